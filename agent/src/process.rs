//! One process of a container, from created to ended.
//!
//! ```text
//! Created --start--> Running --> Ended
//!    \--start, cannot be executed--^
//!    \--killed---------------------^
//! ```

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::process::Pid;
use tokio::sync::watch;

use crate::cgroup::Cgroup;
use crate::error::{AgentError, Tried};
use crate::plan::Window;
use crate::reaper::{Exit, Reaper};
use crate::spawn::{CreatedProcess, ExecFailure, Spawned};
use crate::stdio::{Connections, Ends, Lines, Pumps};
use crate::sys;

/// How a process ended, for the supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ended {
    pub exit: Exit,
    /// The kernel killed something in the container for want of memory while it ran.
    pub oom_killed: bool,
}

/// A process.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    /// To start it with; taken by the first start.
    waiting: Mutex<Option<Spawned>>,
    terminal: Option<OwnedFd>,
    /// Of its streams.
    lines: Lines,
    /// It was reaped: its pid may belong to another one now.
    reaped: AtomicBool,
    ended: watch::Receiver<Option<Ended>>,
}

impl Process {
    /// Takes a created process into care: copies its streams and waits for its end.
    ///
    /// # Errors
    /// Its streams cannot be set up; it is ended then, by losing its control socket.
    pub(crate) fn adopt(
        reaper: &Reaper,
        created: CreatedProcess,
        connections: Option<Connections>,
        ends: Ends,
        cgroup: Cgroup,
    ) -> Result<Arc<Self>, AgentError> {
        let exit = reaper.watch(created.pid);
        let ends = match (&created.terminal, connections) {
            (Some(master), Some(connections)) => connections.terminal(master)?,
            _ => ends,
        };
        let (pumps, lines) = ends.start();
        let (sender, ended) = watch::channel(None);
        let process = Arc::new(Self {
            pid: created.pid,
            waiting: Mutex::new(Some(created.spawned)),
            terminal: created.terminal,
            lines,
            reaped: AtomicBool::new(false),
            ended,
        });
        tokio::spawn(Arc::clone(&process).until_end(exit, pumps, cgroup, sender));
        Ok(process)
    }

    async fn until_end(
        self: Arc<Self>,
        exit: tokio::sync::oneshot::Receiver<Exit>,
        pumps: Pumps,
        cgroup: Cgroup,
        sender: watch::Sender<Option<Ended>>,
    ) {
        let oom_before = cgroup.oom_kills();
        // The reaper outlives all processes.
        let Ok(exit) = exit.await else { return };
        self.reaped.store(true, Ordering::SeqCst);
        let oom_killed = cgroup.oom_kills() > oom_before;
        pumps.finish().await;
        let _ = sender.send(Some(Ended { exit, oom_killed }));
    }

    /// Its pid in the agent's namespace.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Of its streams: there are some when somebody is connected to it.
    pub(crate) fn lines(&self) -> &Lines {
        &self.lines
    }

    /// Whether it has ended.
    pub(crate) fn is_ended(&self) -> bool {
        self.reaped.load(Ordering::SeqCst)
    }

    /// Starts it. `Some`: its command could not be executed.
    ///
    /// # Errors
    /// It was started before, or has ended.
    pub(crate) async fn start(&self) -> Result<Option<ExecFailure>, AgentError> {
        let waiting = self.waiting.lock().map_or(None, |mut w| w.take());
        let Some(spawned) = waiting else {
            return Err(AgentError::state("the process was started already"));
        };
        if self.is_ended() {
            return Err(AgentError::state("the process has ended"));
        }
        spawned.run().await
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// The agent is shutting down.
    pub(crate) async fn wait(&self) -> Result<Ended, AgentError> {
        let mut ended = self.ended.clone();
        let ended = ended.wait_for(Option::is_some).await;
        ended.ok().and_then(|e| *e).ok_or_else(|| AgentError::state("the process is not watched any more"))
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// It has ended.
    pub(crate) fn signal(&self, signal: i32) -> Result<(), AgentError> {
        if self.is_ended() {
            return Err(AgentError::state("the process has ended"));
        }
        sys::kill(self.pid, signal).tried(|| format!("send signal {signal}"))
    }

    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// It has none.
    pub(crate) fn resize(&self, window: Window) -> Result<(), AgentError> {
        let Some(master) = &self.terminal else {
            return Err(AgentError::state("the process has no terminal"));
        };
        rustix::termios::tcsetwinsize(master, window.winsize()).tried(|| "set the terminal's size".to_owned())
    }
}
