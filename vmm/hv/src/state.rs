//! A paused processor, and what its machine has beside processors, as bytes and back.
//!
//! ```text
//! Vcpu::save    -> VcpuState    -> bytes      registers, local APIC, model-specific registers, …
//! Machine::save -> MachineState -> bytes      the two 8259, the I/O APIC, kvm-clock, what the host's KVM is
//! bytes -> from_bytes (length is checked) -> Vcpu::restore, then Machine::restore
//! ```
//!
//! Time stands still in what is saved: the time stamp counter and kvm-clock go on from where they were, so that no timer of the guest is
//! late by the time that passed in between. Its wall clock is for its owner to set.
#![expect(unsafe_code, reason = "setting the XSAVE area is unsafe by its signature")]
// UNSAFETY: KVM_SET_XSAVE reads as many bytes as KVM_CAP_XSAVE2 says; nothing is set when those are more than the structure has.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_MSR_ENTRIES, Msrs,
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::HvError;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Memory type ranges, which KVM's own list has only since Linux 6.5: variable ones, fixed ones, the default.
const MTRRS: [std::ops::RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];
/// The interrupt controllers of a machine.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Registers of fixed size; the model-specific ones follow.
#[derive(Debug, Default)]
struct Fixed {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    mp: kvm_mp_state,
    events: kvm_vcpu_events,
}

/// One processor's state.
#[derive(Debug, Default)]
pub struct VcpuState {
    fixed: Box<Fixed>,
    msrs: Vec<kvm_msr_entry>,
}

/// State that processors have in common.
#[derive(Debug, Default)]
pub struct MachineState {
    chips: [kvm_irqchip; CHIPS.len()],
    clock: kvm_clock_data,
    /// See [`fingerprint`].
    host: u64,
}

/// Takes structures off the front of bytes.
struct Front<'a>(&'a [u8]);

impl Front<'_> {
    fn take<T: FromBytes>(&mut self) -> Option<T> {
        let (value, rest) = T::read_from_prefix(self.0).ok()?;
        self.0 = rest;
        Some(value)
    }
}

fn put(bytes: &mut Vec<u8>, value: &(impl IntoBytes + Immutable)) {
    bytes.extend_from_slice(value.as_bytes());
}

impl VcpuState {
    /// The state as bytes, for this program on this processor only.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let fixed = &*self.fixed;
        put(&mut bytes, &fixed.regs);
        put(&mut bytes, &fixed.sregs);
        put(&mut bytes, &fixed.xsave);
        put(&mut bytes, &fixed.xcrs);
        put(&mut bytes, &fixed.debug);
        put(&mut bytes, &fixed.lapic);
        put(&mut bytes, &fixed.mp);
        put(&mut bytes, &fixed.events);
        for msr in &self.msrs {
            put(&mut bytes, msr);
        }
        bytes
    }

    /// What [`VcpuState::to_bytes`] made.
    ///
    /// # Errors
    /// [`HvError::State`] when there are too few or too many bytes. Values are KVM's to judge.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, HvError> {
        let bad = || HvError::State("a processor");
        let mut front = Front(bytes);
        let mut fixed = Box::<Fixed>::default();
        fixed.regs = front.take().ok_or_else(bad)?;
        fixed.sregs = front.take().ok_or_else(bad)?;
        fixed.xsave = front.take().ok_or_else(bad)?;
        fixed.xcrs = front.take().ok_or_else(bad)?;
        fixed.debug = front.take().ok_or_else(bad)?;
        fixed.lapic = front.take().ok_or_else(bad)?;
        fixed.mp = front.take().ok_or_else(bad)?;
        fixed.events = front.take().ok_or_else(bad)?;
        let mut msrs = Vec::new();
        while !front.0.is_empty() && msrs.len() < KVM_MAX_MSR_ENTRIES {
            msrs.push(front.take().ok_or_else(bad)?);
        }
        if front.0.is_empty() { Ok(Self { fixed, msrs }) } else { Err(bad()) }
    }

    /// The processor's time stamp counter when it was saved.
    fn tsc(&self) -> u64 {
        self.msrs.iter().find(|msr| msr.index == MSR_TSC).map_or(0, |msr| msr.data)
    }

    /// Processors are stopped one after the other, but their counters run as one: all get that of the first.
    pub fn align_clocks(states: &mut [Self]) {
        let tsc = states.first().map_or(0, Self::tsc);
        for msr in states.iter_mut().flat_map(|state| &mut state.msrs) {
            match (msr.index, msr.data) {
                (MSR_TSC, _) => msr.data = tsc,
                // KVM clears the deadline when it has passed, but may not have told the APIC: it passes once more.
                (MSR_TSC_DEADLINE, 0) => msr.data = tsc,
                _ => {}
            }
        }
    }
}

