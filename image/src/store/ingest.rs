//! Getting content into the store: written under a temporary name, checked, synced, then renamed.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::time::Duration;

use crate::digest::{Digest, Hasher};
use crate::error::{ImageError, Result, blocking};
use crate::fault;
use crate::store::lock::{self, Mode};
use crate::store::{Store, TempPath, list, remove_file, sync_dir};

/// Pause between two looks at a download that another process has under way.
const WAIT: Duration = Duration::from_millis(100);
/// Bytes copied at a time.
const COPY_CHUNK: usize = 1 << 20;

/// What [`Store::begin`] found.
#[derive(Debug)]
pub(crate) enum Begin {
    /// The blob is stored already.
    Present,
    /// It has to be written; nobody else does.
    Partial(Box<Partial>),
}

/// A blob under way: its temporary file is ours alone (locked) until this is dropped.
#[derive(Debug)]
pub(crate) struct Partial {
    store: Store,
    file: File,
    path: PathBuf,
    digest: Digest,
    size_bytes: u64,
    len: u64,
    hasher: Hasher,
    resumed: bool,
    /// The file has got its final name, or was removed.
    settled: bool,
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Nothing to resume. A failure leaves an empty file, which the next pull takes up.
        if !self.settled && self.len == 0 {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Store {
    /// Starts, or resumes, writing a blob. Waits while another process writes it; `on_wait` is told once.
    ///
    /// Cancelled by dropping the future.
    pub(crate) async fn begin(
        &self,
        digest: &Digest,
        size_bytes: u64,
        on_wait: &(dyn Fn() + Send + Sync),
    ) -> Result<Begin> {
        let mut told = false;
        loop {
            let (store, wanted) = (self.clone(), digest.clone());
            if let Some(begin) = blocking(move || store.try_begin(wanted, size_bytes)).await? {
                return Ok(begin);
            }
            if !told {
                on_wait();
                told = true;
            }
            tokio::time::sleep(WAIT).await;
        }
    }

    /// One try of [`Store::begin`]; `None` if somebody else has it.
    fn try_begin(&self, digest: Digest, size_bytes: u64) -> Result<Option<Begin>> {
        if self.has_blob(&digest, size_bytes)? {
            return Ok(Some(Begin::Present));
        }
        let path = self.partial_path(&digest);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| ImageError::io("open", &path, error))?;
        if !lock::try_lock_file(&file, &path, Mode::Exclusive)? {
            return Ok(None);
        }
        // The one who had the lock before us may have renamed the file into place: then ours is the finished
        // blob, and writing to it would corrupt it.
        let ours = file.metadata().map_err(|error| ImageError::io("look at", &path, error))?;
        match fs::metadata(&path) {
            Ok(named) if named.ino() == ours.ino() => {}
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(ImageError::io("look at", &path, error)),
        }
        if self.has_blob(&digest, size_bytes)? {
            fs::remove_file(&path).map_err(|error| ImageError::io("remove", &path, error))?;
            return Ok(Some(Begin::Present));
        }
        fault::point("partial opened");
        let mut partial = Partial {
            store: self.clone(),
            file,
            path,
            digest,
            size_bytes,
            len: ours.len(),
            hasher: Hasher::default(),
            resumed: ours.len() > 0,
            settled: false,
        };
        partial.take_up()?;
        Ok(Some(Begin::Partial(Box::new(partial))))
    }

    /// Bytes of a blob that an unfinished download has left.
    pub(crate) fn partial_len(&self, digest: &Digest) -> u64 {
        fs::metadata(self.partial_path(digest)).map(|meta| meta.len()).unwrap_or_default()
    }

    /// Removes the unfinished downloads that nobody is at, but for those to `keep`. Returns the bytes that it freed.
    pub(crate) fn discard_partials(&self, keep: &HashSet<Digest>) -> Result<u64> {
        let keep: HashSet<PathBuf> = keep.iter().map(|digest| self.partial_path(digest)).collect();
        let mut freed = 0;
        for (path, meta) in list(&self.ingest_dir())? {
            if path.extension().is_none_or(|ext| ext != "partial") || keep.contains(&path) {
                continue;
            }
            // It may be finished, removed or taken up at any moment: only what we have locked under this name is ours.
            let Ok(file) = OpenOptions::new().write(true).open(&path) else { continue };
            let locked = lock::try_lock_file(&file, &path, Mode::Exclusive)?;
            let same = |named: fs::Metadata| file.metadata().is_ok_and(|ours| ours.ino() == named.ino());
            if locked && fs::metadata(&path).is_ok_and(same) {
                freed += remove_file(&path, &meta)?;
            }
        }
        Ok(freed)
    }

    fn partial_path(&self, digest: &Digest) -> PathBuf {
        self.ingest_dir().join(format!("{}.partial", digest.hex()))
    }

    /// Copies a blob whose digest is not known beforehand; `limit` bounds it. The result has no name yet.
    pub(crate) fn stage(&self, reader: &mut impl Read, limit: u64, what: &str) -> Result<Staged> {
        let temp = TempPath(self.temp_path());
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&temp.0)
            .map_err(|error| ImageError::io("create", &temp.0, error))?;
        let mut hasher = Hasher::default();
        let mut buffer = vec![0; COPY_CHUNK];
        let mut size_bytes = 0_u64;
        loop {
            let read = match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(source) => return Err(ImageError::ArchiveRead { source }),
            };
            size_bytes += read as u64;
            crate::manifest::bound(what, size_bytes, limit)?;
            let chunk = buffer.get(..read).unwrap_or_default();
            hasher.update(chunk);
            self.spend(read)
                .and_then(|()| file.write_all(chunk))
                .map_err(|error| ImageError::io("write", &temp.0, error))?;
        }
        Ok(Staged { temp, digest: hasher.finish(), size_bytes })
    }

    /// Gives a staged blob its name, durably.
    pub(crate) fn commit(&self, staged: Staged) -> Result<Digest> {
        if !self.has_blob(&staged.digest, staged.size_bytes)? {
            let path = &staged.temp.0;
            let file = File::open(path).map_err(|error| ImageError::io("open", path, error))?;
            publish(self, &file, path, &staged.digest)?;
        }
        Ok(staged.digest.clone())
    }
}

