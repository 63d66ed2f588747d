//! How much memory the VM must have so that `MemTotal` in the guest is what was asked for.
//!
//! `MemTotal` is what the machine has, less: the kernel's image and fixed tables; a map of 2 MiB for each section of 128 MiB that is
//! begun; what each further vCPU costs; hash tables that grow with memory. All but the first are the same for every kernel that we
//! build. The first is learned: every start compares what came out with what was expected, and remembers it for this kernel, so that
//! from its second start on a kernel's guests are exact to the MiB.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::SandboxError;
use crate::dirs::Parts;
use crate::state::{read_json, write_json};

/// What a kernel is taken to need before it has been seen, KiB: measured on 6.12, and a little more.
const FIXED_KIB: u64 = 17 * 1024;
/// What is believed at all, KiB: a damaged file must not make machines that cannot boot.
const PLAUSIBLE_KIB: std::ops::RangeInclusive<u64> = 4 * 1024..=64 * 1024;
/// Margin, so that the guest never has less than was asked for, KiB.
const MARGIN_KIB: u64 = 256;
/// Memory that is described by one block of the memory map, MiB, and the size of the block, KiB.
const SECTION_MIB: u64 = 128;
const SECTION_MAP_KIB: u64 = 2048;
/// What each vCPU after the first costs, KiB.
const PER_CPU_KIB: u64 = 1250;
/// Hash tables: KiB for each 1000 MiB.
const HASHES_KIB_PER_1000_MIB: u64 = 1200;

/// What the kernel does not count as `MemTotal` but for its fixed part, KiB.
fn variable_kib(vm_mib: u64, vcpus: u8) -> u64 {
    vm_mib.div_ceil(SECTION_MIB) * SECTION_MAP_KIB
        + u64::from(vcpus).saturating_sub(1) * PER_CPU_KIB
        + vm_mib * HASHES_KIB_PER_1000_MIB / 1000
}

/// Memory of the VM, MiB, for a container of `mem_mib` with `vcpus`, when the kernel's fixed part is known.
fn vm_mem_mib(mem_mib: u32, vcpus: u8, fixed_kib: u64) -> u32 {
    let wanted_kib = u64::from(mem_mib) * 1024 + fixed_kib + MARGIN_KIB;
    let mut vm_mib = u64::from(mem_mib);
    // Each round adds what the last one's memory needs to be described; it settles within a few.
    while vm_mib * 1024 < wanted_kib + variable_kib(vm_mib, vcpus) {
        vm_mib = (wanted_kib + variable_kib(vm_mib, vcpus)).div_ceil(1024);
    }
    u32::try_from(vm_mib).unwrap_or(u32::MAX)
}

/// The fixed part that explains what came out.
fn observed_fixed_kib(vm_mib: u32, vcpus: u8, mem_total_bytes: u64) -> u64 {
    let missing_kib = (u64::from(vm_mib) * 1024).saturating_sub(mem_total_bytes / 1024);
    missing_kib.saturating_sub(variable_kib(u64::from(vm_mib), vcpus))
}

/// What is remembered of a kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    kernel_bytes: u64,
    kernel_modified_ns: i64,
    fixed_kib: u64,
}

/// Sizes machines for one kernel.
#[derive(Debug)]
pub(crate) struct MemorySizing {
    path: PathBuf,
    seen: Seen,
    known: bool,
}

impl MemorySizing {
    /// What is known of this kernel; the file is in `dir`.
    pub(crate) fn load(dir: &Path, parts: &Parts) -> Self {
        use std::os::unix::fs::MetadataExt;
        let path = dir.join("guest-memory.json");
        let (kernel_bytes, kernel_modified_ns) = std::fs::metadata(&parts.kernel).map_or((0, 0), |data| {
            (data.len(), data.mtime().saturating_mul(1_000_000_000).saturating_add(data.mtime_nsec()))
        });
        let same = |seen: &Seen| {
            seen.kernel_bytes == kernel_bytes
                && seen.kernel_modified_ns == kernel_modified_ns
                && PLAUSIBLE_KIB.contains(&seen.fixed_kib)
        };
        let seen = read_json::<Seen>(&path).ok().flatten().filter(same);
        let known = seen.is_some();
        let seen = seen.unwrap_or(Seen { kernel_bytes, kernel_modified_ns, fixed_kib: FIXED_KIB });
        Self { path, seen, known }
    }

