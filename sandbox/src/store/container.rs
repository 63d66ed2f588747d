//! One container: its files, and the verbs that change them.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::home::{REMOVED_PREFIX, remove_tree};
use super::lock::FileLock;
use super::record::Record;
use crate::clock::Timestamp;
use crate::config::{ContainerConfig, MountConfig, ResourceUpdate, check_name};
use crate::logs::{LogOptions, LogStream};
use crate::state::{ContainerState, Status, read_json, sync_dir, write_json};
use crate::stream::wire::Request;
use crate::{Home, SandboxError, StartError};

/// How long the supervisor of a container that is removed may take to end.
const REMOVE_MS: u64 = 30_000;
/// Pause between two looks at whether it has.
const REMOVE_RETRY: Duration = Duration::from_millis(5);

/// One container, as it was when it was found; [`Container::refresh`] looks again. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Container {
    pub(super) home: Home,
    record: Record,
    state: ContainerState,
}

/// What [`Container::wait`] waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitCondition {
    /// It does not run (at once if it does not now) and no policy is about to start it again.
    NotRunning,
    /// The next end of its process, even if it has not been started yet.
    NextExit,
    /// It has been removed.
    Removed,
}

/// How a container is removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RemoveOptions {
    /// Kill it first if it runs.
    pub force: bool,
    /// Remove its anonymous volumes too.
    pub volumes: bool,
}

/// A process to be added to a running container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecConfig {
    /// Program and arguments, at least one.
    pub args: Vec<String>,
    /// Added to the container's environment.
    pub env: Vec<String>,
    /// Empty: the container's.
    pub working_dir: String,
    /// Empty: the container's.
    pub user: String,
    /// Give it a terminal.
    pub terminal: bool,
    /// Keep its standard input open.
    pub open_stdin: bool,
    /// All capabilities.
    pub privileged: bool,
}

impl Container {
    pub(super) fn new(home: Home, record: Record, state: ContainerState) -> Self {
        Self { home, record, state }
    }

    /// Reads a container's files.
    pub(crate) fn load(home: &Home, id: &str) -> Result<Self, SandboxError> {
        let dir = home.container_dir(id);
        let missing = || SandboxError::NoSuchContainer(id.to_owned());
        let record: Record = read_json(&dir.join("config.json"))?.ok_or_else(missing)?;
        if record.version > Record::VERSION {
            return Err(SandboxError::TooNew { path: dir.join("config.json"), version: record.version });
        }
        let state = read_json(&dir.join("state.json"))?.unwrap_or_default();
        Ok(Self::new(home.clone(), record, state))
    }

