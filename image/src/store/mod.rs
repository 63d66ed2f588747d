//! The content store: blobs by digest, names, and unpacked disks, safe against a crash at any byte.
//!
//! ```text
//! <root>/version                   format of this tree
//! <root>/lock                      shared: somebody relies on content; exclusive: content is being deleted
//! <root>/images.json               images and names (replaced whole, by rename)
//! <root>/images.lock               held while images.json is changed
//! <root>/blobs/sha256/<hex>        complete, synced, checked, read-only
//! <root>/ingest/<hex>.partial      download under way or to be resumed; locked by whoever writes it
//! <root>/ingest/<pid>-<n>.tmp      anything else that is being written
//! <root>/signatures/<hex>.json     signatures of an image, by the digest under which it was pulled
//! <root>/disks/<key>.<format>      complete unpacked image, read-only
//! <root>/disks/<key>.<format>.lock held by whoever builds that disk
//! <root>/disks/*.building          a disk being built
//! ```
//!
//! Nothing gets its final name before it is complete and synced, and no name is recorded before all its content
//! is. Deletion needs the exclusive lock, so content cannot vanish under a pull that found it present.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use crate::digest::Digest;
use crate::error::{ImageError, Result};
use crate::fault;
use crate::manifest::bound;
use crate::store::lock::{Lock, Mode};

pub(crate) mod disk;
pub(crate) mod gc;
pub(crate) mod images;
pub(crate) mod index;
pub(crate) mod ingest;
pub(crate) mod lock;

/// Content of the version file.
const FORMAT: &str = "1";
/// Longest wait for the store's lock: deletions are short.
const HOLD_PATIENCE: Duration = Duration::from_secs(60);
/// Downloads that nobody resumed for this long are given up by the next [`Store::open`] or clean-up.
const ORPHAN_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// A handle on a store; cheap to clone, usable from several threads and processes at once.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    next_temp: AtomicU64,
    /// Bytes that may still be written before the disk counts as full.
    #[cfg(test)]
    write_budget: std::sync::atomic::AtomicI64,
}

/// While this lives nothing is deleted from the store, by no process. Take it around "resolve an image, make a
/// disk of it, record the container that uses it".
#[derive(Debug)]
pub struct Hold {
    _lock: Lock,
}

impl Store {
    /// Opens a store, creating it if it is missing, and reclaims what a crash left in it.
    ///
    /// # Errors
    /// [`ImageError::StoreVersion`] for a tree of another format, [`ImageError::Io`] or
    /// [`ImageError::DiskFull`] if it cannot be created.
    pub fn open(root: &Path) -> Result<Self> {
        let store = Self {
            inner: Arc::new(Inner {
                root: root.to_owned(),
                next_temp: AtomicU64::new(0),
                #[cfg(test)]
                write_budget: std::sync::atomic::AtomicI64::new(i64::MAX),
            }),
        };
        let (blobs, signatures) = (root.join("blobs"), store.signatures_dir());
        for dir in [root, &blobs, &store.blobs_dir(), &store.ingest_dir(), &store.disks_dir(), &signatures] {
            create_dir(dir)?;
        }
        store.check_version()?;
        store.sweep()?;
        Ok(store)
    }

    /// Where the store is.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// Keeps everything from being deleted until the guard is dropped.
    ///
    /// # Errors
    /// [`ImageError::LockTimeout`] if another process deletes for longer than a minute.
    pub async fn hold(&self) -> Result<Hold> {
        let lock = lock::lock(&self.root().join("lock"), Mode::Shared, HOLD_PATIENCE).await?;
        Ok(Hold { _lock: lock })
    }

    /// The same for callers outside of a runtime.
    fn hold_blocking(&self) -> Result<Hold> {
        let lock = lock::lock_blocking(&self.root().join("lock"), Mode::Shared, HOLD_PATIENCE)?;
        Ok(Hold { _lock: lock })
    }

