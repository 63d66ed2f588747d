//! The event loop: handlers of all devices run on the main thread; vCPU threads add and remove them.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventManager, RemoteEndpoint, SubscriberId, SubscriberOps};
use hyper_vmm_devices::device::{EventLoop, Handler, HandlerId};

/// The loop itself; belongs to the main thread.
pub(crate) struct EventThread {
    manager: EventManager<Handler>,
    handle: Arc<LoopHandle>,
}

impl EventThread {
    pub(crate) fn new() -> Result<Self, event_manager::Error> {
        let manager = EventManager::new()?;
        let endpoint = manager.remote_endpoint();
        let handle = LoopHandle { endpoint, next: AtomicU64::new(0), known: Arc::default() };
        Ok(Self { manager, handle: Arc::new(handle) })
    }

    /// What transports are given.
    pub(crate) fn handle(&self) -> Arc<dyn EventLoop> {
        Arc::clone(&self.handle) as Arc<dyn EventLoop>
    }

    /// Adds a handler for good, from the main thread.
    pub(crate) fn add(&mut self, handler: Handler) {
        let _stays = self.manager.add_subscriber(handler);
    }

    /// Waits for events and serves them once.
    pub(crate) fn run_once(&mut self) -> Result<(), event_manager::Error> {
        self.manager.run().map(drop)
    }
}

impl fmt::Debug for EventThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventThread").finish_non_exhaustive()
    }
}

/// The other threads' end. Never used by handlers themselves: `remove` waits for the loop.
struct LoopHandle {
    endpoint: RemoteEndpoint<Handler>,
    next: AtomicU64,
    known: Arc<Mutex<HashMap<HandlerId, SubscriberId>>>,
}

impl fmt::Debug for LoopHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoopHandle").finish_non_exhaustive()
    }
}

impl EventLoop for LoopHandle {
    /// Does not wait: events on the handler's descriptors are kept until it is added.
    fn add(&self, handler: Handler) -> io::Result<HandlerId> {
        let id = self.next.fetch_add(1, Ordering::SeqCst);
        let known = Arc::clone(&self.known);
        let add = move |ops: &mut dyn SubscriberOps<Subscriber = Handler>| {
            let subscriber = ops.add_subscriber(handler);
            known.lock().unwrap_or_else(PoisonError::into_inner).insert(id, subscriber);
        };
        self.endpoint.fire(add).map_err(io::Error::other)?;
        Ok(id)
    }

    /// Waits until the loop has dropped the handler. The loop serves requests in order, so an `add` before it is done by then.
    fn remove(&self, id: HandlerId) -> io::Result<()> {
        let known = Arc::clone(&self.known);
        let remove = move |ops: &mut dyn SubscriberOps<Subscriber = Handler>| {
            let subscriber = known.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
            let subscriber = subscriber.ok_or(event_manager::Error::InvalidId)?;
            ops.remove_subscriber(subscriber).map(drop)
        };
        self.endpoint.call_blocking::<_, (), event_manager::Error>(remove).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_manager::{EventOps, Events, MutEventSubscriber};
    use std::sync::atomic::AtomicBool;
    use vmm_sys_util::epoll::EventSet;
    use vmm_sys_util::eventfd::EventFd;

    struct Counts {
        event: EventFd,
        seen: Arc<AtomicU64>,
        dropped: Arc<AtomicBool>,
    }
    impl MutEventSubscriber for Counts {
        fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
            self.seen.fetch_add(self.event.read().unwrap(), Ordering::SeqCst);
        }
        fn init(&mut self, ops: &mut EventOps<'_>) {
            ops.add(Events::new(&self.event, EventSet::IN)).unwrap();
        }
    }
    impl Drop for Counts {
        fn drop(&mut self) {
            self.dropped.store(true, Ordering::SeqCst);
        }
    }

    #[test]
    fn handlers_come_and_go_from_another_thread() {
        let mut events = EventThread::new().unwrap();
        let handle = events.handle();
        let (event, seen, dropped) =
            (EventFd::new(0).unwrap(), Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        event.write(3).unwrap();
        let handler = Counts {
            event: event.try_clone().unwrap(),
            seen: Arc::clone(&seen),
            dropped: Arc::clone(&dropped),
        };
        let gone = Arc::clone(&dropped);
        let other = std::thread::spawn(move || {
            let id = handle.add(Box::new(handler)).unwrap();
            handle.remove(id).unwrap();
            assert!(gone.load(Ordering::SeqCst), "dropped when remove returns");
            assert!(handle.remove(id).is_err());
            assert!(handle.remove(77).is_err());
        });
        while !other.is_finished() {
            events.manager.run_with_timeout(10).unwrap();
        }
        other.join().unwrap();
    }

    #[test]
    fn events_before_the_handler_are_not_lost() {
        let mut events = EventThread::new().unwrap();
        let event = EventFd::new(0).unwrap();
        event.write(3).unwrap();
        let seen = Arc::new(AtomicU64::new(0));
        let handler = Counts { event, seen: Arc::clone(&seen), dropped: Arc::default() };
        events.handle().add(Box::new(handler)).unwrap();
        events.run_once().unwrap();
        events.run_once().unwrap();
        assert_eq!(seen.load(Ordering::SeqCst), 3);
    }
}
