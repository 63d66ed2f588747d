//! Named points at which the store's tests kill the process; nothing at all in a real build.
//!
//! A point stands after each step that a crash could separate from the next one.

/// A place where a crash must leave the store usable.
#[cfg(not(test))]
pub(crate) fn point(_name: &'static str) {}

#[cfg(test)]
pub(crate) use armed::{CRASH_AT, point};

#[cfg(test)]
mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Environment variable of a test's child process: at which point, counted from 1, it dies.
    pub(crate) const CRASH_AT: &str = "HYPER_IMAGE_TEST_CRASH_AT";

    static PASSED: AtomicU64 = AtomicU64::new(0);
    static LIMIT: OnceLock<Option<u64>> = OnceLock::new();

    /// Counts the point and dies as by `kill -9` if it is the one that was asked for.
    pub(crate) fn point(_name: &'static str) {
        let limit = LIMIT.get_or_init(|| std::env::var(CRASH_AT).ok()?.parse().ok());
        if let Some(limit) = limit
            && PASSED.fetch_add(1, Ordering::SeqCst) + 1 == *limit
        {
            std::process::abort();
        }
    }
}
