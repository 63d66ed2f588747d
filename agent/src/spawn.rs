//! Starts child programs and reads what they report.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use rustix::io::FdFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::Pid;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::child;
use crate::error::{AgentError, ErrorKind, Tried};
use crate::plan::{MAX_PLAN_BYTES, MAX_REPORT_BYTES, Plan, Report, START};
use crate::reaper::Reaper;
use crate::stdio::ChildStdio;
use crate::trace;

/// How long the whole of a creation may take: it may copy a large folder into a new volume.
const CREATE_TIMEOUT: Duration = Duration::from_secs(600);
/// How long a process may take from the word to start until its program runs.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A child program and its control socket.
#[derive(Debug)]
pub(crate) struct Spawned {
    control: UnixStream,
    buffer: Vec<u8>,
    descriptor: Option<OwnedFd>,
}

/// A process that was created and waits to be started.
#[derive(Debug)]
pub(crate) struct CreatedProcess {
    /// In the agent's pid namespace.
    pub pid: Pid,
    /// The terminal's master.
    pub terminal: Option<OwnedFd>,
    /// To start it with.
    pub spawned: Spawned,
}

/// A command that could not be executed: exit code and text.
pub(crate) type ExecFailure = (u32, String);

impl Spawned {
    /// Starts a child program and sends its plan. Descriptors in `keep` are open in it under the same numbers.
    ///
    /// # Errors
    /// The agent's own program cannot be started, or the plan is too large.
    pub(crate) async fn start(
        reaper: &Reaper,
        plan: &Plan,
        stdio: ChildStdio,
        keep: &[BorrowedFd<'_>],
    ) -> Result<Self, AgentError> {
        let _step = trace::span("start a child program");
        let json =
            serde_json::to_vec(plan).map_err(|e| AgentError::invalid(format!("write the plan: {e}")))?;
        if json.len() > MAX_PLAN_BYTES {
            return Err(AgentError::limit("plan bytes", MAX_PLAN_BYTES));
        }
        let (ours, theirs) =
            std::os::unix::net::UnixStream::pair().tried(|| "make a socket pair".to_owned())?;
        ours.set_nonblocking(true).tried(|| "make a socket non-blocking".to_owned())?;
        let control = UnixStream::from_std(ours).tried(|| "use a socket".to_owned())?;
        // No other thread starts programs, so nobody else inherits what is inheritable between these lines.
        let pid = spawn(theirs.as_fd(), stdio, keep)?;
        drop(theirs);
        // Its end is of no interest, only that it does not pile up as one that nobody asked for.
        drop(reaper.watch(pid));
        let mut spawned = Self { control, buffer: Vec::new(), descriptor: None };
        let length = u32::try_from(json.len()).unwrap_or(u32::MAX);
        let send = async {
            spawned.control.write_all(&length.to_le_bytes()).await?;
            spawned.control.write_all(&json).await
        };
        timeout(START_TIMEOUT, send)
            .await
            .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
            .tried(|| "send the plan".to_owned())?;
        Ok(spawned)
    }

    /// The next report; `None` at the end.
    async fn next(&mut self) -> Result<Option<Report>, AgentError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let report = serde_json::from_slice(&line)
                    .map_err(|e| AgentError::state(format!("a child program's report: {e}")))?;
                return Ok(Some(report));
            }
            if self.buffer.len() > MAX_REPORT_BYTES {
                return Err(AgentError::limit("report bytes", MAX_REPORT_BYTES));
            }
            if self.receive().await.tried(|| "read a report".to_owned())? == 0 {
                return Ok(None);
            }
        }
    }

    async fn receive(&mut self) -> std::io::Result<usize> {
        let mut bytes = [0; 4096];
        let control = &self.control;
        let descriptor = &mut self.descriptor;
        let n = control
            .async_io(Interest::READABLE, || {
                let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = RecvAncillaryBuffer::new(&mut space);
                let mut buffers = [IoSliceMut::new(&mut bytes)];
                let received =
                    rustix::net::recvmsg(control, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
                for message in ancillary.drain() {
                    if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                        *descriptor = descriptors.last();
                    }
                }
                Ok(received.bytes)
            })
            .await?;
        self.buffer.extend_from_slice(bytes.get(..n).unwrap_or_default());
        Ok(n)
    }

    /// Waits for the one report of an archive program.
    ///
    /// # Errors
    /// What it reports, or that it ended without a report.
    pub(crate) async fn answer(mut self) -> Result<Report, AgentError> {
        match self.next().await? {
            Some(Report::Failed { kind, message }) => Err(AgentError::refused(kind, message)),
            Some(report) => Ok(report),
            None => Err(ended()),
        }
    }

    /// Waits until the process is created.
    ///
    /// # Errors
    /// What failed in the child, in its words.
    pub(crate) async fn created(mut self, reaper: &Reaper) -> Result<CreatedProcess, AgentError> {
        let _step = trace::span("child program");
        let mut pid = None;
        let result = timeout(CREATE_TIMEOUT, self.wait_created(&mut pid)).await.unwrap_or_else(|_| {
            Err(AgentError::refused(ErrorKind::Deadline, "making the process took too long"))
        });
        match (result, pid) {
            (Ok(()), Some(pid)) => {
                Ok(CreatedProcess { pid, terminal: self.descriptor.take(), spawned: self })
            }
            (Ok(()), None) => Err(AgentError::state("a child program reported no pid")),
            (Err(error), pid) => {
                if let Some(pid) = pid {
                    // Its control socket closes with this error, which ends it.
                    drop(reaper.watch(pid));
                }
                Err(error)
            }
        }
    }

    async fn wait_created(&mut self, pid: &mut Option<Pid>) -> Result<(), AgentError> {
        let mut ready = false;
        let mut failed = None;
        // The two come from two programs, in any order; after a failure the pid may still be on its way.
        while !(ready && pid.is_some()) {
            match self.next().await? {
                Some(Report::Pid(number)) => *pid = i32::try_from(number).ok().and_then(Pid::from_raw),
                Some(Report::Ready) => ready = true,
                Some(Report::Steps(steps)) => trace::add(steps),
                Some(Report::Failed { kind, message }) => {
                    failed = Some(AgentError::refused(kind, message));
                }
                Some(_) => {}
                None => return Err(failed.unwrap_or_else(ended)),
            }
        }
        Ok(())
    }

    /// Starts a created process. `Ok(None)`: its program runs.
    ///
    /// # Errors
    /// It is gone.
    pub(crate) async fn run(mut self) -> Result<Option<ExecFailure>, AgentError> {
        let _step = trace::span("execute the program");
        self.control.write_all(&[START]).await.tried(|| "start the process".to_owned())?;
        let wait = async {
            match self.next().await? {
                Some(Report::ExecFailed { exit_code, error }) => Ok(Some((exit_code, error))),
                Some(Report::Failed { message, .. }) => Ok(Some((126, message))),
                Some(_) | None => Ok(None),
            }
        };
        timeout(START_TIMEOUT, wait).await.unwrap_or_else(|_| {
            Err(AgentError::refused(ErrorKind::Deadline, "starting the process took too long"))
        })
    }
}

fn ended() -> AgentError {
    AgentError::state("a child program ended without a report: out of memory, or killed")
}

fn spawn(control: BorrowedFd<'_>, stdio: ChildStdio, keep: &[BorrowedFd<'_>]) -> Result<Pid, AgentError> {
    let inherit = |flags: FdFlags| {
        std::iter::once(&control).chain(keep).try_for_each(|fd| rustix::io::fcntl_setfd(fd, flags))
    };
    inherit(FdFlags::empty()).tried(|| "pass descriptors on".to_owned())?;
    let spawned = Command::new("/proc/self/exe")
        .arg0("hyper-agent")
        .arg(child::ARGUMENT)
        .arg(control.as_raw_fd().to_string())
        .env_clear()
        .current_dir("/")
        .stdin(stdio.stdin)
        .stdout(stdio.stdout)
        .stderr(stdio.stderr)
        .spawn();
    inherit(FdFlags::CLOEXEC).tried(|| "keep descriptors".to_owned())?;
    let spawned = spawned.tried(|| "start a child program".to_owned())?;
    // The reaper waits for it, as for every child of PID 1.
    i32::try_from(spawned.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| AgentError::state("a child program has no pid"))
}
