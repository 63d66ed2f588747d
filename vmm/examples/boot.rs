//! Boots a machine with `hyper-vmm` and prints what happens: events, timeline, exit.
//!
//! `cargo run -p hyper-vmm --example boot -- KERNEL [--initramfs FILE] [--cmdline TEXT] [--vcpus N] [--mem MIB] [--disk ID=FILE]...
//! [--disk-ro ID=FILE]... [--vsock PATH] [--no-devices] [--console FILE] [--vmm FILE] [--until-ready]
//! [--pause MS] [--balloon PAGES] [--metrics]`
//!
//! The guest's serial console goes to standard output. When the agent reports that it is
//! ready, `--pause`, `--balloon` and `--metrics` are tried, and with `--until-ready` the machine is ended.

use std::ffi::OsString;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use hyper_vmm_spec::control::{Event, ExitCause, MAX_PACKET_BYTES, Message, Reply, Request};
use hyper_vmm_spec::{BalloonSpec, DeviceSpec, DiskId, DiskSpec, FdSlot, HostPort, VmSpec, VsockSpec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg, socketpair,
};

/// No console probing, no timer or crypto self-tests, reset by the keyboard controller, at once after a panic.
const CMDLINE: &str = "console=ttyS0 quiet reboot=k panic=-1 tsc=reliable no_timer_check cryptomgr.notests \
                       random.trust_cpu=on rdinit=/init";
/// Ports of the host that the guest may connect to: doorbell and names. Who listens at `PATH_<port>` gets the connections.
const HOST_PORTS: [u32; 2] = [1026, 1027];
/// How long the whole run may take; a stock kernel in an emulated lab needs a minute.
const DEADLINE: Duration = Duration::from_secs(300);

type Failure = Box<dyn std::error::Error>;

struct Options {
    vmm: PathBuf,
    kernel: PathBuf,
    initramfs: Option<PathBuf>,
    cmdline: String,
    vcpus: u8,
    mem_mib: u32,
    disks: Vec<(String, PathBuf, bool)>,
    vsock: Option<PathBuf>,
    console: Option<PathBuf>,
    devices: bool,
    until_ready: bool,
    pause_ms: Option<u64>,
    balloon_pages: Option<u32>,
    metrics: bool,
}

fn main() -> ExitCode {
    match parse().and_then(|options| run(&options)) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            // Nowhere is left to report a broken standard error.
            let _ = writeln!(std::io::stderr(), "boot: {e}");
            ExitCode::from(125)
        }
    }
}

fn say(what: std::fmt::Arguments<'_>) -> Result<(), Failure> {
    Ok(writeln!(std::io::stdout(), "{what}")?)
}

fn parse() -> Result<Options, Failure> {
    let beside = std::env::current_exe()?;
    let target = beside.parent().and_then(|p| p.parent()).ok_or("no target folder")?;
    let mut options = Options {
        vmm: target.join("hyper-vmm"),
        kernel: PathBuf::new(),
        initramfs: None,
        cmdline: CMDLINE.to_owned(),
        vcpus: 1,
        mem_mib: 128,
        disks: Vec::new(),
        vsock: None,
        console: None,
        devices: true,
        until_ready: false,
        pause_ms: None,
        balloon_pages: None,
        metrics: false,
    };
    let mut arguments = std::env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        option(&mut options, argument, &mut arguments)?;
    }
    if options.kernel.as_os_str().is_empty() {
        return Err("give a kernel".into());
    }
    Ok(options)
}

fn option(
    options: &mut Options,
    argument: OsString,
    rest: &mut impl Iterator<Item = OsString>,
) -> Result<(), Failure> {
    let name = argument.to_string_lossy().into_owned();
    let mut next = || rest.next().ok_or(format!("{name} needs a value"));
    let text = |value: OsString| value.into_string().map_err(|_| "not UTF-8");
    match name.as_str() {
        "--vmm" => options.vmm = next()?.into(),
        "--initramfs" => options.initramfs = Some(next()?.into()),
        "--cmdline" => options.cmdline = text(next()?)?,
        "--vcpus" => options.vcpus = text(next()?)?.parse()?,
        "--mem" => options.mem_mib = text(next()?)?.parse()?,
        "--disk" | "--disk-ro" => {
            let value = text(next()?)?;
            let (id, file) = value.split_once('=').ok_or("give a disk as ID=FILE")?;
            options.disks.push((id.to_owned(), file.into(), name == "--disk-ro"));
        }
        "--vsock" => options.vsock = Some(next()?.into()),
        "--console" => options.console = Some(next()?.into()),
        "--no-devices" => options.devices = false,
        "--until-ready" => options.until_ready = true,
        "--pause" => options.pause_ms = Some(text(next()?)?.parse()?),
        "--balloon" => options.balloon_pages = Some(text(next()?)?.parse()?),
        "--metrics" => options.metrics = true,
        _ if name.starts_with("--") => return Err(format!("unknown option {name}").into()),
        _ => options.kernel = argument.into(),
    }
    Ok(())
}