/// Whether the XSAVE area that KVM copies fits the structure; it does unless this process asked for tile registers.
fn check_wide_registers(vm: &VmFd) -> Result<(), HvError> {
    let bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    if bytes > size_of::<kvm_xsave>() { Err(HvError::State("wide registers")) } else { Ok(()) }
}

/// Reads a stopped processor of `vm`. `indices` are the model-specific registers that this KVM has.
pub(crate) fn save_vcpu(vm: &VmFd, fd: &VcpuFd, indices: &[u32]) -> Result<VcpuState, HvError> {
    check_wide_registers(vm)?;
    let refused = HvError::refused;
    let fixed = Fixed {
        // This first: it makes a processor that waits for its start-up interrupt take it.
        mp: fd.get_mp_state().map_err(refused("read a processor's run state"))?,
        regs: fd.get_regs().map_err(refused("read registers"))?,
        sregs: fd.get_sregs().map_err(refused("read control registers"))?,
        xsave: fd.get_xsave().map_err(refused("read wide registers"))?,
        xcrs: fd.get_xcrs().map_err(refused("read which wide registers are enabled"))?,
        debug: fd.get_debug_regs().map_err(refused("read debug registers"))?,
        lapic: fd.get_lapic().map_err(refused("read a local APIC"))?,
        events: fd.get_vcpu_events().map_err(refused("read pending events"))?,
    };
    Ok(VcpuState { fixed: Box::new(fixed), msrs: read_msrs(fd, indices)? })
}

/// Puts a processor of `vm` that has never run into a saved state. `amd`: see [`task_segment`].
pub(crate) fn restore_vcpu(vm: &VmFd, fd: &VcpuFd, state: &VcpuState, amd: bool) -> Result<(), HvError> {
    check_wide_registers(vm)?;
    let refused = HvError::refused;
    let fixed = &*state.fixed;
    fd.set_mp_state(fixed.mp).map_err(refused("set a processor's run state"))?;
    fd.set_regs(&fixed.regs).map_err(refused("set registers"))?;
    let mut sregs = fixed.sregs;
    sregs.tr = task_segment(sregs.tr, amd);
    fd.set_sregs(&sregs).map_err(refused("set control registers"))?;
    // SAFETY: KVM reads no more than the structure has, as was just checked.
    unsafe { fd.set_xsave(&fixed.xsave) }.map_err(refused("set wide registers"))?;
    fd.set_xcrs(&fixed.xcrs).map_err(refused("enable wide registers"))?;
    fd.set_debug_regs(&fixed.debug).map_err(refused("set debug registers"))?;
    // Its timer's mode decides what the deadline below means.
    fd.set_lapic(&fixed.lapic).map_err(refused("set up a local APIC"))?;
    // The deadline is compared with the counter, so it comes after it.
    let (deadline, others): (Vec<_>, Vec<_>) =
        state.msrs.iter().copied().partition(|msr| msr.index == MSR_TSC_DEADLINE);
    write_msrs(fd, &others)?;
    write_msrs(fd, &deadline)?;
    fd.set_vcpu_events(&fixed.events).map_err(refused("set pending events"))
}

/// The task register as the processor keeps it. KVM reports its segment as busy on every processor, as Intel's need it to be; AMD's keep
/// an available one, and an emulator of such a processor refuses port I/O of user space, which asks the segment, with any other.
fn task_segment(tr: kvm_segment, amd: bool) -> kvm_segment {
    const BUSY: u8 = 2;
    kvm_segment { type_: if amd { tr.type_ & !BUSY } else { tr.type_ }, ..tr }
}

