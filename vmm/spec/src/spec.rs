//! `VmSpec`: a machine description that is valid by construction.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

/// Most virtual processors of one machine (the MP table and the tests stop there).
pub const MAX_VCPUS: u8 = 32;
/// Least guest memory, MiB: below this the guest kernel cannot unpack its initramfs.
pub const MIN_MEM_MIB: u32 = 32;
/// Most guest memory, MiB (1 TiB): keeps every address under the 46 bits that all x86_64 hosts map.
pub const MAX_MEM_MIB: u32 = 1 << 20;
/// Most virtio devices: one I/O APIC pin each, pins 5 to 23.
pub const MAX_DEVICES: usize = 19;
/// Most ports of the host that a guest may connect to: there are a doorbell and a name service.
pub const MAX_HOST_PORTS: usize = 8;
/// Memory that is added while the machine runs comes in parts of this size, MiB: what a Linux guest describes at once.
pub const HOT_MEM_STEP_MIB: u32 = 128;
/// Longest kernel command line that the caller may give, bytes; the VMM appends device entries to it
/// (x86 `COMMAND_LINE_SIZE` is 2048).
pub const MAX_CMDLINE_BYTES: usize = 1024;

/// Position of a file descriptor in the list that travels with the boot message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdSlot(pub u32);

/// Name of a disk: its virtio-blk serial, by which the guest finds it. 1 to 20 bytes of `[a-z0-9_-]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DiskId(String);

impl DiskId {
    /// Checks and wraps a disk name.
    ///
    /// # Errors
    /// [`SpecError::DiskId`] unless it is 1 to 20 bytes of `[a-z0-9_-]`.
    pub fn new(id: impl Into<String>) -> Result<Self, SpecError> {
        let id = id.into();
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-';
        if id.is_empty() || id.len() > 20 || !id.bytes().all(plain) {
            return Err(SpecError::DiskId(id));
        }
        Ok(Self(id))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for DiskId {
    type Error = SpecError;
    fn try_from(id: String) -> Result<Self, SpecError> {
        Self::new(id)
    }
}

impl From<DiskId> for String {
    fn from(id: DiskId) -> Self {
        id.0
    }
}

/// One virtio-blk disk backed by a raw file or block device. The type is never guessed from content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Serial of the disk.
    pub id: DiskId,
    /// The backing file. For a read-only disk it must have been opened read-only.
    pub fd: FdSlot,
    /// Whether writes are refused by the device (and by the descriptor).
    pub read_only: bool,
}

/// One virtio-net interface on a TAP descriptor (opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetSpec {
    /// The TAP descriptor.
    pub fd: FdSlot,
    /// Hardware address that the guest is told.
    pub mac: [u8; 6],
    /// Maximum transmission unit that the guest is told, bytes.
    pub mtu: u16,
}

/// The vsock device. Host side: hybrid vsock, Unix stream sockets.
///
/// A host program connects to the listener, writes `CONNECT <port>\n`, reads `OK <port>\n`, and then has a stream to that
/// guest port. A guest connection to host port P arrives as a descriptor on the socket of that [`HostPort`]. The VMM itself
/// looks up no path: it has none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockSpec {
    /// Context id of the guest, at least 3.
    pub guest_cid: u32,
    /// The listening Unix stream socket.
    pub listener: FdSlot,
    /// Ports of the host that the guest may connect to, each once, at most [`MAX_HOST_PORTS`].
    pub host_ports: Vec<HostPort>,
}

/// A port of the host, as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPort {
    /// Its number.
    pub port: u32,
    /// A connected `SOCK_SEQPACKET` Unix socket. For each connection of the guest a packet of one byte comes out at its other end, and
    /// with it, as `SCM_RIGHTS`, one end of a Unix stream socket pair.
    pub fd: FdSlot,
}

/// One virtio-fs device whose queues are served by another process over vhost-user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareSpec {
    /// Mount tag, 1 to 36 bytes of ASCII.
    pub tag: String,
    /// Connected Unix stream socket to the file server.
    pub fd: FdSlot,
}

/// The memory balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonSpec {
    /// Offer free page reporting, so that memory which the guest frees goes back to the host.
    pub free_page_reporting: bool,
}

/// Memory that the guest gets and gives back while it runs (virtio-mem), at first none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HotMemorySpec {
    /// Most of it, MiB: a multiple of [`HOT_MEM_STEP_MIB`].
    pub max_mib: u32,
}

