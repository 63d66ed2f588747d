//! A guest that misbehaves on purpose harms nobody but itself. What it tries is in `tests/rude-guest`.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of cases, which fail by panic"
)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use hyper_tests::{Footprint, Machine, Scratch, Service, Wire, given, noise, note};
use hyper_vmm_spec::control::{DiskPart, ExitCause, Reply, Request, exit_code};
use hyper_vmm_spec::{
    BalloonSpec, DeviceSpec, DiskId, DiskSpec, FdSlot, HostPort, HotMemorySpec, NetSpec, ShareSpec, VmSpec,
    VsockSpec,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What the guest is written for.
const MEM_MIB: u32 = 64;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OPEN_PORT: u32 = 1026;
const DISK_BYTES: usize = 1 << 20;
const DISK_MAGIC: &[u8] = b"HYPRDISK";
/// Bytes at a disk's end to which the guest may write.
const SCRATCH_BYTES: usize = 8 * 512;
/// Memory that the guest may be given, and is, MiB.
const HOT_MIB: u32 = 128;
const GIVEN_MIB: u32 = 64;
/// What the VMM may hold more of after everything than before it, KiB: pieces of a thousand connections that the allocator keeps (2.3 MiB
/// were seen). The flood comes three times, and what each left would add up.
const GROWTH_KIB: u64 = 4096;
/// And in the middle of a flood of connections: windows of 1024, of which 64 are large, are 31 MiB.
const FLOOD_KIB: u64 = 40 * 1024;
/// Lines that the VMM may log: a guest must not be able to fill a disk by it.
const MOST_LINES: usize = 100;

/// A disk with known content.
struct Disk {
    path: PathBuf,
    content: Vec<u8>,
}

impl Disk {
    fn new(scratch: &Scratch, name: &str) -> Self {
        let mut content = noise(DISK_BYTES);
        content[..DISK_MAGIC.len()].copy_from_slice(DISK_MAGIC);
        Self { path: scratch.file(name, &content).into(), content }
    }

    fn open(&self, read_only: bool) -> OwnedFd {
        File::options().read(true).write(!read_only).open(&self.path).unwrap().into()
    }

    /// Whether nothing but the last `scratch` bytes has changed.
    fn is_intact(&self, scratch: usize) -> bool {
        let now = std::fs::read(&self.path).unwrap();
        now.len() == DISK_BYTES && now[..DISK_BYTES - scratch] == self.content[..DISK_BYTES - scratch]
    }
}

/// Descriptors of a boot request, in order, and the devices that name them.
#[derive(Default)]
struct Parts {
    fds: Vec<OwnedFd>,
    devices: Vec<DeviceSpec>,
}

impl Parts {
    fn new() -> Self {
        let mut parts = Self::default();
        parts.fd(File::open(given("HYPER_TEST_RUDE_GUEST")).unwrap());
        parts
    }

    fn fd(&mut self, fd: impl Into<OwnedFd>) -> FdSlot {
        self.fds.push(fd.into());
        FdSlot(u32::try_from(self.fds.len() - 1).unwrap())
    }

    fn disk(&mut self, name: &str, disk: &Disk, read_only: bool) {
        let fd = self.fd(disk.open(read_only));
        let id = DiskId::new(name).unwrap();
        self.devices.push(DeviceSpec::Disk(DiskSpec { id, fd, read_only }));
    }

    fn boot(self, scratch: &Scratch, cmdline: &str) -> Machine {
        let Self { fds, devices } = self;
        Machine::boot(scratch.path(), fds, |serial| {
            let spec = VmSpec::new(1, MEM_MIB, FdSlot(0), cmdline).unwrap().with_serial(serial);
            devices.into_iter().fold(spec, |spec, device| spec.with_device(device).unwrap())
        })
    }
}

/// What was seen on the way.
#[derive(Default)]
struct Seen {
    lines: Vec<String>,
    before: Option<Footprint>,
    flood: Option<Footprint>,
    after: Option<Footprint>,
}

/// A line of the guest in the case's log, and when it came.
#[expect(clippy::print_stdout, reason = "libtest keeps it and shows it with the failure")]
fn show(started: Instant, line: &str) {
    println!("{:8.3} {line}", started.elapsed().as_secs_f32());
}

/// Follows the guest to the end of what it says, and does what it asks for.
fn follow(machine: &mut Machine, bay: Option<&Disk>) -> Seen {
    let mut seen = Seen::default();
    let mut asked = 0;
    let started = Instant::now();
    while let Some(line) = machine.line() {
        if let Some(word) = line.strip_prefix("? ") {
            serve(machine, word, bay, &mut seen);
            asked += 1;
            machine.ask(&Request::Balloon { pages: asked }, &[] as &[OwnedFd]);
        }
        show(started, &line);
        let last = line.starts_with("total: ") || line.contains("rude guest: BAD");
        seen.lines.push(line);
        if last {
            break;
        }
    }
    seen
}

fn serve(machine: &mut Machine, word: &str, bay: Option<&Disk>, seen: &mut Seen) {
    let none: &[OwnedFd] = &[];
    let footprint = Footprint::of(machine.pid());
    match word {
        "before" => seen.before = Some(footprint),
        "flood" => seen.flood = Some(footprint),
        "after" => seen.after = Some(footprint),
        "attach" => {
            let disk = bay.unwrap();
            let parts = vec![DiskPart { fd: FdSlot(0), sectors: DISK_BYTES as u64 / 512 }];
            let id = DiskId::new("bay").unwrap();
            machine.ask(&Request::Attach { bay: 0, id, parts }, &[disk.open(false)]);
        }
        "detach" => drop(machine.ask(&Request::Detach { bay: 0 }, none)),
        "grow" => drop(machine.ask(&Request::HotMemory { mib: GIVEN_MIB, serial: 1 }, none)),
        "shrink" => drop(machine.ask(&Request::HotMemory { mib: 0, serial: 2 }, none)),
        other => panic!("the guest asks for {other}"),
    }
}

/// What holds of every machine whose guest has said its last line.
fn judge(what: &str, machine: Machine, seen: &Seen) {
    let bad: Vec<_> = seen.lines.iter().filter(|line| line.contains("BAD")).collect();
    let log = machine.log();
    assert!(bad.is_empty(), "{bad:#?}\n{log}\n{:#?}", seen.lines);
    let Some(total) = seen.lines.iter().find_map(|line| line.strip_prefix("total: ")) else {
        panic!("the guest did not come to its end: {:?} {log}", machine.end())
    };
    let (before, after) = (seen.before.unwrap(), seen.after.unwrap());
    assert_eq!(
        (before.threads, before.descriptors),
        (after.threads, after.descriptors),
        "threads or descriptors are left: {before:?} {after:?}"
    );
    assert!(after.own_kib <= before.own_kib + GROWTH_KIB, "{before:?} {after:?}");
    if let Some(flood) = seen.flood {
        assert!(flood.own_kib <= before.own_kib + FLOOD_KIB, "{before:?} {flood:?}");
    }
    assert!(!log.contains("internal error") && log.lines().count() <= MOST_LINES, "{log}");
    assert_eq!(machine.end(), (ExitCause::PowerOff, i32::from(exit_code::ENDED)), "{log}");
    note(&format!(
        "misbehaving guest, {what}: {}; VMM's own memory {} -> {} KiB",
        total.trim_end_matches(", 0 bad"),
        before.own_kib,
        after.own_kib
    ));
}

/// A case holds both ends of more than a thousand connections.
fn allow_descriptors() {
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most }).unwrap();
}

