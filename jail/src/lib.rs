//! The jail of a process that serves a guest: what it was started with is taken away, layer by layer, before it meets anything of the guest.
//!
//! ```text
//!  supervisor: spawn::in_pid_namespace --fork, exec--> inherited descriptors closed -> what is needed from outside is opened
//!    -> namespaces -> empty root -> limits -> ids of nobody -> no capability, no new privileges, no dumps   (vmm::close)
//!    -> the machine is built from handed descriptors -> limits of this machine -> few system calls          (vmm::bound, filter)
//! ```
//!
//! [`vmm`] is the jail of hyper-vmm, in its order. hyper-fs has its own order, because shares are mounted into its root, and takes the
//! layers from here: [`root`], [`privileges`], [`limits`], [`filter`]. What is there in the end, [`report`] reads from outside.

pub mod filter;
pub mod ids;
pub mod limits;
pub mod privileges;
pub mod report;
pub mod root;
pub mod spawn;
mod sys;
pub mod vmm;

use std::io;

pub use crate::sys::{close_inherited, exit_on_forbidden_calls, namespaces};
pub use rustix::thread::{CapabilitySet, UnshareFlags};

/// Which layer could not be put up.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The kernel refused a step.
    #[error("cannot {what}")]
    Step {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A filter of system calls cannot be made.
    #[error("cannot build the filter of system calls")]
    Build(#[from] seccompiler::BackendError),
    /// A filter of system calls was refused.
    #[error("the kernel refuses the filter of system calls")]
    Filter(#[from] seccompiler::Error),
}

/// Names the step that failed.
pub fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| JailError::Step { what, source: source.into() }
}
