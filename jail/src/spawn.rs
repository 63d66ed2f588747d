//! The part of the jail that only the parent can do: a child that is the first process of a process namespace, without one in between.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

/// Where this thread's next child would be.
const CHILDREN: &str = "/proc/thread-self/ns/pid_for_children";

/// Runs `spawn`, whose one child sees no process but itself and its own. The child's parent is outside: it reads 0 as its id. Without
/// root's power there is no such namespace, and the child is like any other.
///
/// `spawn` must not make a thread: the kernel refuses threads whose children would be elsewhere than their maker.
///
/// # Errors
/// What the kernel answers. When the way back is refused, this thread can start nothing any more.
pub fn in_pid_namespace<T>(spawn: impl FnOnce() -> T) -> io::Result<T> {
    let own: OwnedFd = rustix::fs::open(CHILDREN, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    match crate::namespaces(UnshareFlags::NEWPID) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(Errno::PERM.raw_os_error()) => return Ok(spawn()),
        Err(error) => return Err(error),
    }
    let spawned = spawn();
    move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID))?;
    Ok(spawned)
}
