//! What is to be started, and its form as a `VmSpec`: descriptors get their slots here.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use hyper_vmm_spec::control::SnapshotFds;
use hyper_vmm_spec::{
    BalloonSpec, DeviceSpec, DiskId, DiskSpec, FdSlot, HostPort, HotMemorySpec, MAX_DEVICES, NetSpec,
    ShareSpec, SpecError, VmSpec, VsockSpec,
};
use serde::Serialize;

use super::VmError;
use super::callers::HostPortPlan;
use super::template::Template;
use crate::dirs::Parts;

/// Kernel command line of every guest. The VMM appends its devices. `reboot=k`: the reset that the VMM sees is that of the keyboard
/// controller; `quiet`: each character on the serial port is an exit to the VMM; no dummy interface beside eth0.
pub(super) const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=k tsc=reliable no_timer_check random.trust_cpu=on dummy.numdummies=0";
/// And of those that grow: most of the memory that is added is kept free of what cannot be moved, so that it can be taken back, but never
/// so much of it that the kernel has too little for itself.
const GROWTH_CMDLINE: &str = "memory_hotplug.online_policy=auto-movable";
/// How long a guest may take until its agent serves: it needs a tenth of a second of processor time, which may be a minute on a host
/// where hundreds start at once. A guest that has died is noticed at once.
pub(crate) const DEFAULT_BOOT_MS: u64 = 60_000;
/// The first context id that is not reserved. Guests cannot see each other, so all have the same.
const GUEST_CID: u32 = 3;

/// A machine to be started.
#[derive(Debug)]
pub(crate) struct GuestPlan {
    /// Where its sockets are made; must exist.
    pub(crate) run_dir: PathBuf,
    /// Where its logs are written.
    pub(crate) log_dir: PathBuf,
    pub(crate) vcpus: u8,
    /// Memory of the machine at boot, MiB.
    pub(crate) mem_mib: u32,
    /// How it may grow while it runs.
    pub(crate) growth: Option<GrowthPlan>,
    /// Most places for disks that come while it runs; as many as there are slots left.
    pub(crate) bays: u8,
    pub(crate) disks: Vec<DiskPlan>,
    pub(crate) nets: Vec<NetPlan>,
    /// Ports of the host that it may connect to, beside the doorbell.
    pub(crate) host_ports: Vec<HostPortPlan>,
    /// What is shared; nothing: no file server.
    pub(crate) shares: Vec<SharePlan>,
    /// More words for the kernel's command line.
    pub(crate) kernel_args: Vec<String>,
    /// How long the guest may take until its agent serves.
    pub(crate) boot_ms: u64,
    /// The VMM stays in the network namespace that it is started in: its pod's.
    pub(crate) in_pod: bool,
    /// Open `cgroup.procs` of the control groups that VMM and file server run in; none: those of this process.
    pub(crate) cgroups: Vec<OwnedFd>,
    /// It goes on from this instead of booting.
    pub(crate) template: Option<Template>,
}

impl GuestPlan {
    /// The same once more, with copies of all descriptors.
    pub(super) fn try_clone(&self) -> Result<Self, VmError> {
        let failed = |source| VmError::Descriptor { what: "a copy of a descriptor", source };
        let disk = |disk: &DiskPlan| {
            Ok(DiskPlan { id: disk.id.clone(), file: disk.file.try_clone()?, read_only: disk.read_only })
        };
        let net = |net: &NetPlan| Ok(NetPlan { tap: net.tap.try_clone()?, mac: net.mac, mtu: net.mtu });
        let host_port =
            |plan: &HostPortPlan| Ok(HostPortPlan { port: plan.port, socket: plan.socket.try_clone()? });
        Ok(Self {
            run_dir: self.run_dir.clone(),
            log_dir: self.log_dir.clone(),
            vcpus: self.vcpus,
            mem_mib: self.mem_mib,
            growth: self.growth,
            bays: self.bays,
            disks: self.disks.iter().map(disk).collect::<Result<_, _>>().map_err(failed)?,
            nets: self.nets.iter().map(net).collect::<Result<_, _>>().map_err(failed)?,
            host_ports: self.host_ports.iter().map(host_port).collect::<Result<_, _>>().map_err(failed)?,
            shares: self.shares.clone(),
            kernel_args: self.kernel_args.clone(),
            boot_ms: self.boot_ms,
            in_pod: self.in_pod,
            cgroups: self.cgroups.iter().map(OwnedFd::try_clone).collect::<Result<_, _>>().map_err(failed)?,
            template: None,
        })
    }

