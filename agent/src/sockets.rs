//! Unix sockets of the host in containers: what connects here is connected there, through a vsock connection of its own.
//!
//! The supervisor knows which socket a number means; a guest can name those only that its containers were given.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_protocol::SOCKET_PORT;
use tokio::io::{AsyncWriteExt, copy_bidirectional};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_vsock::{VsockAddr, VsockStream};

use crate::child::rootfs::SOCKET_DIR;
use crate::error::{AgentError, Tried};
use crate::log;
use crate::plan::{CreatePlan, VolumeSource};
use crate::streams::HOST_CID;

/// Most connections at a time, of all containers; more wait in their listeners' queues.
const MAX_CONNECTIONS: usize = 256;
/// How long the host may take to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Bits of a mode that a socket's file gets.
const MODE: u32 = 0o777;

/// Where sockets come from.
#[derive(Debug)]
pub(crate) struct HostSockets {
    room: Arc<Semaphore>,
}

impl Default for HostSockets {
    fn default() -> Self {
        Self { room: Arc::new(Semaphore::new(MAX_CONNECTIONS)) }
    }
}

/// A listener that stands for a socket of the host; gone when this is dropped. Connections that were made stay.
#[derive(Debug)]
pub(crate) struct HostSocket {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl Drop for HostSocket {
    fn drop(&mut self) {
        self.task.abort();
        // Its folder is memory: nothing but this names it.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl HostSockets {
    /// Listens in place of each socket of the host that a plan has; their names are their numbers in [`SOCKET_DIR`].
    ///
    /// # Errors
    /// What the kernel answers, for a number that is in use too.
    pub(crate) fn stand_in(&self, plan: &CreatePlan) -> Result<Vec<HostSocket>, AgentError> {
        let mut made = Vec::new();
        for volume in &plan.volumes {
            let VolumeSource::Socket { id, mode, uid, gid } = volume.source else { continue };
            let path = Path::new(SOCKET_DIR).join(id.to_string());
            let tried = || format!("listen for {}", volume.destination);
            let listener = UnixListener::bind(&path).tried(tried)?;
            let task = tokio::spawn(serve(listener, id, Arc::clone(&self.room)));
            made.push(HostSocket { path: path.clone(), task });
            std::os::unix::fs::chown(&path, Some(uid), Some(gid)).tried(tried)?;
            std::fs::set_permissions(&path, Permissions::from_mode(mode & MODE)).tried(tried)?;
        }
        Ok(made)
    }
}

async fn serve(listener: UnixListener, id: u64, room: Arc<Semaphore>) {
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                tokio::spawn(async move {
                    // Whichever side breaks it off, both are closed after this.
                    let _ = bridge(client, id).await;
                    drop(permit);
                });
            }
            Err(error) => {
                log::error(format!("accept a client of a host's socket: {error}"));
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn bridge(mut client: UnixStream, id: u64) -> std::io::Result<()> {
    let connect = VsockStream::connect(VsockAddr::new(HOST_CID, SOCKET_PORT));
    let mut host = timeout(CONNECT_TIMEOUT, connect).await??;
    host.write_all(&id.to_le_bytes()).await?;
    copy_bidirectional(&mut client, &mut host).await.map(drop)
}
