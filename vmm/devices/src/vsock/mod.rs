//! virtio-vsock (virtio 1.3, 5.10) whose host side is Unix stream sockets.
//!
//! A host program connects to the listener, writes `CONNECT <port>\n`, reads `OK <port>\n` and then has a stream to that guest
//! port; a connection of the guest to host port P arrives on the listener at `<path>_<P>`. While the driver is not ready, host
//! programs wait in the listener's backlog.

mod connection;
mod handler;
mod request;
mod table;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::net::SocketAddrUnix;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use self::handler::{Queues, VsockHandler};
use self::table::Counters;
use crate::device::{ActivateContext, ActivateError, Handler, VirtioDevice};
use crate::state::StateError;

/// Largest size of the receive, transmit and event queue.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// The device.
#[derive(Debug)]
pub struct Vsock {
    cid: u64,
    path: PathBuf,
    listener: UnixListener,
    counters: Arc<Counters>,
}

impl Vsock {
    /// A device for the guest with context id `cid`, listening at `uds_path`, which must not exist yet. The socket file is
    /// removed when the device is dropped.
    ///
    /// # Errors
    /// When the path with its `_<port>` suffix is too long for a Unix socket address, or the listener cannot be made.
    pub fn new(cid: u32, uds_path: impl AsRef<Path>) -> io::Result<Self> {
        let path = uds_path.as_ref().to_owned();
        SocketAddrUnix::new(port_path(&path, u32::MAX))?;
        let listener = UnixListener::bind(&path)?;
        let device = Self { cid: cid.into(), path, listener, counters: Arc::default() };
        device.listener.set_nonblocking(true)?;
        Ok(device)
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        // The directory may be gone, with all that was in it.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Where the host listens for guest connections to `port`.
fn port_path(path: &Path, port: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{port}"));
    name.into()
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &'static str {
        "vsock"
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    /// `guest_cid`, 8 bytes.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::config::read(&self.cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, context: ActivateContext) -> Result<Vec<Handler>, ActivateError> {
        let prepare = |source| ActivateError::Io { what: "the vsock event set", source };
        let queues = Queues::take(context.queues)?;
        let listener = self.listener.try_clone().map_err(prepare)?;
        let side =
            table::HostSide::new(listener, self.path.clone(), Arc::clone(&self.counters)).map_err(prepare)?;
        let handler =
            VsockHandler::new(self.cid, context.mem, context.interrupt, queues, side).map_err(prepare)?;
        Ok(vec![Box::new(handler)])
    }

    /// All connections ended with the handler.
    fn reset(&mut self) {}

    /// Nothing, and only without connections: a guest that is continued elsewhere must not believe in any. So it needs no reset of the
    /// transport (5.10.6.7) either.
    fn save(&self) -> Result<Vec<u8>, StateError> {
        match self.counters.open.load(Ordering::Relaxed) {
            0 => Ok(Vec::new()),
            open => {
                Err(StateError::Unsaved { device: self.name(), why: format!("{open} connections are open") })
            }
        }
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.read()
    }
}
