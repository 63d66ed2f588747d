//! The table that tells a kernel without ACPI its processors and interrupt wiring (Intel MultiProcessor Specification 1.4).
//!
//! One I/O APIC; all its pins carry ISA interrupts of the same number, edge triggered and active high, which is how KVM's
//! irqfd raises them. Linux then uses the pin's number as the interrupt's.

use super::layout::{BASE_MEMORY_END, IO_APIC, IO_APIC_PINS, LOCAL_APIC, MP_TABLE};

const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC_ENTRY: u8 = 2;
const INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

const KIND_INT: u8 = 0;
const KIND_NMI: u8 = 1;
const KIND_EXTERNAL: u8 = 3;
const ALL_LOCAL_APICS: u8 = 0xff;
/// What the processors' APICs say their version is.
const APIC_VERSION: u8 = 0x14;
const POINTER_BYTES: u32 = 16;
const HEADER_BYTES: usize = 44;

/// Builds the floating pointer and the table behind it, for [`MP_TABLE`]; `None` if it would not fit there (it does for up to
/// 32 processors).
pub(super) fn build(vcpus: u8) -> Option<Vec<u8>> {
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus {
        // Flags: enabled, and processor 0 is the one that boots.
        let flags = 1 | u8::from(id == 0) << 1;
        let signature = 0x600_u32.to_le_bytes();
        let features = 0x201_u32.to_le_bytes();
        let head = [PROCESSOR, id, APIC_VERSION, flags];
        add(&[&head[..], &signature, &features, &[0; 8]].concat());
    }
    add(&[&[BUS, 0][..], b"ISA   "].concat());
    let io_apic_id = vcpus;
    add(&[&[IO_APIC_ENTRY, io_apic_id, 0x11, 1][..], &IO_APIC.to_le_bytes()].concat());
    for pin in 0..IO_APIC_PINS {
        add(&[INTERRUPT, KIND_INT, 0, 0, 0, pin, io_apic_id, pin]);
    }
    add(&[LOCAL_INTERRUPT, KIND_EXTERNAL, 0, 0, 0, 0, 0, 0]);
    add(&[LOCAL_INTERRUPT, KIND_NMI, 0, 0, 0, 0, ALL_LOCAL_APICS, 1]);

    let table = table(&entries, count)?;
    let bytes = [pointer().to_vec(), table].concat();
    (MP_TABLE + bytes.len() as u64 <= BASE_MEMORY_END).then_some(bytes)
}

fn pointer() -> [u8; 16] {
    let mut pointer = [0; 16];
    let table = u32::try_from(MP_TABLE).unwrap_or(0) + POINTER_BYTES;
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&table.to_le_bytes());
    // One paragraph long, version 1.4.
    pointer[8] = 1;
    pointer[9] = 4;
    pointer[10] = checksum(&pointer);
    pointer
}

fn table(entries: &[u8], count: u16) -> Option<Vec<u8>> {
    let length = u16::try_from(HEADER_BYTES + entries.len()).ok()?;
    let mut table = Vec::with_capacity(usize::from(length));
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&length.to_le_bytes());
    table.extend_from_slice(&[4, 0]);
    table.extend_from_slice(b"HYPER   ");
    table.extend_from_slice(b"MICROVM     ");
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(entries);
    let sum = checksum(&table);
    *table.get_mut(7)? = sum;
    Some(table)
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper_vmm_spec::MAX_VCPUS;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn the_table_is_whole_and_fits_for_every_machine() {
        for vcpus in 1..=MAX_VCPUS {
            let bytes = build(vcpus).unwrap();
            let (pointer, table) = bytes.split_at(16);
            assert_eq!((&pointer[..4], sum(pointer), sum(table)), (&b"_MP_"[..], 0, 0));
            assert_eq!(u64::from(u32::from_le_bytes(pointer[4..8].try_into().unwrap())), MP_TABLE + 16);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            let mut at = HEADER_BYTES;
            let mut kinds = [0_u16; 5];
            while at < table.len() {
                kinds[usize::from(table[at])] += 1;
                at += if table[at] == PROCESSOR { 20 } else { 8 };
            }
            assert_eq!(kinds, [u16::from(vcpus), 1, 1, u16::from(IO_APIC_PINS), 2]);
            assert_eq!(u16::from_le_bytes([table[34], table[35]]), kinds.iter().sum::<u16>());
        }
    }

    #[test]
    fn a_table_that_does_not_fit_is_not_made() {
        assert!(build(255).is_none());
    }
}
