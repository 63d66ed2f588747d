//! From a spec and its descriptors to a running machine: one function that walks the spec's devices.

use std::fs::File;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use hyper_jail::JailError;
use hyper_vmm_devices::balloon::{Balloon, BalloonTarget, MemfdPages, PageRelease};
use hyper_vmm_devices::blk::{Bay, BayError, BayHandle, Blk, BlkError};
use hyper_vmm_devices::console::Console;
use hyper_vmm_devices::device::{EventLoop, GuestMem, VirtioDevice};
use hyper_vmm_devices::fs::{FsError, VhostUserFs};
use hyper_vmm_devices::legacy::{I8042, LifecyclePort, LineLog, SerialPort};
use hyper_vmm_devices::mem::{Mem, MemoryGoal, Reached};
use hyper_vmm_devices::net::{Net, NetError};
use hyper_vmm_devices::output::Output;
use hyper_vmm_devices::rng::{HostEntropy, Rng};
use hyper_vmm_devices::transport::{MmioTransport, QUEUE_NOTIFY, WINDOW_BYTES};
use hyper_vmm_devices::vsock::{Callers, Vsock};
use hyper_vmm_hv::{Entry, HvError, Hypervisor, Machine as KvmMachine, Vcpu};
use hyper_vmm_spec::control::{DiskPart, LIFECYCLE_PORT, Metrics, SnapshotFds};
use hyper_vmm_spec::{
    BalloonSpec, DeviceSpec, DiskId, DiskSpec, HotMemorySpec, NetSpec, ShareSpec, VmSpec, VsockSpec,
};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::arch::{
    self, BootError, BootPlan, DEVICE_WINDOWS, FIRST_DEVICE_IRQ, KernelError, SERIAL_IRQ, SERIAL_PORT,
};
use crate::bus::{Bus, Window};
use crate::confine::{self, Needs};
use crate::hot_memory::HotMemory;
use crate::life::{Ending, Life, Mark, Notice};
use crate::memory::{self, MemoryError};
use crate::snapshot::{Saved, Shape, SnapshotError, io_error};
use crate::socket::{Descriptors, MissingDescriptor};
use crate::vcpus::{StartError, Vcpus};

