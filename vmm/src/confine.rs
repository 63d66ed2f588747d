//! The last layer of the jail, put up when the machine is built and before a guest runs: its limits, and few system calls.
//!
//! ```text
//!  main thread: begin --> events --spawns--> vCPU threads: vcpu --spawn--> disk_worker
//! ```
//! A thread is bound by the filters of those that made it, and by its own, which allows less.

use std::sync::OnceLock;

use hyper_jail::JailError;
use hyper_jail::filter::Filter;
use hyper_jail::vmm::{Kind, bound};
use hyper_vmm_spec::control::exit_code;

use crate::log;

/// What a machine takes of the host while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Needs {
    /// Guest memory that is no file's.
    pub(crate) private_bytes: u64,
    /// Length of the longest file that is written to; none where it is not known.
    pub(crate) file_bytes: Option<u64>,
}

/// Filters of the threads that come later, made once.
#[derive(Debug)]
struct Filters {
    vcpu: Filter,
    disk: Filter,
}

static FILTERS: OnceLock<Filters> = OnceLock::new();

/// Binds the main thread, and makes the filters of the others.
pub(crate) fn begin(needs: &Needs) -> Result<(), JailError> {
    bound(needs.private_bytes, needs.file_bytes)?;
    hyper_jail::exit_on_forbidden_calls(exit_code::FORBIDDEN)?;
    let events = Kind::Events.filter()?;
    let filters = Filters { vcpu: Kind::Vcpu.filter()?, disk: Kind::Disk.filter()? };
    // One machine is built in a process.
    FILTERS.get_or_init(|| filters);
    events.apply()
}

/// Binds the thread of a virtual processor.
pub(crate) fn vcpu() {
    bind(|filters| &filters.vcpu);
}

/// Binds the thread of a disk.
pub(crate) fn disk_worker() {
    bind(|filters| &filters.disk);
}

/// A thread that cannot be bound does not go on, and neither does the process.
fn bind(which: impl FnOnce(&Filters) -> &Filter) {
    if let Some(Err(e)) = FILTERS.get().map(|filters| which(filters).apply()) {
        log::line(format_args!("{}", log::chain(&e)));
        std::process::abort();
    }
}
