//! What a saved machine is made from. All of it must be the same in a machine that goes on from it; a hash of it is a template's name.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::dirs::Parts;
use crate::launch::VmError;
use crate::launch::plan::{CMDLINE, GuestPlan};

/// Changed when what a template is, or how it is made, changes.
const FORMAT: u32 = 1;
/// Most memory of a machine that is saved, MiB: each has a map of its memory, which is saved with it (1.5 %).
const MOST_MEM_MIB: u32 = 8192;

/// The shape of a machine: what of it the guest learned when it booted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MachineShape {
    pub(super) vcpus: u8,
    pub(super) mem_mib: u32,
    pub(super) nets: usize,
    /// Serials, and whether they are read-only.
    pub(super) disks: Vec<(String, bool)>,
}

/// A file, by what changes when it is replaced or written to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileFacts {
    device: u64,
    inode: u64,
    bytes: u64,
    modified_ns: i128,
    changed_ns: i128,
}

/// All that a saved machine depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Inputs {
    format: u32,
    protocol: u32,
    /// This run of the host's kernel: with it go the processor, its microcode, the frequency of its counter and KVM's settings. The VMM
    /// looks at the processor's features once more.
    host_boot: String,
    vmm: FileFacts,
    kernel: FileFacts,
    initramfs: FileFacts,
    cmdline: String,
    shape: MachineShape,
}

impl FileFacts {
    fn of(part: &'static str, path: &Path) -> Result<Self, VmError> {
        let data =
            fs::metadata(path).map_err(|source| VmError::Part { part, path: path.to_owned(), source })?;
        let ns = |seconds: i64, ns: i64| i128::from(seconds) * 1_000_000_000 + i128::from(ns);
        Ok(Self {
            device: data.dev(),
            inode: data.ino(),
            bytes: data.size(),
            modified_ns: ns(data.mtime(), data.mtime_nsec()),
            changed_ns: ns(data.ctime(), data.ctime_nsec()),
        })
    }
}

impl MachineShape {
    /// The shape of the machine that is planned.
    pub(crate) fn planned(plan: &GuestPlan) -> Self {
        let disks = plan.disks.iter().map(|disk| (disk.id.to_owned(), disk.read_only)).collect();
        Self { vcpus: plan.vcpus, mem_mib: plan.mem_mib, nets: plan.nets.len(), disks }
    }

    /// vCPUs, and memory of the machine, MiB.
    pub(crate) fn size(&self) -> (u8, u32) {
        (self.vcpus, self.mem_mib)
    }

    /// The shape of the machine that is planned, or why it cannot start from a template.
    pub(crate) fn of(plan: &GuestPlan) -> Result<Self, &'static str> {
        if !plan.shares.is_empty() {
            // The file server needs memory that is shared with it, and a clone's is its own.
            Err("it shares directories with the host")
        } else if !plan.kernel_args.is_empty() {
            Err("it has kernel arguments of its own")
        } else if plan.growth.is_some() || plan.bays > 0 {
            Err("it may grow")
        } else if plan.mem_mib > MOST_MEM_MIB {
            Err("it has too much memory")
        } else {
            Ok(Self::planned(plan))
        }
    }

    /// The same with other memory.
    pub(crate) fn with_mem_mib(self, mem_mib: u32) -> Self {
        Self { mem_mib, ..self }
    }

    /// With all else that a saved machine of this shape depends on here and now.
    pub(crate) fn inputs(&self, parts: &Parts) -> Result<Inputs, VmError> {
        let host_boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map_err(|source| VmError::Descriptor { what: "a name for this run of the host", source })?;
        Ok(Inputs {
            format: FORMAT,
            protocol: hyper_protocol::PROTOCOL_VERSION,
            host_boot: host_boot.trim().to_owned(),
            vmm: FileFacts::of("hyper-vmm", &parts.vmm)?,
            kernel: FileFacts::of("the guest kernel", &parts.kernel)?,
            initramfs: FileFacts::of("the guest's initramfs", &parts.initramfs)?,
            cmdline: CMDLINE.to_owned(),
            shape: self.clone(),
        })
    }
}

#[cfg(test)]
impl MachineShape {
    /// A small one.
    pub(crate) fn of_tests() -> Self {
        Self { vcpus: 1, mem_mib: 64, nets: 1, disks: vec![("image".to_owned(), true)] }
    }
}

impl Inputs {
    /// The shape of the machine.
    pub(crate) fn shape(&self) -> &MachineShape {
        &self.shape
    }

    /// Name of the template's folder. Two inputs of one name are told apart by the file in it.
    pub(super) fn name(&self) -> String {
        const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
        const PRIME: u64 = 0x0100_0000_01b3;
        // Plain data without maps: it cannot fail, and is the same for the same inputs.
        let text = serde_json::to_vec(self).unwrap_or_default();
        let hash = text.iter().fold(BASIS, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(PRIME));
        format!("{}{hash:016x}", super::store::PREFIX)
    }

    /// Whether they differ in the shape only: then both are of use on this host.
    pub(super) fn same_but_shape(&self, other: &Self) -> bool {
        Self { shape: other.shape.clone(), ..self.clone() } == *other
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::launch::plan::tests::plan;
    use crate::launch::plan::{GrowthPlan, SharePlan};

    pub(in crate::launch::template) fn parts(dir: &Path) -> Parts {
        let parts = Parts::in_dir(dir, dir);
        for path in [&parts.vmm, &parts.kernel, &parts.initramfs] {
            fs::write(path, "part").unwrap();
        }
        parts
    }

    #[test]
    fn inputs_change_with_every_part() {
        let dir = tempfile::tempdir().unwrap();
        let parts = parts(dir.path());
        let mut plan = plan(dir.path());
        plan.kernel_args.clear();
        let shape = MachineShape::of(&plan).unwrap();
        let first = shape.inputs(&parts).unwrap();
        assert_eq!(first, shape.inputs(&parts).unwrap());
        for path in [&parts.vmm, &parts.kernel, &parts.initramfs] {
            let before = shape.inputs(&parts).unwrap();
            fs::write(path, "another part").unwrap();
            let after = shape.inputs(&parts).unwrap();
            assert_ne!(before.name(), after.name());
            assert!(!before.same_but_shape(&after));
        }
        let other = shape.clone().with_mem_mib(7).inputs(&parts).unwrap();
        let now = shape.inputs(&parts).unwrap();
        assert_ne!(now.name(), other.name());
        assert!(now.same_but_shape(&other));
        fs::remove_file(&parts.kernel).unwrap();
        assert!(shape.inputs(&parts).unwrap_err().to_string().contains("the guest kernel"));
    }

    #[test]
    fn machines_that_cannot_be_cloned_say_why() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |change: &dyn Fn(&mut GuestPlan)| {
            let mut plan = plan(dir.path());
            plan.kernel_args.clear();
            change(&mut plan);
            MachineShape::of(&plan).unwrap_err()
        };
        let share = SharePlan { name: "0".into(), source: "/".into(), read_only: true, live: false };
        assert!(refused(&|plan| plan.shares.push(share.clone())).contains("shares"));
        assert!(refused(&|plan| plan.kernel_args.push("quiet".into())).contains("kernel arguments"));
        let growth = GrowthPlan { max_vcpus: 2, hot_mem_mib: 0 };
        assert!(refused(&|plan| plan.growth = Some(growth)).contains("grow"));
        assert!(refused(&|plan| plan.mem_mib = MOST_MEM_MIB + 1).contains("memory"));
    }
}
