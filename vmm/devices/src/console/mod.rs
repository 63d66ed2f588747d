//! virtio-console (virtio 1.3, 5.3), output only: what the guest writes goes to a descriptor. Its reader may be slow; see
//! [`Output`] for what happens then.

mod handler;

use std::sync::{Arc, Mutex, PoisonError};

use crate::device::{ActivateContext, ActivateError, Handler, VirtioDevice};
use crate::output::Output;
use crate::serve::{Counter, QueueHandler};
use crate::transport::{F_EVENT_IDX, F_VERSION_1};
use handler::ConsoleServer;

const DEVICE_TYPE: u32 = 3;
const QUEUE_SIZE: u16 = 64;
/// Queue 0 would carry input; the driver may set it up, nothing is ever put into it.
const TRANSMIT: usize = 1;

/// The device.
#[derive(Debug)]
pub struct Console {
    output: Arc<Mutex<Output>>,
    malformed: Counter,
}

impl Console {
    /// A console whose output goes to `output`.
    #[must_use]
    pub fn new(output: Output) -> Self {
        Self { output: Arc::new(Mutex::new(output)), malformed: Counter::default() }
    }
}

impl VirtioDevice for Console {
    fn name(&self) -> &'static str {
        "console"
    }
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }
    fn features(&self) -> u64 {
        F_VERSION_1 | F_EVENT_IDX
    }
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn activate(&mut self, context: ActivateContext) -> Result<Vec<Handler>, ActivateError> {
        let ActivateContext { mem, interrupt, queues, .. } = context;
        let mut queues = queues.into_iter();
        let active = queues.find(|q| q.index == TRANSMIT).ok_or(ActivateError::MissingQueue(TRANSMIT))?;
        let server = ConsoleServer::new(Arc::clone(&self.output));
        let malformed = self.malformed.clone();
        Ok(vec![Box::new(QueueHandler { active, mem, interrupt, malformed, server })])
    }
    fn reset(&mut self) {}
    fn counters(&self) -> Vec<(&'static str, u64)> {
        let dropped = self.output.lock().unwrap_or_else(PoisonError::into_inner).dropped();
        vec![("dropped_bytes", dropped), ("malformed", self.malformed.get())]
    }
}
