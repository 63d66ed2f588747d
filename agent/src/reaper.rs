//! Reaps every child of PID 1 and tells who waits for it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, WaitOptions, WaitStatus};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::error::{AgentError, Tried};

/// Exits that nobody asked for yet: a process can end before its pid is known. Bounded; older ones are orphans'.
const MAX_UNCLAIMED: usize = 64;
/// How long such an exit is kept: pids come back.
const UNCLAIMED_LIFETIME: Duration = Duration::from_secs(10);

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 128 + signal when killed by one.
    pub code: u32,
    /// 0 when it exited by itself.
    pub signal: u32,
    /// When, nanoseconds since 1970.
    pub at_unix_ns: i64,
}

#[derive(Debug, Default)]
struct Inner {
    watched: HashMap<Pid, oneshot::Sender<Exit>>,
    unclaimed: VecDeque<(Pid, Exit, Instant)>,
}

/// All children of PID 1.
#[derive(Debug, Default)]
pub(crate) struct Reaper {
    inner: Mutex<Inner>,
}

/// Nanoseconds since 1970 by the guest's clock.
pub(crate) fn now_unix_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

impl Reaper {
    /// Asks to be told of a process's end. Each pid can be watched once.
    pub(crate) fn watch(&self, pid: Pid) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        if let Ok(mut inner) = self.inner.lock() {
            let now = Instant::now();
            inner.unclaimed.retain(|(_, _, at)| now.duration_since(*at) < UNCLAIMED_LIFETIME);
            if let Some(position) = inner.unclaimed.iter().position(|(p, _, _)| *p == pid) {
                if let Some((_, exit, _)) = inner.unclaimed.remove(position) {
                    // The receiver is in our hands.
                    let _ = sender.send(exit);
                }
            } else {
                inner.watched.insert(pid, sender);
            }
        }
        receiver
    }

    /// Reaps on every SIGCHLD, for ever.
    ///
    /// # Errors
    /// The signal cannot be listened to.
    pub(crate) fn start(self: &Arc<Self>) -> Result<(), AgentError> {
        let mut signals = signal(SignalKind::child()).tried(|| "listen to SIGCHLD".to_owned())?;
        let reaper = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                reaper.reap();
                if signals.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(())
    }

    fn reap(&self) {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if let Some(exit) = exit_of(status, now_unix_ns()) {
                        self.ended(pid, exit);
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn ended(&self, pid: Pid, exit: Exit) {
        let Ok(mut inner) = self.inner.lock() else { return };
        match inner.watched.remove(&pid) {
            // Who asked may have stopped caring.
            Some(sender) => drop(sender.send(exit)),
            None => {
                if inner.unclaimed.len() >= MAX_UNCLAIMED {
                    inner.unclaimed.pop_front();
                }
                inner.unclaimed.push_back((pid, exit, Instant::now()));
            }
        }
    }
}

fn exit_of(status: WaitStatus, at_unix_ns: i64) -> Option<Exit> {
    let number = |n: i32| u32::try_from(n).unwrap_or_default();
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Some(Exit { code: number(code), signal: 0, at_unix_ns }),
        (None, Some(signal)) => {
            Some(Exit { code: number(signal).saturating_add(128), signal: number(signal), at_unix_ns })
        }
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pid(n: i32) -> Pid {
        Pid::from_raw(n).unwrap()
    }

    #[test]
    fn exits_reach_who_asked_before_and_after() {
        let reaper = Reaper::default();
        let mut early = reaper.watch(pid(10));
        let (three, killed) =
            (Exit { code: 3, signal: 0, at_unix_ns: 5 }, Exit { code: 137, signal: 9, at_unix_ns: 6 });
        reaper.ended(pid(10), three);
        assert_eq!(early.try_recv().unwrap(), three);
        reaper.ended(pid(11), killed);
        assert_eq!(reaper.watch(pid(11)).try_recv().unwrap(), killed);
        assert!(reaper.watch(pid(11)).try_recv().is_err(), "an exit is told once");
    }

    #[test]
    fn exits_of_orphans_are_bounded() {
        let reaper = Reaper::default();
        for n in 1..1000 {
            reaper.ended(pid(n), Exit { code: 0, signal: 0, at_unix_ns: 0 });
        }
        assert_eq!(reaper.inner.lock().unwrap().unclaimed.len(), MAX_UNCLAIMED);
    }
}
