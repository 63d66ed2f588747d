//! What the guest sees of the host's files: one share, below which roots and volumes are mounted and unmounted while it runs.
//!
//! The share is a tmpfs that propagates: what is mounted below it appears in the file server, with the attributes that it was given
//! here. Read-only is such an attribute, so the host's kernel refuses writes, whatever the guest believes.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use hyper_protocol::SHARE_TAG;
use hyper_protocol::rpc::agent::ShareSource;
use rustix::fs::{CWD, FileType, Mode};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount, mount_change, move_mount,
    open_tree,
};

use super::mounts::{RootMount, mount_root, unmount_all};
use super::{PodError, held};
use crate::launch::SharePlan;
use crate::sys;

/// Name of the live share in the file server.
const NAME: &str = "live";
/// What every mount gets: neither devices nor programs of the shares work for the file server.
const HARMLESS: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;

/// Kind of a tmpfs (linux/magic.h).
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// Directory of the share in the run directory.
const LIVE_DIR: &str = "live";

/// The share.
#[derive(Debug)]
pub(super) struct LiveShare {
    dir: Arc<PathBuf>,
    next: AtomicU64,
    /// What is bound: containers that share a volume share its pages in the guest.
    bound: Mutex<BTreeMap<Source, Weak<LiveMount>>>,
    /// What stands for the host's shared memory: a name in the guest for each path.
    memory: Mutex<BTreeMap<PathBuf, String>>,
    /// Goes after the mounts.
    _run_dir: RunDir,
}

/// The directory of sockets, logs and the share. It is never removed recursively: what is mounted below it is the host's.
#[derive(Debug)]
struct RunDir(PathBuf);

impl Drop for RunDir {
    fn drop(&mut self) {
        clean(&self.0);
    }
}

/// Removes a run directory that nobody uses any more; it is no error if it is not there.
pub fn clean(run_dir: &Path) {
    let Ok(entries) = std::fs::read_dir(run_dir) else { return };
    super::cgroup::clean(run_dir);
    for entry in entries.flatten() {
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let path = entry.path();
        let removed = if is_dir { std::fs::remove_dir(&path) } else { std::fs::remove_file(&path) };
        tell_unless_gone(&path, removed);
    }
    tell_unless_gone(run_dir, std::fs::remove_dir(run_dir));
}

/// Somebody else may have removed it meanwhile: the shim and its own delete command may be at it together.
fn tell_unless_gone(path: &Path, removed: std::io::Result<()>) {
    if let Err(error) = removed
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "undo failed");
    }
}

/// What was bound: device and inode, and whether it is read-only.
type Source = (u64, u64, bool);

/// Something in it, taken out again when this is dropped.
#[derive(Debug)]
pub(super) struct LiveMount {
    dir: Arc<PathBuf>,
    name: String,
}

impl LiveShare {
    /// Makes the run directory, with the share in it.
    pub(super) fn make(run_dir: &Path) -> Result<Self, PodError> {
        make_dir(run_dir)?;
        let undo = RunDir(run_dir.to_owned());
        let dir = run_dir.join(LIVE_DIR);
        make_dir(&dir)?;
        let fail = |errno| PodError::io("make a share at", &dir, errno);
        let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
        // Mount points only.
        mount("hyper", dir.as_path(), "tmpfs", flags, Some(c"mode=0755,size=1m")).map_err(fail)?;
        let share = Self {
            dir: Arc::new(dir),
            next: AtomicU64::new(0),
            bound: Mutex::default(),
            memory: Mutex::default(),
            _run_dir: undo,
        };
        mount_change(share.dir.as_path(), MountPropagationFlags::SHARED)
            .map_err(|errno| PodError::io("make a share at", share.dir.as_path(), errno))?;
        Ok(share)
    }

    /// What the file server is told.
    pub(super) fn plan(&self) -> SharePlan {
        SharePlan { name: NAME.to_owned(), source: self.dir.as_ref().clone(), read_only: false, live: true }
    }

    fn place(&self) -> LiveMount {
        let name = self.next.fetch_add(1, Ordering::Relaxed).to_string();
        LiveMount { dir: Arc::clone(&self.dir), name }
    }