/// One virtio device. The machine is assembled by walking these in order; slot n gets MMIO window n and pin 5 + n.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum DeviceSpec {
    /// virtio-blk.
    Disk(DiskSpec),
    /// virtio-net.
    Net(NetSpec),
    /// virtio-vsock.
    Vsock(VsockSpec),
    /// virtio-fs through vhost-user.
    Share(ShareSpec),
    /// virtio-balloon.
    Balloon(BalloonSpec),
    /// An empty place for a disk that is attached while the machine runs.
    Bay,
    /// virtio-mem.
    HotMemory(HotMemorySpec),
    /// virtio-rng, fed from the host's `getrandom`.
    Rng,
    /// virtio-console, output only, to a descriptor.
    Console {
        /// Where the guest's output goes.
        fd: FdSlot,
    },
}

/// A machine, as it travels. [`VmSpec`] is its checked form.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct RawVmSpec {
    vcpus: u8,
    max_vcpus: u8,
    mem_mib: u32,
    kernel: FdSlot,
    initramfs: Option<FdSlot>,
    cmdline: String,
    serial: Option<FdSlot>,
    devices: Vec<DeviceSpec>,
}

/// A machine that can be built: every invariant has been checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawVmSpec", into = "RawVmSpec")]
pub struct VmSpec {
    vcpus: u8,
    max_vcpus: u8,
    mem_mib: u32,
    kernel: FdSlot,
    initramfs: Option<FdSlot>,
    cmdline: String,
    serial: Option<FdSlot>,
    devices: Vec<DeviceSpec>,
}

impl VmSpec {
    /// A machine with no devices. `cmdline` must not name virtio devices: the VMM announces them itself.
    ///
    /// # Errors
    /// The first [`SpecError`] found.
    pub fn new(
        vcpus: u8,
        mem_mib: u32,
        kernel: FdSlot,
        cmdline: impl Into<String>,
    ) -> Result<Self, SpecError> {
        let cmdline = cmdline.into();
        if vcpus == 0 || vcpus > MAX_VCPUS {
            return Err(SpecError::Vcpus(vcpus));
        }
        if !(MIN_MEM_MIB..=MAX_MEM_MIB).contains(&mem_mib) {
            return Err(SpecError::Memory(mem_mib));
        }
        if cmdline.len() > MAX_CMDLINE_BYTES {
            return Err(SpecError::CmdlineLength(cmdline.len()));
        }
        if !cmdline.bytes().all(|b| (0x20..0x7f).contains(&b)) {
            return Err(SpecError::CmdlineBytes);
        }
        let (initramfs, serial, devices) = (None, None, Vec::new());
        Ok(Self { vcpus, max_vcpus: vcpus, mem_mib, kernel, initramfs, cmdline, serial, devices })
    }

    /// Lets the machine have up to `max_vcpus` virtual processors while it runs; without it there are as many as it boots with.
    ///
    /// # Errors
    /// [`SpecError::MaxVcpus`] when that is less than it boots with, or more than [`MAX_VCPUS`].
    pub fn with_max_vcpus(mut self, max_vcpus: u8) -> Result<Self, SpecError> {
        if !(self.vcpus..=MAX_VCPUS).contains(&max_vcpus) {
            return Err(SpecError::MaxVcpus { max_vcpus, vcpus: self.vcpus });
        }
        self.max_vcpus = max_vcpus;
        Ok(self)
    }

    /// Sets the initramfs.
    #[must_use]
    pub fn with_initramfs(mut self, fd: FdSlot) -> Self {
        self.initramfs = Some(fd);
        self
    }

    /// Sets where the bytes of the first serial port go; without it they are dropped.
    #[must_use]
    pub fn with_serial(mut self, fd: FdSlot) -> Self {
        self.serial = Some(fd);
        self
    }

    /// Adds a device in the next free slot.
    ///
    /// # Errors
    /// When the slots are used up, or the device clashes with one that is there.
    pub fn with_device(mut self, device: DeviceSpec) -> Result<Self, SpecError> {
        self.devices.push(device);
        check_devices(&self.devices, self.mem_mib)?;
        Ok(self)
    }

    /// Virtual processors that it boots with, 1 to [`MAX_VCPUS`].
    #[must_use]
    pub fn vcpus(&self) -> u8 {
        self.vcpus
    }
    /// Virtual processors that it may have.
    #[must_use]
    pub fn max_vcpus(&self) -> u8 {
        self.max_vcpus
    }
    /// Memory that may be added while it runs, MiB.
    #[must_use]
    pub fn hot_mem_mib(&self) -> u32 {
        let hot = self.devices.iter().find_map(|device| match device {
            DeviceSpec::HotMemory(hot) => Some(hot.max_mib),
            _ => None,
        });
        hot.unwrap_or(0)
    }
    /// Guest memory at boot, MiB.
    #[must_use]
    pub fn mem_mib(&self) -> u32 {
        self.mem_mib
    }
    /// The kernel, an uncompressed ELF vmlinux.
    #[must_use]
    pub fn kernel(&self) -> FdSlot {
        self.kernel
    }
    /// The initramfs.
    #[must_use]
    pub fn initramfs(&self) -> Option<FdSlot> {
        self.initramfs
    }
    /// Kernel command line without the device entries.
    #[must_use]
    pub fn cmdline(&self) -> &str {
        &self.cmdline
    }
    /// Where serial output goes.
    #[must_use]
    pub fn serial(&self) -> Option<FdSlot> {
        self.serial
    }
    /// The devices, in slot order.
    #[must_use]
    pub fn devices(&self) -> &[DeviceSpec] {
        &self.devices
    }
}

