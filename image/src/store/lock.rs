//! Advisory locks between processes (flock), taken by polling so that every wait can end.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{ImageError, Result};

/// Pause between two tries; what a waiter may lose at most.
const POLL: Duration = Duration::from_millis(20);

/// How a lock is shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// With others that share it.
    Shared,
    /// With nobody.
    Exclusive,
}

/// A held lock; dropping it, or the death of the process, releases it.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// Takes a lock if it is free. The file is created if it is missing and never deleted by the holder.
pub(crate) fn try_lock(path: &Path, mode: Mode) -> Result<Option<Lock>> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(|error| ImageError::io("open lock file", path, error))?;
    Ok(try_lock_file(&file, path, mode)?.then_some(Lock { _file: file }))
}

/// Locks an open file if that is possible at once; it stays locked while the file is open.
pub(crate) fn try_lock_file(file: &File, path: &Path, mode: Mode) -> Result<bool> {
    let outcome = match mode {
        Mode::Shared => file.try_lock_shared(),
        Mode::Exclusive => file.try_lock(),
    };
    match outcome {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(ImageError::io("lock", path, error)),
    }
}

/// Takes a lock, waiting at most `patience`.
pub(crate) async fn lock(path: &Path, mode: Mode, patience: Duration) -> Result<Lock> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(lock) = try_lock(path, mode)? {
            return Ok(lock);
        }
        if Instant::now() >= deadline {
            return Err(timed_out(path, patience));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The same for callers outside of a runtime; only for locks that are held for milliseconds.
pub(crate) fn lock_blocking(path: &Path, mode: Mode, patience: Duration) -> Result<Lock> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(lock) = try_lock(path, mode)? {
            return Ok(lock);
        }
        if Instant::now() >= deadline {
            return Err(timed_out(path, patience));
        }
        std::thread::sleep(POLL);
    }
}

/// The error of a wait that took too long.
fn timed_out(path: &Path, patience: Duration) -> ImageError {
    ImageError::LockTimeout { path: path.to_owned(), waited_s: patience.as_secs() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_and_exclusive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let one = try_lock(&path, Mode::Shared).unwrap().unwrap();
        let two = try_lock(&path, Mode::Shared).unwrap().unwrap();
        assert!(try_lock(&path, Mode::Exclusive).unwrap().is_none());
        drop((one, two));
        let _held = try_lock(&path, Mode::Exclusive).unwrap().unwrap();
        let error = lock_blocking(&path, Mode::Shared, Duration::ZERO).unwrap_err();
        assert!(matches!(error, ImageError::LockTimeout { .. }));
    }
}