/// Reads those of `indices` that can be read.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, HvError> {
    let mut found = Vec::new();
    let mut left: Vec<_> =
        indices.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
    while !left.is_empty() {
        let mut msrs =
            Msrs::from_entries(&left).map_err(|_| HvError::ListLength("model-specific registers"))?;
        let count = fd.get_msrs(&mut msrs).map_err(HvError::refused("read model-specific registers"))?;
        found.extend(msrs.as_slice().iter().take(count).copied());
        // KVM stops at the first that it cannot read.
        left = left.split_off((count + 1).min(left.len()));
    }
    Ok(found)
}

fn write_msrs(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), HvError> {
    let msrs = Msrs::from_entries(entries).map_err(|_| HvError::ListLength("model-specific registers"))?;
    let count = fd.set_msrs(&msrs).map_err(HvError::refused("set model-specific registers"))?;
    match entries.get(count) {
        Some(refused) => Err(HvError::Msr { index: refused.index, value: refused.data }),
        None => Ok(()),
    }
}

/// Model-specific registers to save: KVM's list and the memory type ranges, each once.
pub(crate) fn msr_indices(listed: &[u32]) -> Vec<u32> {
    let mut indices: Vec<u32> = listed.iter().copied().chain(MTRRS.into_iter().flatten()).collect();
    indices.sort_unstable();
    indices.dedup();
    indices
}

/// A number for what KVM offers on this host: a machine that was saved under another is not to be continued. FNV-1a, 64 bits.
pub(crate) fn fingerprint(features: &[kvm_cpuid_entry2], tsc_khz: u32) -> u64 {
    const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    let words = features.iter().flat_map(|e| {
        let mut words = [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx];
        // What depends on the processor that is asked, not on its kind: its APIC id, and sizes of state that is enabled just now.
        match (e.function, e.index) {
            (0x1, _) => words[4] &= 0x00ff_ffff,
            (0xb | 0x1f | 0x8000_0026, _) => words[6] = 0,
            (0xd, 0 | 1) => words[4] = 0,
            (0x8000_001e, _) => (words[3], words[4]) = (0, 0),
            _ => {}
        }
        words
    });
    words.chain([tsc_khz]).fold(BASIS, |hash, word| (hash ^ u64::from(word)).wrapping_mul(PRIME))
}

impl MachineState {
    /// The state as bytes, for this program on this host only.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        put(&mut bytes, &self.host);
        put(&mut bytes, &self.clock);
        for chip in &self.chips {
            put(&mut bytes, chip);
        }
        bytes
    }

    /// What [`MachineState::to_bytes`] made.
    ///
    /// # Errors
    /// [`HvError::State`] when there are too few or too many bytes. Values are KVM's to judge.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, HvError> {
        let bad = || HvError::State("a machine");
        let mut front = Front(bytes);
        let mut state = Self {
            host: front.take().ok_or_else(bad)?,
            clock: front.take().ok_or_else(bad)?,
            ..Self::default()
        };
        for chip in &mut state.chips {
            *chip = front.take().ok_or_else(bad)?;
        }
        if front.0.is_empty() { Ok(state) } else { Err(bad()) }
    }
}

/// Reads what processors have in common; they must be stopped.
pub(crate) fn save_machine(vm: &VmFd, host: u64) -> Result<MachineState, HvError> {
    let mut state = MachineState { host, ..MachineState::default() };
    for (chip, id) in state.chips.iter_mut().zip(CHIPS) {
        chip.chip_id = id;
        vm.get_irqchip(chip).map_err(HvError::refused("read an interrupt controller"))?;
    }
    state.clock = vm.get_clock().map_err(HvError::refused("read the clock"))?;
    Ok(state)
}

