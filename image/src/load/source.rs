//! Where `load` finds content: an archive that has been read into unnamed files, or an OCI layout directory.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::error::{ImageError, Result, clean};
use crate::load::tar::{Archive, Kind, normalise};
use crate::manifest::{BlobRef, MAX_LAYER_BYTES, bound};
use crate::store::ingest::Staged;
use crate::store::{Store, read_bounded};

/// Largest `index.json` or `manifest.json`.
const MAX_TABLE_BYTES: u64 = 4 << 20;
/// Most files of an archive that are kept until its tables tell which are needed.
const MAX_FILES: usize = 16_384;

/// Content to load from.
#[derive(Debug)]
pub(crate) enum Source {
    /// An archive.
    Staged(Archived),
    /// A directory.
    Directory(PathBuf),
}

/// An archive's members: small tables in memory, the rest in files that vanish unless committed.
#[derive(Debug, Default)]
pub(crate) struct Archived {
    tables: HashMap<String, Vec<u8>>,
    files: HashMap<String, Staged>,
    /// Name of a symbolic link to the name of the member that it means.
    aliases: HashMap<String, String>,
    /// Files already moved into the store, by name.
    committed: HashMap<String, BlobRef>,
}

impl Source {
    /// Reads a whole archive. `limit` bounds the sum of its contents.
    pub(crate) fn read_archive(store: &Store, reader: impl Read, limit: u64) -> Result<Self> {
        let mut archive = Archive::new(reader);
        let mut archived = Archived::default();
        let mut total = 0_u64;
        while let Some(member) = archive.next()? {
            let name = member.name;
            match member.kind {
                Kind::Directory => continue,
                Kind::Symlink(target) => {
                    archived.add_alias(name, &target);
                    continue;
                }
                Kind::File => {}
            }
            if archived.files.contains_key(&name) || archived.tables.contains_key(&name) {
                return Err(ImageError::Archive { why: format!("member \"{}\" occurs twice", clean(&name)) });
            }
            total = total.saturating_add(member.size_bytes);
            bound("image archive", total, limit)?;
            let what = format!("member \"{}\"", clean(&name));
            if matches!(name.as_str(), "index.json" | "manifest.json" | "oci-layout") {
                bound(&what, member.size_bytes, MAX_TABLE_BYTES)?;
                let mut bytes = Vec::new();
                archive.read_to_end(&mut bytes).map_err(|source| ImageError::ArchiveRead { source })?;
                archived.tables.insert(name, bytes);
            } else if is_content(&name) {
                bound(&what, member.size_bytes, MAX_LAYER_BYTES)?;
                bound(
                    "number of files in the image archive",
                    archived.files.len() as u64 + 1,
                    MAX_FILES as u64,
                )?;
                let staged = store.stage(&mut archive, member.size_bytes, &what)?;
                if let Some(expected) = blob_digest(&name).filter(|expected| *expected != staged.digest) {
                    return Err(ImageError::WrongDigest { what, expected, found: staged.digest });
                }
                archived.files.insert(name, staged);
            }
        }
        Ok(Self::Staged(archived))
    }

    /// One of the tables that say what is where; `None` if there is none.
    pub(crate) fn table(&self, name: &str) -> Result<Option<Vec<u8>>> {
        match self {
            Self::Staged(archived) => Ok(archived.tables.get(name).cloned()),
            Self::Directory(dir) => match regular(&dir.join(name))? {
                Some(path) => read_bounded(&path, MAX_TABLE_BYTES),
                None => Ok(None),
            },
        }
    }

    /// Reads a small file by name and moves it into the store.
    pub(crate) fn read(&mut self, store: &Store, name: &str, limit: u64) -> Result<(Digest, Vec<u8>)> {
        let blob = self.commit(store, name, None)?;
        let bytes = store.read_blob(&blob.digest, limit)?.unwrap_or_default();
        Ok((blob.digest, bytes))
    }

