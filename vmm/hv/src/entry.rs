//! Registers of a processor before its first instruction.
//!
//! The boot processor starts at the 64-bit entry point of the Linux boot protocol (Documentation/arch/x86/boot.rst, "64-bit
//! boot protocol"): long mode, paging on over an identity map, flat segments `__BOOT_CS` 0x10 and `__BOOT_DS` 0x18, the
//! address of the zero page in RSI, interrupts off. The other processors wait for a start-up interrupt.

use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_xcrs};
use kvm_ioctls::VcpuFd;

use crate::HvError;

/// Where the boot processor starts. All addresses are guest-physical.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// First instruction.
    pub instruction: u64,
    /// The boot parameters.
    pub zero_page: u64,
    /// End of a stack, 16-byte aligned.
    pub stack: u64,
    /// Top level of page tables that map the kernel, the zero page and the command line one to one.
    pub page_table: u64,
    /// A descriptor table of four entries: null, unused, 64-bit code, flat data.
    pub descriptor_table: u64,
}

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// Memory type ranges on, memory is write-back where none is set.
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

const CR0_PROTECTED: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;
const DESCRIPTOR_TABLE_LIMIT: u16 = 4 * 8 - 1;

/// What firmware would have set on every processor. `wide_registers` is the value of XCR0, 0 when the processor has none.
///
/// XCR0 starts with all that the guest's CPUID offers, which the guest's kernel will ask for anyway: a KVM that does not see it
/// do so (SVM in QEMU up to 7.2 does not intercept XSETBV) would otherwise enter the guest with the reset value from then on,
/// and SSE state would not be saved.
pub(crate) fn set_common_state(fd: &VcpuFd, wide_registers: u64) -> Result<(), HvError> {
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries =
        [msr(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), msr(MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK)];
    let msrs = Msrs::from_entries(&entries).map_err(|_| HvError::ListLength("model-specific registers"))?;
    fd.set_msrs(&msrs).map_err(HvError::refused("set model-specific registers"))?;
    if wide_registers != 0 {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        if let Some(first) = xcrs.xcrs.first_mut() {
            first.value = wide_registers;
        }
        fd.set_xcrs(&xcrs).map_err(HvError::refused("enable wide registers"))?;
    }
    let mut lapic = fd.get_lapic().map_err(HvError::refused("read a local APIC"))?;
    set_local_lines(&mut lapic);
    fd.set_lapic(&lapic).map_err(HvError::refused("set up a local APIC"))
}

/// Virtual wire mode: line 0 takes the 8259's interrupts, line 1 is NMI.
fn set_local_lines(lapic: &mut kvm_lapic_state) {
    const LINE_0: usize = 0x350;
    const LINE_1: usize = 0x360;
    const DELIVERY_NMI: u32 = 4 << 8;
    const DELIVERY_EXTERNAL: u32 = 7 << 8;
    const DELIVERY_MASK: u32 = 7 << 8;
    for (offset, delivery) in [(LINE_0, DELIVERY_EXTERNAL), (LINE_1, DELIVERY_NMI)] {
        for (n, byte) in lapic.regs.iter_mut().skip(offset).take(4).enumerate() {
            // Little-endian bytes of a 32-bit register; only byte 1 holds the delivery mode.
            let shift = 8 * n;
            let mask = (DELIVERY_MASK >> shift).to_le_bytes()[0].cast_signed();
            let value = (delivery >> shift).to_le_bytes()[0].cast_signed();
            *byte = *byte & !mask | value;
        }
    }
}

/// Puts the boot processor at its entry point.
pub(crate) fn set_boot_state(fd: &VcpuFd, entry: &Entry) -> Result<(), HvError> {
    let mut sregs = fd.get_sregs().map_err(HvError::refused("read control registers"))?;
    let code = segment(0x10, true);
    let data = segment(0x18, false);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = entry.descriptor_table;
    sregs.gdt.limit = DESCRIPTOR_TABLE_LIMIT;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 |= CR0_PROTECTED | CR0_PAGING;
    sregs.cr3 = entry.page_table;
    sregs.cr4 |= CR4_PHYSICAL_ADDRESS_EXTENSION;
    sregs.efer |= EFER_LONG_MODE;
    fd.set_sregs(&sregs).map_err(HvError::refused("set control registers"))?;
    let regs = kvm_regs {
        rip: entry.instruction,
        rsi: entry.zero_page,
        rsp: entry.stack,
        rbp: entry.stack,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    fd.set_regs(&regs).map_err(HvError::refused("set registers"))
}

/// A flat segment: 64-bit code or writable data, both already accessed.
pub(crate) fn segment(selector: u16, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: if code { 0xb } else { 0x3 },
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_lines_become_virtual_wire() {
        let mut lapic = kvm_lapic_state::default();
        // Masked, vector 0x55, delivery mode 1: only the mode may change.
        for offset in [0x350, 0x360] {
            lapic.regs[offset] = 0x55;
            lapic.regs[offset + 1] = 0x01;
            lapic.regs[offset + 2] = 0x01;
        }
        set_local_lines(&mut lapic);
        let read =
            |offset: usize| u32::from_le_bytes([0, 1, 2, 3].map(|n| lapic.regs[offset + n].cast_unsigned()));
        assert_eq!(read(0x350), 0x0001_0755);
        assert_eq!(read(0x360), 0x0001_0455);
    }
}