/// Puts it back, after all processors.
pub(crate) fn restore_machine(vm: &VmFd, state: &MachineState, host: u64) -> Result<(), HvError> {
    if state.host != host {
        return Err(HvError::OtherHost);
    }
    for (chip, id) in state.chips.iter().zip(CHIPS) {
        if chip.chip_id != id {
            return Err(HvError::State("an interrupt controller"));
        }
        vm.set_irqchip(chip).map_err(HvError::refused("set up an interrupt controller"))?;
    }
    // Only the time itself: with its flags the clock would be moved on by what has passed since.
    let clock = kvm_clock_data { clock: state.clock.clock, ..Default::default() };
    vm.set_clock(&clock).map_err(HvError::refused("set the clock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msr(index: u32, data: u64) -> kvm_msr_entry {
        kvm_msr_entry { index, data, ..Default::default() }
    }

    #[test]
    fn states_survive_as_bytes_and_any_other_length_is_refused() {
        let mut state = VcpuState::default();
        state.fixed.regs.rip = 7;
        state.fixed.events.nmi.masked = 1;
        state.msrs = vec![msr(MSR_TSC, 5), msr(0x277, 6)];
        let bytes = state.to_bytes();
        let back = VcpuState::from_bytes(&bytes).unwrap();
        assert_eq!((back.fixed.regs.rip, back.fixed.events.nmi.masked), (7, 1));
        assert_eq!(back.msrs.iter().map(|m| (m.index, m.data)).collect::<Vec<_>>(), [(0x10, 5), (0x277, 6)]);
        let step = size_of::<kvm_msr_entry>();
        for cut in (0..bytes.len()).filter(|cut| (bytes.len() - cut) % step != 0) {
            assert!(VcpuState::from_bytes(&bytes[..cut]).is_err(), "{cut} bytes");
        }
        let many = [bytes, vec![0; step * KVM_MAX_MSR_ENTRIES]].concat();
        assert!(VcpuState::from_bytes(&many).is_err());

        let mut machine = MachineState { host: 9, ..MachineState::default() };
        machine.clock.clock = 11;
        let bytes = machine.to_bytes();
        let back = MachineState::from_bytes(&bytes).unwrap();
        assert_eq!((back.host, back.clock.clock), (9, 11));
        for cut in 0..bytes.len() {
            assert!(MachineState::from_bytes(&bytes[..cut]).is_err(), "{cut} bytes");
        }
        assert!(MachineState::from_bytes(&[bytes, vec![0]].concat()).is_err());
    }

    #[test]
    fn counters_are_aligned_and_passed_deadlines_pass_again() {
        let state = |tsc, deadline| VcpuState {
            msrs: vec![msr(MSR_TSC, tsc), msr(MSR_TSC_DEADLINE, deadline)],
            ..VcpuState::default()
        };
        let mut states = [state(100, 0), state(130, 170)];
        VcpuState::align_clocks(&mut states);
        let data: Vec<_> = states.iter().map(|s| (s.msrs[0].data, s.msrs[1].data)).collect();
        assert_eq!(data, [(100, 100), (100, 170)]);
    }

    #[test]
    fn task_segments_are_as_the_processor_keeps_them() {
        let busy = kvm_segment { type_: 11, limit: 0x206f, ..Default::default() };
        assert_eq!((task_segment(busy, true).type_, task_segment(busy, false).type_), (9, 11));
        assert_eq!(task_segment(busy, true).limit, 0x206f);
    }

    #[test]
    fn registers_are_listed_once() {
        let indices = msr_indices(&[0x10, 0x2ff, 0x201]);
        assert_eq!(indices.iter().filter(|index| **index == 0x2ff).count(), 1);
        assert_eq!(indices.len(), 1 + 16 + 1 + 2 + 8 + 1);
    }

    #[test]
    fn hosts_are_told_apart_by_what_they_offer() {
        let entry = |function, eax, ebx| kvm_cpuid_entry2 { function, eax, ebx, ..Default::default() };
        let one = [entry(1, 3, 0x0100_0800), entry(7, 0, 1)];
        let same = [entry(1, 3, 0x0200_0800), entry(7, 0, 1)];
        let other = [entry(1, 3, 0x0100_0800), entry(7, 0, 2)];
        assert_eq!(fingerprint(&one, 5), fingerprint(&same, 5), "another processor of the same host");
        assert_ne!(fingerprint(&one, 5), fingerprint(&other, 5));
        assert_ne!(fingerprint(&one, 5), fingerprint(&one, 6));
    }
}
