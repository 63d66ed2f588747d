//! Serving: the FUSE side comes from virtiofsd, the queues from vhost-user-backend.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::time::Timespec;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use virtiofsd::passthrough::{CachePolicy, Config, PassthroughFs};
use virtiofsd::vhost_user::VhostUserFsBackendBuilder;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::confine::View;

/// How long to wait for the one connection, which is made before this process is started.
const CONNECT_DEADLINE: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };
/// How long the guest may believe attributes and names, for it is not the only one that changes them.
const CACHE_TIMEOUT: Duration = Duration::from_secs(1);
/// Threads that serve requests, so that one `fsync` does not hold up every other file.
const THREADS: usize = 4;

/// Why files cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error("standard input is no listening Unix stream socket")]
    Socket(#[source] io::Error),
    #[error("nobody connected within {} s", CONNECT_DEADLINE.tv_sec)]
    Nobody,
    #[error("cannot open the shares")]
    Shares(#[source] io::Error),
    #[error("cannot start the threads that serve")]
    Threads(#[source] virtiofsd::vhost_user::Error),
    #[error("vhost-user: {0}")]
    VhostUser(vhost_user_backend::Error),
}

/// Takes the listening socket over from standard input.
pub(crate) fn take_listener() -> Result<UnixListener, ServeError> {
    let input = io::stdin();
    let listening = rustix::net::sockopt::socket_acceptconn(&input);
    if !listening.map_err(|error| ServeError::Socket(error.into()))? {
        return Err(ServeError::Socket(io::ErrorKind::NotConnected.into()));
    }
    let listener = UnixListener::from(input.as_fd().try_clone_to_owned().map_err(ServeError::Socket)?);
    listener.set_nonblocking(false).map_err(ServeError::Socket)?;
    let mut waiting = [PollFd::new(&listener, PollFlags::IN)];
    let ready = rustix::event::poll(&mut waiting, Some(&CONNECT_DEADLINE));
    match ready.map_err(|error| ServeError::Socket(error.into()))? {
        0 => Err(ServeError::Nobody),
        _ => Ok(listener),
    }
}

/// Serves what is in `/` until the connection ends.
pub(crate) fn serve(listener: UnixListener, view: View) -> Result<(), ServeError> {
    let config = Config {
        entry_timeout: CACHE_TIMEOUT,
        attr_timeout: CACHE_TIMEOUT,
        cache_policy: CachePolicy::Auto,
        root_dir: "/".to_owned(),
        proc_sfd_rawfd: Some(view.proc_self_fd),
        proc_mountinfo_rawfd: Some(view.mountinfo),
        guest_fd_limit: view.guest_files,
        xattr: true,
        // Spares a look for file capabilities with every write.
        killpriv_v2: true,
        // Each share is a mount of its own to the guest as well: files of two shares can have one inode number.
        announce_submounts: true,
        writeback: false,
        ..Config::default()
    };
    let files = PassthroughFs::new(config).map_err(ServeError::Shares)?;
    let backend = VhostUserFsBackendBuilder::default()
        .set_thread_pool_size(THREADS)
        .build(files)
        .map_err(ServeError::Threads)?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("hyper-fs".to_owned(), Arc::new(backend), memory)
        .map_err(ServeError::VhostUser)?;
    daemon.start(&mut Listener::from(listener)).map_err(ServeError::VhostUser)?;
    match daemon.wait() {
        Err(vhost_user_backend::Error::HandleRequest(error)) if ended(&error) => Ok(()),
        other => other.map_err(ServeError::VhostUser),
    }
}

/// Whether the other side has closed, in whatever state it was.
fn ended(error: &vhost::vhost_user::Error) -> bool {
    use vhost::vhost_user::Error as E;
    matches!(error, E::Disconnected | E::PartialMessage | E::SocketBroken(_))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_end_of_the_connection_is_an_orderly_end() {
        use vhost::vhost_user::Error as E;
        assert!(ended(&E::Disconnected) && ended(&E::PartialMessage));
        assert!(!ended(&E::InvalidMessage) && !ended(&E::InvalidParam));
    }
}
