//! Garbage collection: content that no recorded image refers to.

use std::collections::HashSet;
use std::time::Duration;

use crate::digest::Digest;
use crate::error::{ImageError, Result};
use crate::fault;
use crate::store::disk::layers_key;
use crate::store::images::{Removal, Removed, Used};
use crate::store::lock::{self, Mode};
use crate::store::{ORPHAN_AGE, Store, age, list, remove_file, sync_dir};

/// Longest wait for those who only change a name; a pull or a build is not waited for.
const COLLECT_PATIENCE: Duration = Duration::from_millis(100);

/// What a collection removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Blobs removed.
    pub blobs: usize,
    /// Unpacked disks removed.
    pub disks: usize,
    /// Bytes that this frees on the disk.
    pub freed_bytes: u64,
    /// Nothing was removed because a pull or a start is under way; a later collection will.
    pub deferred: bool,
}

/// Which images [`Store::prune`] removes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PruneScope {
    /// Those without a name.
    Dangling,
    /// All that no container uses.
    Unused,
}

impl Store {
    /// Removes all content that no image needs: orphaned blobs, abandoned downloads, disks of removed images
    /// unless a container has them.
    ///
    /// # Errors
    /// [`crate::ImageError::Io`] if content cannot be listed or removed; what was removed stays removed.
    pub fn gc(&self, used: &Used) -> Result<GcReport> {
        self.collect(true, &HashSet::new(), used)
    }

    /// Removes images that no container uses, then collects.
    ///
    /// # Errors
    /// As [`Store::gc`].
    pub fn prune(&self, scope: PruneScope, used: &Used) -> Result<Removal> {
        let removed = self.update_index(|index| {
            let unused: Vec<Digest> =
                index.images.keys().filter(|id| !used.images.contains_key(id)).cloned().collect();
            let mut removed = Vec::new();
            for id in unused {
                let names = index.names_of(&id);
                if scope == PruneScope::Dangling && !names.is_empty() {
                    continue;
                }
                for name in names {
                    index.references.remove(&name);
                    removed.push(Removed::Untagged(name));
                }
                index.images.remove(&id);
                removed.push(Removed::Deleted(id));
            }
            Ok(removed)
        })?;
        Ok(Removal { removed, freed: self.gc(used)? })
    }

    /// Removes blobs that no image needs if they are in `doomed`, old, or `all` is set; and likewise the rest.
    pub(crate) fn collect(&self, all: bool, doomed: &HashSet<Digest>, used: &Used) -> Result<GcReport> {
        let _lock = match lock::lock_blocking(&self.root().join("lock"), Mode::Exclusive, COLLECT_PATIENCE) {
            Ok(lock) => lock,
            Err(ImageError::LockTimeout { .. }) => {
                return Ok(GcReport { deferred: true, ..GcReport::default() });
            }
            Err(error) => return Err(error),
        };
        let min_age = if all { Duration::ZERO } else { ORPHAN_AGE };
        let (live, keys) = self.live()?;
        let mut report = GcReport::default();
        for (path, meta) in list(&self.blobs_dir())? {
            let digest = path.file_name().and_then(|name| Digest::from_hex(name.to_str()?));
            let keep = digest.is_some_and(|digest| {
                live.contains(&digest) || (age(&meta) < min_age && !doomed.contains(&digest))
            });
            if !keep {
                report.freed_bytes += remove_file(&path, &meta)?;
                report.blobs += 1;
                fault::point("blob removed");
            }
        }
        report.freed_bytes += self.sweep_leftovers(min_age)? + self.sweep_signatures()?;
        for (path, meta) in list(&self.disks_dir())? {
            let key = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.split('.').next());
            if !key.is_some_and(|key| keys.contains(key)) && !used.disks.contains(&path) {
                report.freed_bytes += remove_file(&path, &meta)?;
                report.disks += 1;
            }
        }
        sync_dir(&self.blobs_dir())?;
        sync_dir(&self.disks_dir())?;
        Ok(report)
    }

    /// Removes signatures of what is not stored any more.
    fn sweep_signatures(&self) -> Result<u64> {
        let index = self.index()?;
        let signed: HashSet<&str> = index
            .images
            .values()
            .flat_map(|record| &record.repo_digests)
            .filter_map(|name| name.rsplit(':').next())
            .collect();
        let mut freed = 0;
        for (path, meta) in list(&self.signatures_dir())? {
            let digest = path.file_stem().and_then(|name| name.to_str());
            if !digest.is_some_and(|digest| signed.contains(digest)) {
                freed += remove_file(&path, &meta)?;
            }
        }
        Ok(freed)
    }

    /// Digests and disk keys that recorded images need.
    fn live(&self) -> Result<(HashSet<Digest>, HashSet<String>)> {
        let index = self.index()?;
        let (mut blobs, mut keys) = (HashSet::new(), HashSet::new());
        for (id, record) in &index.images {
            blobs.extend(self.blobs_of(id, &record.manifest));
            if let Ok(image) = self.load_image(&index, id, record) {
                keys.insert(layers_key(&image.layers));
            }
        }
        Ok((blobs, keys))
    }
}
