//! Unpacked images: one read-only disk per image and disk format, built once, by one builder at a time.
//!
//! ```text
//!            disk exists
//! disk() ---------------------> Ready(path)
//!   | lock free                    ^
//!   v                              |
//! Build --- commit(): sync, rename-+
//!   \------ dropped or process dead: lock free again, the next caller builds
//! ```

use std::fs::{self, File, Permissions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::digest::Hasher;
use crate::error::{ImageError, Result, blocking};
use crate::fault;
use crate::image::{Compression, Image, Layer, LayerBlob};
use crate::store::lock::{self, Lock, Mode};
use crate::store::{Hold, Store, TempPath, sync_dir};

/// Longest name of a disk format.
const MAX_FORMAT: usize = 32;

/// The unpacked disk of an image, or the right and duty to make it.
#[derive(Debug)]
pub enum DiskEntry {
    /// Complete, read-only, never to change.
    Ready(PathBuf),
    /// Not there yet, and this caller is the only one who builds it.
    Build(DiskBuild),
}

/// A disk under construction. Dropping it gives up and lets the next caller build.
#[derive(Debug)]
pub struct DiskBuild {
    store: Store,
    temp: TempPath,
    target: PathBuf,
    layers: Vec<LayerBlob>,
    _lock: Lock,
    _hold: Hold,
}

impl Store {
    /// The disk of an image if it has been built in this format.
    ///
    /// `format` names everything besides the layers that the content depends on (file system, unpacker's
    /// version): lower-case letters, digits and dashes, at most 32.
    ///
    /// # Errors
    /// [`ImageError::Unsupported`] for a malformed `format`, [`ImageError::Io`].
    pub fn disk_path(&self, image: &Image, format: &str) -> Result<Option<PathBuf>> {
        let path = self.disk_target(&image.layers, format)?;
        match fs::metadata(&path) {
            Ok(_) => Ok(Some(path)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ImageError::io("look at", &path, error)),
        }
    }

    /// The disk of an image, or a builder's guard. While another process builds it this waits, at most `patience`.
    ///
    /// # Errors
    /// As [`Store::disk_path`]; [`ImageError::LockTimeout`]; [`ImageError::Damaged`] if a layer is missing.
    pub async fn disk(&self, image: &Image, format: &str, patience: Duration) -> Result<DiskEntry> {
        if let Some(ready) = self.disk_path(image, format)? {
            return Ok(DiskEntry::Ready(ready));
        }
        let hold = self.hold().await?;
        let target = self.disk_target(&image.layers, format)?;
        let lock = lock::lock(&with_suffix(&target, "lock"), Mode::Exclusive, patience).await?;
        if let Some(ready) = self.disk_path(image, format)? {
            return Ok(DiskEntry::Ready(ready));
        }
        let (store, image) = (self.clone(), image.clone());
        let layers = blocking(move || store.layer_blobs(&image)).await?;
        // A name of its own: an earlier builder's VM may outlive it and still write to the old one.
        let unique = self.temp_path().file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let temp = TempPath(with_suffix(&target, &format!("{unique}.building")));
        fault::point("disk building");
        let store = self.clone();
        Ok(DiskEntry::Build(DiskBuild { store, temp, target, layers, _lock: lock, _hold: hold }))
    }

    /// The layers of an image, lowest first, as files.
    ///
    /// # Errors
    /// [`ImageError::Damaged`] if one is missing or has another length than the manifest says.
    pub fn layer_blobs(&self, image: &Image) -> Result<Vec<LayerBlob>> {
        image.layers.iter().map(|layer| self.layer_blob(layer)).collect()
    }

    fn layer_blob(&self, layer: &Layer) -> Result<LayerBlob> {
        let path = self.blob_path(&layer.digest);
        if !self.has_blob(&layer.digest, layer.size_bytes)? {
            return Err(ImageError::Damaged {
                what: "a layer is missing, pull the image again",
                path,
                source: None,
            });
        }
        Ok(LayerBlob {
            compression: detect(&path)?,
            path,
            digest: layer.digest.clone(),
            size_bytes: layer.size_bytes,
            diff_id: layer.diff_id.clone(),
        })
    }

    fn disk_target(&self, layers: &[Layer], format: &str) -> Result<PathBuf> {
        let valid = !format.is_empty()
            && format.len() <= MAX_FORMAT
            && format.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !matches!(format, "lock" | "building");
        if !valid {
            let what = format!("disk format \"{}\"", crate::error::clean(format));
            return Err(ImageError::Unsupported { what, why: "its name is malformed".to_owned() });
        }
        Ok(self.disks_dir().join(format!("{}.{format}", layers_key(layers))))
    }
}

impl DiskBuild {
    /// Where the disk is to be written; nothing exists there yet. The name is new for each build.
    pub fn path(&self) -> &Path {
        &self.temp.0
    }

    /// What to unpack, lowest layer first.
    pub fn layers(&self) -> &[LayerBlob] {
        &self.layers
    }

    /// Publishes the disk written at [`DiskBuild::path`]: synced, read-only, under its final name.
    ///
    /// # Errors
    /// [`ImageError::Io`] or [`ImageError::DiskFull`]; then there is no disk and the file is removed.
    pub async fn commit(self) -> Result<PathBuf> {
        blocking(move || {
            let path = &self.temp.0;
            let file = File::open(path).map_err(|error| ImageError::io("open", path, error))?;
            file.set_permissions(Permissions::from_mode(0o444))
                .map_err(|error| ImageError::io("change the mode of", path, error))?;
            file.sync_all().map_err(|error| ImageError::io("sync", path, error))?;
            fault::point("disk synced");
            fs::rename(path, &self.target).map_err(|error| ImageError::io("rename", &self.target, error))?;
            fault::point("disk renamed");
            sync_dir(&self.store.disks_dir())?;
            Ok(self.target.clone())
        })
        .await
    }
}

/// Names the content of a stack of layers. Over the digests of the blobs, which this store has checked, and not only
/// over the configuration's claims of what they unpack to: else one image could plant the disk of another.
pub(crate) fn layers_key(layers: &[Layer]) -> String {
    let mut hasher = Hasher::default();
    for layer in layers {
        hasher.update(format!("{} {}\n", layer.digest, layer.diff_id).as_bytes());
    }
    hasher.finish().hex().to_owned()
}

/// Finds out how a layer is compressed.
pub(crate) fn detect(path: &Path) -> Result<Compression> {
    let mut start = Vec::new();
    File::open(path)
        .and_then(|file| file.take(Compression::MAGIC_LEN as u64).read_to_end(&mut start))
        .map_err(|error| ImageError::io("read", path, error))?;
    Ok(Compression::detect(&start))
}

/// `path` with `.suffix` appended.
fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    PathBuf::from(name)
}