    /// Memory of the VM, MiB, for a container of `mem_mib` with `vcpus`.
    pub(crate) fn vm_mem_mib(&self, mem_mib: u32, vcpus: u8) -> u32 {
        vm_mem_mib(mem_mib, vcpus, self.seen.fixed_kib)
    }

    /// Remembers what came out, if the kernel was new or something came out short.
    pub(crate) fn learn(&mut self, vm_mib: u32, vcpus: u8, mem_total_bytes: u64) -> Result<(), SandboxError> {
        let observed = observed_fixed_kib(vm_mib, vcpus, mem_total_bytes);
        let better = !self.known || observed > self.seen.fixed_kib;
        if !better || !PLAUSIBLE_KIB.contains(&observed) {
            return Ok(());
        }
        tracing::debug!(fixed_kib = observed, "memory of this kernel");
        self.seen.fixed_kib = observed;
        self.known = true;
        match self.path.parent() {
            Some(dir) => crate::store::make_private_dir(dir)?,
            None => return Ok(()),
        }
        write_json(&self.path, &self.seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `MemTotal` of a kernel with this fixed part.
    fn mem_total(vm_mib: u32, vcpus: u8, fixed_kib: u64) -> u64 {
        (u64::from(vm_mib) * 1024 - variable_kib(u64::from(vm_mib), vcpus) - fixed_kib) * 1024
    }

    #[test]
    fn guests_get_what_was_asked_for_within_two_percent() {
        for mem_mib in [32, 64, 100, 128, 512, 1024, 2048, 16 * 1024, 1 << 19] {
            for vcpus in [1, 2, 32] {
                let vm = vm_mem_mib(mem_mib, vcpus, 16_000);
                let total = mem_total(vm, vcpus, 16_000);
                let wanted = u64::from(mem_mib) << 20;
                assert!(total >= wanted, "{mem_mib} {vcpus}: {total}");
                assert!(total - wanted < (2 << 20) + wanted / 50, "{mem_mib} {vcpus}: {total}");
            }
        }
    }

    #[test]
    fn model_fits_what_was_measured() {
        // Linux 6.12 with one to four vCPUs: MiB of the VM, vCPUs, KiB of MemTotal.
        for (vm_mib, vcpus, total_kib) in
            [(92, 1, 76_144), (157, 1, 140_464), (547, 1, 533_552), (548, 2, 533_368), (2109, 4, 2_102_288)]
        {
            let fixed = observed_fixed_kib(vm_mib, vcpus, total_kib * 1024);
            assert!((15_500..=16_500).contains(&fixed), "{vm_mib} MiB: {fixed}");
        }
    }

    #[test]
    fn kernels_are_learned_and_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let parts = Parts::in_dir(dir.path(), dir.path());
        std::fs::write(&parts.kernel, "kernel").unwrap();
        let mut sizing = MemorySizing::load(dir.path(), &parts);
        let first = sizing.vm_mem_mib(512, 1);
        sizing.learn(first, 1, mem_total(first, 1, 9_000)).unwrap();
        let sizing = MemorySizing::load(dir.path(), &parts);
        let second = sizing.vm_mem_mib(512, 1);
        assert!(second + 7 <= first, "{second} {first}");
        assert!(mem_total(second, 1, 9_000) >= 512 << 20);
        std::fs::write(&parts.kernel, "another kernel").unwrap();
        assert_eq!(MemorySizing::load(dir.path(), &parts).vm_mem_mib(512, 1), first);
    }

    #[test]
    fn nonsense_is_not_learned() {
        let dir = tempfile::tempdir().unwrap();
        let parts = Parts::in_dir(dir.path(), dir.path());
        let mut sizing = MemorySizing::load(dir.path(), &parts);
        let before = sizing.vm_mem_mib(512, 1);
        sizing.learn(before, 1, 0).unwrap();
        sizing.learn(before, 1, u64::MAX).unwrap();
        assert_eq!(MemorySizing::load(dir.path(), &parts).vm_mem_mib(512, 1), before);
        std::fs::write(dir.path().join("guest-memory.json"), "{").unwrap();
        assert_eq!(MemorySizing::load(dir.path(), &parts).vm_mem_mib(512, 1), before);
    }
}