    /// To go on from a template.
    pub(super) fn going_on_from(mut self, template: Template) -> Self {
        self.template = Some(template);
        self
    }
}

/// What a machine may come to have while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GrowthPlan {
    /// vCPUs, those at boot included.
    pub(crate) max_vcpus: u8,
    /// Memory beside that at boot, MiB; a multiple of `HOT_MEM_STEP_MIB`, or none.
    pub(crate) hot_mem_mib: u32,
}

/// A disk.
#[derive(Debug)]
pub(crate) struct DiskPlan {
    pub(crate) id: String,
    pub(crate) file: File,
    pub(crate) read_only: bool,
}

/// A network interface.
#[derive(Debug)]
pub(crate) struct NetPlan {
    pub(crate) tap: OwnedFd,
    pub(crate) mac: [u8; 6],
    pub(crate) mtu: u16,
}

/// A directory or file of the host, as the file server is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct SharePlan {
    /// Its name in the share.
    pub(crate) name: String,
    pub(crate) source: PathBuf,
    pub(crate) read_only: bool,
    /// What the host mounts below it later appears to the guest as well.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) live: bool,
}

/// A spec with the descriptors that it names.
#[derive(Debug)]
pub(crate) struct Assembled {
    pub(crate) spec: VmSpec,
    /// Slots of the bays, by which the guest knows them.
    pub(crate) bays: Vec<u32>,
    /// What it goes on from.
    pub(crate) snapshot: Option<SnapshotFds>,
    fds: Vec<OwnedFd>,
}

impl Assembled {
    pub(crate) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.fds.iter().map(AsFd::as_fd).collect()
    }
}

/// Path of the socket on which programs connect to the guest.
pub(crate) fn vsock_path(run_dir: &Path) -> PathBuf {
    run_dir.join("vsock")
}

/// Sockets that the VMM is given for a machine.
#[derive(Debug)]
pub(super) struct Sockets {
    /// Where programs connect to the guest.
    pub(super) vsock: OwnedFd,
    /// Where the console's output goes.
    pub(super) serial: OwnedFd,
    /// That of the file server.
    pub(super) share: Option<OwnedFd>,
}

#[derive(Debug, Default)]
struct Slots {
    fds: Vec<OwnedFd>,
}

impl Slots {
    fn take(&mut self, fd: impl Into<OwnedFd>) -> FdSlot {
        let slot = FdSlot(u32::try_from(self.fds.len()).unwrap_or(u32::MAX));
        self.fds.push(fd.into());
        slot
    }
}

fn open_part(part: &'static str, path: &Path) -> Result<File, VmError> {
    File::open(path).map_err(|source| VmError::Part { part, path: path.to_owned(), source })
}