    /// Its id, 64 hexadecimal digits.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.record.id
    }

    /// The first 12 digits of its id.
    #[must_use]
    pub fn short_id(&self) -> &str {
        self.id().get(..12).unwrap_or(self.id())
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.record.config.name
    }

    /// When it was made.
    #[must_use]
    pub fn created(&self) -> Timestamp {
        self.record.created
    }

    /// What it is to be.
    #[must_use]
    pub fn config(&self) -> &ContainerConfig {
        &self.record.config
    }

    /// What it was when it was last looked at.
    #[must_use]
    pub fn state(&self) -> &ContainerState {
        &self.state
    }

    /// Its directory on the host: `config.json`, `state.json`, `log.json`, `console.log`, `vmm.log`, `supervisor.log`, `rw.img`.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.home.container_dir(self.id())
    }

    /// Looks again.
    ///
    /// # Errors
    /// [`SandboxError::NoSuchContainer`] when it has been removed.
    pub fn refresh(&mut self) -> Result<(), SandboxError> {
        super::recover::recover_container(&self.home, self.id())?;
        *self = Self::load(&self.home, self.id())?;
        Ok(())
    }

    /// Changes and writes the state. Only the holder of the container's lock may.
    pub(crate) fn change_state(
        &mut self,
        _lock: &FileLock,
        change: impl FnOnce(&mut ContainerState),
    ) -> Result<(), SandboxError> {
        change(&mut self.state);
        write_json(&self.dir().join("state.json"), &self.state)
    }

    /// Reads the configuration again: a rename or an update may have changed it.
    pub(crate) fn reload_config(&mut self) -> Result<(), SandboxError> {
        self.record = Self::load(&self.home, self.id())?.record;
        Ok(())
    }

    pub(super) fn wrong_status(&self, hint: &'static str) -> SandboxError {
        SandboxError::WrongStatus { container: self.name().to_owned(), status: self.state.status, hint }
    }

    /// Removes it. The handle is of no use afterwards.
    ///
    /// # Errors
    /// [`SandboxError::WrongStatus`] when it runs and `force` is not set.
    pub async fn remove(&self, options: RemoveOptions) -> Result<(), SandboxError> {
        // What is removed is noted by whoever removes it.
        match self.try_remove(options).await {
            Ok(()) => Ok(()),
            failed => self.noted("container remove", failed),
        }
    }

    async fn try_remove(&self, options: RemoveOptions) -> Result<(), SandboxError> {
        let path = self.home.container_lock(self.id());
        let deadline = Instant::now() + crate::launch::scaled_ms(REMOVE_MS);
        let mut first = true;
        let lock = loop {
            let now = match self.looked_again() {
                Err(SandboxError::NoSuchContainer(_)) if !first => return Ok(()),
                looked => looked?,
            };
            first = false;
            if now.state.status.is_live() && !options.force {
                return Err(now.wrong_status("stop the container before removing or force remove"));
            }
            if !path.exists() {
                // It was to remove itself, and has.
                return Ok(());
            }
            if let Some(lock) = FileLock::try_take(&path)? {
                break lock;
            }
            // Its supervisor runs it, starts it, or is about to end.
            if options.force {
                match now.kill_and_wait().await {
                    Ok(()) | Err(SandboxError::NoSuchContainer(_)) => {}
                    Err(error) => return Err(error),
                }
            }
            if Instant::now() >= deadline {
                let (what, limit_ms) = ("waiting for the container's supervisor to end", REMOVE_MS);
                return Err(SandboxError::Timeout { what, limit_ms });
            }
            tokio::time::sleep(REMOVE_RETRY).await;
        };
        let now = match Self::load(&self.home, self.id()) {
            Err(SandboxError::NoSuchContainer(_)) => return Ok(()),
            loaded => loaded?,
        };
        if now.state.status.is_live() && !options.force {
            super::recover::recover_locked(&self.home, self.id(), &lock)?;
        }
        now.remove_locked(options.volumes)
    }

    /// Puts what was done to it into the audit log.
    pub(super) fn noted<T, E: std::error::Error>(&self, action: &str, outcome: Result<T, E>) -> Result<T, E> {
        self.home.audit().note(action, self.id(), self.name(), outcome)
    }

    /// Puts its end into the audit log.
    pub(crate) fn note_exit(&self, code: u8, error: &str) {
        let because = if error.is_empty() { String::new() } else { format!(": {error}") };
        let detail = format!("{}: code {code}{because}", self.name());
        // There is nothing that could have failed.
        let _: Result<(), SandboxError> =
            self.home.audit().note("container exit", self.id(), &detail, Ok(()));
    }

    pub(super) fn looked_again(&self) -> Result<Self, SandboxError> {
        let mut now = self.clone();
        now.refresh()?;
        Ok(now)
    }

    /// Removes its directories, by the holder of its lock.
    pub(crate) fn remove_locked(&self, volumes: bool) -> Result<(), SandboxError> {
        match self.remove_dirs(volumes) {
            Ok(false) => Ok(()),
            removed => self.noted("container remove", removed).map(drop),
        }
    }

    /// Whether they were there.
    fn remove_dirs(&self, volumes: bool) -> Result<bool, SandboxError> {
        remove_tree(&self.home.run_dir(self.id()))?;
        let beside = self.home.containers_dir().join(format!("{REMOVED_PREFIX}{}", self.id()));
        {
            let _home = self.home.lock()?;
            match fs::rename(self.dir(), &beside) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
                renamed => renamed.map_err(|source| SandboxError::io("remove", self.dir(), source))?,
            }
            if !self.config().auto_remove {
                sync_dir(&self.home.containers_dir())?;
            }
        }
        remove_tree(&beside)?;
        if volumes {
            self.remove_anonymous_volumes();
        }
        Ok(true)
    }

    fn remove_anonymous_volumes(&self) {
        for mount in &self.config().mounts {
            if let MountConfig::Volume { name, anonymous: true, .. } = mount {
                match self.home.remove_volume(name) {
                    Ok(()) | Err(SandboxError::NoSuchVolume(_)) => {}
                    Err(error) => tracing::warn!(name, %error, "anonymous volume stays"),
                }
            }
        }
    }

    /// Gives it another name.
    ///
    /// # Errors
    /// [`SandboxError::NameInUse`], [`SandboxError::Config`].
    pub fn rename(&self, name: &str) -> Result<(), SandboxError> {
        let renamed = self.try_rename(name);
        self.home.audit().note("container rename", self.id(), &format!("{} to {name}", self.name()), renamed)
    }

    fn try_rename(&self, name: &str) -> Result<(), SandboxError> {
        check_name(name)?;
        let _lock = self.home.lock()?;
        if let Some(other) = self.home.containers()?.iter().find(|other| other.name() == name) {
            return Err(SandboxError::NameInUse { name: name.to_owned(), id: other.short_id().to_owned() });
        }
        let mut record = Self::load(&self.home, self.id())?.record;
        name.clone_into(&mut record.config.name);
        write_json(&self.dir().join("config.json"), &record)
    }

    /// Changes limits and restart policy, now and for later starts.
    ///
    /// # Errors
    /// [`SandboxError::Config`], [`SandboxError::Refused`] when the running VM is too small.
    pub async fn update(&self, update: ResourceUpdate) -> Result<(), SandboxError> {
        self.noted("container update", self.try_update(update).await)
    }

    async fn try_update(&self, update: ResourceUpdate) -> Result<(), SandboxError> {
        let now = self.looked_again()?;
        let mut wanted = now.record.config.clone();
        wanted.apply(&update);
        wanted.check()?;
        if now.state.status.is_live() {
            now.ask(&Request::Update { resources: wanted.resources.clone() }).await?;
        }
        let _lock = self.home.lock()?;
        let mut record = Self::load(&self.home, self.id())?.record;
        record.config.apply(&update);
        write_json(&self.dir().join("config.json"), &record)
    }

    /// What it has written.
    ///
    /// # Errors
    /// When the log cannot be opened.
    pub fn logs(&self, options: LogOptions) -> Result<LogStream, SandboxError> {
        LogStream::open(&self.dir(), self.home.container_lock(self.id()), options)
    }

    /// Stops it if it runs, and starts it.
    ///
    /// # Errors
    /// As [`Container::stop`] and [`Container::start`].
    pub async fn restart(&self, timeout: Option<Duration>) -> Result<(), StartError> {
        self.stop(timeout).await?;
        self.start(None).await.map(|_| ())
    }

    /// Whether its process runs or waits to be started again, as of the last look.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.state.status.is_live()
    }

    /// Whether it ran and does not any more, as of the last look.
    pub(super) fn has_ended(&self) -> bool {
        self.state.status == Status::Exited
    }

    pub(super) fn status(&self) -> Status {
        self.state.status
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::{config, home};

    #[test]
    fn names_and_prefixes_resolve() {
        let (_dir, home) = home();
        let web = home.create(config("web")).unwrap();
        let db = home.create(config("")).unwrap();
        assert!(!db.name().is_empty());
        assert_eq!(home.find("web").unwrap().id(), web.id());
        assert_eq!(home.find("/web").unwrap().id(), web.id());
        assert_eq!(home.find(web.id()).unwrap().id(), web.id());
        assert_eq!(home.find(web.short_id()).unwrap().id(), web.id());
        assert!(matches!(home.find(""), Err(SandboxError::NoSuchContainer(_))));
        assert!(matches!(home.find("nope"), Err(SandboxError::NoSuchContainer(_))));
        assert!(matches!(home.find("../containers"), Err(SandboxError::NoSuchContainer(_))));
        for _ in 0..20 {
            home.create(config("")).unwrap();
        }
        let digits = "0123456789abcdef";
        let ambiguous =
            digits.chars().any(|d| matches!(home.find(&d.to_string()), Err(SandboxError::Ambiguous(_))));
        assert!(ambiguous, "22 ids share some first digit");
        assert_eq!(home.containers().unwrap().last().unwrap().id(), web.id(), "newest first");
    }

    #[test]
    fn names_are_unique() {
        let (_dir, home) = home();
        let web = home.create(config("web")).unwrap();
        assert!(matches!(home.create(config("web")), Err(SandboxError::NameInUse { .. })));
        let other = home.create(config("other")).unwrap();
        assert!(matches!(other.rename("web"), Err(SandboxError::NameInUse { .. })));
        assert!(other.rename("-bad").is_err());
        web.rename("www").unwrap();
        assert_eq!(home.find("www").unwrap().id(), web.id());
        assert!(home.find("web").is_err());
    }

    #[tokio::test]
    async fn removal_takes_anonymous_volumes_only_when_asked() {
        let (_dir, home) = home();
        for volumes in [false, true] {
            let mut wish = config("c1");
            let mount = MountConfig::Volume {
                name: String::new(),
                anonymous: false,
                target: "/d".into(),
                read_only: false,
            };
            wish.mounts = vec![mount];
            let container = home.create(wish).unwrap();
            let before = home.volumes().unwrap().len();
            container.remove(RemoveOptions { force: false, volumes }).await.unwrap();
            assert_eq!(home.volumes().unwrap().len(), before - usize::from(volumes));
            assert!(home.containers().unwrap().is_empty());
            assert!(matches!(
                container.remove(RemoveOptions::default()).await,
                Err(SandboxError::NoSuchContainer(_))
            ));
        }
    }

    #[tokio::test]
    async fn update_of_a_stopped_container_is_kept() {
        let (_dir, home) = home();
        let container = home.create(config("c1")).unwrap();
        let update = ResourceUpdate { mem_mib: Some(256), ..Default::default() };
        container.update(update).await.unwrap();
        assert_eq!(home.find("c1").unwrap().config().resources.mem_mib, 256);
        let bad = ResourceUpdate { mem_mib: Some(1), ..Default::default() };
        assert!(matches!(container.update(bad).await, Err(SandboxError::Config(_))));
    }

    #[test]
    fn damaged_and_newer_files_are_named_not_lost() {
        let (_dir, home) = home();
        let container = home.create(config("c1")).unwrap();
        let path = container.dir().join("config.json");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("\"version\": 1", "\"version\": 2")).unwrap();
        assert!(matches!(home.find(container.id()), Err(SandboxError::TooNew { version: 2, .. })));
        fs::write(&path, &text[..text.len() / 2]).unwrap();
        assert!(matches!(home.find(container.id()), Err(SandboxError::Damaged { .. })));
        assert!(home.containers().unwrap().is_empty());
    }
}