    /// The guest's name for shared memory of the host; the same for all containers that have it.
    pub(super) fn memory_name(&self, source: &Path) -> String {
        let mut names = held(&self.memory);
        let next = names.len().to_string();
        names.entry(source.to_owned()).or_insert(next).clone()
    }

    /// Mounts a root.
    pub(super) fn root(&self, mounts: &[RootMount]) -> Result<Arc<LiveMount>, PodError> {
        let place = self.place();
        let path = place.path();
        std::fs::create_dir(&path).map_err(|source| PodError::io("make", &path, source))?;
        mount_root(mounts, &path)?;
        Ok(Arc::new(place))
    }

    /// Binds a directory or file of the host, with what is mounted below it.
    pub(super) fn bind(&self, source: &Path, read_only: bool) -> Result<Arc<LiveMount>, PodError> {
        let kind = rustix::fs::stat(source).map_err(|errno| PodError::io("share", source, errno))?;
        let mut bound = held(&self.bound);
        bound.retain(|_, mount| mount.strong_count() > 0);
        let key = (kind.st_dev, kind.st_ino, read_only);
        if let Some(same) = bound.get(&key).and_then(Weak::upgrade) {
            return Ok(same);
        }
        let place = self.place();
        let path = place.path();
        match FileType::from_raw_mode(kind.st_mode) {
            FileType::Directory => std::fs::create_dir(&path),
            FileType::RegularFile => std::fs::File::create_new(&path).map(drop),
            other => {
                return Err(PodError::Unsupported(format!(
                    "a volume that is a {other:?}: {}",
                    source.display()
                )));
            }
        }
        .map_err(|error| PodError::io("make", &path, error))?;
        bind_at(source, &path, read_only, true)?;
        let place = Arc::new(place);
        bound.insert(key, Arc::downgrade(&place));
        Ok(place)
    }
}

impl Drop for LiveShare {
    fn drop(&mut self) {
        unmount_all(&self.dir);
    }
}

impl LiveMount {
    fn path(&self) -> PathBuf {
        self.dir.join(&self.name)
    }

    /// By what the agent finds it.
    pub(super) fn source(&self) -> ShareSource {
        let path = format!("{NAME}/{}", self.name);
        ShareSource { tag: SHARE_TAG.to_owned(), path, ..Default::default() }
    }
}

impl Drop for LiveMount {
    fn drop(&mut self) {
        let path = self.path();
        unmount_all(&path);
        let removed = match std::fs::symlink_metadata(&path) {
            Ok(data) if data.is_dir() => std::fs::remove_dir(&path),
            Ok(_) => std::fs::remove_file(&path),
            // The whole share is gone.
            Err(_) => return,
        };
        if let Err(error) = removed {
            tracing::warn!(path = %path.display(), %error, "undo failed");
        }
    }
}

/// Binds `source` at `target`, which is of the same kind.
pub(super) fn bind_at(
    source: &Path,
    target: &Path,
    read_only: bool,
    recursive: bool,
) -> Result<(), PodError> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree: OwnedFd =
        open_tree(CWD, source, flags).map_err(|errno| PodError::io("share", source, errno))?;
    let read_only = if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    sys::restrict_mounts(tree.as_fd(), HARMLESS | read_only)
        .map_err(|error| PodError::io("restrict the mount of", source, error))?;
    move_mount(tree.as_fd(), c"", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|errno| PodError::io("mount at", target, errno))
}

/// Size of the file system at a place, bytes; `None` when it cannot be asked.
pub(super) fn size_bytes(path: &Path) -> Option<u64> {
    let data = rustix::fs::statvfs(path).ok()?;
    data.f_blocks.checked_mul(data.f_frsize).filter(|bytes| *bytes > 0)
}

/// Whether a place lies in memory, or is not there: what the host's tools make for `/dev/shm` does.
pub(super) fn is_memory(path: &Path) -> bool {
    rustix::fs::statfs(path).map_or(true, |data| data.f_type == TMPFS_MAGIC)
}

/// Makes a directory that only we can enter.
fn make_dir(path: &Path) -> Result<(), PodError> {
    rustix::fs::mkdir(path, Mode::RWXU).map_err(|errno| PodError::io("make", path, errno))
}