/// Turns a plan into a spec.
pub(super) fn assemble(plan: GuestPlan, parts: &Parts, sockets: Sockets) -> Result<Assembled, VmError> {
    let mut slots = Slots::default();
    let kernel = slots.take(open_part("the guest kernel", &parts.kernel)?);
    let initramfs = slots.take(open_part("the guest's initramfs", &parts.initramfs)?);
    let cmdline = std::iter::once(CMDLINE)
        .chain(plan.growth.map(|_| GROWTH_CMDLINE))
        .chain(plan.kernel_args.iter().map(String::as_str))
        .collect::<Vec<_>>()
        .join(" ");
    let mut host_ports = Vec::new();
    for HostPortPlan { port, socket } in plan.host_ports {
        host_ports.push(HostPort { port, fd: slots.take(socket) });
    }
    let vsock = VsockSpec { guest_cid: GUEST_CID, listener: slots.take(sockets.vsock), host_ports };
    let mut spec = VmSpec::new(plan.vcpus, plan.mem_mib, kernel, cmdline)?
        .with_initramfs(initramfs)
        .with_serial(slots.take(sockets.serial))
        .with_device(DeviceSpec::Vsock(vsock))?;
    let snapshot = plan.template.map(|template| SnapshotFds {
        state: slots.take(template.state),
        memory: slots.take(template.memory),
    });
    for disk in plan.disks {
        let id = DiskId::new(disk.id)?;
        let fd = slots.take(disk.file);
        spec = spec.with_device(DeviceSpec::Disk(DiskSpec { id, fd, read_only: disk.read_only }))?;
    }
    for net in plan.nets {
        let fd = slots.take(net.tap);
        spec = spec.with_device(DeviceSpec::Net(NetSpec { fd, mac: net.mac, mtu: net.mtu }))?;
    }
    if let Some(share) = sockets.share {
        let tag = hyper_protocol::SHARE_TAG.to_owned();
        spec = spec.with_device(DeviceSpec::Share(ShareSpec { tag, fd: slots.take(share) }))?;
    }
    let mut spec = with_small_devices(spec)?;
    if let Some(growth) = plan.growth {
        spec = with_growth(spec, growth)?;
    }
    let first_bay_slot = spec.devices().len();
    let bays = usize::from(plan.bays).min(MAX_DEVICES.saturating_sub(first_bay_slot));
    for _ in 0..bays {
        spec = spec.with_device(DeviceSpec::Bay)?;
    }
    Ok(Assembled { bays: bay_slots(first_bay_slot, bays), snapshot, spec, fds: slots.fds })
}

fn with_small_devices(spec: VmSpec) -> Result<VmSpec, SpecError> {
    spec.with_device(DeviceSpec::Balloon(BalloonSpec { free_page_reporting: true }))?
        .with_device(DeviceSpec::Rng)
}

fn bay_slots(first: usize, count: usize) -> Vec<u32> {
    (first..first + count).filter_map(|slot| u32::try_from(slot).ok()).collect()
}

