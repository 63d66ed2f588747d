//! What a client asks of a supervisor, and the answers: the JSON of [`super::FrameKind::Request`], `Reply` and `Refusal`.

use serde::{Deserialize, Serialize};

use super::AttachOptions;
use crate::config::ResourceConfig;
use crate::store::{ArchiveInOptions, ContainerStats, ExecConfig, PathStat, Process, WaitCondition};
use crate::{SandboxError, StartError};

/// A request; the first frame of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub(crate) enum Request {
    /// Answer when the process runs; then, with `attach`, its streams.
    Start { attach: Option<AttachOptions> },
    /// The streams of the process.
    Attach { options: AttachOptions },
    /// Answer when the condition holds.
    Wait { condition: WaitCondition },
    /// Stop signal, then SIGKILL; answer when it has ended.
    Stop { timeout_s: Option<u32> },
    /// A signal to the process.
    Kill { signal: u32 },
    /// Freeze.
    Pause,
    /// Thaw.
    Unpause,
    /// Another process; with `attach`, its streams.
    Exec { config: ExecConfig, attach: Option<AttachOptions> },
    /// Processes.
    Top,
    /// Resource use.
    Stats,
    /// What a path is.
    StatPath { path: String },
    /// A tar of a path, in stdout frames after the reply; then an exit frame or a refusal.
    ArchiveOut { path: String, follow: bool },
    /// Unpack the tar in the stdin frames that follow; reply at its end.
    ArchiveIn { path: String, options: ArchiveInOptions },
    /// Save it into a directory among the snapshots that the client has made.
    Save { draft: String },
    /// Change limits.
    Update { resources: ResourceConfig },
}

/// It worked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum Reply {
    /// Nothing to say, or streams follow.
    Done,
    /// The process has ended.
    Exited { exit_code: u8 },
    /// Processes.
    Processes { processes: Vec<Process> },
    /// Resource use.
    Stats { stats: ContainerStats },
    /// What a path is.
    Path { stat: PathStat },
    /// Bytes of an archive.
    Archive { bytes: u64 },
}

/// It did not work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refusal {
    /// 126 or 127 when a command could not be executed; else 125.
    pub(crate) exit_code: u8,
    /// One line for a person.
    pub(crate) message: String,
}

impl Refusal {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { exit_code: 125, message: message.into() }
    }
}

impl From<StartError> for Refusal {
    fn from(error: StartError) -> Self {
        Self { exit_code: error.exit_code(), message: error.to_string() }
    }
}

impl From<SandboxError> for Refusal {
    fn from(error: SandboxError) -> Self {
        Self::new(error.to_string())
    }
}

impl From<Refusal> for StartError {
    fn from(refusal: Refusal) -> Self {
        let Refusal { exit_code, message } = refusal;
        match exit_code {
            126 | 127 => Self::Command { exit_code, message },
            _ => Self::Sandbox(SandboxError::Refused(message)),
        }
    }
}

impl From<StartError> for SandboxError {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Sandbox(error) => error,
            StartError::Command { message, .. } => Self::Refused(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_the_wire() {
        let exec = ExecConfig { args: vec!["sh".into()], ..Default::default() };
        for request in [
            Request::Start { attach: None },
            Request::Wait { condition: WaitCondition::NextExit },
            Request::Exec { config: exec, attach: None },
            Request::Pause,
        ] {
            let text = serde_json::to_string(&request).unwrap();
            assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request);
        }
    }

    #[test]
    fn exit_codes_survive_the_wire() {
        let command =
            StartError::Command { exit_code: 127, message: "executable file not found in $PATH".into() };
        let back = StartError::from(Refusal::from(command));
        assert_eq!(back.exit_code(), 127);
        assert_eq!(back.to_string(), "executable file not found in $PATH");
        let back = StartError::from(Refusal::from(SandboxError::NoSuchVolume("v1".into())));
        assert_eq!((back.exit_code(), back.to_string().as_str()), (125, "no such volume: v1"));
    }
}