#[test]
fn devices_bear_whatever_a_driver_does() {
    allow_descriptors();
    let scratch = Scratch::new();
    let disks = ["write", "read", "bay"].map(|name| Disk::new(&scratch, name));
    let (wire, tap) = Wire::new(MAC);
    let (service, port) = Service::new();
    let mut parts = Parts::new();
    parts.disk("write", &disks[0], false);
    parts.disk("read", &disks[1], true);
    let fd = parts.fd(tap);
    parts.devices.push(DeviceSpec::Net(NetSpec { fd, mac: MAC, mtu: 1500 }));
    let listener = parts.fd(UnixListener::bind(scratch.path().join("vsock")).unwrap());
    let host_ports = vec![HostPort { port: OPEN_PORT, fd: parts.fd(port) }];
    parts.devices.push(DeviceSpec::Vsock(VsockSpec { guest_cid: 3, listener, host_ports }));
    parts.devices.push(DeviceSpec::Balloon(BalloonSpec { free_page_reporting: true }));
    parts.devices.push(DeviceSpec::Rng);
    let fd = parts.fd(File::create(scratch.path().join("console")).unwrap());
    parts.devices.push(DeviceSpec::Console { fd });
    parts.devices.push(DeviceSpec::Bay);

    let mut machine = parts.boot(&scratch, "end=off");
    let seen = follow(&mut machine, Some(&disks[2]));
    judge("private memory", machine, &seen);
    assert!(service.hang_up() > 0, "no connection arrived");
    assert!(wire.frames() > 0 && wire.wrong().is_empty(), "{:?}", wire.wrong());
    assert!(disks[0].is_intact(SCRATCH_BYTES), "a disk was written where it may not be");
    assert!(disks[1].is_intact(0), "a disk for reading was written");
    assert!(disks[2].is_intact(SCRATCH_BYTES), "a disk in a bay was written where it may not be");
}

