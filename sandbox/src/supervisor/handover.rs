//! What the starter hands over on standard input: the container's lock, with the first byte.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::store::{FileLock, HANDOVER};
use crate::{Home, SandboxError};

/// How long the starter may take: it sends the byte before it spawns us.
const WAIT: std::time::Duration = std::time::Duration::from_secs(10);

/// Takes the lock and the conversation from standard input, which is /dev/null afterwards.
pub(super) fn take(home: &Home, id: &str) -> Result<(FileLock, UnixStream), SandboxError> {
    let stdin = rustix::stdio::stdin();
    let socket =
        stdin.as_fd().try_clone_to_owned().map_err(|_| SandboxError::NotStarted("no standard input"))?;
    let null =
        std::fs::File::open("/dev/null").map_err(|source| SandboxError::io("open", "/dev/null", source))?;
    // Else our own copy would keep the conversation open after its end.
    rustix::stdio::dup2_stdin(&null).map_err(|error| SandboxError::io("replace", "standard input", error))?;
    let fd = receive(&socket)?;
    let lock = FileLock::adopt(fd, &home.container_lock(id));
    let lock = lock.ok_or(SandboxError::NotStarted("the lock is another container's"))?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(true).map_err(|source| SandboxError::io("use", "standard input", source))?;
    Ok((lock, stream))
}

fn receive(socket: &OwnedFd) -> Result<OwnedFd, SandboxError> {
    set_socket_timeout(socket, Timeout::Recv, Some(WAIT))
        .map_err(|_| SandboxError::NotStarted("standard input is no socket"))?;
    let mut byte = [0];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC);
    let received = received.map_err(|error| SandboxError::io("read", "standard input", error))?;
    let mut fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fd = fds.next().and_then(|mut fds| fds.next());
    match fd {
        Some(fd) if received.bytes == 1 && byte == [HANDOVER] => Ok(fd),
        _ => Err(SandboxError::NotStarted("nothing was handed over")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::hand_over;

    #[test]
    fn lock_travels_and_stays_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let lock = FileLock::try_take(&path).unwrap().unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        hand_over(&near, &lock).unwrap();
        drop(lock);
        assert!(FileLock::try_take(&path).unwrap().is_none(), "in flight");
        let received = FileLock::adopt(receive(&far.into()).unwrap(), &path).unwrap();
        assert!(FileLock::try_take(&path).unwrap().is_none(), "arrived");
        drop(received);
        assert!(FileLock::try_take(&path).unwrap().is_some());
    }

    #[test]
    fn unread_lock_is_free_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let lock = FileLock::try_take(&path).unwrap().unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        hand_over(&near, &lock).unwrap();
        drop((lock, near, far));
        assert!(FileLock::try_take(&path).unwrap().is_some());
    }

    #[test]
    fn nothing_handed_over_is_an_error() {
        let (near, far) = UnixStream::pair().unwrap();
        drop(near);
        assert!(matches!(receive(&far.into()), Err(SandboxError::NotStarted(_))));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(receive(&file.into()), Err(SandboxError::NotStarted(_))));
    }
}