fn with_growth(spec: VmSpec, growth: GrowthPlan) -> Result<VmSpec, SpecError> {
    let spec = spec.with_max_vcpus(growth.max_vcpus)?;
    if growth.hot_mem_mib == 0 {
        return Ok(spec);
    }
    spec.with_device(DeviceSpec::HotMemory(HotMemorySpec { max_mib: growth.hot_mem_mib }))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn sockets(share: Option<OwnedFd>) -> Sockets {
        Sockets { vsock: null(), serial: null(), share }
    }

    pub(in crate::launch) fn plan(dir: &Path) -> GuestPlan {
        GuestPlan {
            run_dir: dir.to_owned(),
            log_dir: dir.to_owned(),
            vcpus: 2,
            mem_mib: 128,
            growth: None,
            bays: 0,
            disks: vec![DiskPlan { id: "image".to_owned(), file: null().into(), read_only: true }],
            nets: vec![NetPlan { tap: null(), mac: [2, 0, 0, 0, 0, 1], mtu: 1500 }],
            host_ports: vec![HostPortPlan { port: 1027, socket: null() }],
            shares: Vec::new(),
            kernel_args: vec!["loglevel=7".into()],
            boot_ms: DEFAULT_BOOT_MS,
            in_pod: false,
            cgroups: Vec::new(),
            template: None,
        }
    }

    #[test]
    fn every_slot_has_its_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let parts = Parts::in_dir(dir.path(), dir.path());
        let missing = assemble(plan(dir.path()), &parts, sockets(None)).unwrap_err();
        assert!(missing.to_string().contains("the guest kernel"), "{missing}");
        std::fs::write(&parts.kernel, "").unwrap();
        std::fs::write(&parts.initramfs, "").unwrap();
        let assembled = assemble(plan(dir.path()), &parts, sockets(Some(null()))).unwrap();
        assert_eq!(assembled.fds().len(), 8, "kernel, initramfs, port, vsock, serial, disk, tap, share");
        let text = serde_json::to_string(&assembled.spec).unwrap();
        for slot in 0..8 {
            assert!(text.contains(&format!(":{slot}")), "slot {slot} in {text}");
        }
        assert!(assembled.spec.cmdline().ends_with(&format!("{CMDLINE} loglevel=7")));
        assert_eq!(assembled.spec.devices().len(), 6);
    }

    #[test]
    fn a_machine_that_may_grow_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let parts = Parts::in_dir(dir.path(), dir.path());
        std::fs::write(&parts.kernel, "").unwrap();
        std::fs::write(&parts.initramfs, "").unwrap();
        let mut grows = plan(dir.path());
        grows.growth = Some(GrowthPlan { max_vcpus: 8, hot_mem_mib: 1024 });
        grows.bays = 8;
        let assembled = assemble(grows, &parts, sockets(None)).unwrap();
        assert_eq!(assembled.bays, (6..14).collect::<Vec<_>>());
        let spec = assembled.spec;
        assert_eq!((spec.vcpus(), spec.max_vcpus(), spec.hot_mem_mib()), (2, 8, 1024));
        assert!(spec.cmdline().contains(GROWTH_CMDLINE));
        assert!(
            !assemble(plan(dir.path()), &parts, sockets(None))
                .unwrap()
                .spec
                .cmdline()
                .contains(GROWTH_CMDLINE)
        );
    }

    #[test]
    fn a_clone_has_the_shape_that_was_saved() {
        let dir = tempfile::tempdir().unwrap();
        let parts = Parts::in_dir(dir.path(), dir.path());
        std::fs::write(&parts.kernel, "").unwrap();
        std::fs::write(&parts.initramfs, "").unwrap();
        let saved = plan(dir.path());
        let clone = saved.try_clone().unwrap();
        let saved = assemble(saved, &parts, sockets(None)).unwrap();
        let template = Template { state: null().into(), memory: null().into() };
        let clone = assemble(clone.going_on_from(template), &parts, sockets(None)).unwrap();
        let kinds = |assembled: &Assembled| -> Vec<_> {
            assembled.spec.devices().iter().map(std::mem::discriminant).collect()
        };
        assert_eq!(kinds(&saved), kinds(&clone));
        assert!(saved.snapshot.is_none() && clone.snapshot.is_some());
        assert_eq!(clone.fds().len(), saved.fds().len() + 2);
    }

    #[test]
    fn bays_take_what_slots_are_left() {
        let dir = tempfile::tempdir().unwrap();
        let parts = Parts::in_dir(dir.path(), dir.path());
        std::fs::write(&parts.kernel, "").unwrap();
        std::fs::write(&parts.initramfs, "").unwrap();
        let mut many = plan(dir.path());
        many.nets = (0..10).map(|n| NetPlan { tap: null(), mac: [2, 0, 0, 0, 0, n], mtu: 1500 }).collect();
        many.bays = 8;
        let assembled = assemble(many, &parts, sockets(None)).unwrap();
        assert_eq!(assembled.spec.devices().len(), MAX_DEVICES);
        assert_eq!(assembled.bays, (14..19).collect::<Vec<_>>());
    }

    #[test]
    fn two_disks_of_one_name_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let parts = Parts::in_dir(dir.path(), dir.path());
        std::fs::write(&parts.kernel, "").unwrap();
        std::fs::write(&parts.initramfs, "").unwrap();
        let mut twice = plan(dir.path());
        twice.disks.push(DiskPlan { id: "image".to_owned(), file: null().into(), read_only: true });
        assert!(matches!(
            assemble(twice, &parts, sockets(None)),
            Err(VmError::Spec(SpecError::DuplicateName(_)))
        ));
    }
}
