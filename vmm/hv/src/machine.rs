//! Opening KVM and making a machine: memory slots, interrupt controllers, event descriptors.
#![expect(unsafe_code, reason = "lending guest memory to KVM is unsafe by nature")]
// UNSAFETY: KVM_SET_USER_MEMORY_REGION makes the kernel write to memory that Rust owns. `Machine` and every `Vcpu` keep
// the mapping alive, and all access from Rust goes through vm-memory's volatile interface.

use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Error as Errno, IoEventAddress, Kvm, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::state::{self, MachineState, VcpuState};
use crate::{HvError, Vcpu};

/// The one version of the KVM interface (since Linux 2.6.22).
const API_VERSION: i32 = 12;
/// Three pages that Intel processors without unrestricted guest mode need for a task state segment, and one for an
/// identity map: in the hole below 4 GiB, above all devices.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// KVM's number of the first slot of [`Machine::lend`].
const FIRST_HOT_SLOT: u32 = 8;

/// What a machine cannot be built without.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// An open and checked /dev/kvm.
#[derive(Debug)]
pub struct Hypervisor {
    kvm: Kvm,
}

impl Hypervisor {
    /// Opens /dev/kvm and checks that a machine can be built on it.
    ///
    /// # Errors
    /// [`HvError`] with one line that says how to mend it.
    pub fn open() -> Result<Self, HvError> {
        let hypervisor = Self::open_unchecked()?;
        let version = hypervisor.api_version();
        if version != API_VERSION {
            return Err(HvError::ApiVersion(version));
        }
        let missing = hypervisor.missing_capabilities();
        if missing.is_empty() { Ok(hypervisor) } else { Err(HvError::Capabilities(missing)) }
    }

    pub(crate) fn open_unchecked() -> Result<Self, HvError> {
        Ok(Self { kvm: Kvm::new().map_err(open_error)? })
    }

    pub(crate) fn api_version(&self) -> i32 {
        self.kvm.get_api_version()
    }

    pub(crate) fn missing_capabilities(&self) -> Vec<&'static str> {
        NEEDED.iter().filter(|(cap, _)| !self.kvm.check_extension(*cap)).map(|(_, name)| *name).collect()
    }

    /// Makes a machine with `vcpus` processors to come, in-kernel interrupt controllers (two 8259, one I/O APIC, local
    /// APICs) and `mem` up to guest address `memory_end` as its memory, one slot per region; what lies above is lent by
    /// [`Machine::lend`]. There is no 8254 timer: a guest kernel that knows kvm-clock and the APIC's deadline timer never asks for it.
    ///
    /// # Errors
    /// [`HvError::Vcpus`], or [`HvError::Refused`] with what KVM would not do.
    pub fn create_machine(
        self,
        mem: Arc<GuestMemoryMmap>,
        memory_end: u64,
        vcpus: u8,
    ) -> Result<Machine, HvError> {
        let most = self.kvm.get_max_vcpus();
        if usize::from(vcpus) > most {
            return Err(HvError::Vcpus { asked: usize::from(vcpus), most });
        }
        let vm = self.create_vm()?;
        leave_out_of_dumps(&mem)?;
        lend_memory(&vm, &mem, memory_end)?;
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(HvError::refused("set the identity map"))?;
        vm.set_tss_address(TSS_ADDRESS).map_err(HvError::refused("set the task state segment"))?;
        vm.create_irq_chip().map_err(HvError::refused("create the interrupt controllers"))?;
        let cpuid = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(HvError::refused("list processor features"))?;
        let deadline_timer = self.kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Machine { vm, mem, cpuid, deadline_timer, vcpus, kvm: self.kvm })
    }

    /// `KVM_CREATE_VM` is interrupted by any signal that is pending, and by cgroup moves: try again a few times.
    pub(crate) fn create_vm(&self) -> Result<VmFd, HvError> {
        const ATTEMPTS: usize = 5;
        let mut attempt = 1;
        loop {
            match self.kvm.create_vm() {
                Err(e) if e.errno() == libc::EINTR && attempt < ATTEMPTS => attempt += 1,
                other => return other.map_err(HvError::refused("create a machine")),
            }
        }
    }
}

/// What it means that /dev/kvm cannot be opened.
fn open_error(errno: Errno) -> HvError {
    match errno.errno() {
        libc::ENOENT => HvError::Missing,
        libc::EACCES | libc::EPERM => HvError::Permission,
        libc::ENODEV | libc::ENXIO => HvError::NoDriver,
        _ => HvError::Open(errno),
    }
}