fn check_devices(devices: &[DeviceSpec], mem_mib: u32) -> Result<(), SpecError> {
    if devices.len() > MAX_DEVICES {
        return Err(SpecError::TooManyDevices(devices.len()));
    }
    let mut names = HashSet::new();
    let mut single = HashSet::new();
    for device in devices {
        match device {
            DeviceSpec::Disk(d) if !names.insert(d.id.as_str()) => {
                return Err(SpecError::DuplicateName(d.id.as_str().to_owned()));
            }
            DeviceSpec::Share(s) => {
                if s.tag.is_empty() || s.tag.len() > 36 || !s.tag.is_ascii() {
                    return Err(SpecError::ShareTag(s.tag.clone()));
                }
                if !names.insert(s.tag.as_str()) {
                    return Err(SpecError::DuplicateName(s.tag.clone()));
                }
            }
            DeviceSpec::HotMemory(hot) if !hot_memory_fits(*hot, mem_mib) => {
                return Err(SpecError::HotMemory(hot.max_mib));
            }
            DeviceSpec::Vsock(v) if v.guest_cid < 3 => return Err(SpecError::GuestCid(v.guest_cid)),
            DeviceSpec::Vsock(v) if !host_ports_fit(&v.host_ports) => return Err(SpecError::HostPorts),
            _ => {}
        }
        let kind = std::mem::discriminant(device);
        let many = matches!(
            device,
            DeviceSpec::Disk(_) | DeviceSpec::Share(_) | DeviceSpec::Net(_) | DeviceSpec::Bay
        );
        if !many && !single.insert(kind) {
            return Err(SpecError::SecondOfItsKind);
        }
    }
    Ok(())
}

fn host_ports_fit(ports: &[HostPort]) -> bool {
    let numbers: HashSet<_> = ports.iter().map(|port| port.port).collect();
    numbers.len() == ports.len() && ports.len() <= MAX_HOST_PORTS
}

fn hot_memory_fits(hot: HotMemorySpec, mem_mib: u32) -> bool {
    let all = hot.max_mib.checked_add(mem_mib);
    hot.max_mib > 0
        && hot.max_mib.is_multiple_of(HOT_MEM_STEP_MIB)
        && all.is_some_and(|all| all <= MAX_MEM_MIB)
}

impl TryFrom<RawVmSpec> for VmSpec {
    type Error = SpecError;
    fn try_from(raw: RawVmSpec) -> Result<Self, SpecError> {
        let mut spec =
            Self::new(raw.vcpus, raw.mem_mib, raw.kernel, raw.cmdline)?.with_max_vcpus(raw.max_vcpus)?;
        check_devices(&raw.devices, raw.mem_mib)?;
        spec.initramfs = raw.initramfs;
        spec.serial = raw.serial;
        spec.devices = raw.devices;
        Ok(spec)
    }
}

impl From<VmSpec> for RawVmSpec {
    fn from(s: VmSpec) -> Self {
        Self {
            vcpus: s.vcpus,
            max_vcpus: s.max_vcpus,
            mem_mib: s.mem_mib,
            kernel: s.kernel,
            initramfs: s.initramfs,
            cmdline: s.cmdline,
            serial: s.serial,
            devices: s.devices,
        }
    }
}

