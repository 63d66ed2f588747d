//! The verbs that a container's supervisor answers.

use std::time::Duration;

use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::time::{sleep, timeout};

use super::container::{Container, ExecConfig, RemoveOptions, WaitCondition};
use super::stats::{ContainerStats, Process};
use crate::launch::scaled_ms;
use crate::stream::wire::{Refusal, Reply, Request};
use crate::stream::{
    AttachOptions, Attached, Frame, FrameError, FrameKind, FrameReader, is_end, write_frame,
};
use crate::{SandboxError, StartError};

/// How long a supervisor may take to answer what needs no waiting: agents answer in milliseconds.
const ANSWER_MS: u64 = 30_000;
/// How often a container without a supervisor is looked at by `wait`.
const LOOK: Duration = Duration::from_millis(50);

/// A conversation whose request has been sent.
#[derive(Debug)]
pub(super) struct Conversation {
    stream: UnixStream,
    read: Vec<u8>,
}

impl Conversation {
    /// A supervisor that ends while it is asked has closed: then there is no answer, as when it closes later.
    pub(super) async fn open(stream: UnixStream, request: &Request) -> Result<Self, FrameError> {
        let mut stream = stream;
        match write_frame(&mut stream, &Frame::json(FrameKind::Request, request)?).await {
            Err(FrameError::Io(error)) if is_end(&error) => {}
            sent => sent?,
        }
        Ok(Self { stream, read: Vec::new() })
    }

    /// The answer; `Ok(None)` when the supervisor closed without one.
    pub(super) async fn answer(&mut self) -> Result<Option<Result<Reply, Refusal>>, FrameError> {
        let mut reader = FrameReader::resume(&mut self.stream, std::mem::take(&mut self.read));
        let frame = reader.next().await?;
        self.read = reader.into_parts().1;
        let Some(frame) = frame else { return Ok(None) };
        match frame.kind {
            FrameKind::Reply => Ok(Some(Ok(frame.parse_json()?))),
            FrameKind::Refusal => Ok(Some(Err(frame.parse_json()?))),
            kind => Err(FrameError::Payload(kind)),
        }
    }

    /// Takes the connection over for streams.
    pub(super) fn into_attached(self) -> Attached {
        Attached::new(self.stream, self.read)
    }

    pub(super) fn into_split(self) -> (FrameReader<OwnedReadHalf>, tokio::net::unix::OwnedWriteHalf) {
        let (from, to) = self.stream.into_split();
        (FrameReader::resume(from, self.read), to)
    }

    /// Waits until the supervisor closes: it does so last, after it has let go of the container's lock.
    async fn closed(mut self) {
        while let Ok(Some(_)) = self.answer().await {}
    }
}

impl Container {
    pub(super) fn gone(&self) -> SandboxError {
        SandboxError::SupervisorGone {
            container: self.name().to_owned(),
            log: self.dir().join("supervisor.log"),
        }
    }

    /// Connects to the supervisor; `None` when none listens.
    pub(super) async fn connect(&self) -> Option<UnixStream> {
        UnixStream::connect(self.home.run_dir(self.id()).join("sup.sock")).await.ok()
    }

    /// Sends a request to the supervisor of a container that must be live.
    pub(super) async fn converse(&self, request: &Request) -> Result<Conversation, SandboxError> {
        let now = self.looked_again()?;
        if !now.is_live() {
            return Err(now.wrong_status("it must be running"));
        }
        let stream = self.connect().await.ok_or_else(|| self.gone())?;
        Ok(Conversation::open(stream, request).await?)
    }

    async fn answer_within(&self, talk: &mut Conversation, limit: Duration) -> Result<Reply, StartError> {
        let answer = timeout(limit, talk.answer()).await.map_err(|_| SandboxError::Timeout {
            what: "waiting for the container's supervisor",
            limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
        })?;
        match answer.map_err(SandboxError::Stream)? {
            Some(Ok(reply)) => Ok(reply),
            Some(Err(refusal)) => Err(refusal.into()),
            None => Err(self.gone().into()),
        }
    }

    /// One request, one answer.
    pub(super) async fn ask(&self, request: &Request) -> Result<Reply, SandboxError> {
        self.ask_within(request, scaled_ms(ANSWER_MS)).await
    }

