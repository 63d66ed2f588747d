//! virtio-rng (virtio 1.3, 5.4): one queue of buffers to fill with random bytes.

mod handler;

pub use handler::{Entropy, HostEntropy, MAX_REQUEST_BYTES};

use crate::device::{ActivateContext, ActivateError, Handler, VirtioDevice};
use crate::serve::{Counter, QueueHandler};
use crate::state::StateError;
use crate::transport::{F_EVENT_IDX, F_VERSION_1};
use handler::RngServer;

const DEVICE_TYPE: u32 = 4;
const QUEUE_SIZE: u16 = 64;

/// The device. `E` is where the bytes come from.
#[derive(Debug)]
pub struct Rng<E> {
    entropy: E,
    bytes: Counter,
    malformed: Counter,
}

impl<E: Entropy> Rng<E> {
    /// A device that serves bytes of `entropy`.
    pub fn new(entropy: E) -> Self {
        Self { entropy, bytes: Counter::default(), malformed: Counter::default() }
    }
}

impl<E: Entropy> VirtioDevice for Rng<E> {
    fn name(&self) -> &'static str {
        "rng"
    }
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }
    fn features(&self) -> u64 {
        F_VERSION_1 | F_EVENT_IDX
    }
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn activate(&mut self, context: ActivateContext) -> Result<Vec<Handler>, ActivateError> {
        let ActivateContext { mem, interrupt, queues, .. } = context;
        let active = queues.into_iter().next().ok_or(ActivateError::MissingQueue(0))?;
        let server = RngServer::new(self.entropy.clone(), self.bytes.clone());
        let malformed = self.malformed.clone();
        Ok(vec![Box::new(QueueHandler { active, mem, interrupt, malformed, server })])
    }
    fn reset(&mut self) {}
    /// Nothing: bytes come from the host.
    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }
    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("bytes", self.bytes.get()), ("malformed", self.malformed.get())]
    }
}
