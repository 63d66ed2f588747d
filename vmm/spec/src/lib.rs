//! What a virtual machine is to be (`VmSpec`) and what is said to a running one (`control`): plain data.
//!
//! Nothing here opens anything. File descriptors are named by [`FdSlot`]: a position in the list of descriptors that
//! travels with the boot message (see [`control`]).
#![forbid(unsafe_code)]

pub mod control;
pub mod probe;
mod spec;

pub use spec::{
    BalloonSpec, DeviceSpec, DiskId, DiskSpec, FdSlot, HOT_MEM_STEP_MIB, HostPort, HotMemorySpec,
    MAX_CMDLINE_BYTES, MAX_DEVICES, MAX_HOST_PORTS, MAX_MEM_MIB, MAX_VCPUS, MIN_MEM_MIB, NetSpec, ShareSpec,
    SpecError, VmSpec, VsockSpec,
};