    /// As [`Container::ask`], for what may take its time.
    pub(super) async fn ask_within(&self, request: &Request, limit: Duration) -> Result<Reply, SandboxError> {
        let mut talk = self.converse(request).await?;
        Ok(self.answer_within(&mut talk, limit).await?)
    }

    /// Joins the conversation with its process.
    ///
    /// # Errors
    /// [`SandboxError::WrongStatus`] when it does not run.
    pub async fn attach(&self, options: AttachOptions) -> Result<Attached, SandboxError> {
        let request = Request::Attach { options };
        self.noted(
            "container attach",
            self.begin(&request).await.map(Conversation::into_attached).map_err(Into::into),
        )
    }

    /// A conversation that the supervisor has agreed to.
    async fn begin(&self, request: &Request) -> Result<Conversation, StartError> {
        let mut talk = self.converse(request).await?;
        self.answer_within(&mut talk, scaled_ms(ANSWER_MS)).await?;
        Ok(talk)
    }

    /// Adds a process. With `attach` there is a conversation with it; without, it runs on its own and `None` comes back.
    ///
    /// # Errors
    /// [`StartError`] with Docker's exit code.
    pub async fn exec(
        &self,
        config: ExecConfig,
        attach: Option<AttachOptions>,
    ) -> Result<Option<Attached>, StartError> {
        // The program alone: what it is given may be a secret.
        let detail = format!("{}: {}", self.name(), config.args.first().map_or("", String::as_str));
        let begun = self.begin(&Request::Exec { config, attach }).await;
        let talk = self.home.audit().note("container exec", self.id(), &detail, begun)?;
        Ok(attach.map(|_| talk.into_attached()))
    }

    /// Waits, without limit, and returns the exit code (0 if it was never started, or has been removed before). Dropping the future
    /// gives up.
    ///
    /// # Errors
    /// When the state cannot be read.
    pub async fn wait(&self, condition: WaitCondition) -> Result<u8, SandboxError> {
        let mut last = self.state().exit_code;
        loop {
            let now = match self.looked_again() {
                Err(SandboxError::NoSuchContainer(_)) if condition != WaitCondition::NotRunning => {
                    return Ok(last);
                }
                looked => looked?,
            };
            last = now.state().exit_code;
            if condition == WaitCondition::Removed && now.has_ended() && now.config().auto_remove {
                // Its supervisor removes it; when that has failed, nobody would.
                let options = RemoveOptions { volumes: true, ..RemoveOptions::default() };
                now.remove(options).await?;
                return Ok(last);
            }
            let met = condition == WaitCondition::NotRunning && !now.is_live();
            // NextExit of a container that ended since this handle was made has been met too.
            let missed =
                condition == WaitCondition::NextExit && now.state().finished != self.state().finished;
            if met || missed {
                return Ok(last);
            }
            if let Some(stream) = self.connect().await {
                let mut talk = Conversation::open(stream, &Request::Wait { condition }).await?;
                if let Ok(Some(Ok(Reply::Exited { exit_code }))) = talk.answer().await {
                    last = exit_code;
                    if condition != WaitCondition::Removed {
                        return Ok(exit_code);
                    }
                    talk.closed().await;
                    continue;
                }
            }
            sleep(LOOK).await;
        }
    }

    /// Sends the stop signal, and SIGKILL after `timeout` (`None`: the container's own). Nothing to do when it does not run.
    ///
    /// # Errors
    /// When the supervisor cannot be talked to.
    pub async fn stop(&self, limit: Option<Duration>) -> Result<(), SandboxError> {
        self.noted("container stop", self.try_stop(limit).await)
    }

    async fn try_stop(&self, limit: Option<Duration>) -> Result<(), SandboxError> {
        let timeout_s = limit.map(|limit| u32::try_from(limit.as_secs()).unwrap_or(u32::MAX));
        let talk = match self.converse(&Request::Stop { timeout_s }).await {
            Err(SandboxError::WrongStatus { .. }) => return Ok(()),
            talk => talk?,
        };
        let own = Duration::from_secs(u64::from(timeout_s.unwrap_or(self.config().stop_timeout_s)));
        self.await_stop(talk, own).await
    }