    /// The file of a blob, whether or not it exists.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.blobs_dir().join(digest.hex())
    }

    /// Whether a blob is stored. A stored blob of another length than declared proves the declaration wrong.
    pub(crate) fn has_blob(&self, digest: &Digest, size_bytes: u64) -> Result<bool> {
        let path = self.blob_path(digest);
        match fs::metadata(&path) {
            Ok(meta) if meta.len() == size_bytes => Ok(true),
            Ok(meta) => Err(ImageError::WrongSize {
                what: format!("blob {digest}"),
                declared: size_bytes,
                found: meta.len(),
            }),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(ImageError::io("look at", &path, error)),
        }
    }

    /// Reads a small blob whole and checks its digest. `None` if it is not stored.
    pub(crate) fn read_blob(&self, digest: &Digest, limit: u64) -> Result<Option<Vec<u8>>> {
        let path = self.blob_path(digest);
        let Some(bytes) = read_bounded(&path, limit)? else { return Ok(None) };
        if Digest::of(&bytes) != *digest {
            return Err(ImageError::Damaged { what: "a blob does not match its digest", path, source: None });
        }
        Ok(Some(bytes))
    }

    /// Stores a small blob.
    pub(crate) fn put_blob(&self, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        if !self.has_blob(&digest, bytes.len() as u64)? {
            self.write_atomic(&self.blob_path(&digest), bytes)?;
        }
        Ok(digest)
    }

    /// Replaces a file by rename, so that a reader or a crash sees the old or the new content.
    pub(crate) fn write_atomic(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let temp = TempPath(self.temp_path());
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&temp.0)
            .map_err(|error| ImageError::io("create", &temp.0, error))?;
        self.spend(bytes.len())
            .and_then(|()| file.write_all(bytes))
            .map_err(|error| ImageError::io("write", &temp.0, error))?;
        fault::point("written whole");
        file.sync_all().map_err(|error| ImageError::io("sync", &temp.0, error))?;
        fs::rename(&temp.0, path).map_err(|error| ImageError::io("rename", path, error))?;
        fault::point("renamed whole");
        sync_dir(path.parent().unwrap_or(path))
    }

    /// A fresh path for something that is being written.
    pub(crate) fn temp_path(&self) -> PathBuf {
        let n = self.inner.next_temp.fetch_add(1, Ordering::Relaxed);
        let unique = Arc::as_ptr(&self.inner) as usize;
        self.ingest_dir().join(format!("{}-{unique:x}-{n}.tmp", std::process::id()))
    }

    /// `<root>/blobs/sha256`.
    pub(crate) fn blobs_dir(&self) -> PathBuf {
        self.root().join("blobs").join("sha256")
    }

    /// `<root>/ingest`.
    pub(crate) fn ingest_dir(&self) -> PathBuf {
        self.root().join("ingest")
    }

    /// `<root>/signatures`.
    pub(crate) fn signatures_dir(&self) -> PathBuf {
        self.root().join("signatures")
    }

    /// `<root>/disks`.
    pub(crate) fn disks_dir(&self) -> PathBuf {
        self.root().join("disks")
    }

    /// Takes the lock that deletion needs, if nobody relies on content now.
    pub(crate) fn try_exclusive(&self) -> Result<Option<Lock>> {
        lock::try_lock(&self.root().join("lock"), Mode::Exclusive)
    }

    /// Writes the version file into a new store, or checks that of an old one.
    fn check_version(&self) -> Result<()> {
        let path = self.root().join("version");
        match read_bounded(&path, 64)? {
            None => {
                let _hold = self.hold_blocking()?;
                self.write_atomic(&path, format!("{FORMAT}\n").as_bytes())
            }
            Some(bytes) if bytes.trim_ascii() == FORMAT.as_bytes() => Ok(()),
            Some(bytes) => Err(ImageError::StoreVersion {
                path: self.root().to_owned(),
                found: crate::error::clean(&String::from_utf8_lossy(&bytes)),
                known: FORMAT,
            }),
        }
    }

    /// Removes what dead processes left half-written. Does nothing while anyone relies on the store.
    fn sweep(&self) -> Result<()> {
        let busy =
            |dir: &Path| Ok(fs::read_dir(dir).map_err(|e| ImageError::io("list", dir, e))?.next().is_some());
        // Nearly always there is nothing to sweep, and then an open costs no lock.
        if !busy(&self.ingest_dir())? && !busy(&self.disks_dir())? {
            return Ok(());
        }
        if let Some(_lock) = self.try_exclusive()? {
            self.sweep_leftovers(ORPHAN_AGE)?;
        }
        Ok(())
    }

    /// Removes temporary files, and partial downloads of at least `min_age`. Needs the exclusive lock.
    fn sweep_leftovers(&self, min_age: Duration) -> Result<u64> {
        let mut freed = 0;
        for (path, meta) in list(&self.ingest_dir())? {
            let resumable = path.extension().is_some_and(|ext| ext == "partial") && meta.len() > 0;
            if !resumable || age(&meta) >= min_age {
                freed += remove_file(&path, &meta)?;
            }
        }
        for (path, meta) in list(&self.disks_dir())? {
            if path.extension().is_some_and(|ext| ext == "building" || ext == "lock") {
                freed += remove_file(&path, &meta)?;
            }
        }
        Ok(freed)
    }

    /// Counts bytes against the tests' idea of a full disk; free in a real build.
    fn spend(&self, _bytes: usize) -> std::io::Result<()> {
        #[cfg(test)]
        {
            let bytes = i64::try_from(_bytes).unwrap();
            if self.inner.write_budget.fetch_sub(bytes, Ordering::SeqCst) < bytes {
                return Err(ErrorKind::StorageFull.into());
            }
        }
        Ok(())
    }

    /// Sets how many bytes the pretended disk still takes.
    #[cfg(test)]
    pub(crate) fn set_write_budget(&self, bytes: i64) {
        self.inner.write_budget.store(bytes, Ordering::SeqCst);
    }
}

