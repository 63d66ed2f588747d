//! A machine of hyper-vmm alone, over its control socket, without `hyper`: for guests that are no Linux. And the host's side of its devices.
#![expect(clippy::panic, reason = "assertions of the cases; a panic is how a case fails")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper_vmm_spec::control::{Event, ExitCause, MAX_PACKET_BYTES, Message, Reply, Request};
use hyper_vmm_spec::{FdSlot, VmSpec};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg, socketpair,
};

use crate::{DEADLINE, given};

/// Most descriptors that go with one request here.
const MOST_FDS: usize = 32;
/// How long a guest may say nothing: longer than it waits for an answer itself.
const SILENCE: Duration = Duration::from_secs(60);
/// Bytes of a header in front of a frame, and of an Ethernet header.
const FRAME_HEADER: usize = 12;
const ETHERNET_HEADER: usize = 14;
/// Longest frame with its header.
const MAX_FRAME: usize = 65550 + FRAME_HEADER;

/// Two connected Unix sockets.
///
/// # Panics
/// When the host has none.
#[must_use]
fn socket_pair(kind: SocketType) -> (OwnedFd, OwnedFd) {
    match socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None) {
        Ok(pair) => pair,
        Err(error) => panic!("cannot make a pair of sockets: {error}"),
    }
}

/// hyper-vmm in its jail, and what it is asked for. Killed when dropped.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    socket: OwnedFd,
    log: PathBuf,
    lines: Receiver<String>,
    /// What was told of the guest's end while something else was waited for.
    ended: Option<ExitCause>,
}

impl Machine {
    /// Boots what `spec` makes of the slot of the serial port; `fds` are the descriptors behind its slots, of which the last is
    /// the serial port's. The log goes to a file in `folder`.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn boot(folder: &Path, mut fds: Vec<OwnedFd>, spec: impl FnOnce(FdSlot) -> VmSpec) -> Self {
        let (socket, theirs) = socket_pair(SocketType::SEQPACKET);
        let log = folder.join("vmm.log");
        let prepare = || -> std::io::Result<_> {
            set_socket_timeout(&socket, Timeout::Recv, Some(DEADLINE))?;
            let (said, serial) = rustix::pipe::pipe()?;
            let child = Command::new(given("HYPER_TEST_PREFIX").join("libexec/hyper/hyper-vmm"))
                .stdin(Stdio::from(theirs))
                .stdout(Stdio::null())
                .stderr(File::create(&log)?)
                .spawn()?;
            Ok((child, said, serial))
        };
        let (child, said, serial) = match prepare() {
            Ok(parts) => parts,
            Err(error) => panic!("cannot start hyper-vmm: {error}"),
        };
        let slot = FdSlot(u32::try_from(fds.len()).unwrap_or(u32::MAX));
        fds.push(serial);
        let mut machine = Self { child, socket, log, lines: lines_of(said), ended: None };
        machine.ask(&Request::Boot { spec: spec(slot) }, &fds);
        machine
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks for something, with descriptors, and waits for the answer.
    ///
    /// # Panics
    /// When it is refused, or not answered in time.
    pub fn ask(&mut self, request: &Request, fds: &[impl AsFd]) -> Reply {
        let packet = serde_json::to_vec(request).unwrap_or_default();
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fit = fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        assert!(fit, "too many descriptors");
        if let Err(error) =
            sendmsg(&self.socket, &[IoSlice::new(&packet)], &mut ancillary, SendFlags::NOSIGNAL)
        {
            panic!("cannot ask hyper-vmm: {error}: {}", self.log());
        }
        loop {
            match self.message() {
                Message::Reply { result: Ok(reply) } => return reply,
                Message::Reply { result: Err(error) } => panic!("{request:?} is refused: {error}"),
                Message::Event { event } => self.note(event),
            }
        }
    }

    fn note(&mut self, event: Event) {
        if let Event::Exited { cause, .. } = event {
            self.ended = Some(cause);
        }
    }

    fn message(&self) -> Message {
        let mut buffer = vec![0; MAX_PACKET_BYTES];
        match recv(&self.socket, buffer.as_mut_slice(), RecvFlags::empty()) {
            Ok((_, length)) if length > 0 => {
                let message = serde_json::from_slice(buffer.get(..length).unwrap_or_default());
                message.unwrap_or_else(|error| panic!("hyper-vmm says nonsense: {error}"))
            }
            other => panic!("hyper-vmm says nothing any more ({other:?}): {}", self.log()),
        }
    }

    /// The next line of the guest; none when there are no more.
    ///
    /// # Panics
    /// When none comes in time.
    pub fn line(&self) -> Option<String> {
        match self.lines.recv_timeout(SILENCE) {
            Ok(line) => Some(line),
            Err(mpsc::RecvTimeoutError::Disconnected) => None,
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("the guest says nothing: {}", self.log()),
        }
    }

    /// What it has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for its end: how the guest ended, and the code of the process, 128 and more when a signal ended it.
    ///
    /// # Panics
    /// When it does not end in time.
    #[must_use]
    pub fn end(mut self) -> (ExitCause, i32) {
        while self.ended.is_none() {
            match self.message() {
                Message::Event { event } => self.note(event),
                Message::Reply { result } => panic!("an answer to nothing: {result:?}"),
            }
        }
        let start = Instant::now();
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                Err(error) => panic!("waiting for hyper-vmm: {error}"),
            }
            assert!(start.elapsed() < DEADLINE, "hyper-vmm has told of its end and is still there");
        };
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
        match self.ended.take() {
            Some(cause) => (cause, code),
            None => panic!("it was told above"),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It has ended by itself unless the case failed.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn lines_of(said: OwnedFd) -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(File::from(said));
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(count) if count > 0) {
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
            line.clear();
        }
    });
    lines
}

