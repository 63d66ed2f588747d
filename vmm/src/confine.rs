//! The last layer of the jail, put up when the machine is built and before a guest runs: its limits, and few system calls.
//!
//! ```text
//!  main thread: begin --> events --spawns--> vCPU threads: vcpu --spawn--> disk_worker
//! ```
//! A thread is bound by the filters of those that made it, and by its own, which allows less.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

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

/// Processor time that the jail has taken, nanoseconds.
static SPENT_NS: AtomicU64 = AtomicU64::new(0);

/// Does what belongs to the jail, and counts what it takes.
pub(crate) fn counted<T>(what: impl FnOnce() -> T) -> T {
    let now = || {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
    };
    let before = now();
    let done = what();
    SPENT_NS.fetch_add(now().saturating_sub(before), Ordering::Relaxed);
    done
}

/// Processor time that the jail has taken, microseconds.
pub(crate) fn spent_us() -> u64 {
    SPENT_NS.load(Ordering::Relaxed) / 1000
}

static FILTERS: OnceLock<Filters> = OnceLock::new();

/// Binds the main thread, and makes the filters of the others.
pub(crate) fn begin(needs: &Needs) -> Result<(), JailError> {
    counted(|| begin_with(needs))
}

fn begin_with(needs: &Needs) -> Result<(), JailError> {
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
    if let Some(Err(e)) = FILTERS.get().map(|filters| counted(|| which(filters).apply())) {
        log::line(format_args!("{}", log::chain(&e)));
        std::process::abort();
    }
}
