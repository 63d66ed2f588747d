//! Resource limits: what a process in a jail may take of the host at most.

use rustix::process::{Resource, Rlimit};

use crate::{JailError, step};

/// A limit that cannot be raised again.
///
/// # Errors
/// What the kernel answers.
pub fn set(resource: Resource, most: u64) -> Result<(), JailError> {
    // Above what is allowed, what is allowed stays.
    let allowed = rustix::process::getrlimit(resource).maximum;
    let most = allowed.map_or(most, |allowed| allowed.min(most));
    let limit = Rlimit { current: Some(most), maximum: Some(most) };
    rustix::process::setrlimit(resource, limit).map_err(step("set a resource limit"))
}
