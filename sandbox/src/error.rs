//! Why something was refused or failed. Messages are one lower-case line for a person, in Docker's words where Docker has them.

use std::path::PathBuf;

use crate::config::ConfigError;
use crate::launch::VmError;
use crate::network::NetworkError;
use crate::rootless::RootlessError;
use crate::storage::StorageError;

/// Why an operation on the home, a container or a volume failed.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// No container has this name, id or id prefix.
    #[error("No such container: {0}")]
    NoSuchContainer(String),
    /// Several ids begin with this.
    #[error("multiple containers found with the id prefix {0}: give more of it")]
    Ambiguous(String),
    /// No volume has this name.
    #[error("no such volume: {0}")]
    NoSuchVolume(String),
    /// A volume that containers still name.
    #[error("volume {name} is in use by container {container}")]
    VolumeInUse {
        /// The volume.
        name: String,
        /// Short id of one container that names it.
        container: String,
    },
    /// No snapshot has this name.
    #[error("no such snapshot: {0}")]
    NoSuchSnapshot(String),
    /// Another snapshot has the name.
    #[error("there is a snapshot {0} already: remove it, or give another name")]
    SnapshotExists(String),
    /// What a saved container was made of is not what there is now.
    #[error(
        "what was saved of {0} cannot go on: kernel, agent or hyper-vmm are others now, or this host was started again"
    )]
    Stale(String),
    /// A container that cannot be saved.
    #[error("container {container} cannot be saved: {why}")]
    Unsavable {
        /// Its name.
        container: String,
        /// What stands in the way.
        why: String,
    },
    /// Another container has the name.
    #[error(
        "the container name \"{name}\" is already in use by container {id}: remove or rename that container to reuse the name"
    )]
    NameInUse {
        /// The name.
        name: String,
        /// The container that has it.
        id: String,
    },
    /// The container is not in a status in which this can be done.
    #[error("container {container} is {status}: {hint}")]
    WrongStatus {
        /// Name or short id.
        container: String,
        /// Its status.
        status: crate::Status,
        /// What is needed, or what to do.
        hint: &'static str,
    },
    /// The configuration cannot be honoured.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A system call on a file failed.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried, as a verb phrase.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A state file does not hold what we wrote.
    #[error("{path} is damaged: {source}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A file of a later version of Hyper.
    #[error("{path} is of format {version}, which this version does not know: use a newer hyper")]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its format.
        version: u32,
    },
    /// The supervisor could not be spawned.
    #[error("cannot run {program} as supervisor: {source}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Somebody stopped or removed it while it was being started.
    #[error("it was stopped before it ran")]
    Abandoned,
    /// `supervise` was not called by [`crate::Container::start`].
    #[error("supervise is started by hyper itself: {0}")]
    NotStarted(&'static str),
    /// The supervisor answered no.
    #[error("{0}")]
    Refused(String),
    /// The conversation with the supervisor broke off.
    #[error("the supervisor of container {container} went away: see {log}")]
    SupervisorGone {
        /// Name or short id.
        container: String,
        /// Its log file.
        log: PathBuf,
    },
    /// The supervisor sent what it must not.
    #[error("the conversation with the supervisor broke: {0}")]
    Stream(#[from] crate::stream::FrameError),
    /// Not done in time.
    #[error("{what} took longer than {limit_ms} ms")]
    Timeout {
        /// What.
        what: &'static str,
        /// The deadline.
        limit_ms: u64,
    },
    /// The host's network could not be set up.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A user who is not root cannot have namespaces, or a network.
    #[error(transparent)]
    Rootless(#[from] RootlessError),
    /// A disk could not be made.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The machine could not be started or has failed.
    #[error(transparent)]
    Vm(#[from] VmError),
}

impl SandboxError {
    pub(crate) fn io(
        what: &'static str,
        path: impl Into<PathBuf>,
        source: impl Into<std::io::Error>,
    ) -> Self {
        Self::Io { what, path: path.into(), source: source.into() }
    }
}

/// Why a process did not come to run. [`StartError::exit_code`] is what `docker run` would end with.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The command could not be executed; the text has Docker's words, such as `exec: "x": executable file not found in $PATH`.
    #[error("{message}")]
    Command {
        /// 126 or 127.
        exit_code: u8,
        /// One line.
        message: String,
    },
    /// Everything else.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

impl StartError {
    /// 127: command not found, 126: command cannot be invoked, 125: everything else.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Command { exit_code, .. } => *exit_code,
            Self::Sandbox(_) => 125,
        }
    }
}
