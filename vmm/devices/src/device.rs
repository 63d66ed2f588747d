//! What a virtio device offers to its transport, and what it is given when the driver starts it.
//!
//! ```text
//!  vCPU thread                                   event loop thread
//!  MmioTransport --DRIVER_OK--> VirtioDevice::activate(ActivateContext)
//!        |                            \--> handlers --EventLoop::add--> MutEventSubscriber::process (kicks, files)
//!        \--status = 0--> EventLoop::remove(all its handlers) --> VirtioDevice::reset
//! ```
//!
//! The transport owns the status state machine, feature negotiation, queue registers and their checks (virtio 1.3, 4.2.2 and 3.1).
//! A device sees only a consistent set of ready queues, once per activation.

use std::fmt;
use std::sync::Arc;

use event_manager::MutEventSubscriber;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::state::{Reader, StateError};

/// Guest memory as devices see it: cheap to clone.
pub type GuestMem = Arc<GuestMemoryMmap>;

/// A handler that the event loop drives: one per queue or per device, as suits the device.
pub type Handler = Box<dyn MutEventSubscriber + Send>;

/// Interrupts, as a device raises them. The transport's implementation sets the interrupt status bit before it signals.
pub trait Interrupt: Send + Sync + fmt::Debug {
    /// Buffers were used on a queue (`VIRTIO_MMIO_INT_VRING`). The caller has already asked `needs_notification`.
    fn used_queue(&self);
    /// The configuration space changed (`VIRTIO_MMIO_INT_CONFIG`); also advances the configuration generation.
    fn config_changed(&self);
    /// The device met something that it cannot recover from: sets `DEVICE_NEEDS_RESET` and raises a configuration interrupt (virtio 1.3, 2.1.1).
    fn needs_reset(&self);
    /// The eventfd that `used_queue` signals, for a device whose queues are served by another process. The status bit
    /// `VIRTIO_MMIO_INT_VRING` is reported as always set while such a device is active.
    fn share_with_other_process(&self) -> std::io::Result<EventFd>;
}

/// One ready queue and the eventfd that the driver's notification signals (an ioeventfd under KVM).
#[derive(Debug)]
pub struct ActiveQueue {
    /// Index of the queue in the device.
    pub index: usize,
    /// The queue; checked by the transport: ready, size a power of two within the limit, rings inside guest memory.
    pub queue: Queue,
    /// Readable when the driver has notified.
    pub kick: EventFd,
}

/// Everything that a device is given when the driver sets `DRIVER_OK`.
#[derive(Debug)]
pub struct ActivateContext {
    /// Guest memory.
    pub mem: GuestMem,
    /// How to interrupt the guest.
    pub interrupt: Arc<dyn Interrupt>,
    /// Feature bits that the driver accepted.
    pub features: u64,
    /// The queues that the driver made ready, in index order.
    pub queues: Vec<ActiveQueue>,
}

/// Why a device could not start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver left out a queue that the device cannot work without.
    #[error("the driver did not set up queue {0}")]
    MissingQueue(usize),
    /// An eventfd or file could not be had.
    #[error("cannot prepare {what}")]
    Io {
        /// What was being prepared.
        what: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The process at the other end of vhost-user refused.
    #[error("vhost-user back end: {what}")]
    VhostUser {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        #[source]
        source: vhost::Error,
    },
}

/// A virtio device behind a transport.
pub trait VirtioDevice: Send + fmt::Debug {
    /// Short name for logs and counters: `blk`, `net`, ….
    fn name(&self) -> &'static str;
    /// Device id (virtio 1.3, section 5).
    fn device_type(&self) -> u32;
    /// Largest size of each queue, powers of two; the length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];
    /// Feature bits offered. `VIRTIO_F_VERSION_1` must be among them.
    fn features(&self) -> u64;
    /// Reads the configuration space. Bytes outside it read as zero. `data` is 1 to 8 bytes, any offset.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes the configuration space; devices without writable fields ignore it.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// The driver is ready: take the queues and return the handlers that serve them. Called at most once between resets.
    ///
    /// # Errors
    /// When the device cannot start; the transport then sets `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, context: ActivateContext) -> Result<Vec<Handler>, ActivateError>;
    /// The driver wrote status 0. The handlers have been removed from the event loop and dropped; stop workers, forget queues.
    fn reset(&mut self);
    /// Stops what runs beside the event loop, before the machine is saved: until [`VirtioDevice::resume`] nothing of the device touches guest
    /// memory, and what was done is told to the guest. Devices that live on the loop have nothing to stop.
    fn pause(&mut self) {}
    /// Lets it go on. Does nothing unless it was paused.
    fn resume(&mut self) {}
    /// What the device itself has to remember when the machine is saved; the transport sees to features and queues. Called between turns
    /// of the event loop, while no processor runs and the device is paused: all chains that were taken have been given back.
    ///
    /// # Errors
    /// [`StateError::Unsaved`] when it cannot be saved, or not as it is now. Without code of its own a device cannot be.
    fn save(&self) -> Result<Vec<u8>, StateError> {
        Err(StateError::Unsaved { device: self.name(), why: "such a device is not saved".to_owned() })
    }
    /// Takes what [`VirtioDevice::save`] gave, before it is activated.
    ///
    /// # Errors
    /// When that cannot be.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        Reader::new(state).end()
    }
    /// Counters since creation, for metrics: (name, value).
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// Name of a handler in an [`EventLoop`].
pub type HandlerId = u64;

/// The event loop, as a transport sees it. Implemented by the VMM over `event_manager`'s remote endpoint and by tests.
pub trait EventLoop: Send + Sync + fmt::Debug {
    /// Adds a handler; it runs on the loop's thread from now on.
    ///
    /// # Errors
    /// When the loop has ended or cannot watch one more descriptor.
    fn add(&self, handler: Handler) -> std::io::Result<HandlerId>;
    /// Removes and drops a handler; when this returns it no longer runs.
    ///
    /// # Errors
    /// When the loop has ended or the id is unknown.
    fn remove(&self, id: HandlerId) -> std::io::Result<()>;
}
