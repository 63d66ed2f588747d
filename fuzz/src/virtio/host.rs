//! The host's side of each device: what it is made of, what happens there, and what must hold whatever the driver does.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arbitrary::{Arbitrary, Unstructured};
use hyper_vmm_devices::balloon::{Balloon, BalloonTarget, PageRelease};
use hyper_vmm_devices::blk::Blk;
use hyper_vmm_devices::console::Console;
use hyper_vmm_devices::device::{GuestMem, VirtioDevice};
use hyper_vmm_devices::mem::{Mem, MemoryGoal, PlugMemory, Reached};
use hyper_vmm_devices::net::Net;
use hyper_vmm_devices::output::Output;
use hyper_vmm_devices::rng::{Entropy, MAX_REQUEST_BYTES, Rng};
use hyper_vmm_devices::vsock::{Callers, Vsock};
use hyper_vmm_spec::DiskId;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::GuestAddress;

use super::{REGIONS, drive};

/// The host's side of a device.
pub(super) trait Host: Sized {
    fn make(data: &mut Unstructured<'_>, mem: &GuestMem) -> Option<(Self, Box<dyn VirtioDevice>)>;
    /// The same device once more, for a machine that goes on.
    fn again(&mut self, mem: &GuestMem) -> Option<Box<dyn VirtioDevice>>;
    /// Does something.
    fn act(&mut self, _choice: u8, _data: &mut Unstructured<'_>) {}
    /// Whether a thread of the device serves it, which has to be given the time.
    const THREAD: bool = false;
    /// What must hold after each step.
    fn check(&mut self) {}
    /// What must hold when the device has gone.
    fn end(self) {}
}

/// A disk.
pub(crate) fn blk(data: &[u8]) {
    drive::<Disk>(data);
}

/// A network interface.
pub(crate) fn net(data: &[u8]) {
    drive::<Tap>(data);
}

/// Sockets.
pub(crate) fn vsock(data: &[u8]) {
    drive::<Sockets>(data);
}

/// Balloon and memory that comes and goes.
pub(crate) fn memory(data: &[u8]) {
    match data.split_first() {
        Some((kind, rest)) if kind % 2 == 0 => drive::<Pages>(rest),
        Some((_, rest)) => drive::<Plugged>(rest),
        None => {}
    }
}

/// Entropy and the console.
pub(crate) fn small(data: &[u8]) {
    match data.split_first() {
        Some((kind, rest)) if kind % 2 == 0 => drive::<Randomness>(rest),
        Some((_, rest)) => drive::<Terminal>(rest),
        None => {}
    }
}

fn memfd(bytes: &[u8]) -> Option<File> {
    let file = File::from(rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).ok()?);
    file.write_all_at(bytes, 0).ok()?;
    Some(file)
}

const DISK_BYTES: usize = 64 << 10;

struct Disk {
    file: File,
    read_only: bool,
}

impl Disk {
    fn device(&self) -> Option<Box<dyn VirtioDevice>> {
        let id = DiskId::new("fuzz").ok()?;
        Some(Box::new(Blk::new(&id, reopened(&self.file, self.read_only)?, self.read_only).ok()?))
    }
}

fn reopened(file: &File, read_only: bool) -> Option<File> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options().read(true).write(!read_only).open(path).ok()
}

impl Host for Disk {
    const THREAD: bool = true;

    fn make(data: &mut Unstructured<'_>, _mem: &GuestMem) -> Option<(Self, Box<dyn VirtioDevice>)> {
        let read_only = bool::arbitrary(data).ok()?;
        let host = Self { file: memfd(&[0x5a; DISK_BYTES])?, read_only };
        let device = host.device()?;
        Some((host, device))
    }

    fn again(&mut self, _mem: &GuestMem) -> Option<Box<dyn VirtioDevice>> {
        self.device()
    }

    fn end(self) {
        let mut content = vec![0; DISK_BYTES];
        let read = self.file.read_exact_at(&mut content, 0);
        let len = self.file.metadata().map_or(0, |data| data.len());
        assert!(read.is_ok() && len == DISK_BYTES as u64, "a disk of {len} bytes");
        if self.read_only {
            assert!(content.iter().all(|byte| *byte == 0x5a), "a disk that is read-only was written to");
        }
    }
}

struct Tap {
    wire: UnixStream,
    device_end: OwnedFd,
}

impl Tap {
    fn device(&self) -> Option<Box<dyn VirtioDevice>> {
        let tap = self.device_end.try_clone().ok()?;
        Some(Box::new(Net::new(tap, [2, 0, 0, 0, 0, 7], 1500).ok()?))
    }
}

