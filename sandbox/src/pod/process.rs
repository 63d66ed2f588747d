//! One process of a container, from known to ended.
//!
//! ```text
//! Added (execs) --start--> Created --start--> Running --end--> Stopped
//!                             \--killed, or its machine ends-----^
//! ```

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use hyper_protocol::rpc::agent::{ExitStatus, ProcessRef};
use tokio::sync::watch;
use tokio::time::timeout;

use super::container::PodContainer;
use super::io::{Ends, Input, Pumps, StdioPaths};
use super::logger::ENDED_MS;
use super::{END_MS, EventSink, PodEvent, held, now, until_ended};
use crate::clock::Timestamp;
use crate::launch::{Agent, context, scaled_ms};
use crate::store::LOST_EXIT_CODE;

/// How long the other processes of a container may take to end with its first one.
const OTHERS_MS: u64 = 5_000;

/// What a process is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessStatus {
    /// It waits to be started.
    Created,
    /// It runs.
    Running,
    /// It stands still.
    Paused,
    /// It has ended.
    Stopped,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessExit {
    /// 128 and the signal when it was killed by one, or when its machine ended.
    pub code: u32,
    /// When.
    pub at: Timestamp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Known to us only.
    Added,
    Created,
    /// Its command could not be executed: nobody saw it run, nobody hears of its end.
    Failed,
    Running,
    Stopped,
}

/// What changes while it lives.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) phase: Phase,
    /// The caller's ends, until it is connected.
    pub(super) ends: Option<Ends>,
    /// OCI process object of an exec, until it is created.
    pub(super) wish: Option<Vec<u8>>,
    /// Standard input.
    pub(super) input: Input,
    /// Rows and columns of its terminal.
    pub(super) size: Option<(u32, u32)>,
}

/// A process.
#[derive(Debug)]
pub(super) struct Process {
    /// Empty for the first one.
    pub(super) exec: String,
    pub(super) program: String,
    pub(super) paths: StdioPaths,
    /// Held while it is started, and when its end is made known: the order of events.
    pub(super) gate: tokio::sync::Mutex<()>,
    inner: Mutex<Inner>,
    exit: watch::Sender<Option<ProcessExit>>,
    /// Its loggers have ended, too.
    logged: watch::Sender<bool>,
}

impl Process {
    pub(super) fn new(exec: &str, program: String, paths: StdioPaths, inner: Inner) -> Arc<Self> {
        Arc::new(Self {
            exec: exec.to_owned(),
            program,
            paths,
            gate: tokio::sync::Mutex::new(()),
            inner: Mutex::new(inner),
            exit: watch::channel(None).0,
            logged: watch::channel(false).0,
        })
    }

    pub(super) fn inner(&self) -> MutexGuard<'_, Inner> {
        held(&self.inner)
    }

    pub(super) fn phase(&self) -> Phase {
        self.inner().phase
    }

    pub(super) fn exit(&self) -> Option<ProcessExit> {
        *self.exit.borrow()
    }

    pub(super) fn exits(&self) -> watch::Receiver<Option<ProcessExit>> {
        self.exit.subscribe()
    }

    /// Waits until the loggers of a process that has ended have done so, too: a bounded while.
    pub(super) async fn until_logged(&self) {
        if self.exit().is_some() {
            let mut logged = self.logged.subscribe();
            // The sender is ours.
            let _ = timeout(scaled_ms(ENDED_MS), logged.wait_for(|logged| *logged)).await;
        }
    }

    fn end(&self, exit: ProcessExit) -> bool {
        let was = {
            let mut inner = self.inner();
            inner.input.close();
            std::mem::replace(&mut inner.phase, Phase::Stopped)
        };
        self.exit.send_replace(Some(exit));
        was != Phase::Failed
    }
}

/// What a watcher needs of its sandbox.
#[derive(Clone)]
pub(super) struct Surroundings {
    pub(super) agent: Arc<Agent>,
    pub(super) ended: watch::Receiver<Option<String>>,
    pub(super) events: EventSink,
}

/// Waits for the end of a process and makes it known, once, after its last output and after the other processes of its container.
pub(super) async fn watch_over(
    around: Surroundings,
    container: Arc<PodContainer>,
    process: Arc<Process>,
    pumps: Pumps,
) {
    let (exit, for_memory) = until_exit(&around, &container.id, &process.exec).await;
    let loggers = pumps.finish().await;
    let gate = process.gate.lock().await;
    if process.exec.is_empty() {
        let others = container.others_ended();
        if timeout(scaled_ms(OTHERS_MS), others).await.is_err() {
            tracing::warn!(container = container.id, "processes outlive the first one");
        }
    }
    // The guest's own event may be on its way still, to a container that is about to be deleted.
    if for_memory && !container.memory_told.swap(true, Ordering::SeqCst) {
        (around.events)(PodEvent::Oom { container: container.id.clone() });
    }
    if process.end(exit) {
        let (container, exec) = (container.id.clone(), process.exec.clone());
        (around.events)(PodEvent::Exited { container, exec, exit });
    }
    drop(gate);
    // A logger may wait for that event before it ends.
    for logger in loggers {
        logger.end().await;
    }
    process.logged.send_replace(true);
}

/// How a process ended, and whether the kernel killed something in its container for want of memory.
async fn until_exit(around: &Surroundings, container: &str, exec: &str) -> (ProcessExit, bool) {
    let process =
        ProcessRef { container_id: container.to_owned(), process_id: exec.to_owned(), ..Default::default() };
    let lost = || (ProcessExit { code: u32::from(LOST_EXIT_CODE), at: now() }, false);
    tokio::select! {
        biased;
        status = around.agent.rpc.wait_process(context(None), &process) => match status {
            Ok(status) => (of_status(&status), status.oom_killed),
            Err(error) => {
                // The connection breaks before the VMM says how the machine ended.
                let limit: Duration = scaled_ms(END_MS);
                let end = timeout(limit, until_ended(around.ended.clone())).await;
                tracing::warn!(container, exec, %error, ?end, "its end is not known");
                lost()
            }
        },
        end = until_ended(around.ended.clone()) => {
            tracing::warn!(container, exec, end, "it ended with its machine");
            lost()
        }
    }
}

fn of_status(status: &ExitStatus) -> ProcessExit {
    // The guest's clock follows the host's; a time that cannot be is ours.
    let at =
        if status.exited_at_unix_ns > 0 { Timestamp::from_unix_ns(status.exited_at_unix_ns) } else { now() };
    ProcessExit { code: status.exit_code & 0xff, at }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_of_one_byte_and_of_today() {
        let status = ExitStatus { exit_code: 0x1_0089, exited_at_unix_ns: 5, ..Default::default() };
        let exit = of_status(&status);
        assert_eq!((exit.code, exit.at), (0x89, Timestamp::from_unix_ns(5)));
        assert!(of_status(&ExitStatus::default()).at.unix_ns() > 0);
    }

    #[tokio::test]
    async fn commands_that_never_ran_have_no_exit_event() {
        let inner =
            || Inner { phase: Phase::Running, ends: None, wish: None, input: Input::default(), size: None };
        let exit = ProcessExit { code: 1, at: now() };
        let ran = Process::new("", "sh".into(), StdioPaths::default(), inner());
        assert!(ran.end(exit));
        assert_eq!((ran.exit(), ran.phase()), (Some(exit), Phase::Stopped));
        let failed = Inner { phase: Phase::Failed, ..inner() };
        assert!(!Process::new("", "sh".into(), StdioPaths::default(), failed).end(exit));
    }
}
