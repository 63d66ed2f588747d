//! The only crate that opens /dev/kvm: a safe, small view of KVM.
//!
//! ```text
//! Hypervisor::open --create_machine--> Machine --create_vcpu--> Vcpu --run--> Exit
//!      |                                  |                       \--kicker--> Kicker (any thread: make run return)
//!      |                                  |--save, restore (of what is stopped) --> MachineState, VcpuState
//!      \--probe (is this KVM real?)       \--irqfd, ioeventfd
//! ```
//!
//! Guest memory is lent to KVM by [`Machine`], which keeps the mapping alive for as long as the machine or one of its
//! vCPUs exists; that is what makes the interface safe.

mod cpuid;
mod entry;
mod error;
mod kick;
mod machine;
pub mod memory;
mod probe;
mod state;
mod vcpu;

pub use entry::Entry;
pub use error::HvError;
pub use kick::{Kicker, install_kick_signal, kick_signal};
pub use machine::{Hypervisor, Machine};
pub use probe::{KvmKind, Probe, RingSpeed, probe};
pub use state::{MachineState, VcpuState};
pub use vcpu::{Exit, Fault, Vcpu};
