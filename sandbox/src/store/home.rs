//! All containers of one user.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::lock::FileLock;
use super::record::Record;
use super::{names, recover};
use crate::audit::AuditLog;
use crate::clock::Timestamp;
use crate::config::{ConfigError, ContainerConfig, MountConfig};
use crate::dirs::{Dirs, Parts};
use crate::launch::{LayerBlob, UnpackProgress, Unpacked};
use crate::state::{ContainerState, sync_dir, write_json};
use crate::{Container, SandboxError};

/// All containers and volumes of one user. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Home {
    inner: Arc<HomeInner>,
}

#[derive(Debug)]
struct HomeInner {
    dirs: Dirs,
    parts: Parts,
}

/// Prefix of directories of containers that are being made.
pub(crate) const NEW_PREFIX: &str = ".new-";
/// Prefix of directories of containers that are being removed.
pub(crate) const REMOVED_PREFIX: &str = ".removed-";
/// Least unambiguous prefix of an id that is looked up is one digit; names win over ids.
const RUN_DIR_DIGITS: usize = 16;

impl Home {
    /// Opens the state, makes its directories, and cleans up what dead supervisors and half-made containers left.
    ///
    /// # Errors
    /// When a directory cannot be made or read.
    pub fn open(dirs: Dirs, parts: Parts) -> Result<Self, SandboxError> {
        let home = Self::assume(dirs, parts);
        for dir in [home.containers_dir(), home.volumes_dir()] {
            make_lasting_dir(&dir)?;
        }
        crate::rootless::make_run_dir(home.dirs())?;
        recover::recover(&home)?;
        Ok(home)
    }

    /// A home that [`Home::open`] has opened before, in another process.
    pub(crate) fn assume(dirs: Dirs, parts: Parts) -> Self {
        Self { inner: Arc::new(HomeInner { dirs, parts }) }
    }

    /// The log of what was done.
    #[must_use]
    pub fn audit(&self) -> AuditLog {
        AuditLog::of(self.dirs())
    }

    /// Where the state is.
    #[must_use]
    pub fn dirs(&self) -> &Dirs {
        &self.inner.dirs
    }

    /// What sandboxes are made of.
    #[must_use]
    pub fn parts(&self) -> &Parts {
        &self.inner.parts
    }

    pub(crate) fn containers_dir(&self) -> PathBuf {
        self.dirs().data.join("containers")
    }

    pub(crate) fn container_dir(&self, id: &str) -> PathBuf {
        self.containers_dir().join(id)
    }

    /// Directory of a container's sockets. Short, because a socket's path has at most 107 bytes.
    pub(crate) fn run_dir(&self, id: &str) -> PathBuf {
        self.dirs().run.join(id.get(..RUN_DIR_DIGITS).unwrap_or(id))
    }

    pub(crate) fn volumes_dir(&self) -> PathBuf {
        self.dirs().data.join("volumes")
    }

    pub(crate) fn templates_dir(&self) -> PathBuf {
        self.dirs().data.join("templates")
    }

    pub(crate) fn snapshots_dir(&self) -> PathBuf {
        self.dirs().data.join("snapshots")
    }

    /// The lock under which containers and volumes are made, named and removed. Held for a few file operations.
    pub(crate) fn lock(&self) -> Result<FileLock, SandboxError> {
        FileLock::take_short(&self.dirs().data.join("lock"))
    }

    /// The lock that a container's supervisor holds while it lives.
    pub(crate) fn container_lock(&self, id: &str) -> PathBuf {
        self.container_dir(id).join("lock")
    }

    /// Makes a container, ready to start. An empty name is replaced by a made-up one; anonymous volumes are made.
    ///
    /// # Errors
    /// [`SandboxError::Config`], [`SandboxError::NameInUse`], or a failed write.
    pub fn create(&self, config: ContainerConfig) -> Result<Container, SandboxError> {
        self.create_with(config, |_| Ok(()))
    }

    /// As [`Home::create`]; `fill` puts more into its directory before anybody sees it. The home's lock is held meanwhile.
    pub(crate) fn create_with(
        &self,
        config: ContainerConfig,
        fill: impl FnOnce(&Path) -> Result<(), SandboxError>,
    ) -> Result<Container, SandboxError> {
        let wish = format!("{} of {}", config.name, config.image.reference);
        let made = self.make_container(config, fill);
        let (id, detail) = match &made {
            Ok(made) => {
                (made.id().to_owned(), format!("{} of {}", made.name(), made.config().image.reference))
            }
            Err(_) => (String::new(), wish),
        };
        self.audit().note("container create", &id, &detail, made)
    }

    fn make_container(
        &self,
        mut config: ContainerConfig,
        fill: impl FnOnce(&Path) -> Result<(), SandboxError>,
    ) -> Result<Container, SandboxError> {
        config.check()?;
        let lock = self.lock()?;
        let others = self.containers()?;
        let owner = |name: &str| others.iter().find(|other| other.name() == name);
        if config.name.is_empty() {
            config.name = names::new_name(&|name| owner(name).is_some());
        } else if let Some(other) = owner(&config.name) {
            return Err(SandboxError::NameInUse { name: config.name, id: other.short_id().to_owned() });
        }
        let id = names::new_id();
        for mount in &mut config.mounts {
            self.prepare_mount(mount, &lock)?;
        }
        let record = Record { version: Record::VERSION, id, created: Timestamp::now(), config };
        let state = ContainerState::default();
        let beside = self.containers_dir().join(format!("{NEW_PREFIX}{}", record.id));
        let dir = self.container_dir(&record.id);
        let undo = RemoveDir(Some(beside.clone()));
        make_private_dir(&beside)?;
        // First: it is synced with the names of the others.
        fs::write(beside.join("lock"), "")
            .map_err(|source| SandboxError::io("write", beside.join("lock"), source))?;
        write_json(&beside.join("config.json"), &record)?;
        write_json(&beside.join("state.json"), &state)?;
        fill(&beside)?;
        fs::rename(&beside, &dir).map_err(|source| SandboxError::io("make", &dir, source))?;
        undo.release();
        // What is to go with its end need not outlast the power.
        if !record.config.auto_remove {
            sync_dir(&self.containers_dir())?;
        }
        Ok(Container::new(self.clone(), record, state))
    }