impl Host for Tap {
    fn make(_data: &mut Unstructured<'_>, _mem: &GuestMem) -> Option<(Self, Box<dyn VirtioDevice>)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // Frame by frame, as a TAP.
        let (wire, device_end) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).ok()?;
        let host = Self { wire: UnixStream::from(wire), device_end };
        let device = host.device()?;
        Some((host, device))
    }

    fn again(&mut self, _mem: &GuestMem) -> Option<Box<dyn VirtioDevice>> {
        self.device()
    }

    /// A frame comes in; half of them have a good header.
    fn act(&mut self, choice: u8, data: &mut Unstructured<'_>) {
        let len = usize::from(choice).min(data.len());
        let Ok(bytes) = data.bytes(len) else { return };
        let frame = if choice.is_multiple_of(2) { [&[0; 12], bytes].concat() } else { bytes.to_vec() };
        drop(self.wire.write(&frame));
    }

    /// What went out has a header and a frame from our own address.
    fn check(&mut self) {
        let mut frame = vec![0; 70_000];
        while let Ok(len) = self.wire.read(&mut frame) {
            if len == 0 {
                return;
            }
            let source = frame.get(18..24).filter(|_| len >= 24);
            assert_eq!(
                source,
                Some(&[2, 0, 0, 0, 0, 7][..]),
                "a frame of {len} bytes with another's address"
            );
        }
    }
}

/// Connections that the host keeps open.
const MOST_CONNECTIONS: usize = 32;
const PORT: u32 = 1026;

struct Sockets {
    name: Vec<u8>,
    service: OwnedFd,
    open: Vec<UnixStream>,
}

/// So that no two inputs meet.
static SERIAL: AtomicU64 = AtomicU64::new(0);

impl Sockets {
    fn parts() -> Option<(Self, Box<dyn VirtioDevice>)> {
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let name = format!("hyper-fuzz-{}-{serial}", std::process::id()).into_bytes();
        let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).ok()?).ok()?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (service, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).ok()?;
        let device = Vsock::new(3, listener, Callers::new([(PORT, far)])).ok()?;
        Some((Self { name, service, open: Vec::new() }, Box::new(device)))
    }
}

impl Host for Sockets {
    fn make(_data: &mut Unstructured<'_>, _mem: &GuestMem) -> Option<(Self, Box<dyn VirtioDevice>)> {
        Self::parts()
    }

    fn again(&mut self, _mem: &GuestMem) -> Option<Box<dyn VirtioDevice>> {
        let (next, device) = Self::parts()?;
        *self = next;
        Some(device)
    }

    fn act(&mut self, choice: u8, data: &mut Unstructured<'_>) {
        let which = usize::from(choice >> 2);
        match choice % 4 {
            0 if self.open.len() < MOST_CONNECTIONS => {
                let Ok(address) = SocketAddr::from_abstract_name(&self.name) else { return };
                let Ok(mut stream) = UnixStream::connect_addr(&address) else { return };
                if stream.set_nonblocking(true).is_ok() {
                    drop(stream.write(format!("CONNECT {}\n", which % 8).as_bytes()));
                    self.open.push(stream);
                }
            }
            1 if !self.open.is_empty() => drop(self.open.swap_remove(which % self.open.len())),
            _ => {
                let count = self.open.len().max(1);
                let Some(stream) = self.open.get_mut(which % count) else { return };
                let len = usize::from(u8::arbitrary(data).unwrap_or_default()).min(data.len());
                drop(stream.write(data.bytes(len).unwrap_or_default()));
                let mut place = [0; 4096];
                drop(stream.read(&mut place));
            }
        }
    }

    /// Whoever serves the port takes what comes, and lets go of it.
    fn check(&mut self) {
        use rustix::net::{RecvAncillaryBuffer, RecvFlags, recvmsg};
        use std::mem::MaybeUninit;
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut byte = [0];
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let parts = &mut [io::IoSliceMut::new(&mut byte)];
            match recvmsg(&self.service, parts, &mut ancillary, flags) {
                Ok(message) if message.bytes > 0 => ancillary.drain().for_each(drop),
                _ => return,
            }
        }
    }
}

/// Pages that are given back: only whole ones.
#[derive(Debug, Clone)]
struct Released;