    /// Waits for the end of a container that was asked to end within its `own` time.
    async fn await_stop(&self, mut talk: Conversation, own: Duration) -> Result<(), SandboxError> {
        match self.answer_within(&mut talk, own.saturating_add(scaled_ms(2 * ANSWER_MS))).await {
            // A supervisor that closes without an answer was ending anyway.
            Ok(_) | Err(StartError::Sandbox(SandboxError::SupervisorGone { .. })) => {}
            Err(error) => return Err(error.into()),
        }
        if timeout(scaled_ms(ANSWER_MS), talk.closed()).await.is_err() {
            tracing::warn!(id = self.id(), "its supervisor is slow to end");
        }
        Ok(())
    }

    /// As [`Container::stop`] with no patience, and also while it is being started, which its state does not tell.
    pub(super) async fn kill_and_wait(&self) -> Result<(), SandboxError> {
        let Some(stream) = self.connect().await else { return Ok(()) };
        let talk = Conversation::open(stream, &Request::Stop { timeout_s: Some(0) }).await?;
        self.await_stop(talk, Duration::ZERO).await
    }

    /// Sends a signal to its process. After SIGKILL or its stop signal policies do not start it again.
    ///
    /// # Errors
    /// [`SandboxError::WrongStatus`] when it does not run.
    pub async fn kill(&self, signal: u32) -> Result<(), SandboxError> {
        let detail = format!("{}: signal {signal}", self.name());
        let killed = self.ask(&Request::Kill { signal }).await.map(|_| ());
        self.home.audit().note("container kill", self.id(), &detail, killed)
    }

    /// Freezes its processes.
    ///
    /// # Errors
    /// [`SandboxError::WrongStatus`] when it does not run.
    pub async fn pause(&self) -> Result<(), SandboxError> {
        self.noted("container pause", self.ask(&Request::Pause).await.map(|_| ()))
    }

    /// Thaws its processes.
    ///
    /// # Errors
    /// [`SandboxError::WrongStatus`] when it is not paused.
    pub async fn unpause(&self) -> Result<(), SandboxError> {
        self.noted("container unpause", self.ask(&Request::Unpause).await.map(|_| ()))
    }

    /// Its processes.
    ///
    /// # Errors
    /// [`SandboxError::WrongStatus`] when it does not run.
    pub async fn top(&self) -> Result<Vec<Process>, SandboxError> {
        match self.ask(&Request::Top).await? {
            Reply::Processes { processes } => Ok(processes),
            _ => Err(FrameError::Payload(FrameKind::Reply).into()),
        }
    }

    /// What it uses, now.
    ///
    /// # Errors
    /// [`SandboxError::WrongStatus`] when it does not run.
    pub async fn stats(&self) -> Result<ContainerStats, SandboxError> {
        match self.ask(&Request::Stats).await? {
            Reply::Stats { stats } => Ok(stats),
            _ => Err(FrameError::Payload(FrameKind::Reply).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Status;
    use crate::store::FileLock;

    #[tokio::test]
    async fn a_supervisor_that_has_gone_gives_no_answer() {
        let (near, far) = UnixStream::pair().unwrap();
        drop(far);
        let request = Request::Wait { condition: WaitCondition::NotRunning };
        let mut talk = Conversation::open(near, &request).await.unwrap();
        assert!(talk.answer().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_container_that_its_supervisor_could_not_remove_is_removed_by_who_waits_for_that() {
        let (_dir, home) = crate::store::tests::home();
        let mut wish = crate::store::tests::config("once");
        wish.auto_remove = true;
        let mut container = home.create(wish).unwrap();
        let lock = FileLock::try_take(&home.container_lock(container.id())).unwrap().unwrap();
        container.change_state(&lock, |state| state.end(Status::Exited, 3, String::new())).unwrap();
        drop(lock);
        let waited = container.wait(WaitCondition::Removed);
        let code = timeout(Duration::from_secs(20), waited).await;
        assert_eq!(code.expect("somebody waits for ever").unwrap(), 3);
        assert!(home.containers().unwrap().is_empty());
    }
}
