//! virtio-mem (virtio 1.2, 5.15): memory that the guest plugs and unplugs in blocks as the owner sets its size.
//!
//! ```text
//!  owner --MemoryGoal::set--> requested size, configuration interrupt
//!                               \--> driver: PLUG, UNPLUG of blocks, until plugged == requested --> `reached`, once per goal
//! ```
//!
//! The guest never has more than the goal: what it asks beyond is refused. What it gives back is the host's at once.

mod handler;
mod request;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::GuestAddress;

use self::handler::{Plugger, Region, Shared, held};
use self::request::config_space;
use crate::device::{ActivateContext, ActivateError, Handler, Interrupt, VirtioDevice};
use crate::serve::{Counter, QueueHandler};
use crate::transport::{F_EVENT_IDX, F_VERSION_1};

const DEVICE_TYPE: u32 = 24;
/// Linux has one request in flight.
const QUEUE_SIZE: u16 = 16;
/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: the driver does not touch what is not plugged.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// What the device does to the guest's memory.
pub trait PlugMemory: Clone + Send + fmt::Debug + 'static {
    /// Lets the guest use `len` bytes at `start`, which it could not before; they read as zeroes. Multiples of 2 MiB.
    ///
    /// # Errors
    /// When the host cannot; the guest may try again.
    fn plug(&self, start: GuestAddress, len: u64) -> io::Result<()>;
    /// Takes them away again; their content is forgotten and the host has the memory.
    ///
    /// # Errors
    /// When the host cannot.
    fn unplug(&self, start: GuestAddress, len: u64) -> io::Result<()>;
}

/// Told the serial of a goal when it is met.
#[derive(Clone)]
pub struct Reached(Arc<dyn Fn(u64) + Send + Sync>);

impl Reached {
    /// Has `tell` called, from any thread.
    pub fn new(tell: impl Fn(u64) + Send + Sync + 'static) -> Self {
        Self(Arc::new(tell))
    }

    fn tell(&self, serial: Option<u64>) {
        if let Some(serial) = serial {
            (self.0)(serial);
        }
    }
}

impl fmt::Debug for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reached").finish_non_exhaustive()
    }
}

/// How much is to be plugged, and the request that is still to be answered.
#[derive(Debug, Clone, Copy, Default)]
struct Goal {
    blocks: u64,
    serial: Option<u64>,
}

/// The owner's handle.
#[derive(Debug, Clone)]
pub struct MemoryGoal {
    region: Shared,
    interrupt: Arc<Mutex<Option<Arc<dyn Interrupt>>>>,
    reached: Reached,
}

impl MemoryGoal {
    /// Sets how much the guest is to have, bytes, and tells it if its driver runs. `serial` is what `reached` is told when it does.
    pub fn set(&self, bytes: u64, serial: u64) {
        let reached = {
            let mut region = held(&self.region);
            region.set_goal(bytes, serial);
            region.reached()
        };
        self.reached.tell(reached);
        let interrupt = self.interrupt.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(interrupt) = interrupt {
            interrupt.config_changed();
        }
    }

    fn set_interrupt(&self, interrupt: Option<Arc<dyn Interrupt>>) {
        *self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = interrupt;
    }
}

/// The device.
#[derive(Debug)]
pub struct Mem<P> {
    memory: P,
    goal: MemoryGoal,
    failed: Counter,
    malformed: Counter,
}

impl<P: PlugMemory> Mem<P> {
    /// A region of `bytes` at `start`, nothing of it plugged; both are multiples of 2 MiB.
    pub fn new(memory: P, start: GuestAddress, bytes: u64, reached: Reached) -> Self {
        let region = Arc::new(Mutex::new(Region::new(start, bytes)));
        let goal = MemoryGoal { region, interrupt: Arc::default(), reached };
        Self { memory, goal, failed: Counter::default(), malformed: Counter::default() }
    }

    /// The handle for the owner.
    #[must_use]
    pub fn goal(&self) -> MemoryGoal {
        self.goal.clone()
    }
}

impl<P: PlugMemory> VirtioDevice for Mem<P> {
    fn name(&self) -> &'static str {
        "mem"
    }

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        F_VERSION_1 | F_EVENT_IDX | F_UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let sizes = held(&self.goal.region).sizes();
        crate::config::read(&config_space(sizes), offset, data);
    }

    fn activate(&mut self, context: ActivateContext) -> Result<Vec<Handler>, ActivateError> {
        let ActivateContext { mem, interrupt, queues, .. } = context;
        let active = queues.into_iter().find(|q| q.index == 0).ok_or(ActivateError::MissingQueue(0))?;
        let server = Plugger {
            region: Arc::clone(&self.goal.region),
            memory: self.memory.clone(),
            reached: self.goal.reached.clone(),
            failed: self.failed.clone(),
        };
        self.goal.set_interrupt(Some(Arc::clone(&interrupt)));
        Ok(vec![Box::new(QueueHandler { active, mem, interrupt, malformed: self.malformed.clone(), server })])
    }

    /// What is plugged stays: a driver that comes back asks for its state or unplugs all (5.15.5).
    fn reset(&mut self) {
        self.goal.set_interrupt(None);
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let sizes = held(&self.goal.region).sizes();
        vec![
            ("requested_bytes", sizes.requested),
            ("plugged_bytes", sizes.plugged),
            ("failed", self.failed.get()),
            ("malformed", self.malformed.get()),
        ]
    }
}