    fn prepare_mount(&self, mount: &mut MountConfig, lock: &FileLock) -> Result<(), SandboxError> {
        match mount {
            MountConfig::Bind { source, create: false, .. } if !source.exists() => {
                Err(ConfigError::BindMissing(source.clone()).into())
            }
            MountConfig::Bind { source, .. } if !source.exists() => {
                fs::create_dir_all(&*source).map_err(|error| SandboxError::io("make", &*source, error))
            }
            MountConfig::Volume { name, anonymous, .. } => {
                *anonymous = name.is_empty();
                *name = self.make_volume(name, std::collections::BTreeMap::new(), lock)?.name;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// All containers, the newest first. One whose files are damaged is left out with a warning in the log.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn containers(&self) -> Result<Vec<Container>, SandboxError> {
        let mut all = Vec::new();
        for name in list(&self.containers_dir())? {
            if !names::is_id(&name) {
                continue;
            }
            match Container::load(self, &name) {
                Ok(container) => all.push(container),
                Err(SandboxError::NoSuchContainer(_)) => {}
                Err(error) => tracing::warn!(id = name, %error, "container left out"),
            }
        }
        all.sort_by_key(|container| std::cmp::Reverse(container.created()));
        Ok(all)
    }

    /// The container of this name, id, or unique prefix of an id; in this order.
    ///
    /// # Errors
    /// [`SandboxError::NoSuchContainer`], [`SandboxError::Ambiguous`].
    pub fn find(&self, reference: &str) -> Result<Container, SandboxError> {
        let wanted = reference.strip_prefix('/').unwrap_or(reference);
        let missing = || SandboxError::NoSuchContainer(reference.to_owned());
        if wanted.is_empty() {
            return Err(missing());
        }
        if names::is_id(wanted) {
            return Container::load(self, wanted);
        }
        let all = self.containers()?;
        if let Some(named) = all.iter().find(|container| container.name() == wanted) {
            return Ok(named.clone());
        }
        let mut matches = all.iter().filter(|container| container.id().starts_with(wanted));
        match (matches.next(), matches.next()) {
            (Some(one), None) => Ok(one.clone()),
            (Some(_), Some(_)) => Err(SandboxError::Ambiguous(reference.to_owned())),
            (None, _) => Err(missing()),
        }
    }

    /// Unpacks the layers of an image, bottom first, in a throw-away VM without network, onto the file `out`, which is made (it must
    /// not exist) and is one EROFS image afterwards. Nothing is left at `out` on failure. Dropping the future cancels and cleans up.
    /// `progress` is called now and then from the same task.
    ///
    /// # Errors
    /// [`SandboxError::Vm`] when the VM fails or the agent refuses a layer (wrong digest, truncated, not a tar; the text names it),
    /// [`SandboxError::Io`] for the host's files.
    pub async fn unpack(
        &self,
        layers: &[LayerBlob],
        out: &Path,
        progress: &(dyn Fn(UnpackProgress) + Send + Sync),
    ) -> Result<Unpacked, SandboxError> {
        crate::launch::unpack(self, layers, out, progress).await
    }
}

/// Names in a directory; none if it is missing.
pub(crate) fn list(dir: &Path) -> Result<Vec<String>, SandboxError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(SandboxError::io("read", dir, source)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|source| SandboxError::io("read", dir, source))?;
        names.extend(entry.file_name().into_string());
    }
    Ok(names)
}

/// Makes a directory, and those above it, that only its owner may enter.
pub(crate) fn make_private_dir(dir: &Path) -> Result<(), SandboxError> {
    use std::os::unix::fs::DirBuilderExt;
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|source| SandboxError::io("make", dir, source))
}

/// As [`make_private_dir`]; it is there when the power comes back, too.
fn make_lasting_dir(dir: &Path) -> Result<(), SandboxError> {
    if dir.is_dir() {
        return Ok(());
    }
    let parent = dir.parent().unwrap_or(dir);
    if parent != dir {
        make_lasting_dir(parent)?;
    }
    make_private_dir(dir)?;
    sync_dir(parent)
}

/// Removes a directory and all in it; it is no error if it is not there.
pub(crate) fn remove_tree(dir: &Path) -> Result<(), SandboxError> {
    match fs::remove_dir_all(dir) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(SandboxError::io("remove", dir, source)),
    }
}

/// Undo of a directory that was made.
#[derive(Debug)]
pub(crate) struct RemoveDir(pub(crate) Option<PathBuf>);

impl RemoveDir {
    pub(crate) fn release(mut self) {
        self.0 = None;
    }
}

impl Drop for RemoveDir {
    fn drop(&mut self) {
        if let Some(dir) = &self.0
            && let Err(error) = remove_tree(dir)
        {
            tracing::warn!(%error, "undo failed");
        }
    }
}
