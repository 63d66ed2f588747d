//! Capabilities, and the other powers that a process can give up for good.

use std::io;

use rustix::process::{DumpableBehavior, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::{JailError, step};

/// Capability numbers that a bounding set can hold.
const CAPABILITY_NUMBERS: u32 = 64;

/// What hyper-fs keeps: acting for the guest's users takes it. Not among them: `DAC_READ_SEARCH`, which opens files by handle around any
/// mount.
pub const FILE_SERVER: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// Gives up all capabilities but `kept`, and the chance of having others.
///
/// # Errors
/// What the kernel answers.
pub fn keep_capabilities(kept: CapabilitySet) -> Result<(), JailError> {
    limit_capabilities(kept).map_err(step("drop capabilities"))
}

fn limit_capabilities(kept: CapabilitySet) -> io::Result<()> {
    for number in 0..CAPABILITY_NUMBERS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if kept.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // The first that this kernel does not know.
            Err(rustix::io::Errno::INVAL) => break,
            other => other?,
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

/// No program that this process starts has more power than it.
///
/// # Errors
/// What the kernel answers.
pub fn no_new_privileges() -> Result<(), JailError> {
    rustix::thread::set_no_new_privs(true).map_err(step("give up new privileges"))
}

/// No core dump, and nobody of the same user may look into this process.
///
/// # Errors
/// What the kernel answers.
pub fn no_dumps() -> Result<(), JailError> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("forbid dumps"))
}

/// The kernel kills this process when the thread that spawned it ends. A change of ids undoes it. Should that thread have gone already,
/// the end of its socket is the end of this process.
///
/// # Errors
/// What the kernel answers.
pub fn die_with_parent() -> Result<(), JailError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(step("ask to die with the parent"))
}