/// What a process holds of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// Memory that is resident and is not the guest's, KiB.
    pub own_kib: u64,
    /// Threads.
    pub threads: u64,
    /// Open descriptors.
    pub descriptors: u64,
}

impl Footprint {
    /// Of a process now. Guest memory is what is left out of dumps, as the jail has it.
    ///
    /// # Panics
    /// When there is no such process.
    #[must_use]
    pub fn of(pid: u32) -> Self {
        let read = |name: &str| match fs::read_to_string(format!("/proc/{pid}/{name}")) {
            Ok(text) => text,
            Err(error) => panic!("{name} of process {pid}: {error}"),
        };
        let number =
            |line: &str| line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or(0);
        let (mut own_kib, mut mapping) = (0, 0);
        for line in read("smaps").lines() {
            if line.starts_with("Rss:") {
                mapping = number(line);
            } else if line.starts_with("VmFlags:") && !line.split(' ').any(|flag| flag == "dd") {
                own_kib += mapping;
            }
        }
        let threads = read("status").lines().find(|line| line.starts_with("Threads:")).map_or(0, number);
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |all| all.count() as u64);
        Self { own_kib, threads, descriptors }
    }
}

/// The other end of a network interface: sends each frame back to where it came from, and looks at what the VMM let out.
#[derive(Debug, Clone, Default)]
pub struct Wire {
    frames: Arc<AtomicU64>,
    wrong: Arc<Mutex<Vec<String>>>,
}

impl Wire {
    /// A wire, and the descriptor that is to be the guest's TAP. Frames may come from `address`.
    ///
    /// # Panics
    /// When the host has no sockets.
    #[must_use]
    pub fn new(address: [u8; 6]) -> (Self, OwnedFd) {
        let (near, far) = socket_pair(SocketType::DGRAM);
        let wire = Self::default();
        let mut other = wire.clone();
        std::thread::spawn(move || other.carry(&near, address));
        (wire, far)
    }

    fn carry(&mut self, near: &OwnedFd, address: [u8; 6]) {
        let mut buffer = vec![0; 2 * MAX_FRAME];
        while let Ok((_, length)) = recv(near, buffer.as_mut_slice(), RecvFlags::empty()) {
            let frame = buffer.get(..length).unwrap_or_default();
            self.frames.fetch_add(1, Ordering::Relaxed);
            if !is_sound(frame, address) {
                let start = frame.get(..frame.len().min(FRAME_HEADER + ETHERNET_HEADER)).unwrap_or_default();
                let what = format!("{length} bytes: {start:02x?}");
                self.wrong.lock().unwrap_or_else(PoisonError::into_inner).push(what);
            }
            // Full when the guest does not take them: then they are lost, as on any wire.
            let _lost = send(near, frame, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
    }

    /// How many frames came out of the machine.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }

    /// Those that a TAP should not have been given.
    #[must_use]
    pub fn wrong(&self) -> Vec<String> {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Whether a frame, header first, is one that makes sense and comes from where it says.
fn is_sound(frame: &[u8], address: [u8; 6]) -> bool {
    let (Some(header), Some(ethernet)) = (frame.first_chunk::<FRAME_HEADER>(), frame.get(FRAME_HEADER..))
    else {
        return false;
    };
    let [flags, gso, _, _, s0, s1, c0, c1, o0, o1, _, _] = *header;
    let (size, start, offset) =
        (u16::from_le_bytes([s0, s1]), u16::from_le_bytes([c0, c1]), u16::from_le_bytes([o0, o1]));
    let checksum = usize::from(start) + usize::from(offset) + 2;
    ethernet.len() >= ETHERNET_HEADER
        && frame.len() <= MAX_FRAME
        && ethernet.get(6..12) == Some(&address[..])
        && matches!((flags, gso), (0 | 1, 0) | (1, 1 | 4))
        && (flags == 0 || checksum <= ethernet.len())
        && (gso == 0 || size > 0)
}

/// Serves a port of the host: takes connections, and keeps them without reading, until it is told to let go.
#[derive(Debug, Clone, Default)]
pub struct Service(Arc<Mutex<Vec<OwnedFd>>>);

impl Service {
    /// A service, and the descriptor that is to be the port's.
    ///
    /// # Panics
    /// When the host has no sockets.
    #[must_use]
    pub fn new() -> (Self, OwnedFd) {
        let (near, far) = socket_pair(SocketType::SEQPACKET);
        let service = Self::default();
        let taken = Arc::clone(&service.0);
        std::thread::spawn(move || {
            while let Some(stream) = next_call(&near) {
                taken.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
            }
        });
        (service, far)
    }

    /// Closes all connections; says how many there were.
    pub fn hang_up(&self) -> usize {
        let all = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        all.len()
    }
}

fn next_call(service: &OwnedFd) -> Option<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    loop {
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let message = recvmsg(service, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, flags).ok()?;
        let stream = ancillary.drain().find_map(|part| match part {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        match stream {
            None if message.bytes == 0 => return None,
            None => {}
            stream => return stream,
        }
    }
}
