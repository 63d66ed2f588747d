//! What CPUID tells a guest: what KVM supports, minus the host's topology and counters, plus our own topology.
//!
//! Processors are cores of one package, one thread each; the APIC id is the index of the processor.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::HvError;

/// Where a processor is in its machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) index: u8,
    pub(crate) count: u8,
    /// Whether KVM can do the local APIC's deadline timer (it does not say so in CPUID).
    pub(crate) deadline_timer: bool,
    /// Frequency of the guest's time stamp counter, 0 when unknown.
    pub(crate) tsc_khz: u32,
}

impl Place {
    fn apic_id(&self) -> u32 {
        u32::from(self.index)
    }
    fn count(&self) -> u32 {
        u32::from(self.count)
    }
    /// Bits of an APIC id that number processors.
    fn core_bits(&self) -> u32 {
        self.count().next_power_of_two().trailing_zeros()
    }
}

const HYPERVISOR_BASE: u32 = 0x4000_0000;
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
/// Frequency of KVM's emulated APIC bus.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// Whether AMD made the processor.
pub(crate) fn is_amd(entries: &[kvm_cpuid_entry2]) -> bool {
    entries.iter().any(|e| e.function == 0 && e.ebx == u32::from_le_bytes(*b"Auth"))
}

/// Makes the list for one processor from what KVM supports.
pub(crate) fn for_vcpu(supported: &CpuId, place: &Place) -> Result<CpuId, HvError> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported.as_slice().to_vec();
    let amd = is_amd(&entries);
    let most_basic = entries.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    // Topology in several subleaves: written below. Leaf 0x1f would be asked before 0xb; without it Linux takes 0xb.
    entries.retain(|e| !matches!(e.function, 0xb | 0x1f | HYPERVISOR_TIMING));
    for entry in &mut entries {
        adjust(entry, place, amd);
    }
    if most_basic >= 0xb {
        entries.extend(extended_topology(place));
    }
    if place.tsc_khz != 0 && entries.iter().any(|e| e.function == HYPERVISOR_BASE) {
        let timing = kvm_cpuid_entry2 {
            function: HYPERVISOR_TIMING,
            eax: place.tsc_khz,
            ebx: APIC_BUS_KHZ,
            ..Default::default()
        };
        entries.push(timing);
    }
    CpuId::from_entries(&entries).map_err(|_| HvError::ListLength("processor features"))
}

/// The register sets that a guest with this CPUID may enable in XCR0 (leaf 0xd, subleaf 0), or 0 if it has no XSAVE. Of the known
/// ones: x87, SSE, AVX, AVX-512 and protection keys.
pub(crate) fn wide_registers(cpuid: &CpuId) -> u64 {
    const XSAVE: u32 = 1 << 26;
    const KNOWN: u32 = 0x2e7;
    let leaf = |function| cpuid.as_slice().iter().find(|e| e.function == function && e.index == 0);
    match (leaf(1), leaf(0xd)) {
        (Some(features), Some(sets)) if features.ecx & XSAVE != 0 => u64::from(sets.eax & KNOWN),
        _ => 0,
    }
}

fn adjust(entry: &mut kvm_cpuid_entry2, place: &Place, amd: bool) {
    match entry.function {
        0x1 => adjust_features(entry, place),
        0x4 => entry.eax = cache_sharing(entry.eax, place) | (place.count() - 1).min(0x3f) << 26,
        // Bit 2: the APIC timer runs in every sleep state. It does, and without the bit Linux wants an 8254.
        0x6 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (1 << 2, 0, 0, 0),
        // Performance counters, Intel's and AMD's: not given to guests.
        0xa | 0x8000_0022 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        HYPERVISOR_BASE if place.tsc_khz != 0 => entry.eax = entry.eax.max(HYPERVISOR_TIMING),
        0x8000_0001 if amd => {
            // Bits 23, 24 and 28: more counters. Bit 1: the package has several cores.
            entry.ecx &= !(1 << 23 | 1 << 24 | 1 << 28 | 1 << 1);
            entry.ecx |= u32::from(place.count > 1) << 1;
        }
        0x8000_0008 if amd => {
            entry.ecx = entry.ecx & !0xf0ff | (place.count() - 1) | place.core_bits() << 12;
        }
        0x8000_001d if amd => entry.eax = cache_sharing(entry.eax, place),
        // One thread per core, one node per package.
        0x8000_001e if amd => (entry.eax, entry.ebx, entry.ecx) = (place.apic_id(), place.apic_id(), 0),
        _ => {}
    }
}

fn adjust_features(entry: &mut kvm_cpuid_entry2, place: &Place) {
    const DEADLINE_TIMER: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    const SEVERAL_PER_PACKAGE: u32 = 1 << 28;
    let logical = place.count().next_power_of_two();
    entry.ebx = entry.ebx & 0xffff | logical << 16 | place.apic_id() << 24;
    entry.ecx = entry.ecx & !DEADLINE_TIMER | HYPERVISOR;
    if place.deadline_timer {
        entry.ecx |= DEADLINE_TIMER;
    }
    entry.edx &= !SEVERAL_PER_PACKAGE;
    if place.count > 1 {
        entry.edx |= SEVERAL_PER_PACKAGE;
    }
}

