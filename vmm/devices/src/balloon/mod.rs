//! virtio-balloon (virtio 1.3, 5.5): takes memory from the guest and gives it back to the host.
//!
//! Two ways: the *target*, set by the owner, which the driver meets by handing over pages; and *free page reporting*, by which the
//! driver tells of pages that are free anyway. Either way a page that the guest uses again comes back as zeroes on first touch.

mod handler;
mod request;
mod state;

pub use handler::{MemfdPages, PageRelease};

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::device::{ActivateContext, ActivateError, ActiveQueue, Handler, Interrupt, VirtioDevice};
use crate::serve::{Counter, QueueHandler, ServeChain};
use crate::state::StateError;
use crate::transport::{F_EVENT_IDX, F_VERSION_1};
use handler::{Deflate, Inflate, Report};

const DEVICE_TYPE: u32 = 5;
/// Linux hands over 256 pages per request and has one request in flight.
const QUEUE_SIZE: u16 = 128;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`: the driver takes pages back before it kills a process.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_REPORTING`.
const F_REPORTING: u64 = 1 << 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Queues of features that are not offered take no number, so this is the next one.
const REPORTING: usize = 2;

/// What the owner may ask and set while the machine runs; shared with the device.
#[derive(Debug, Clone, Default)]
pub struct BalloonTarget {
    state: Arc<BalloonState>,
}

#[derive(Debug, Default)]
struct BalloonState {
    target_pages: AtomicU32,
    actual_pages: AtomicU32,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl BalloonTarget {
    /// Sets how many pages of 4 KiB the guest is to hand over, and tells it if its driver runs.
    pub fn set_pages(&self, pages: u32) {
        self.state.target_pages.store(pages, Ordering::SeqCst);
        let interrupt = self.state.interrupt.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(interrupt) = interrupt {
            interrupt.config_changed();
        }
    }

    /// How many pages the guest says it has handed over.
    #[must_use]
    pub fn actual_pages(&self) -> u32 {
        self.state.actual_pages.load(Ordering::SeqCst)
    }

    fn set_interrupt(&self, interrupt: Option<Arc<dyn Interrupt>>) {
        *self.state.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = interrupt;
    }
}

/// The device. `P` gives pages back to the host.
#[derive(Debug)]
pub struct Balloon<P> {
    pages: P,
    free_page_reporting: bool,
    target: BalloonTarget,
    released: Counter,
    reported: Counter,
    failed: Counter,
    malformed: Counter,
}

impl<P: PageRelease> Balloon<P> {
    /// A balloon of target 0.
    pub fn new(pages: P, free_page_reporting: bool) -> Self {
        Self {
            pages,
            free_page_reporting,
            target: BalloonTarget::default(),
            released: Counter::default(),
            reported: Counter::default(),
            failed: Counter::default(),
            malformed: Counter::default(),
        }
    }

    /// The handle for the owner.
    #[must_use]
    pub fn target(&self) -> BalloonTarget {
        self.target.clone()
    }
}

impl<P: PageRelease> VirtioDevice for Balloon<P> {
    fn name(&self) -> &'static str {
        "balloon"
    }

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        if self.free_page_reporting { &[QUEUE_SIZE; 3] } else { &[QUEUE_SIZE; 2] }
    }

    fn features(&self) -> u64 {
        let reporting = if self.free_page_reporting { F_REPORTING } else { 0 };
        F_VERSION_1 | F_EVENT_IDX | F_DEFLATE_ON_OOM | reporting
    }

    /// `num_pages` and `actual`, little-endian; the other fields belong to features that are not offered.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = &self.target.state;
        let fields =
            [&state.target_pages, &state.actual_pages].map(|f| f.load(Ordering::SeqCst).to_le_bytes());
        crate::config::read(fields.as_flattened(), offset, data);
    }

    /// Only `actual` may be written, as a whole.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(word)) = (offset, <[u8; 4]>::try_from(data)) {
            self.target.state.actual_pages.store(u32::from_le_bytes(word), Ordering::SeqCst);
        }
    }

    fn activate(&mut self, context: ActivateContext) -> Result<Vec<Handler>, ActivateError> {
        let ActivateContext { mem, interrupt, queues, features } = context;
        let mut handlers: Vec<Handler> = Vec::new();
        let mut found = [false; 2];
        for active in queues {
            if let Some(found) = found.get_mut(active.index) {
                *found = true;
            }
            let index = active.index;
            let part = Part {
                active,
                mem: Arc::clone(&mem),
                interrupt: Arc::clone(&interrupt),
                malformed: &self.malformed,
            };
            let pages = self.pages.clone();
            match index {
                INFLATE => {
                    handlers.push(part.serve(Inflate::new(pages, self.released.clone(), self.failed.clone())))
                }
                DEFLATE => handlers.push(part.serve(Deflate)),
                REPORTING if features & F_REPORTING != 0 => {
                    handlers.push(part.serve(Report::new(pages, self.reported.clone(), self.failed.clone())));
                }
                _ => {}
            }
        }
        if let Some(missing) = found.iter().position(|found| !found) {
            return Err(ActivateError::MissingQueue(missing));
        }
        self.target.set_interrupt(Some(interrupt));
        Ok(handlers)
    }

    fn reset(&mut self) {
        self.target.set_interrupt(None);
        self.target.state.actual_pages.store(0, Ordering::SeqCst);
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(state::save(&self.target.state))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        state::restore(&self.target.state, state)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("target_pages", u64::from(self.target.state.target_pages.load(Ordering::SeqCst))),
            ("actual_pages", u64::from(self.target.actual_pages())),
            ("inflated_bytes", self.released.get()),
            ("reported_bytes", self.reported.get()),
            ("failed_releases", self.failed.get()),
            ("malformed", self.malformed.get()),
        ]
    }
}

