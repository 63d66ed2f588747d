//! Events of the sandbox, kept until the supervisor asks for them.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

/// Most events that are kept; the oldest are dropped.
const MAX_EVENTS: usize = 256;
/// Longest wait of one request.
const MAX_WAIT: Duration = Duration::from_secs(120);

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// The kernel killed a process of this container for want of memory.
    Oom {
        /// Which.
        container_id: String,
    },
}

/// All events that nobody has fetched.
#[derive(Debug, Default)]
pub(crate) struct Events {
    waiting: Mutex<VecDeque<Event>>,
    arrived: Notify,
}

impl Events {
    /// Adds one.
    pub(crate) fn push(&self, event: Event) {
        if let Ok(mut waiting) = self.waiting.lock() {
            if waiting.len() >= MAX_EVENTS {
                waiting.pop_front();
            }
            waiting.push_back(event);
        }
        self.arrived.notify_one();
    }

    /// Takes all that wait; waits for one when there are none.
    pub(crate) async fn next(&self, wait: Duration) -> Vec<Event> {
        let first = self.take();
        if !first.is_empty() {
            return first;
        }
        // Whether it came in time or not, what is there is the answer.
        let _ = timeout(wait.min(MAX_WAIT), self.arrived.notified()).await;
        self.take()
    }

    fn take(&self) -> Vec<Event> {
        self.waiting.lock().map(|mut w| w.drain(..).collect()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn oom(id: usize) -> Event {
        Event::Oom { container_id: id.to_string() }
    }

    #[tokio::test]
    async fn events_wait_and_are_bounded() {
        let events = Events::default();
        assert!(events.next(Duration::ZERO).await.is_empty());
        for id in 0..1000 {
            events.push(oom(id));
        }
        let got = events.next(Duration::ZERO).await;
        assert_eq!((got.len(), got.last()), (MAX_EVENTS, Some(&oom(999))));
    }

    #[tokio::test]
    async fn a_waiter_is_woken() {
        let events = std::sync::Arc::new(Events::default());
        let waiter = tokio::spawn({
            let events = std::sync::Arc::clone(&events);
            async move { events.next(Duration::from_secs(60)).await }
        });
        tokio::task::yield_now().await;
        events.push(oom(1));
        assert_eq!(waiter.await.unwrap(), [oom(1)]);
    }
}