    /// Reads a small blob that a descriptor names and moves it into the store.
    pub(crate) fn read_blob(&mut self, store: &Store, blob: &BlobRef, limit: u64) -> Result<Vec<u8>> {
        self.commit_blob(store, blob)?;
        Ok(store.read_blob(&blob.digest, limit)?.unwrap_or_default())
    }

    /// Moves a blob that a descriptor names into the store, unless the store has it.
    pub(crate) fn commit_blob(&mut self, store: &Store, blob: &BlobRef) -> Result<()> {
        if !store.has_blob(&blob.digest, blob.size_bytes)? {
            let name = format!("blobs/sha256/{}", blob.digest.hex());
            self.commit(store, &name, Some(blob))?;
        }
        Ok(())
    }

    /// Moves a file into the store; it must be what `expected` says.
    pub(crate) fn commit(
        &mut self,
        store: &Store,
        name: &str,
        expected: Option<&BlobRef>,
    ) -> Result<BlobRef> {
        let missing = || ImageError::Archive { why: format!("\"{}\" is named but not there", clean(name)) };
        let staged = match self {
            Self::Staged(archived) => {
                let name = archived.aliases.get(name).map_or(name, String::as_str);
                if let Some(done) = archived.committed.get(name) {
                    return Ok(done.clone());
                }
                archived.files.remove(name).ok_or_else(missing)?
            }
            Self::Directory(dir) => {
                let relative = normalise(name).ok_or_else(missing)?;
                let path = regular(&dir.join(relative))?.ok_or_else(missing)?;
                let mut file = File::open(&path).map_err(|error| ImageError::io("open", &path, error))?;
                let limit = expected.map_or(MAX_LAYER_BYTES, |blob| blob.size_bytes);
                store.stage(&mut file, limit, &format!("\"{}\"", clean(name)))?
            }
        };
        if let Some(blob) = expected {
            let what = format!("blob {}", blob.digest);
            if staged.digest != blob.digest {
                return Err(ImageError::WrongDigest {
                    what,
                    expected: blob.digest.clone(),
                    found: staged.digest,
                });
            }
            if staged.size_bytes != blob.size_bytes {
                let (declared, found) = (blob.size_bytes, staged.size_bytes);
                return Err(ImageError::WrongSize { what, declared, found });
            }
        }
        let size_bytes = staged.size_bytes;
        let digest = store.commit(staged)?;
        let done = BlobRef { digest, size_bytes, media_type: String::new() };
        if let Self::Staged(archived) = self {
            let name = archived.aliases.get(name).map_or(name, String::as_str);
            archived.committed.insert(name.to_owned(), done.clone());
        }
        Ok(done)
    }
}

impl Archived {
    /// Notes that a layer is spelled as a link to another: `docker save` writes equal layers only once. The target is
    /// only ever looked up among the archive's own files; anything else about links is ignored.
    fn add_alias(&mut self, name: String, target: &str) {
        if !is_content(&name) || self.aliases.len() >= MAX_FILES {
            return;
        }
        let mut dir: Vec<&str> = name.split('/').collect();
        dir.pop();
        let mut rest = target;
        while let Some(up) = rest.strip_prefix("../") {
            if dir.pop().is_none() {
                return;
            }
            rest = up;
        }
        let full = if dir.is_empty() { rest.to_owned() } else { format!("{}/{rest}", dir.join("/")) };
        if let Some(target) = normalise(&full) {
            self.aliases.insert(name, target);
        }
    }
}

/// Whether a member can be a layer, a configuration or a blob.
fn is_content(name: &str) -> bool {
    name.starts_with("blobs/") || name.ends_with(".json") || name.ends_with(".tar")
}

/// The digest that a member's name promises.
fn blob_digest(name: &str) -> Option<Digest> {
    name.strip_prefix("blobs/sha256/").and_then(Digest::from_hex)
}

/// The path if it is a regular file itself (no link), `None` if there is nothing.
fn regular(path: &Path) -> Result<Option<PathBuf>> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_file() => Ok(Some(path.to_owned())),
        Ok(_) => Err(ImageError::Archive { why: format!("{} is no regular file", path.display()) }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ImageError::io("look at", path, error)),
    }
}