/// Bits 25:14, "processors that share this cache, less one": levels 1 and 2 belong to one core, level 3 to the package.
fn cache_sharing(eax: u32, place: &Place) -> u32 {
    let kind = eax & 0x1f;
    let level = eax >> 5 & 0x7;
    if kind == 0 {
        return 0;
    }
    let sharing = if level >= 3 { place.count() - 1 } else { 0 };
    eax & 0x3fff | sharing << 14
}

/// Leaf 0xb: level 0 is threads of a core (one), level 1 cores of the package.
fn extended_topology(place: &Place) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, shift: u32, processors: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: index | kind << 8,
        edx: place.apic_id(),
        ..Default::default()
    };
    [level(0, 0, 1, 1), level(1, place.core_bits(), place.count(), 2), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ..Default::default() }
    }

    fn host(vendor: &[u8; 4]) -> CpuId {
        let mut leaf0 = entry(0);
        leaf0.eax = 0x16;
        leaf0.ebx = u32::from_le_bytes(*vendor);
        let mut leaf1 = entry(1);
        leaf1.ebx = 0x2a10_0800;
        let mut l1 = entry(4);
        l1.eax = 0x3f << 26 | 1 << 14 | 1 << 5 | 1;
        let mut l3 = entry(4);
        l3.index = 3;
        l3.eax = 0x3f << 26 | 0xff << 14 | 3 << 5 | 3;
        let mut counters = entry(0xa);
        counters.eax = 0x0730_0404;
        let mut host_topology = entry(0xb);
        host_topology.edx = 0x99;
        let mut hypervisor = entry(HYPERVISOR_BASE);
        hypervisor.eax = 0x4000_0001;
        let rest = [entry(0x1f), entry(0x8000_0001), entry(0x8000_0008), entry(0x8000_001e)];
        let mut all = vec![leaf0, leaf1, l1, l3, counters, host_topology, hypervisor];
        all.extend(rest);
        CpuId::from_entries(&all).unwrap()
    }

    fn find(id: &CpuId, function: u32, nth: usize) -> kvm_cpuid_entry2 {
        *id.as_slice().iter().filter(|e| e.function == function).nth(nth).unwrap()
    }

    #[test]
    fn each_processor_is_a_core_of_one_package() {
        let place = Place { index: 2, count: 5, deadline_timer: true, tsc_khz: 2_000_000 };
        let id = for_vcpu(&host(b"Auth"), &place).unwrap();
        let features = find(&id, 1, 0);
        assert_eq!(features.ebx, 2 << 24 | 8 << 16 | 0x0800);
        assert_ne!(features.ecx & 1 << 24, 0);
        assert_ne!(features.ecx & 1 << 31, 0);
        assert_ne!(features.edx & 1 << 28, 0);
        assert_eq!(find(&id, 0xb, 0).ebx, 1);
        assert_eq!((find(&id, 0xb, 1).eax, find(&id, 0xb, 1).ebx, find(&id, 0xb, 1).edx), (3, 5, 2));
        assert_eq!(id.as_slice().iter().filter(|e| e.function == 0xb).count(), 3);
        assert!(!id.as_slice().iter().any(|e| e.function == 0x1f));
        assert_eq!(find(&id, 0x8000_0008, 0).ecx, 3 << 12 | 4);
        assert_eq!(find(&id, 0x8000_001e, 0).eax, 2);
    }

    #[test]
    fn wide_registers_need_xsave() {
        let mut features = entry(1);
        let mut sets = entry(0xd);
        sets.eax = 0x6_0007;
        let list = |entries: &[kvm_cpuid_entry2]| CpuId::from_entries(entries).unwrap();
        assert_eq!(wide_registers(&list(&[features, sets])), 0);
        features.ecx = 1 << 26;
        assert_eq!(wide_registers(&list(&[features, sets])), 7);
        assert_eq!(wide_registers(&list(&[features])), 0);
    }

    #[test]
    fn caches_are_shared_as_the_topology_says() {
        let place = Place { index: 0, count: 4, deadline_timer: false, tsc_khz: 0 };
        let id = for_vcpu(&host(b"Genu"), &place).unwrap();
        assert_eq!(find(&id, 4, 0).eax >> 14, 3 << 12);
        assert_eq!(find(&id, 4, 1).eax >> 14, 3 << 12 | 3);
        assert_eq!(find(&id, 1, 0).ecx & 1 << 24, 0);
    }

    #[test]
    fn counters_are_hidden_and_timing_is_told() {
        let place = Place { index: 0, count: 1, deadline_timer: true, tsc_khz: 2_500_000 };
        let id = for_vcpu(&host(b"Genu"), &place).unwrap();
        assert_eq!(find(&id, 0xa, 0).eax, 0);
        assert_eq!(find(&id, HYPERVISOR_BASE, 0).eax, HYPERVISOR_TIMING);
        assert_eq!(find(&id, HYPERVISOR_TIMING, 0).eax, 2_500_000);
        assert_eq!(find(&id, 1, 0).edx & 1 << 28, 0);
    }
}