/// hyper-fs with one folder; killed when dropped.
struct FileServer(Child);

impl FileServer {
    fn start(scratch: &Scratch, folder: &Path) -> (Self, UnixStream) {
        let path = scratch.path().join("fs");
        let listener = UnixListener::bind(&path).unwrap();
        let near = UnixStream::connect(&path).unwrap();
        let spec =
            format!(r#"{{"shares":[{{"name":"0","source":"{}","read_only":false}}]}}"#, folder.display());
        let child = Command::new(given("HYPER_TEST_PREFIX").join("libexec/hyper/hyper-fs"))
            .args(["--spec", &spec])
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stderr(File::create(scratch.path().join("fs.log")).unwrap())
            .spawn();
        (Self(child.unwrap()), near)
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn devices_in_shared_memory_bear_it_too() {
    let scratch = Scratch::new();
    let folder = scratch.path().join("shared");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("file"), "content").unwrap();
    let (mut server, socket) = FileServer::start(&scratch, &folder);
    let mut parts = Parts::new();
    let fd = parts.fd(socket);
    parts.devices.push(DeviceSpec::Share(ShareSpec { tag: "share".to_owned(), fd }));
    parts.devices.push(DeviceSpec::Balloon(BalloonSpec { free_page_reporting: true }));
    parts.devices.push(DeviceSpec::HotMemory(HotMemorySpec { max_mib: HOT_MIB }));
    parts.devices.push(DeviceSpec::Rng);

    let mut machine = parts.boot(&scratch, "end=off");
    let seen = follow(&mut machine, None);
    let log = std::fs::read_to_string(scratch.path().join("fs.log")).unwrap();
    // It ends when it is sent what it cannot read, which comes last; not by a crash.
    let status = server.0.wait().unwrap();
    assert_eq!(status.code(), Some(1), "{status}: {log}");
    assert!(!log.contains("panicked"), "{log}");
    judge("shared memory", machine, &seen);
    assert_eq!(std::fs::read_to_string(folder.join("file")).unwrap(), "content");
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "something was made in the share");
}

/// A machine that ends as `how` says, once it has said so.
fn ending(scratch: &Scratch, how: &str) -> Machine {
    let mut parts = Parts::new();
    parts.devices.push(DeviceSpec::Rng);
    let machine = parts.boot(scratch, how);
    while !machine.line().unwrap().contains("ends by") {}
    machine
}

#[test]
fn a_guest_that_stops_or_spins_is_ended_by_its_owner() {
    for how in ["end=halt", "end=spin"] {
        let scratch = Scratch::new();
        let mut machine = ending(&scratch, how);
        let none: &[OwnedFd] = &[];
        assert!(matches!(machine.ask(&Request::State, none), Reply::State { .. }), "{how}");
        assert!(matches!(machine.ask(&Request::Pause, none), Reply::Done), "{how}");
        assert!(matches!(machine.ask(&Request::Resume, none), Reply::Done), "{how}");
        machine.ask(&Request::Shutdown, none);
        assert_eq!(machine.end(), (ExitCause::Shutdown, i32::from(exit_code::ENDED)), "{how}");
    }
}

#[test]
fn a_guest_that_faults_ends_its_machine() {
    let scratch = Scratch::new();
    let (cause, code) = ending(&scratch, "end=fault").end();
    assert_eq!(code, i32::from(exit_code::GUEST_CRASH));
    assert!(
        matches!(&cause, ExitCause::Fault { reason, .. } if reason.contains("triple fault")),
        "{cause:?}"
    );
}
