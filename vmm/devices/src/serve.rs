//! Serving one queue, chain by chain, on the event loop: what the simple devices have in common.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use crate::chain::{self, ChainError};
use crate::device::{ActiveQueue, GuestMem, Interrupt};

/// How many times its queue's size a handler serves before it lets others run: a guest that adds chains as fast as they
/// are served must not keep the loop to itself.
const ROUNDS: usize = 2;

/// A counter that a device shares with its handlers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counter(Arc<AtomicU64>);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a device does with one chain.
pub(crate) trait ServeChain: Send {
    /// Serves the chain; returns how many bytes were written to it.
    fn serve<'m>(
        &mut self,
        mem: &'m GuestMemoryMmap,
        chain: DescriptorChain<&'m GuestMemoryMmap>,
    ) -> Result<u32, ChainError>;
}

/// Feeds the chains of one queue to a [`ServeChain`].
#[derive(Debug)]
pub(crate) struct QueueHandler<S> {
    pub(crate) active: ActiveQueue,
    pub(crate) mem: GuestMem,
    pub(crate) interrupt: Arc<dyn Interrupt>,
    /// Chains that broke the rules; they are given back unserved.
    pub(crate) malformed: Counter,
    pub(crate) server: S,
}

impl<S: ServeChain> QueueHandler<S> {
    /// Serves what is there; an error means that the ring itself is broken.
    fn serve_queue(&mut self) -> Result<(), virtio_queue::Error> {
        let queue = &mut self.active.queue;
        let mem = &*self.mem;
        let mut budget = ROUNDS * usize::from(queue.size());
        let mut served = false;
        'rounds: loop {
            queue.disable_notification(mem)?;
            while let Some(chain) = chain::take(queue, mem)? {
                let head = chain.head_index();
                let written = self.server.serve(mem, chain).unwrap_or_else(|_| {
                    self.malformed.add(1);
                    0
                });
                queue.add_used(mem, head, written)?;
                served = true;
                budget = budget.saturating_sub(1);
                if budget == 0 {
                    queue.enable_notification(mem)?;
                    // Fails only when the counter is full, and then the handler is already called.
                    let _already_rung = self.active.kick.write(1);
                    break 'rounds;
                }
            }
            if !queue.enable_notification(mem)? {
                break;
            }
        }
        if served && queue.needs_notification(mem)? {
            self.interrupt.used_queue();
        }
        Ok(())
    }
}

impl<S: ServeChain> MutEventSubscriber for QueueHandler<S> {
    fn process(&mut self, _events: Events, ops: &mut EventOps<'_>) {
        // Nothing to read means that somebody else has: look at the queue all the same.
        let _count = self.active.kick.read();
        if self.serve_queue().is_err() {
            let _not_watched = ops.remove(Events::new(&self.active.kick, EventSet::IN));
            self.interrupt.needs_reset();
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if ops.add(Events::new(&self.active.kick, EventSet::IN)).is_err() {
            self.interrupt.needs_reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::Chain;
    use crate::mock::{CountingInterrupt, Driver, memory};
    use event_manager::{EventManager, SubscriberOps};
    use vm_memory::{Bytes, GuestAddress};

    struct Writes(u32);
    impl ServeChain for Writes {
        fn serve<'m>(
            &mut self,
            mem: &'m GuestMemoryMmap,
            chain: DescriptorChain<&'m GuestMemoryMmap>,
        ) -> Result<u32, ChainError> {
            Chain::parse(mem, chain)?;
            self.0 += 1;
            Ok(self.0)
        }
    }

    #[test]
    fn chains_are_served_in_order_and_malformed_ones_given_back() {
        let mem = memory();
        let mut driver = Driver::new(&mem, GuestAddress(0), 8);
        let interrupt = Arc::new(CountingInterrupt::default());
        let (active, kick) = driver.active(0, false);
        let malformed = Counter::default();
        let handler = QueueHandler {
            active,
            mem: Arc::clone(&mem),
            interrupt: Arc::clone(&interrupt) as Arc<dyn Interrupt>,
            malformed: malformed.clone(),
            server: Writes(0),
        };
        let first = driver.offer(&[(0x10_000, 4, true)]);
        let bad = driver.offer(&[(0x10_000, 4, true), (0x10_000, 4, false)]);
        let last = driver.offer(&[(0x10_000, 4, false)]);
        let mut events = EventManager::<QueueHandler<Writes>>::new().unwrap();
        events.add_subscriber(handler);
        kick.write(1).unwrap();
        events.run_with_timeout(1000).unwrap();
        let used: Vec<_> = std::iter::from_fn(|| driver.used()).collect();
        assert_eq!(used, [(first, 1), (bad, 0), (last, 2)]);
        assert_eq!((malformed.get(), interrupt.used.load(Ordering::SeqCst)), (1, 1));
    }

    #[test]
    fn a_broken_ring_stops_the_device() {
        let mem = memory();
        let driver = Driver::new(&mem, GuestAddress(0), 8);
        let interrupt = Arc::new(CountingInterrupt::default());
        let (active, kick) = driver.active(0, false);
        // The available index jumps ahead by more than the queue holds.
        mem.write_obj(1000_u16, GuestAddress(8 * 16 + 2)).unwrap();
        let mut events = EventManager::<QueueHandler<Writes>>::new().unwrap();
        events.add_subscriber(QueueHandler {
            active,
            mem: Arc::clone(&mem),
            interrupt: Arc::clone(&interrupt) as Arc<dyn Interrupt>,
            malformed: Counter::default(),
            server: Writes(0),
        });
        kick.write(1).unwrap();
        events.run_with_timeout(1000).unwrap();
        assert_eq!(interrupt.reset.load(Ordering::SeqCst), 1);
        kick.write(1).unwrap();
        assert_eq!(events.run_with_timeout(0).unwrap(), 0, "no longer watched");
    }
}