/// Descriptors for the boot request, in slot order.
#[derive(Default)]
struct Fds(Vec<OwnedFd>);

impl Fds {
    fn add(&mut self, fd: impl Into<OwnedFd>) -> FdSlot {
        self.0.push(fd.into());
        FdSlot(u32::try_from(self.0.len() - 1).unwrap_or(u32::MAX))
    }
}

fn spec(options: &Options, fds: &mut Fds) -> Result<VmSpec, Failure> {
    let kernel = fds.add(File::open(&options.kernel)?);
    let mut spec = VmSpec::new(options.vcpus, options.mem_mib, kernel, options.cmdline.as_str())?;
    if let Some(file) = &options.initramfs {
        spec = spec.with_initramfs(fds.add(File::open(file)?));
    }
    spec = spec.with_serial(fds.add(std::io::stdout().as_fd().try_clone_to_owned()?));
    for (id, path, read_only) in &options.disks {
        let file = File::options().read(true).write(!read_only).open(path)?;
        let disk = DiskSpec { id: DiskId::new(id.as_str())?, fd: fds.add(file), read_only: *read_only };
        spec = spec.with_device(DeviceSpec::Disk(disk))?;
    }
    if let Some(path) = &options.vsock {
        let listener = fds.add(UnixListener::bind(path)?);
        let mut host_ports = Vec::new();
        for port in HOST_PORTS {
            let (near, far) =
                socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
            let to = PathBuf::from(format!("{}_{port}", path.display()));
            std::thread::spawn(move || pass_on(&near, &to));
            host_ports.push(HostPort { port, fd: fds.add(far) });
        }
        let vsock = VsockSpec { guest_cid: 3, listener, host_ports };
        spec = spec.with_device(DeviceSpec::Vsock(vsock))?;
    }
    if let Some(path) = &options.console {
        spec = spec.with_device(DeviceSpec::Console { fd: fds.add(File::create(path)?) })?;
    }
    if options.devices {
        spec = spec.with_device(DeviceSpec::Balloon(BalloonSpec { free_page_reporting: true }))?;
        spec = spec.with_device(DeviceSpec::Rng)?;
    }
    Ok(spec)
}

/// Joins the guest's connections to a port with a listener of the host at `to`.
fn pass_on(calls: &OwnedFd, to: &Path) -> Option<()> {
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let flags = RecvFlags::CMSG_CLOEXEC;
        recvmsg(calls, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, flags).ok()?;
        let guest = ancillary.drain().find_map(|part| match part {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let guest = UnixStream::from(guest?);
        guest.set_nonblocking(false).ok()?;
        // Nobody listens: the guest's connection ends.
        let Ok(host) = UnixStream::connect(to) else { continue };
        for (from, to) in [(guest.try_clone(), host.try_clone()), (Ok(host), Ok(guest))] {
            let (mut from, mut to) = (from.ok()?, to.ok()?);
            std::thread::spawn(move || {
                // However it ends, the other side is told.
                let _ = std::io::copy(&mut from, &mut to);
                to.shutdown(Shutdown::Write)
            });
        }
    }
}

/// The owner's end of the control socket.
struct Owner {
    socket: OwnedFd,
    deadline: Instant,
}

impl Owner {
    fn request(&self, request: &Request, fds: &Fds) -> Result<(), Failure> {
        let bytes = serde_json::to_vec(request)?;
        if fds.0.is_empty() {
            send(&self.socket, &bytes, SendFlags::NOSIGNAL)?;
            return Ok(());
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let borrowed: Vec<_> = fds.0.iter().map(AsFd::as_fd).collect();
        if !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)) {
            return Err("too many descriptors".into());
        }
        sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// The next message, or `None` when nothing came within `wait` or the other end is closed.
    fn next(&self, wait: Duration) -> Result<Option<Message>, Failure> {
        let wait = wait.min(self.deadline.saturating_duration_since(Instant::now()));
        let timeout =
            Timespec { tv_sec: i64::try_from(wait.as_secs())?, tv_nsec: wait.subsec_nanos().into() };
        if poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&timeout))? == 0 {
            return Ok(None);
        }
        let mut bytes = vec![0; MAX_PACKET_BYTES];
        let (count, _) = recv(&self.socket, &mut bytes, RecvFlags::empty())?;
        Ok(Some(serde_json::from_slice(bytes.get(..count).unwrap_or_default())?).filter(|_| count > 0))
    }

    /// Sends a request without descriptors and waits for its reply; events on the way are printed.
    fn ask(&self, request: &Request) -> Result<Reply, Failure> {
        let start = Instant::now();
        self.request(request, &Fds::default())?;
        loop {
            match self.next(DEADLINE)?.ok_or("no reply")? {
                Message::Reply { result } => {
                    say(format_args!("boot: {request:?} answered in {} us", start.elapsed().as_micros()))?;
                    return Ok(result?);
                }
                Message::Event { event } => say(format_args!("boot: event {event:?}"))?,
            }
        }
    }
}