/// What every queue's handler is made of.
struct Part<'a> {
    active: ActiveQueue,
    mem: crate::device::GuestMem,
    interrupt: Arc<dyn Interrupt>,
    malformed: &'a Counter,
}

impl Part<'_> {
    fn serve(self, server: impl ServeChain + 'static) -> Handler {
        let Self { active, mem, interrupt, malformed } = self;
        Box::new(QueueHandler { active, mem, interrupt, malformed: malformed.clone(), server })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::{CountingInterrupt, Driver, memory};
    use vm_memory::GuestAddress;

    #[derive(Debug, Clone)]
    struct Nowhere;
    impl PageRelease for Nowhere {
        fn release(&self, _: GuestAddress, _: u64) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn context(indices: &[usize], interrupt: &Arc<CountingInterrupt>) -> ActivateContext {
        let mem = memory();
        let driver = Driver::new(&mem, GuestAddress(0), 8);
        let queues = indices.iter().map(|index| driver.active(*index, false).0).collect();
        let interrupt = Arc::clone(interrupt) as Arc<dyn Interrupt>;
        ActivateContext { mem: Arc::clone(&mem), interrupt, features: F_VERSION_1 | F_REPORTING, queues }
    }

    #[test]
    fn a_new_target_reaches_a_running_driver() {
        let mut balloon = Balloon::new(Nowhere, true);
        let target = balloon.target();
        let interrupt = Arc::new(CountingInterrupt::default());
        target.set_pages(7);
        assert_eq!(balloon.activate(context(&[0, 1, 2], &interrupt)).unwrap().len(), 3);
        target.set_pages(512);
        assert_eq!(interrupt.config.load(Ordering::SeqCst), 1);
        let mut config = [0; 8];
        balloon.read_config(0, &mut config);
        assert_eq!(config, [0, 2, 0, 0, 0, 0, 0, 0]);
        balloon.write_config(4, &500_u32.to_le_bytes());
        balloon.write_config(0, &9_u32.to_le_bytes());
        balloon.write_config(4, &[1]);
        assert_eq!(target.actual_pages(), 500);
        balloon.read_config(6, &mut config);
        balloon.read_config(u64::MAX, &mut config);
        assert_eq!(config, [0; 8]);
        balloon.reset();
        target.set_pages(1);
        assert_eq!(interrupt.config.load(Ordering::SeqCst), 1, "nobody to tell after a reset");
    }

    #[test]
    fn target_and_what_was_handed_over_are_saved() {
        let mut balloon = Balloon::new(Nowhere, true);
        balloon.target().set_pages(70);
        balloon.write_config(4, &60_u32.to_le_bytes());
        let state = balloon.save().unwrap();
        let mut again = Balloon::new(Nowhere, true);
        again.restore(&state).unwrap();
        let mut config = [0; 8];
        again.read_config(0, &mut config);
        assert_eq!(config, [70, 0, 0, 0, 60, 0, 0, 0]);
        assert_eq!(again.restore(&state[1..]).unwrap_err(), StateError::Length);
    }

    #[test]
    fn both_queues_are_needed() {
        let interrupt = Arc::new(CountingInterrupt::default());
        let mut balloon = Balloon::new(Nowhere, false);
        assert_eq!(balloon.queue_max_sizes().len(), 2);
        let refused = balloon.activate(context(&[0], &interrupt));
        assert!(matches!(refused, Err(ActivateError::MissingQueue(1))));
    }
}