impl PageRelease for Released {
    fn release(&self, start: GuestAddress, len: u64) -> io::Result<()> {
        assert!(start.0.is_multiple_of(4096) && len.is_multiple_of(4096), "{len} bytes at {:#x}", start.0);
        let inside = REGIONS.iter().any(|(first, size)| {
            let end = first + *size as u64;
            (*first..end).contains(&start.0) && start.0.checked_add(len).is_some_and(|last| last <= end)
        });
        if inside { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

struct Pages {
    target: BalloonTarget,
    reporting: bool,
}

impl Host for Pages {
    fn make(data: &mut Unstructured<'_>, _mem: &GuestMem) -> Option<(Self, Box<dyn VirtioDevice>)> {
        let reporting = bool::arbitrary(data).ok()?;
        let balloon = Balloon::new(Released, reporting);
        Some((Self { target: balloon.target(), reporting }, Box::new(balloon)))
    }

    fn again(&mut self, _mem: &GuestMem) -> Option<Box<dyn VirtioDevice>> {
        let balloon = Balloon::new(Released, self.reporting);
        self.target = balloon.target();
        Some(Box::new(balloon))
    }

    fn act(&mut self, choice: u8, _data: &mut Unstructured<'_>) {
        self.target.set_pages(choice.into());
    }
}

const BLOCK: u64 = 2 << 20;
const BLOCKS: u64 = 32;
const FIRST: u64 = 4 << 30;

/// What is plugged, block by block.
#[derive(Debug, Clone, Default)]
struct Blocks(Arc<Mutex<u32>>);

impl Blocks {
    fn change(&self, start: GuestAddress, len: u64, plug: bool) {
        let whole = start.0.is_multiple_of(BLOCK) && len.is_multiple_of(BLOCK) && len > 0;
        let inside =
            start.0 >= FIRST && start.0.checked_add(len).is_some_and(|end| end <= FIRST + BLOCKS * BLOCK);
        assert!(whole && inside, "{len} bytes at {:#x} of hot memory", start.0);
        let mut plugged = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for block in (start.0 - FIRST) / BLOCK..(start.0 - FIRST + len) / BLOCK {
            let bit = 1 << block;
            if plug {
                assert!(*plugged & bit == 0, "block {block} is plugged twice");
                *plugged |= bit;
            } else {
                *plugged &= !bit;
            }
        }
    }
}

impl PlugMemory for Blocks {
    fn plug(&self, start: GuestAddress, len: u64) -> io::Result<()> {
        self.change(start, len, true);
        Ok(())
    }

    fn unplug(&self, start: GuestAddress, len: u64) -> io::Result<()> {
        self.change(start, len, false);
        Ok(())
    }
}

struct Plugged {
    blocks: Blocks,
    goal: MemoryGoal,
    wanted: u64,
}

impl Host for Plugged {
    fn make(_data: &mut Unstructured<'_>, _mem: &GuestMem) -> Option<(Self, Box<dyn VirtioDevice>)> {
        let blocks = Blocks::default();
        let mem = Mem::new(blocks.clone(), GuestAddress(FIRST), BLOCKS * BLOCK, Reached::new(|_| {}));
        Some((Self { blocks, goal: mem.goal(), wanted: 0 }, Box::new(mem)))
    }

    fn again(&mut self, _mem: &GuestMem) -> Option<Box<dyn VirtioDevice>> {
        None
    }

    fn act(&mut self, choice: u8, _data: &mut Unstructured<'_>) {
        self.wanted = u64::from(choice) % (BLOCKS + 1);
        self.goal.set(self.wanted * BLOCK, choice.into());
    }

    fn check(&mut self) {
        let plugged = *self.blocks.0.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(u64::from(plugged.count_ones()) <= BLOCKS, "more than there is");
    }
}

/// Entropy that looks at how much it is asked for.
#[derive(Debug, Clone)]
struct Counted;

impl Entropy for Counted {
    fn fill(&mut self, buf: &mut [u8]) -> io::Result<()> {
        assert!(buf.len() <= MAX_REQUEST_BYTES, "{} bytes at once", buf.len());
        buf.fill(7);
        Ok(())
    }
}

struct Randomness;

impl Host for Randomness {
    fn make(_data: &mut Unstructured<'_>, _mem: &GuestMem) -> Option<(Self, Box<dyn VirtioDevice>)> {
        Some((Self, Box::new(Rng::new(Counted))))
    }

    fn again(&mut self, _mem: &GuestMem) -> Option<Box<dyn VirtioDevice>> {
        Some(Box::new(Rng::new(Counted)))
    }
}

struct Terminal {
    output: File,
}

impl Host for Terminal {
    fn make(_data: &mut Unstructured<'_>, _mem: &GuestMem) -> Option<(Self, Box<dyn VirtioDevice>)> {
        let host = Self { output: File::options().write(true).open("/dev/null").ok()? };
        let device = Console::new(Output::new(host.output.try_clone().ok()?.into()));
        Some((host, Box::new(device)))
    }

    fn again(&mut self, _mem: &GuestMem) -> Option<Box<dyn VirtioDevice>> {
        Some(Box::new(Console::new(Output::new(self.output.try_clone().ok()?.into()))))
    }
}