/// Why a machine could not be built; one line with its causes.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    #[error(transparent)]
    Kvm(#[from] HvError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Descriptor(#[from] MissingDescriptor),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("the machine is built, but not let run")]
    Jail(#[from] JailError),
    #[error("the thread that builds the machine has died")]
    Builder,
    #[error("this machine has {0} bays")]
    NoBay(usize),
    #[error("bay {bay}")]
    Bay {
        bay: u8,
        #[source]
        source: BayError,
    },
    #[error("{asked} vCPUs asked for, this machine has at most {most}")]
    Vcpus { asked: u8, most: u8 },
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("cannot make an event descriptor")]
    EventFd(#[source] io::Error),
    #[error("disk {id}")]
    Disk {
        id: String,
        #[source]
        source: BlkError,
    },
    #[error("network interface")]
    Net(#[source] NetError),
    #[error("share {tag}")]
    Share {
        tag: String,
        #[source]
        source: FsError,
    },
    #[error("the vsock socket that was handed over")]
    Vsock(#[source] io::Error),
}

/// A running machine, as the main thread sees it.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) vcpus: Vcpus,
    /// Kept also because KVM forgets all interrupt routes when this is closed, even while vCPUs run.
    kvm: Arc<KvmMachine>,
    max_vcpus: u8,
    mem: GuestMem,
    shape: Shape,
    pub(crate) windows: Vec<Window>,
    pub(crate) balloon: Option<BalloonTarget>,
    pub(crate) memory: Option<MemoryGoal>,
    bays: Vec<BayHandle>,
    pub(crate) serial: Arc<Mutex<LineLog>>,
}

impl Machine {
    /// Counters of all devices, or `None` while a vCPU thread is busy with one of them.
    pub(crate) fn metrics(&self) -> Option<Metrics> {
        let mut metrics = Metrics { vm_exits: self.vcpus.exits(), devices: Vec::new() };
        for window in &self.windows {
            let device = match window.try_lock() {
                Ok(device) => device,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return None,
            };
            let counters =
                device.counters().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            metrics.devices.push((device.name().to_owned(), counters));
        }
        Some(metrics)
    }

    /// Writes the machine to files. Only while all processors are paused, and on the event loop's thread: nothing is under way then.
    pub(crate) fn save(
        &self,
        snapshot: SnapshotFds,
        limit_ms: u32,
        mut fds: Descriptors,
    ) -> Result<(), BuildError> {
        let state = File::from(fds.take(snapshot.state, "the machine's state")?);
        let memory = File::from(fds.take(snapshot.memory, "the machine's memory")?);
        if self.memory.is_some() || self.vcpus.count() > self.shape.vcpus() {
            return Err(SnapshotError::Unsaved("memory or vCPUs that came while it ran").into());
        }
        // No vCPU thread holds one, and none waits for this thread: they are parked.
        for window in &self.windows {
            window.lock().unwrap_or_else(PoisonError::into_inner).pause();
        }
        let save = |window: &Window| window.lock().unwrap_or_else(PoisonError::into_inner).save();
        let windows = self.windows.iter().map(save).collect::<Result<_, _>>().map_err(SnapshotError::from)?;
        let (vcpus, machine) = self.vcpus.save(&self.kvm)?;
        let ports = self.vcpus.save_ports();
        memory::save(&self.mem, &memory, limit_ms)?;
        Ok(Saved { machine, vcpus, ports, windows }.write(&self.shape, &state)?)
    }

    /// Lets processors go on, and what [`Machine::save`] stopped.
    pub(crate) fn resume(&self) {
        for window in &self.windows {
            window.lock().unwrap_or_else(PoisonError::into_inner).resume();
        }
        self.vcpus.resume();
    }

    /// Makes processors until there are `count`. Not while processors are paused.
    pub(crate) fn add_vcpus(&mut self, count: u8) -> Result<(), BuildError> {
        if count > self.max_vcpus {
            return Err(BuildError::Vcpus { asked: count, most: self.max_vcpus });
        }
        while let Some(index) = u8::try_from(self.vcpus.count()).ok().filter(|index| *index < count) {
            self.vcpus.add(self.kvm.create_vcpu(index)?)?;
        }
        Ok(())
    }

    fn bay(&self, bay: u8) -> Result<&BayHandle, BuildError> {
        self.bays.get(usize::from(bay)).ok_or(BuildError::NoBay(self.bays.len()))
    }

    /// Puts a disk into a bay.
    pub(crate) fn attach(
        &self,
        bay: u8,
        id: &DiskId,
        parts: &[DiskPart],
        mut fds: Descriptors,
    ) -> Result<(), BuildError> {
        let handle = self.bay(bay)?;
        let mut open = |part: &DiskPart| Ok((File::from(fds.take(part.fd, "a disk")?), part.sectors));
        let files = parts.iter().map(&mut open).collect::<Result<_, BuildError>>()?;
        handle.insert(id, files).map_err(|source| BuildError::Bay { bay, source })
    }

    /// Empties a bay.
    pub(crate) fn detach(&self, bay: u8) -> Result<(), BuildError> {
        self.bay(bay)?.take();
        Ok(())
    }
}

/// Guest addresses (start, length) of memory that may be added.
fn hot_range(spec: &VmSpec) -> Option<(u64, u64)> {
    let start = arch::hot_memory_start(u64::from(spec.mem_mib()) << 20);
    (spec.hot_mem_mib() > 0).then(|| (start, u64::from(spec.hot_mem_mib()) << 20))
}

/// Builds the machine that `spec` describes and starts it: at its kernel's entry or, with a snapshot, where that was saved. When this
/// fails, nothing is left.
pub(crate) fn start(
    spec: &VmSpec,
    kvm: Result<Hypervisor, HvError>,
    snapshot: Option<SnapshotFds>,
    mut fds: Descriptors,
    event_loop: &Arc<dyn EventLoop>,
    life: &Arc<Life>,
) -> Result<Machine, BuildError> {
    let hot = hot_range(spec);
    let mut ranges = arch::memory_ranges(u64::from(spec.mem_mib()) << 20);
    ranges.extend(hot);
    // What is added later begins above all that is there at boot.
    let memory_end = hot.map_or(u64::MAX, |(start, _)| start);
    let origin = Origin::new(snapshot, &mut fds)?;
    // A file server maps it too, and added memory is given back through its file.
    let shared = hot.is_some() || spec.devices().iter().any(|device| matches!(device, DeviceSpec::Share(_)));
    let mem = origin.memory(spec.mem_mib() + spec.hot_mem_mib(), &ranges, shared)?;
    let (beginning, kvm) = std::thread::scope(|scope| {
        // KVM_CREATE_VM waits for the host's kernel (grace periods: 10 ms and more); the kernel is loaded meanwhile.
        let kvm = scope.spawn(|| kvm?.create_machine(Arc::clone(&mem), memory_end, spec.max_vcpus()));
        let beginning = origin.beginning(spec, &mut fds, &mem, memory_end);
        (beginning, kvm.join())
    });
    let beginning = beginning?;
    // A panic has ended the process before it could end the thread.
    let kvm = Arc::new(kvm.map_err(|_| BuildError::Builder)??);

    let serial_output = spec.serial().map(|slot| fds.take(slot, "the serial port")).transpose()?;
    let serial = Arc::new(Mutex::new(LineLog::new(serial_output.map(Output::new))));
    let mut bus = Bus::default();
    add_legacy_devices(&mut bus, &kvm, &serial, life)?;

    let mut builder = DeviceBuilder {
        fds,
        mem: Arc::clone(&mem),
        private: snapshot.is_some() || !shared,
        kvm: Arc::clone(&kvm),
        life: Arc::clone(life),
        hot,
        balloon: None,
        memory: None,
        bays: Vec::new(),
        longest_file: 0,
    };
    let mut windows = Vec::new();
    for (device, (address, irq)) in spec.devices().iter().zip(slots()) {
        let device = builder.build(device)?;
        let window = place(device, &builder.mem, &kvm, event_loop, address, irq)?;
        bus.add_window(Arc::clone(&window));
        windows.push(window);
    }

    let vcpus = (0..spec.vcpus()).map(|index| kvm.create_vcpu(index)).collect::<Result<Vec<_>, _>>()?;
    beginning.apply(&kvm, &vcpus, &windows, &mut bus)?;
    life.mark(Mark::Built);
    hyper_vmm_hv::install_kick_signal()?;
    confine::begin(&builder.needs(spec))?;
    let vcpus = Vcpus::start(vcpus, &Arc::new(bus), life)?;
    let DeviceBuilder { balloon, memory, bays, .. } = builder;
    let (max_vcpus, shape) = (spec.max_vcpus(), Shape::of(spec));
    Ok(Machine { vcpus, kvm, max_vcpus, mem, shape, windows, balloon, memory, bays, serial })
}

/// Where a machine comes from.
#[derive(Debug)]
enum Origin {
    /// It boots a kernel.
    Kernel,
    /// It goes on with what was saved.
    Snapshot { state: File, memory: File },
}

impl Origin {
    fn new(snapshot: Option<SnapshotFds>, fds: &mut Descriptors) -> Result<Self, BuildError> {
        let Some(snapshot) = snapshot else { return Ok(Self::Kernel) };
        let state = File::from(fds.take(snapshot.state, "the saved machine's state")?);
        let memory = File::from(fds.take(snapshot.memory, "the saved machine's memory")?);
        Ok(Self::Snapshot { state, memory })
    }

    fn memory(&self, mem_mib: u32, ranges: &[(u64, u64)], shared: bool) -> Result<GuestMem, BuildError> {
        match self {
            Self::Kernel if shared => Ok(memory::create_shared(mem_mib, ranges)?),
            Self::Kernel => Ok(memory::create_private(mem_mib, ranges)?),
            Self::Snapshot { memory, .. } => {
                let memory = memory.try_clone().map_err(io_error("use the saved memory"))?;
                Ok(memory::map_private(mem_mib, ranges, memory)?)
            }
        }
    }

    /// Loads or reads what processors begin with.
    fn beginning(
        &self,
        spec: &VmSpec,
        fds: &mut Descriptors,
        mem: &GuestMem,
        memory_end: u64,
    ) -> Result<Beginning, BuildError> {
        match self {
            Self::Kernel => load(spec, fds, mem, memory_end).map(Beginning::Entry),
            Self::Snapshot { .. } if spec.hot_mem_mib() > 0 => {
                Err(SnapshotError::Unsaved("memory that comes while it runs").into())
            }
            Self::Snapshot { state, .. } => {
                Ok(Beginning::Saved(Box::new(Saved::read(&Shape::of(spec), state)?)))
            }
        }
    }
}

/// What a machine begins with once it is built.
#[derive(Debug)]
enum Beginning {
    Entry(Entry),
    Saved(Box<Saved>),
}

impl Beginning {
    /// Puts a machine there that has not run. Devices come last: they may interrupt.
    fn apply(
        &self,
        kvm: &KvmMachine,
        vcpus: &[Vcpu],
        windows: &[Window],
        bus: &mut Bus,
    ) -> Result<(), BuildError> {
        let first = vcpus.first().ok_or(BuildError::Builder)?;
        let saved = match self {
            Self::Entry(entry) => return Ok(first.set_entry(entry)?),
            Self::Saved(saved) => saved,
        };
        for (vcpu, state) in vcpus.iter().zip(&saved.vcpus) {
            kvm.restore_vcpu(vcpu, state)?;
        }
        kvm.restore(&saved.machine, first)?;
        bus.restore_ports(&saved.ports).map_err(SnapshotError::from)?;
        for (window, state) in windows.iter().zip(&saved.windows) {
            let mut window = window.lock().unwrap_or_else(PoisonError::into_inner);
            window.restore(state).map_err(SnapshotError::from)?;
        }
        Ok(())
    }
}

/// Memory that goes back to the host: through its file, or out of a private mapping.
#[derive(Debug, Clone)]
enum Pages {
    Shared(MemfdPages),
    Private(Arc<KvmMachine>),
}

impl PageRelease for Pages {
    fn release(&self, start: GuestAddress, len: u64) -> io::Result<()> {
        match self {
            Self::Shared(pages) => pages.release(start, len),
            // What is read there next is what was saved, not zeroes. No driver relies on those: it would have to ask for poisoned pages.
            Self::Private(kvm) => kvm.discard(start.0, len).map_err(io::Error::other),
        }
    }
}

/// Address and interrupt of each device slot.
fn slots() -> impl Iterator<Item = (u64, u32)> {
    (0..).map(|n| DEVICE_WINDOWS + n * WINDOW_BYTES).zip(FIRST_DEVICE_IRQ..)
}

/// Kernel, initramfs and boot data into guest memory.
fn load(spec: &VmSpec, fds: &mut Descriptors, mem: &GuestMem, memory_end: u64) -> Result<Entry, BuildError> {
    let kernel_file = File::from(fds.take(spec.kernel(), "the kernel")?);
    let kernel = arch::load_kernel(mem, &kernel_file)?;
    let initramfs = match spec.initramfs() {
        Some(slot) => {
            let file = File::from(fds.take(slot, "the initramfs")?);
            Some(arch::load_initramfs(mem, &file, &kernel)?)
        }
        None => None,
    };
    let max_vcpus = spec.max_vcpus();
    let cmdline = arch::announce_processors(spec.cmdline(), spec.vcpus(), max_vcpus);
    let cmdline = arch::announce_devices(&cmdline, spec.devices().len());
    let plan = BootPlan { max_vcpus, memory_end, cmdline: &cmdline, kernel: &kernel, initramfs };
    Ok(arch::write_boot_data(mem, &plan)?)
}

fn add_legacy_devices(
    bus: &mut Bus,
    kvm: &KvmMachine,
    serial: &Arc<Mutex<LineLog>>,
    life: &Arc<Life>,
) -> Result<(), BuildError> {
    let irq = event_fd()?;
    kvm.route_interrupt(&irq, SERIAL_IRQ)?;
    bus.add_ports(SERIAL_PORT, SerialPort::PORTS, SerialPort::new(irq, Arc::clone(serial)));
    let to_end = Arc::clone(life);
    bus.add_ports(arch::ports::I8042, I8042::PORTS, I8042::new(move || to_end.end(Ending::Reset)));
    let to_tell = Arc::clone(life);
    bus.add_ports(LIFECYCLE_PORT, 1, LifecyclePort::new(move |step| to_tell.guest_step(step)));
    Ok(())
}

fn event_fd() -> Result<EventFd, BuildError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(BuildError::EventFd)
}

/// Puts a device behind its window and wires its interrupt and doorbells.
fn place(
    device: Box<dyn VirtioDevice>,
    mem: &GuestMem,
    kvm: &KvmMachine,
    event_loop: &Arc<dyn EventLoop>,
    address: u64,
    irq: u32,
) -> Result<Window, BuildError> {
    let line = event_fd()?;
    kvm.route_interrupt(&line, irq)?;
    let transport = MmioTransport::new(device, Arc::clone(mem), line, Arc::clone(event_loop))
        .map_err(BuildError::EventFd)?;
    for (queue, kick) in (0..).zip(transport.queue_kicks()) {
        kvm.signal_on_write(kick, address + QUEUE_NOTIFY, queue)?;
    }
    Ok(Arc::new(Mutex::new(transport)))
}

/// One small constructor per kind of device.
struct DeviceBuilder {
    fds: Descriptors,
    mem: GuestMem,
    /// Memory is a private mapping.
    private: bool,
    kvm: Arc<KvmMachine>,
    life: Arc<Life>,
    /// Start and length of memory that may be added.
    hot: Option<(u64, u64)>,
    balloon: Option<BalloonTarget>,
    memory: Option<MemoryGoal>,
    bays: Vec<BayHandle>,
    /// Length of the longest disk so far, bytes.
    longest_file: u64,
}

impl DeviceBuilder {
    /// What the machine takes of the host while it runs.
    fn needs(&self, spec: &VmSpec) -> Needs {
        let mem_bytes = (u64::from(spec.mem_mib()) + u64::from(spec.hot_mem_mib())) << 20;
        Needs {
            private_bytes: if self.private { mem_bytes } else { 0 },
            // It may be saved, too. The length of what comes into a bay is not known yet.
            file_bytes: self.bays.is_empty().then(|| self.longest_file.max(mem_bytes)),
        }
    }

    fn build(&mut self, device: &DeviceSpec) -> Result<Box<dyn VirtioDevice>, BuildError> {
        match device {
            DeviceSpec::Disk(disk) => self.disk(disk),
            DeviceSpec::Net(net) => self.net(net),
            DeviceSpec::Vsock(vsock) => self.vsock(vsock),
            DeviceSpec::Share(share) => self.share(share),
            DeviceSpec::Balloon(balloon) => Ok(self.balloon(*balloon)),
            DeviceSpec::Bay => {
                let bay = Bay::new(confine::disk_worker);
                self.bays.push(bay.handle());
                Ok(Box::new(bay))
            }
            DeviceSpec::HotMemory(hot) => Ok(self.hot_memory(*hot)),
            DeviceSpec::Rng => Ok(Box::new(Rng::new(HostEntropy))),
            DeviceSpec::Console { fd } => {
                let output = Output::new(self.fds.take(*fd, "the console")?);
                Ok(Box::new(Console::new(output)))
            }
        }
    }

    fn disk(&mut self, disk: &DiskSpec) -> Result<Box<dyn VirtioDevice>, BuildError> {
        let file = File::from(self.fds.take(disk.fd, "a disk")?);
        let failed = |source| BuildError::Disk { id: disk.id.as_str().to_owned(), source };
        self.longest_file = self.longest_file.max(file.metadata().map_or(0, |meta| meta.len()));
        let blk = Blk::new(&disk.id, file, disk.read_only).map_err(failed)?;
        Ok(Box::new(blk.with_worker(confine::disk_worker)))
    }

    fn vsock(&mut self, vsock: &VsockSpec) -> Result<Box<dyn VirtioDevice>, BuildError> {
        let listener = UnixListener::from(self.fds.take(vsock.listener, "the vsock socket")?);
        let mut callers = Vec::new();
        for port in &vsock.host_ports {
            callers.push((port.port, self.fds.take(port.fd, "a port of the host")?));
        }
        let device = Vsock::new(vsock.guest_cid, listener, Callers::new(callers));
        Ok(Box::new(device.map_err(BuildError::Vsock)?))
    }

    fn net(&mut self, net: &NetSpec) -> Result<Box<dyn VirtioDevice>, BuildError> {
        let tap = self.fds.take(net.fd, "a network interface")?;
        Ok(Box::new(Net::new(tap, net.mac, net.mtu).map_err(BuildError::Net)?))
    }

    fn share(&mut self, share: &ShareSpec) -> Result<Box<dyn VirtioDevice>, BuildError> {
        let socket = UnixStream::from(self.fds.take(share.fd, "a share")?);
        let failed = |source| BuildError::Share { tag: share.tag.clone(), source };
        Ok(Box::new(VhostUserFs::new(&share.tag, socket).map_err(failed)?))
    }

    fn hot_memory(&mut self, spec: HotMemorySpec) -> Box<dyn VirtioDevice> {
        let (start, bytes) = self.hot.unwrap_or((0, u64::from(spec.max_mib) << 20));
        let lender = Arc::clone(&self.kvm) as Arc<dyn crate::hot_memory::Lend>;
        let memory = HotMemory::new(lender, MemfdPages(Arc::clone(&self.mem)), start, bytes);
        let life = Arc::clone(&self.life);
        let reached = Reached::new(move |serial| life.post(Notice::MemoryReached(serial)));
        let device = Mem::new(memory, GuestAddress(start), bytes, reached);
        self.memory = Some(device.goal());
        Box::new(device)
    }

    fn balloon(&mut self, spec: BalloonSpec) -> Box<dyn VirtioDevice> {
        let pages = if self.private {
            Pages::Private(Arc::clone(&self.kvm))
        } else {
            Pages::Shared(MemfdPages(Arc::clone(&self.mem)))
        };
        let balloon = Balloon::new(pages, spec.free_page_reporting);
        self.balloon = Some(balloon.target());
        Box::new(balloon)
    }
}
