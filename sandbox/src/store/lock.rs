//! Locks on files that last as long as a process: how it is known who is alive.
//!
//! `flock` belongs to the open file, not to the process: a lock can be handed to another process with its descriptor, without a moment
//! in which it is free, and the kernel frees it when the last descriptor is closed, however its holder ended.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::SandboxError;

/// How often a lock that somebody holds is tried again.
const RETRY: Duration = Duration::from_millis(5);
/// The longest pause between two tries: a crowd that waits must leave the holder time to work.
const SLOWEST_RETRY: Duration = Duration::from_millis(100);
/// How long a crowd may hold the home's lock, one after the other: each does a few file operations.
const HOME_LOCK_MS: u64 = 60_000;

/// An exclusive lock; free again when it is dropped (and all its copies are closed).
#[derive(Debug)]
pub(crate) struct FileLock {
    file: File,
}

fn open(path: &Path) -> Result<File, SandboxError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).map_err(|source| SandboxError::io("open", path, source))
}

impl FileLock {
    /// Takes the lock if it is free. The file is made when it is missing.
    pub(crate) fn try_take(path: &Path) -> Result<Option<Self>, SandboxError> {
        let file = open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self { file })),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(SandboxError::io("lock", path, error)),
        }
    }

    /// As [`FileLock::try_take`], but a missing file is not made and counts as not free.
    pub(crate) fn try_take_existing(path: &Path) -> Result<Option<Self>, SandboxError> {
        if path.exists() { Self::try_take(path) } else { Ok(None) }
    }

    /// Waits for a lock that is held for short times only. Blocks the thread.
    pub(crate) fn take_short(path: &Path) -> Result<Self, SandboxError> {
        let deadline = Instant::now() + crate::launch::scaled_ms(HOME_LOCK_MS);
        let mut pause = RETRY;
        loop {
            if let Some(lock) = Self::try_take(path)? {
                return Ok(lock);
            }
            if Instant::now() >= deadline {
                return Err(SandboxError::Timeout {
                    what: "waiting for another hyper command",
                    limit_ms: HOME_LOCK_MS,
                });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(SLOWEST_RETRY);
        }
    }

    /// Waits for a lock that a supervisor may hold while it ends.
    pub(crate) async fn take_within(path: &Path, limit: Duration) -> Result<Self, SandboxError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(lock) = Self::try_take(path)? {
                return Ok(lock);
            }
            if Instant::now() >= deadline {
                let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
                return Err(SandboxError::Timeout {
                    what: "waiting for another process to finish",
                    limit_ms,
                });
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// A lock that came from another process; `None` if the file is not the one at `path`.
    pub(crate) fn adopt(fd: OwnedFd, path: &Path) -> Option<Self> {
        let ours = rustix::fs::fstat(&fd).ok()?;
        let named = rustix::fs::stat(path).ok()?;
        let same = ours.st_dev == named.st_dev && ours.st_ino == named.st_ino;
        same.then(|| Self { file: File::from(fd) })
    }

    /// The descriptor, to be handed to another process.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_at_a_time_and_handing_over_leaves_no_gap() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        assert!(FileLock::try_take_existing(&path).unwrap().is_none());
        let first = FileLock::try_take(&path).unwrap().unwrap();
        assert!(FileLock::try_take(&path).unwrap().is_none());
        let copy = first.file().try_clone().unwrap();
        drop(first);
        assert!(FileLock::try_take(&path).unwrap().is_none());
        let adopted = FileLock::adopt(copy.into(), &path).unwrap();
        drop(adopted);
        assert!(FileLock::try_take(&path).unwrap().is_some());
    }

    #[test]
    fn another_file_is_not_adopted() {
        let dir = tempfile::tempdir().unwrap();
        let lock = FileLock::try_take(&dir.path().join("a")).unwrap().unwrap();
        std::fs::write(dir.path().join("b"), "").unwrap();
        assert!(FileLock::adopt(lock.file.into(), &dir.path().join("b")).is_none());
    }
}
