//! virtio-vsock (virtio 1.3, 5.10) whose host side is Unix stream sockets.
//!
//! A host program connects to the listener, writes `CONNECT <port>\n`, reads `OK <port>\n` and then has a stream to that guest
//! port. While the driver is not ready, host programs wait in the listener's backlog. For a connection of the guest a pair of sockets
//! is made, one end of which goes through the socket that was handed over for the port: no path is looked up.

mod callers;
mod connection;
mod handler;
mod request;
mod reset;
mod table;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

pub use self::callers::Callers;
use self::handler::{Queues, VsockHandler};
use self::table::Counters;
use crate::device::{ActivateContext, ActivateError, Handler, VirtioDevice};
use crate::state::{Reader, StateError, Writer};

/// Largest size of the receive, transmit and event queue.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// The device.
#[derive(Debug)]
pub struct Vsock {
    cid: u64,
    listener: UnixListener,
    callers: Arc<Callers>,
    counters: Arc<Counters>,
}

impl Vsock {
    /// A device for the guest with context id `cid`. Host programs come in at `listener`, the guest's connections go out by `callers`.
    ///
    /// # Errors
    /// When the listener is none.
    pub fn new(cid: u32, listener: UnixListener, callers: Callers) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { cid: cid.into(), listener, callers: Arc::new(callers), counters: Arc::default() })
    }
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
        let callers = Arc::clone(&self.callers);
        let side = table::HostSide::new(listener, callers, Arc::clone(&self.counters)).map_err(prepare)?;
        let handler =
            VsockHandler::new(self.cid, context.mem, context.interrupt, queues, side).map_err(prepare)?;
        Ok(vec![Box::new(handler)])
    }

    /// All connections ended with the handler, and the driver knows that.
    fn reset(&mut self) {
        self.counters.reset_due.store(false, Ordering::Relaxed);
    }

    /// Whether the driver has connections, and which ports it may know. They stay here; where the guest goes on it is told that it has none
    /// any more (5.10.6.7).
    fn save(&self) -> Result<Vec<u8>, StateError> {
        let open = self.counters.open.load(Ordering::Relaxed) > 0;
        let mut to = Writer::default();
        to.u8(u8::from(open || self.counters.reset_due.load(Ordering::Relaxed)));
        to.u32(self.counters.next_port.load(Ordering::Relaxed));
        Ok(to.done())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let mut from = Reader::new(state);
        let due = match from.u8()? {
            0 => false,
            1 => true,
            _ => return Err(StateError::Value { what: "connections" }),
        };
        let next_port = from.u32()?;
        from.end()?;
        if next_port < table::FIRST_HOST_PORT {
            return Err(StateError::Value { what: "a port of the host" });
        }
        self.counters.next_port.store(next_port, Ordering::Relaxed);
        self.counters.reset_due.store(due, Ordering::Relaxed);
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.read()
    }
}
