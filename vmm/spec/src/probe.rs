//! What `hyper-vmm --probe` prints about this host's KVM: one line of JSON.

use serde::{Deserialize, Serialize};

/// Whether the processor or a program runs guest kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HostKvm {
    /// The processor.
    Hardware,
    /// A program that emulates them one instruction at a time: a kernel takes minutes to boot, or does not.
    Emulated,
}

/// What was found. A host can run machines when `accessible`, `missing_capabilities` is empty, `kind` is
/// [`HostKvm::Hardware`] and `error` is absent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// Whether there is a /dev/kvm with a driver behind it.
    pub present: bool,
    /// Whether it could be opened.
    pub accessible: bool,
    /// Version of the interface; 12 is the one that is needed.
    pub api_version: Option<i32>,
    /// Needed features that this KVM lacks, by their C names.
    pub missing_capabilities: Vec<String>,
    /// What runs guest kernels, when it could be measured.
    pub kind: Option<HostKvm>,
    /// Measured time per instruction of a loop in the guest's ring 0, picoseconds.
    pub guest_ring0_ps: Option<u64>,
    /// The same in ring 3 of the host, picoseconds.
    pub host_ring3_ps: Option<u64>,
    /// One line that says what is wrong and how to mend it.
    pub error: Option<String>,
}
