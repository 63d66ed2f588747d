//! `images.json`: which images there are and what they are called.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{ImageError, Result};
use crate::fault;
use crate::reference::Reference;
use crate::store::lock::{self, Mode};
use crate::store::{Store, read_bounded};

/// Largest index; a hundred thousand images fit.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Version of the JSON format.
const INDEX_VERSION: u32 = 1;
/// Longest wait for another process that changes the index (a few milliseconds of work).
const INDEX_PATIENCE: Duration = Duration::from_secs(10);
/// Digests under which one image is remembered to have been pulled.
const MAX_REPO_DIGESTS: usize = 32;

/// The whole index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Index {
    version: u32,
    /// By image id.
    pub(crate) images: BTreeMap<Digest, Record>,
    /// From the full name with tag to the image id.
    pub(crate) references: BTreeMap<String, Digest>,
}

/// One image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Its manifest.
    pub(crate) manifest: Digest,
    /// Full names with digest under which it was pulled.
    #[serde(default)]
    pub(crate) repo_digests: Vec<String>,
    /// Seconds since 1970.
    #[serde(default)]
    pub(crate) stored_unix_s: u64,
}

impl Default for Index {
    fn default() -> Self {
        Self { version: INDEX_VERSION, images: BTreeMap::new(), references: BTreeMap::new() }
    }
}

impl Index {
    /// Adds an image, or points a name at it. All its content must be stored.
    pub(crate) fn add(
        &mut self,
        id: &Digest,
        manifest: &Digest,
        name: Option<&Reference>,
        digest: Option<&Reference>,
    ) {
        let record = self.images.entry(id.clone()).or_insert_with(|| Record {
            manifest: manifest.clone(),
            repo_digests: Vec::new(),
            stored_unix_s: unix_now(),
        });
        record.manifest = manifest.clone();
        if let Some(digest) = digest.map(Reference::full)
            && !record.repo_digests.contains(&digest)
        {
            record.repo_digests.push(digest);
            let excess = record.repo_digests.len().saturating_sub(MAX_REPO_DIGESTS);
            record.repo_digests.drain(..excess);
        }
        if let Some(name) = name.filter(|name| name.tag().is_some() && name.digest().is_none()) {
            self.references.insert(name.full(), id.clone());
        }
    }

    /// Full names with tags of an image.
    pub(crate) fn names_of(&self, id: &Digest) -> Vec<String> {
        self.references.iter().filter(|(_, target)| *target == id).map(|(name, _)| name.clone()).collect()
    }
}

impl Store {
    /// Reads the index. No lock: it is only ever replaced whole.
    pub(crate) fn index(&self) -> Result<Index> {
        let path = self.index_path();
        let Some(bytes) = read_bounded(&path, MAX_INDEX_BYTES)? else { return Ok(Index::default()) };
        match serde_json::from_slice::<Index>(&bytes) {
            Ok(index) if index.version == INDEX_VERSION => Ok(index),
            Ok(_) => {
                Err(ImageError::Damaged { what: "its index is of an unknown version", path, source: None })
            }
            Err(error) => {
                Err(ImageError::Damaged { what: "its index cannot be read", path, source: Some(error) })
            }
        }
    }

    /// Changes the index under its lock; nothing is written if `change` fails or changes nothing.
    pub(crate) fn update_index<T>(&self, change: impl FnOnce(&mut Index) -> Result<T>) -> Result<T> {
        // The new index is a temporary file for a moment, and clean-ups of others remove those.
        let _hold = self.hold_blocking()?;
        let _lock = lock::lock_blocking(&self.root().join("images.lock"), Mode::Exclusive, INDEX_PATIENCE)?;
        let before = self.index()?;
        let mut index = before.clone();
        let outcome = change(&mut index)?;
        if index != before {
            let path = self.index_path();
            let bytes = serde_json::to_vec_pretty(&index).map_err(|error| ImageError::Damaged {
                what: "its index cannot be written",
                path: path.clone(),
                source: Some(error),
            })?;
            fault::point("index changing");
            self.write_atomic(&path, &bytes)?;
        }
        Ok(outcome)
    }

    fn index_path(&self) -> PathBuf {
        self.root().join("images.json")
    }
}

/// Seconds since 1970.
fn unix_now() -> u64 {
    std::time::SystemTime::UNIX_EPOCH.elapsed().map(|since| since.as_secs()).unwrap_or_default()
}