/// Content under a temporary name, removed unless committed.
#[derive(Debug)]
pub(crate) struct Staged {
    pub(crate) temp: TempPath,
    pub(crate) digest: Digest,
    pub(crate) size_bytes: u64,
}

impl Partial {
    /// Bytes written so far; where a download has to continue.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Whether its beginning was left by an earlier process, which may have died before it was on disk.
    pub(crate) fn was_resumed(&self) -> bool {
        self.resumed
    }

    /// Appends. More than the declared size is an error, and then nothing is written.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let found = self.len + bytes.len() as u64;
        if found > self.size_bytes {
            let what = format!("blob {}", self.digest);
            return Err(ImageError::WrongSize { what, declared: self.size_bytes, found });
        }
        if let Err(error) = self.store.spend(bytes.len()).and_then(|()| self.file.write_all(bytes)) {
            // What a short write left past `len` would spoil a resume.
            let _ = self.file.set_len(self.len);
            return Err(ImageError::io("write", &self.path, error));
        }
        self.hasher.update(bytes);
        self.len = found;
        fault::point("partial written");
        Ok(())
    }

    /// Forgets all that was written.
    pub(crate) fn restart(&mut self) -> Result<()> {
        let fail = |error| ImageError::io("truncate", &self.path, error);
        self.file.set_len(0).map_err(fail)?;
        self.file.seek(SeekFrom::Start(0)).map_err(fail)?;
        self.len = 0;
        self.hasher = Hasher::default();
        self.resumed = false;
        Ok(())
    }

    /// Checks the whole blob and gives it its name. Content that is wrong is truncated away and may be retried.
    pub(crate) fn finish(&mut self) -> Result<()> {
        if self.len != self.size_bytes {
            let what = format!("blob {}", self.digest);
            return Err(ImageError::WrongSize { what, declared: self.size_bytes, found: self.len });
        }
        let found = self.hasher.clone().finish();
        if found != self.digest {
            self.restart()?;
            let what = format!("blob of {} bytes", self.size_bytes);
            return Err(ImageError::WrongDigest { what, expected: self.digest.clone(), found });
        }
        publish(&self.store, &self.file, &self.path, &self.digest)?;
        self.settled = true;
        Ok(())
    }

    /// Removes the temporary file; for content that must not be resumed.
    pub(crate) fn discard(mut self) -> Result<()> {
        self.settled = true;
        fs::remove_file(&self.path).map_err(|error| ImageError::io("remove", &self.path, error))
    }

    /// Hashes what an earlier process left, so that writing goes on at its end.
    fn take_up(&mut self) -> Result<()> {
        if self.len > self.size_bytes {
            self.restart()?;
        }
        let read = self
            .hasher
            .update_from(&mut self.file)
            .map_err(|error| ImageError::io("read", &self.path, error))?;
        self.len = read;
        Ok(())
    }
}

/// Syncs a checked file, makes it read-only and renames it to its digest.
fn publish(store: &Store, file: &File, path: &std::path::Path, digest: &Digest) -> Result<()> {
    file.set_permissions(Permissions::from_mode(0o444))
        .map_err(|error| ImageError::io("change the mode of", path, error))?;
    file.sync_all().map_err(|error| ImageError::io("sync", path, error))?;
    fault::point("blob synced");
    let target = store.blob_path(digest);
    fs::rename(path, &target).map_err(|error| ImageError::io("rename", &target, error))?;
    fault::point("blob renamed");
    sync_dir(&store.blobs_dir())
}
