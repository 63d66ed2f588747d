//! Starting a container: a supervisor is spawned, and handed its lock and its first client on its standard input.
//!
//! The lock is taken here and travels with the first byte, so there is no moment in which a second start could take it, and none in
//! which a crash leaves it taken: if the supervisor never comes to read it, the kernel closes it with the socket.

use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::Stdio;
use std::time::Instant;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::net::UnixStream;

use super::ask::Conversation;
use super::container::Container;
use super::lock::FileLock;
use super::recover::recover_locked;
use crate::launch::scaled_ms;
use crate::state::Status;
use crate::stream::wire::{Reply, Request};
use crate::stream::{AttachOptions, Attached};
use crate::{SandboxError, StartError};

/// The byte that carries the lock.
pub(crate) const HANDOVER: u8 = b'L';
/// How long a start may take in all: image, disks, boot, process. More than its parts' own limits together, which say more.
const START_MS: u64 = 300_000;
/// How often a start is tried again while an older supervisor ends.
const RETRY_MS: u64 = 5;
/// A supervisor's log is begun anew when it is longer, bytes.
const MAX_LOG_BYTES: u64 = 1 << 20;

impl Container {
    /// Starts it and waits until its process runs. With `attach` the conversation is in place before the process starts, so no output
    /// is lost. A container that runs already is left as it is (and attached to).
    ///
    /// # Errors
    /// [`StartError`] with Docker's exit code; the container is then as before, with [`crate::ContainerState::error`] set.
    pub async fn start(&self, attach: Option<AttachOptions>) -> Result<Option<Attached>, StartError> {
        self.noted("container start", self.try_start(attach).await)
    }

    async fn try_start(&self, attach: Option<AttachOptions>) -> Result<Option<Attached>, StartError> {
        let deadline = Instant::now() + scaled_ms(START_MS);
        let request = Request::Start { attach };
        loop {
            let now = self.looked_again()?;
            if now.status() == Status::Paused {
                return Err(now.wrong_status("unpause it instead").into());
            }
            let path = self.home.container_lock(self.id());
            let (stream, ours) = match FileLock::try_take(&path).map_err(|error| now.vanished(error))? {
                Some(lock) => {
                    recover_locked(&self.home, self.id(), &lock)?;
                    (Some(now.spawn_supervisor(&lock)?), true)
                }
                None => (self.connect().await, false),
            };
            if let Some(stream) = stream {
                let mut talk = Conversation::open(stream, &request).await.map_err(SandboxError::Stream)?;
                let left = deadline.saturating_duration_since(Instant::now());
                let answer =
                    tokio::time::timeout(left, talk.answer()).await.map_err(|_| SandboxError::Timeout {
                        what: "starting the container",
                        limit_ms: u64::try_from(scaled_ms(START_MS).as_millis()).unwrap_or(u64::MAX),
                    })?;
                match answer {
                    Ok(Some(Ok(Reply::Done))) => return Ok(attach.map(|_| talk.into_attached())),
                    Ok(Some(Err(refusal))) => return Err(refusal.into()),
                    _ if ours => return Err(now.gone().into()),
                    // An older supervisor that was ending: look again.
                    _ => {}
                }
            }
            if Instant::now() >= deadline {
                return Err(SandboxError::Timeout {
                    what: "waiting for an older supervisor to end",
                    limit_ms: START_MS,
                }
                .into());
            }
            tokio::time::sleep(std::time::Duration::from_millis(RETRY_MS)).await;
        }
    }

    /// A container that removed itself has no lock to open.
    fn vanished(&self, error: SandboxError) -> SandboxError {
        if self.dir().exists() { error } else { SandboxError::NoSuchContainer(self.id().to_owned()) }
    }

    fn spawn_supervisor(&self, lock: &FileLock) -> Result<UnixStream, SandboxError> {
        let fail = |source: std::io::Error| SandboxError::io("make a socket for", self.dir(), source);
        let (near, far) = StdUnixStream::pair().map_err(fail)?;
        hand_over(&near, lock).map_err(fail)?;
        near.set_nonblocking(true).map_err(fail)?;
        let program = &self.home.parts().supervisor;
        let mut command = tokio::process::Command::new(program);
        command
            .args(["supervise", self.id()])
            .env("HYPER_ROOT", &self.home.dirs().data)
            .env("HYPER_RUN", &self.home.dirs().run)
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(far)))
            .stdout(Stdio::null())
            .stderr(Stdio::from(self.supervisor_log()?))
            .process_group(0)
            .kill_on_drop(false);
        // Dropping the child does not end it; tokio reaps it when it ends before we do.
        let child = command.spawn();
        child.map_err(|source| SandboxError::Spawn { program: program.clone(), source })?;
        UnixStream::from_std(near).map_err(fail)
    }

    fn supervisor_log(&self) -> Result<File, SandboxError> {
        let path = self.dir().join("supervisor.log");
        let long = std::fs::metadata(&path).is_ok_and(|data| data.len() > MAX_LOG_BYTES);
        let mut options = OpenOptions::new();
        options.create(true).append(true);
        let file = options.open(&path).map_err(|source| SandboxError::io("open", &path, source))?;
        if long {
            file.set_len(0).map_err(|source| SandboxError::io("shorten", &path, source))?;
        }
        Ok(file)
    }
}

pub(crate) fn hand_over(to: &StdUnixStream, lock: &FileLock) -> Result<(), std::io::Error> {
    let fds = [lock.file().as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(to, &[IoSlice::new(&[HANDOVER])], &mut ancillary, SendFlags::empty())?;
    Ok(())
}