fn run(options: &Options) -> Result<u8, Failure> {
    let mut fds = Fds::default();
    let spec = spec(options, &mut fds)?;
    let (socket, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let start = Instant::now();
    let mut vmm = Command::new(&options.vmm).stdin(Stdio::from(theirs)).spawn()?;
    let owner = Owner { socket, deadline: start + DEADLINE };
    owner.request(&Request::Boot { spec }, &fds)?;
    drop(fds);
    match owner.next(DEADLINE)?.ok_or("no reply to the boot request")? {
        Message::Reply { result } => drop(result?),
        Message::Event { event } => return Err(format!("event {event:?} before the reply").into()),
    }
    say(format_args!("boot: started after {} us", start.elapsed().as_micros()))?;
    let cause = drive(&owner, options)?;
    let status = vmm.wait()?;
    say(format_args!("boot: exited after {} us: {cause:?}, {status}", start.elapsed().as_micros()))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(125))
}

/// Follows the machine to its end.
fn drive(owner: &Owner, options: &Options) -> Result<ExitCause, Failure> {
    if let Some(ms) = options.pause_ms {
        owner.ask(&Request::Pause)?;
        let before = owner.ask(&Request::Metrics)?;
        std::thread::sleep(Duration::from_millis(ms));
        let same = owner.ask(&Request::Metrics)? == before;
        say(format_args!("boot: paused for {ms} ms, no exit in between: {same}"))?;
        owner.ask(&Request::Resume)?;
    }
    loop {
        let message = owner.next(owner.deadline.saturating_duration_since(Instant::now()))?;
        match message.ok_or("out of time, or the VMM closed the socket")? {
            Message::Event { event: Event::AgentReady } => {
                say(format_args!("boot: event AgentReady"))?;
                ready(owner, options)?;
            }
            Message::Event { event: Event::MemoryReached { .. } } => {}
            Message::Event { event: Event::Exited { cause, timeline } } => {
                say(format_args!("boot: {timeline:?}"))?;
                return Ok(cause);
            }
            Message::Reply { result } => return Err(format!("reply to nothing: {result:?}").into()),
        }
    }
}

/// What was asked for once the agent is ready.
fn ready(owner: &Owner, options: &Options) -> Result<(), Failure> {
    if let Some(ms) = options.pause_ms {
        owner.ask(&Request::Pause)?;
        let before = owner.ask(&Request::Metrics)?;
        std::thread::sleep(Duration::from_millis(ms));
        let same = owner.ask(&Request::Metrics)? == before;
        say(format_args!("boot: paused for {ms} ms, no exit in between: {same}"))?;
        owner.ask(&Request::Resume)?;
    }
    if let Some(pages) = options.balloon_pages {
        owner.ask(&Request::Balloon { pages })?;
    }
    if options.metrics {
        std::thread::sleep(Duration::from_millis(200));
        say(format_args!("boot: {:?}", owner.ask(&Request::Metrics)?))?;
    }
    if options.until_ready {
        owner.ask(&Request::Shutdown)?;
    }
    Ok(())
}