/// Which invariant of a [`VmSpec`] was broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Processor count out of range.
    #[error("{0} vCPUs asked for: give 1 to {MAX_VCPUS}")]
    Vcpus(u8),
    /// Fewer processors at most than at boot, or too many.
    #[error("at most {max_vcpus} vCPUs asked for, and {vcpus} at boot: give {vcpus} to {MAX_VCPUS}")]
    MaxVcpus {
        /// Asked for at most.
        max_vcpus: u8,
        /// Asked for at boot.
        vcpus: u8,
    },
    /// Memory to be added is out of range.
    #[error(
        "{0} MiB of memory to be added asked for: give a multiple of {HOT_MEM_STEP_MIB}, and no more than \
         {MAX_MEM_MIB} with that at boot"
    )]
    HotMemory(u32),
    /// Memory out of range.
    #[error("{0} MiB of memory asked for: give {MIN_MEM_MIB} to {MAX_MEM_MIB}")]
    Memory(u32),
    /// Command line too long.
    #[error("kernel command line of {0} bytes: at most {MAX_CMDLINE_BYTES}")]
    CmdlineLength(usize),
    /// Command line with control or non-ASCII bytes.
    #[error("kernel command line has bytes outside printable ASCII")]
    CmdlineBytes,
    /// Too many devices.
    #[error("{0} devices asked for: at most {MAX_DEVICES}")]
    TooManyDevices(usize),
    /// Bad disk name.
    #[error("disk name {0:?}: give 1 to 20 characters of a-z, 0-9, '_' and '-'")]
    DiskId(String),
    /// Bad share tag.
    #[error("share tag {0:?}: give 1 to 36 ASCII characters")]
    ShareTag(String),
    /// Two disks or shares with one name.
    #[error("two devices are named {0:?}")]
    DuplicateName(String),
    /// Two of a device that comes once.
    #[error("a second vsock, balloon, rng, console or memory device was asked for")]
    SecondOfItsKind,
    /// A host port twice, or too many.
    #[error("ports of the host: give each once, and at most {MAX_HOST_PORTS}")]
    HostPorts,
    /// Reserved context id.
    #[error("guest context id {0}: give 3 or more")]
    GuestCid(u32),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(id: &str) -> DeviceSpec {
        DeviceSpec::Disk(DiskSpec { id: DiskId::new(id).unwrap(), fd: FdSlot(1), read_only: true })
    }

    #[test]
    fn spec_survives_the_wire() {
        let spec = VmSpec::new(2, 256, FdSlot(0), "quiet").unwrap().with_device(disk("image")).unwrap();
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<VmSpec>(&text).unwrap(), spec);
    }

    #[test]
    fn each_invariant_is_checked_on_the_wire_too() {
        let spec = VmSpec::new(1, 256, FdSlot(0), "quiet").unwrap();
        let text = serde_json::to_string(&spec).unwrap();
        for (from, to) in [("\"vcpus\":1", "\"vcpus\":33"), ("256", "1"), ("quiet", "qui\\net")] {
            assert!(serde_json::from_str::<VmSpec>(&text.replace(from, to)).is_err(), "{to}");
        }
    }

    #[test]
    fn names_are_unique_and_slots_end() {
        let spec = VmSpec::new(1, 256, FdSlot(0), "").unwrap().with_device(disk("a")).unwrap();
        assert_eq!(spec.clone().with_device(disk("a")), Err(SpecError::DuplicateName("a".into())));
        let mut spec = spec;
        for n in 1..MAX_DEVICES {
            spec = spec.with_device(disk(&format!("d{n}"))).unwrap();
        }
        assert_eq!(spec.with_device(disk("last")), Err(SpecError::TooManyDevices(MAX_DEVICES + 1)));
    }

    #[test]
    fn ports_of_the_host_are_few_and_differ() {
        let vsock = |ports: &[u32]| {
            let host_ports = ports.iter().map(|port| HostPort { port: *port, fd: FdSlot(2) }).collect();
            let vsock = VsockSpec { guest_cid: 3, listener: FdSlot(1), host_ports };
            VmSpec::new(1, 256, FdSlot(0), "").unwrap().with_device(DeviceSpec::Vsock(vsock))
        };
        assert!(vsock(&[1026, 1027]).is_ok());
        assert_eq!(vsock(&[1026, 1026]), Err(SpecError::HostPorts));
        assert_eq!(vsock(&(0..9).collect::<Vec<_>>()), Err(SpecError::HostPorts));
    }

    #[test]
    fn growth_is_bounded() {
        let spec = VmSpec::new(2, 512, FdSlot(0), "").unwrap();
        assert_eq!((spec.max_vcpus(), spec.hot_mem_mib()), (2, 0));
        assert_eq!(spec.clone().with_max_vcpus(4).unwrap().max_vcpus(), 4);
        for max_vcpus in [1, MAX_VCPUS + 1] {
            let refused = spec.clone().with_max_vcpus(max_vcpus);
            assert_eq!(refused, Err(SpecError::MaxVcpus { max_vcpus, vcpus: 2 }));
        }
        let hot = |max_mib| DeviceSpec::HotMemory(HotMemorySpec { max_mib });
        assert_eq!(spec.clone().with_device(hot(256)).unwrap().hot_mem_mib(), 256);
        for bad in [0, 100, MAX_MEM_MIB, u32::MAX] {
            assert_eq!(spec.clone().with_device(hot(bad)), Err(SpecError::HotMemory(bad)));
        }
        let twice = spec.with_device(hot(128)).unwrap().with_device(hot(128));
        assert_eq!(twice, Err(SpecError::SecondOfItsKind));
    }

    #[test]
    fn disk_names_are_plain() {
        for bad in ["", "A", "a b", "123456789012345678901", "é"] {
            assert!(DiskId::new(bad).is_err(), "{bad}");
        }
    }
}