/// One KVM slot per region of `mem` below `end`, in order. The caller keeps `mem` alive as long as `vm` can run.
pub(crate) fn lend_memory(vm: &VmFd, mem: &GuestMemoryMmap, end: u64) -> Result<(), HvError> {
    for (slot, region) in (0u32..).zip(mem.iter().filter(|region| region.start_addr().0 < end)) {
        let start = region.start_addr();
        let host =
            mem.get_host_address(GuestAddress(start.0)).map_err(|_| HvError::MemoryAddress(start.0))?;
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: start.0,
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the region is mapped for `memory_size` bytes from `host`, regions do not overlap (vm-memory checks it),
        // and the owner of `vm` keeps `mem` until after the last vCPU is gone.
        unsafe { vm.set_user_memory_region(slot) }.map_err(HvError::refused("take guest memory"))?;
    }
    Ok(())
}

/// Keeps guest memory out of core dumps of this process, whoever makes one.
fn leave_out_of_dumps(mem: &GuestMemoryMmap) -> Result<(), HvError> {
    for region in mem.iter() {
        let start = region.start_addr();
        let outside = |_| HvError::MemoryAddress(start.0);
        let host = mem.get_host_address(start).map_err(|_| HvError::MemoryAddress(start.0))?;
        let len = usize::try_from(region.len()).map_err(outside)?;
        // SAFETY: the region is mapped for `len` bytes from `host`; the advice changes nothing of what is there.
        unsafe { rustix::mm::madvise(host.cast(), len, rustix::mm::Advice::LinuxDontDump) }
            .map_err(|error| HvError::Dumps(error.into()))?;
    }
    Ok(())
}

/// A machine. Keep it as long as its processors run: dropping it takes down its interrupt routes.
#[derive(Debug)]
pub struct Machine {
    vm: VmFd,
    mem: Arc<GuestMemoryMmap>,
    cpuid: CpuId,
    deadline_timer: bool,
    vcpus: u8,
    kvm: Kvm,
}

impl Machine {
    /// Raises interrupt `gsi` (an I/O APIC pin) on each signal of `event`; edge triggered.
    ///
    /// # Errors
    /// [`HvError::Refused`].
    pub fn route_interrupt(&self, event: &EventFd, gsi: u32) -> Result<(), HvError> {
        self.vm.register_irqfd(event, gsi).map_err(HvError::refused("route an interrupt"))
    }

    /// Signals `event` when the guest writes the 32-bit `value` to `address`, without an exit to this process.
    ///
    /// # Errors
    /// [`HvError::Refused`].
    pub fn signal_on_write(&self, event: &EventFd, address: u64, value: u32) -> Result<(), HvError> {
        self.vm
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(HvError::refused("watch a doorbell"))
    }

    /// Where `len` bytes of guest memory from `start` lie in this process; they are inside one region.
    fn host_address(&self, start: u64, len: u64) -> Result<*mut u8, HvError> {
        let outside = || HvError::MemoryAddress(start);
        let region = self.mem.find_region(GuestAddress(start)).ok_or_else(outside)?;
        let inside = start - region.start_addr().0;
        if inside.checked_add(len).is_none_or(|end| end > region.len()) {
            return Err(outside());
        }
        let host = self.mem.get_host_address(GuestAddress(start)).map_err(|_| outside())?;
        Ok(host)
    }

    /// Lends `len` bytes of guest memory from `start` to KVM, or takes them back (`present` false), while processors run. They lie in
    /// one region and have slot `number` of their own, which nothing else has: numbers begin at 0, behind those of the regions at boot.
    ///
    /// # Errors
    /// [`HvError::MemoryAddress`] when that is not memory, [`HvError::Refused`] when KVM does not take it.
    pub fn lend(&self, number: u32, start: u64, len: u64, present: bool) -> Result<(), HvError> {
        let host = self.host_address(start, len)?;
        let slot = kvm_userspace_memory_region {
            slot: number.saturating_add(FIRST_HOT_SLOT),
            flags: 0,
            guest_phys_addr: start,
            // No length takes the slot away.
            memory_size: if present { len } else { 0 },
            userspace_addr: host as u64,
        };
        // SAFETY: `len` bytes are mapped from `host`, as was just checked, and `self.mem` outlives all processors. KVM refuses what
        // overlaps another slot.
        unsafe { self.vm.set_user_memory_region(slot) }.map_err(HvError::refused("take guest memory"))
    }

