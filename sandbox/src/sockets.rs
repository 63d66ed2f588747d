//! Unix sockets of the host in a guest: who connects there is connected here.
//!
//! A guest says which socket it means by a number that it was given with a mount. Any of its processes may use any number of its sandbox's
//! containers: the wall is around the sandbox.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper_protocol::SOCKET_PORT;
use hyper_protocol::rpc::agent::SocketSource;
use rustix::fs::{FileType, Mode, OFlags};
use tokio::io::{AsyncReadExt, copy_bidirectional};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::launch::{Callers, HostPortPlan, scaled_ms};

/// Most connections of one sandbox at a time; more wait.
const MAX_CONNECTIONS: usize = 256;
/// How long a guest may take to say which socket it means, and a server whose queue is full to make room.
const CONNECT_MS: u64 = 10_000;
/// Between two tries with a full queue, which tells nobody when it has room.
const RETRY: Duration = Duration::from_millis(20);

type Offers = Arc<Mutex<BTreeMap<u64, Arc<OwnedFd>>>>;

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The sockets of one sandbox.
#[derive(Debug)]
pub(crate) struct HostSockets {
    offers: Offers,
    next: AtomicU64,
    task: JoinHandle<()>,
}

/// A socket that a guest may connect to, until this is dropped. Connections that were made stay.
#[derive(Debug)]
pub(crate) struct Offer {
    source: SocketSource,
    offers: Offers,
}

impl Offer {
    /// What the agent is told.
    pub(crate) fn source(&self) -> SocketSource {
        self.source.clone()
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        held(&self.offers).remove(&self.source.id);
    }
}

impl HostSockets {
    /// Serves a port, and what the VMM is given for it.
    ///
    /// # Errors
    /// No socket can be made.
    pub(crate) fn serve() -> io::Result<(Self, HostPortPlan)> {
        let (callers, plan) = Callers::of_port(SOCKET_PORT)?;
        let offers = Offers::default();
        let task = tokio::spawn(answer(callers, Arc::clone(&offers)));
        Ok((Self { offers, next: AtomicU64::new(1), task }, plan))
    }

    /// Offers what is at a path, if it is a socket. As with a bind mount it is that socket for good, whatever its name becomes: a name in
    /// a folder that containers can write to must not lead them anywhere else.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub(crate) fn offer(&self, path: &Path) -> io::Result<Option<Offer>> {
        let socket = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let stat = rustix::fs::fstat(&socket)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
            return Ok(None);
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let source = SocketSource {
            id,
            mode: stat.st_mode & 0o777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            ..SocketSource::default()
        };
        held(&self.offers).insert(id, Arc::new(socket));
        Ok(Some(Offer { source, offers: Arc::clone(&self.offers) }))
    }
}

impl Drop for HostSockets {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(callers: Callers, offers: Offers) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        match callers.next().await {
            Ok(Some(guest)) => drop(tokio::spawn(join(guest, Arc::clone(&offers), place))),
            Ok(None) => return,
            Err(error) => tracing::warn!(%error, "a connection of the guest is dropped"),
        }
    }
}

async fn join(mut guest: UnixStream, offers: Offers, _place: OwnedSemaphorePermit) {
    let joined = timeout(scaled_ms(CONNECT_MS), async {
        let id = guest.read_u64_le().await?;
        let socket = held(&offers).get(&id).cloned();
        let socket = socket.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        connect(&socket).await
    });
    match joined.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        // Whichever side breaks it off, both are closed after this.
        Ok(mut server) => drop(copy_bidirectional(&mut guest, &mut server).await),
        Err(error) => tracing::debug!(%error, "a socket of the host is not reached"),
    }
}

/// Connects to the very socket that was opened.
async fn connect(socket: &OwnedFd) -> io::Result<UnixStream> {
    let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
    loop {
        match UnixStream::connect(&path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => tokio::time::sleep(RETRY).await,
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::callers_testing::call;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    async fn asked(plan: &HostPortPlan, id: u64) -> String {
        let mut guest = call(plan);
        tokio::task::spawn_blocking(move || {
            guest.write_all(&id.to_le_bytes()).unwrap();
            guest.write_all(b"?").unwrap();
            let mut text = String::new();
            // Refused is closed, with or without an error.
            drop(guest.read_to_string(&mut text));
            text
        })
        .await
        .unwrap()
    }

    fn server(path: &Path, says: &'static str) {
        let listener = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let mut client = client.unwrap();
                client.read_exact(&mut [0]).unwrap();
                client.write_all(says.as_bytes()).unwrap();
            }
        });
    }

    #[tokio::test]
    async fn a_guest_reaches_what_it_was_offered_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("one"), dir.path().join("other"));
        server(&path, "one");
        server(&other, "other");
        let (sockets, plan) = HostSockets::serve().unwrap();
        assert!(sockets.offer(dir.path()).unwrap().is_none());
        assert!(sockets.offer(&dir.path().join("nothing")).is_err());
        let offer = sockets.offer(&path).unwrap().unwrap();
        let id = offer.source().id;
        assert_eq!(asked(&plan, id).await, "one");
        assert_eq!(asked(&plan, id + 1).await, "");
        assert_eq!(asked(&plan, 0).await, "");
        // Whoever can change the folder cannot lead the guest elsewhere.
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert_eq!(asked(&plan, id).await, "one");
        drop(offer);
        assert_eq!(asked(&plan, id).await, "");
    }
}