/// A file that is removed when the guard drops, unless it was renamed away.
#[derive(Debug)]
pub(crate) struct TempPath(pub(crate) PathBuf);

impl Drop for TempPath {
    fn drop(&mut self) {
        // Gone already if it was renamed; if not, the next open of the store sweeps it.
        let _ = fs::remove_file(&self.0);
    }
}

/// Creates a private directory, and those above it, unless it exists; durably.
fn create_dir(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = path.parent().unwrap_or(path);
    if parent != path {
        create_dir(parent)?;
    }
    // Another process may be just as far.
    let created = DirBuilder::new().recursive(true).mode(0o700).create(path);
    created.map_err(|error| ImageError::io("create directory", path, error))?;
    sync_dir(parent)
}

/// Makes renames and unlinks in a directory durable.
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(|error| ImageError::io("sync", path, error))
}

/// Reads a file of at most `limit` bytes; `None` if it does not exist.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let fail = |error| ImageError::io("read", path, error);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail(error)),
    };
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(fail)?;
    bound(&path.display().to_string(), bytes.len() as u64, limit)?;
    Ok(Some(bytes))
}

/// The regular files of a directory.
fn list(dir: &Path) -> Result<Vec<(PathBuf, fs::Metadata)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(|error| ImageError::io("list", dir, error))? {
        let entry = entry.map_err(|error| ImageError::io("list", dir, error))?;
        match entry.metadata() {
            Ok(meta) if meta.is_file() => files.push((entry.path(), meta)),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(ImageError::io("look at", &entry.path(), error)),
        }
    }
    Ok(files)
}

/// Time since the last change of a file.
fn age(meta: &fs::Metadata) -> Duration {
    meta.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok()).unwrap_or_default()
}

/// Removes a file; returns the bytes it took.
fn remove_file(path: &Path, meta: &fs::Metadata) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    match fs::remove_file(path) {
        Ok(()) => Ok(meta.blocks() * 512),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
        Err(error) => Err(ImageError::io("remove", path, error)),
    }
}

#[cfg(test)]
mod tests;