    /// Reads all that processors have in common, of a machine that is stopped.
    ///
    /// # Errors
    /// [`HvError::Refused`].
    pub fn save(&self, processor: &Vcpu) -> Result<MachineState, HvError> {
        state::save_machine(&self.vm, self.host(processor))
    }

    /// Puts back what [`Machine::save`] read, after all processors.
    ///
    /// # Errors
    /// [`HvError::OtherHost`], [`HvError::State`] or [`HvError::Refused`].
    pub fn restore(&self, saved: &MachineState, processor: &Vcpu) -> Result<(), HvError> {
        state::restore_machine(&self.vm, saved, self.host(processor))
    }

    fn host(&self, processor: &Vcpu) -> u64 {
        state::fingerprint(self.cpuid.as_slice(), processor.fd().get_tsc_khz().unwrap_or(0))
    }

    /// Reads a processor that is stopped.
    ///
    /// # Errors
    /// [`HvError::Refused`], or [`HvError::State`] when it has registers that are not saved.
    pub fn save_vcpu(&self, vcpu: &Vcpu) -> Result<VcpuState, HvError> {
        let listed =
            self.kvm.get_msr_index_list().map_err(HvError::refused("list model-specific registers"))?;
        state::save_vcpu(&self.vm, vcpu.fd(), &state::msr_indices(listed.as_slice()))
    }

    /// Puts a processor that was just made into a saved state.
    ///
    /// # Errors
    /// [`HvError::Refused`] or [`HvError::Msr`].
    pub fn restore_vcpu(&self, vcpu: &Vcpu, saved: &VcpuState) -> Result<(), HvError> {
        state::restore_vcpu(&self.vm, vcpu.fd(), saved, crate::cpuid::is_amd(self.cpuid.as_slice()))
    }

    /// Gives the host back the private copies of `len` bytes of memory at `start`, both multiples of 4096. What the guest reads there
    /// next is what the memory's file has, or zeroes when there is none.
    ///
    /// # Errors
    /// [`HvError::MemoryAddress`] when that is not inside one region of memory, [`HvError::Discard`].
    pub fn discard(&self, start: u64, len: u64) -> Result<(), HvError> {
        let host = self.host_address(start, len)?;
        let outside = |_| HvError::MemoryAddress(start);
        let len = usize::try_from(len).map_err(outside)?;
        // SAFETY: `len` bytes are mapped from `host`, as was just checked, and stay mapped. They are guest memory, which Rust reads by
        // volatile copies only: that they change under it is what they always do.
        unsafe { rustix::mm::madvise(host.cast(), len, rustix::mm::Advice::LinuxDontNeed) }
            .map_err(|error| HvError::Discard(error.into()))
    }

    /// Makes processor `index` with its features and topology. Processor 0 is the one that boots; the others wait for it.
    ///
    /// # Errors
    /// [`HvError::Refused`].
    pub fn create_vcpu(&self, index: u8) -> Result<Vcpu, HvError> {
        let fd = self.vm.create_vcpu(u64::from(index)).map_err(HvError::refused("create a vCPU"))?;
        let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        let cpuid = crate::cpuid::for_vcpu(
            &self.cpuid,
            &crate::cpuid::Place { index, count: self.vcpus, deadline_timer: self.deadline_timer, tsc_khz },
        )?;
        fd.set_cpuid2(&cpuid).map_err(HvError::refused("set processor features"))?;
        crate::entry::set_common_state(&fd, crate::cpuid::wide_registers(&cpuid))?;
        Ok(Vcpu::new(fd, index, self.vm.run_size(), Arc::clone(&self.mem)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_have_no_kvm_says_how_to_mend_it() {
        let says = |errno| open_error(Errno::new(errno)).to_string();
        assert!(says(libc::ENOENT).contains("modprobe kvm_intel"));
        assert!(says(libc::EACCES).contains("usermod -aG kvm"));
        assert!(says(libc::ENODEV).contains("modprobe"));
        assert_eq!(says(libc::EMFILE), "cannot open /dev/kvm");
        let lacks = HvError::Capabilities(vec!["KVM_CAP_IRQFD", "KVM_CAP_IOEVENTFD"]).to_string();
        assert!(lacks.contains("lacks KVM_CAP_IRQFD, KVM_CAP_IOEVENTFD"), "{lacks}");
    }
}
