//! Guest-physical addresses, interrupt lines and ports.
//!
//! ```text
//!  0x0500   descriptor table            0x10_0000    kernel, initramfs at the end of low memory
//!  0x7000   zero page                 0xd000_0000    device windows, one page each (no memory from here ...)
//!  0x8ff0   first stack (downwards)   0xfec0_0000    I/O APIC      0xfee0_0000  local APICs
//!  0x9000   page tables, three pages  0xfffb_c000    KVM's own pages
//! 0x2_0000  command line            0x1_0000_0000    the rest of memory (... to here)
//! 0x9_fc00  MP table, up to 0xa_0000            above it   memory that is added while it runs, from a multiple of 2 GiB
//! ```

pub(super) const DESCRIPTOR_TABLE: u64 = 0x500;
pub(super) const ZERO_PAGE: u64 = 0x7000;
pub(super) const STACK_END: u64 = 0x8ff0;
pub(super) const PAGE_TABLE_TOP: u64 = 0x9000;
pub(super) const PAGE_TABLE_MIDDLE: u64 = 0xa000;
pub(super) const PAGE_TABLE_LOW: u64 = 0xb000;
pub(super) const CMDLINE: u64 = 0x2_0000;
/// Where Linux looks for the MP table: the last KiB of base memory.
pub(super) const MP_TABLE: u64 = 0x9_fc00;
pub(super) const BASE_MEMORY_END: u64 = 0xa_0000;
/// Start of the memory that a kernel is loaded to.
pub(super) const HIGH_MEMORY: u64 = 0x10_0000;
/// No memory from here to 4 GiB.
pub(super) const HOLE_START: u64 = 0xd000_0000;
const HOLE_END: u64 = 1 << 32;

/// First device window; window n is n pages above.
pub(crate) const DEVICE_WINDOWS: u64 = HOLE_START;
/// I/O APIC pin of device 0; device n has pin 5 + n.
pub(crate) const FIRST_DEVICE_IRQ: u32 = 5;
/// The first serial port's.
pub(crate) const SERIAL_IRQ: u32 = 4;
pub(crate) const SERIAL_PORT: u16 = 0x3f8;

/// Other ports.
pub(crate) mod ports {
    /// Keyboard controller: data at 0x60, command at 0x64.
    pub(crate) const I8042: u16 = 0x60;
}

pub(super) const IO_APIC: u32 = 0xfec0_0000;
pub(super) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Pins of KVM's I/O APIC.
pub(super) const IO_APIC_PINS: u8 = 24;

/// The guest's memory as ranges of guest addresses (start, length): up to the hole, and what is left from 4 GiB.
pub(crate) fn memory_ranges(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(HOLE_START);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((HOLE_END, bytes - low));
    }
    ranges
}

/// What Linux may describe memory in at once, at most: what is added begins at a multiple of it.
const LARGEST_BLOCK: u64 = 2 << 30;

/// Where memory that is added while the machine runs begins, behind the memory at boot and the hole.
pub(crate) fn hot_memory_start(boot_bytes: u64) -> u64 {
    let end = memory_ranges(boot_bytes).iter().map(|(start, len)| start + len).max().unwrap_or(0);
    end.max(HOLE_END).next_multiple_of(LARGEST_BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_around_the_hole() {
        assert_eq!(memory_ranges(128 << 20), [(0, 128 << 20)]);
        assert_eq!(memory_ranges(HOLE_START), [(0, HOLE_START)]);
        assert_eq!(memory_ranges(6 << 30), [(0, HOLE_START), (1 << 32, (6 << 30) - HOLE_START)]);
        assert_eq!(hot_memory_start(128 << 20), 4 << 30);
        assert_eq!(hot_memory_start(6 << 30), 8 << 30);
    }
}
