//! The part of the jail that only the parent can do: a child that is the first process of a process namespace, without one in between.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::ids;

/// Where this thread's next child would be.
const CHILDREN: &str = "/proc/thread-self/ns/pid_for_children";

/// Runs `spawn`, whose one child, of which `id` tells the number, sees no process but itself and its own. The child's parent is outside: it
/// reads 0 as its id. Without root's power there is no such namespace, and the child is like any other.
///
/// `spawn` must not make a thread: the kernel refuses threads whose children would be elsewhere than their maker.
///
/// # Errors
/// What the kernel answers. When the way back is refused, this thread can start nothing any more.
pub fn in_pid_namespace<T: Send + 'static>(
    spawn: impl FnOnce() -> T + Send + 'static,
    id: fn(&T) -> Option<u32>,
) -> io::Result<T> {
    if ids::is_alone().map_err(io::Error::other)? {
        return by_a_thread(spawn, id);
    }
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

/// The host's process namespace is not a user's, so from a user namespace of that user's nobody comes back to it: a thread goes, and stays as
/// long as the child, which dies with whoever spawned it.
fn by_a_thread<T: Send + 'static>(
    spawn: impl FnOnce() -> T + Send + 'static,
    id: fn(&T) -> Option<u32>,
) -> io::Result<T> {
    let (tell, told) = mpsc::sync_channel(1);
    let parent = move || {
        let spawned = crate::namespaces(UnshareFlags::NEWPID).map(|()| spawn());
        let child = spawned.as_ref().ok().and_then(id).and_then(|id| Pid::from_raw(id.cast_signed()));
        if tell.send(spawned).is_ok()
            && let Some(child) = child
        {
            // Somebody else takes its status; when that has happened already there is nothing to wait for either.
            let ended = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            while waitid(WaitId::Pid(child), ended).is_err_and(|error| error == Errno::INTR) {}
        }
    };
    std::thread::Builder::new().name("parent".to_owned()).spawn(parent)?;
    told.recv().map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn number(child: &io::Result<Child>) -> Option<u32> {
        child.as_ref().ok().map(Child::id)
    }

    #[test]
    fn a_child_of_a_thread_outlives_the_call_and_not_the_thread() {
        if !rustix::process::geteuid().is_root() {
            // It takes root's power, or a namespace in which to have it.
            return;
        }
        let spawn = || {
            let mut command = Command::new("sh");
            // The first of its namespace.
            command
                .args(["-c", "test $$ = 1 || exit 7; read line; exit 5"])
                .stdin(std::process::Stdio::piped())
                .spawn()
        };
        let mut child = by_a_thread(spawn, number).unwrap().unwrap();
        assert!(child.try_wait().unwrap().is_none(), "it waits for a line");
        drop(child.stdin.take());
        assert_eq!(child.wait().unwrap().code(), Some(5), "the first, and no line came");
    }
}
