//! Telling the driver of a machine that was saved with connections that they are gone (virtio 1.3, 5.10.6.6 and 5.10.6.7).
//!
//! ```text
//! Due --a buffer of the driver takes the event--> Told --the driver gives that buffer back--> done
//! ```
//! Until it is done nothing new is connected: Linux ends all connections that there are when it looks at the event, new ones too.

use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use crate::chain::{self, Chain};
use crate::device::ActiveQueue;

/// The event "transport reset" (5.10.6.6), as it lies in the buffer.
const TRANSPORT_RESET: [u8; 4] = 0_u32.to_le_bytes();

/// Where the telling is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Due,
    /// So many buffers were left when the event took one.
    Told {
        left: usize,
    },
}

/// What is left to be told, by the event queue.
#[derive(Debug)]
pub(super) struct Reset {
    queue: ActiveQueue,
    step: Step,
}

/// How far it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// The driver has something to do.
    Waits,
    /// The driver is to be interrupted.
    Tells,
    /// The driver knows.
    Done,
}

impl Reset {
    pub(super) fn new(queue: ActiveQueue) -> Self {
        Self { queue, step: Step::Due }
    }

    /// The driver's notifications on the event queue.
    pub(super) fn kick(&self) -> &vmm_sys_util::eventfd::EventFd {
        &self.queue.kick
    }

    /// Goes as far as the driver lets it.
    ///
    /// # Errors
    /// The ring itself is broken.
    pub(super) fn advance(&mut self, mem: &GuestMemoryMmap) -> Result<Progress, virtio_queue::Error> {
        // Nonblocking; a lost race means that the kick was already seen.
        let _ = self.queue.kick.read();
        let queue = &mut self.queue.queue;
        match self.step {
            Step::Due => loop {
                let Some(chain) = chain::take(queue, mem)? else {
                    if chain::listen(queue, mem)? {
                        continue;
                    }
                    return Ok(Progress::Waits);
                };
                let head = chain.head_index();
                // A driver whose buffer cannot hold the event does not want it.
                let mut span = Chain::parse(mem, chain).map(|chain| chain.writable).unwrap_or_default();
                // At most four bytes.
                let written = span.write(&TRANSPORT_RESET) as u32;
                queue.add_used(mem, head, written)?;
                self.step = Step::Told { left: chain::offered(queue, mem)? };
                chain::listen_beyond(queue, mem)?;
                return Ok(Progress::Tells);
            },
            Step::Told { left } if chain::offered(queue, mem)? > left => Ok(Progress::Done),
            Step::Told { .. } => {
                Ok(if chain::listen_beyond(queue, mem)? { Progress::Done } else { Progress::Waits })
            }
        }
    }
}
