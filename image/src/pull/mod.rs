//! Pulling an image: manifest, configuration, layers in parallel, and last the record that makes it an image.
//!
//! ```text
//! reference -> manifest (index -> manifest of the platform) -> configuration -> layers -> manifest stored -> recorded
//! ```
//! Whatever interrupts this, finished blobs stay and unfinished ones are resumed by the next pull.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::stream::{self, StreamExt, TryStreamExt};

use crate::config::MAX_CONFIG_BYTES;
use crate::digest::Digest;
use crate::error::{ImageError, Result, blocking};
use crate::image::{self, Image};
use crate::manifest::{self, BlobRef, Document, Parts};
use crate::platform::Platform;
use crate::progress::{Event, LayerState, Progress, Quiet};
use crate::reference::Reference;
use crate::registry::credentials::Auth;
use crate::registry::{Fetched, Patience, Registry};
use crate::signature::{self, VerifyKey};
use crate::store::Store;

mod blob;

/// Layers downloaded at a time, as many as Docker does.
const CONCURRENCY: usize = 3;
/// Most layers downloaded at a time, whatever is asked for.
const MAX_CONCURRENCY: usize = 32;
/// Indexes that may lie inside of each other.
const MAX_INDEX_DEPTH: usize = 3;

/// How to pull.
#[derive(Clone)]
pub struct PullOptions {
    /// Which of a multi-platform image's variants is wanted.
    pub platform: Platform,
    /// Layers downloaded at a time, at least 1.
    pub concurrency: usize,
    /// Whose credentials are used.
    pub auth: Auth,
    /// Directory of Docker's `config.json`; `None` means `$DOCKER_CONFIG`, else `~/.docker`.
    pub docker_config_dir: Option<PathBuf>,
    /// Speak HTTP without TLS to a registry that is not this machine (an "insecure registry").
    pub plain_http: bool,
    /// Time limits and retries.
    pub patience: Patience,
    /// Keys of which one must have signed the image; none: it need not be signed.
    pub keys: Vec<VerifyKey>,
    /// Who is told how far it is.
    pub progress: Arc<dyn Progress>,
}

impl Default for PullOptions {
    fn default() -> Self {
        Self {
            platform: Platform::default(),
            concurrency: CONCURRENCY,
            auth: Auth::default(),
            docker_config_dir: None,
            plain_http: false,
            patience: Patience::default(),
            keys: Vec::new(),
            progress: Arc::new(Quiet),
        }
    }
}

impl std::fmt::Debug for PullOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let platform = self.platform.to_string();
        f.debug_struct("PullOptions")
            .field("platform", &platform)
            .field("auth", &self.auth)
            .finish_non_exhaustive()
    }
}

/// A pulled image.
#[derive(Clone, Debug)]
pub struct Pulled {
    /// The image.
    pub image: Image,
    /// Digest under which the registry serves the reference (that of the index for a multi-platform image):
    /// Docker's `Digest:` line.
    pub digest: Digest,
    /// Whether the reference means another image than before: Docker's "Downloaded newer image" or "up to date".
    pub changed: bool,
}

/// Pulls `reference` into the store. Only what is missing is downloaded; two pulls at once, even of two
/// processes, share the work. Dropping the future stops it.
///
/// # Errors
/// Everything that [`ImageError`] lists for registries; [`ImageError::DiskFull`] says what was kept. The store
/// never holds a half image.
pub async fn pull(store: &Store, reference: &Reference, options: &PullOptions) -> Result<Pulled> {
    let _hold = store.hold().await?;
    if let Some(pulled) = present(store, reference, options).await? {
        signature::verify(store, &pulled.image, options).await?;
        return Ok(pulled);
    }
    let registry = Registry::of(reference, options)?;
    let what = reference.to_string();
    let (top, fetched, parts) = find_manifest(&registry, reference, &options.platform).await?;
    if !options.keys.is_empty() {
        signature::check(store, &registry, reference, &top, options).await?;
    }
    options.progress.event(&Event::Started { reference });
    let mut outcome = fetch_content(store, &registry, &parts, &fetched, options, &what).await;
    // What was left of other downloads is worth less than this one.
    if matches!(outcome, Err(ImageError::DiskFull { .. })) && make_room(store, &parts).await? > 0 {
        outcome = fetch_content(store, &registry, &parts, &fetched, options, &what).await;
    }
    let fresh = outcome.map_err(|error| with_kept(store, error, &parts, &what))?;
    let id = parts.config.digest.clone();
    let (handle, name, bytes) = (store.clone(), reference.clone(), fetched.bytes);
    let repo_digest = reference.with_digest(top.clone());
    let (image, changed) = blocking(move || {
        let manifest = handle.put_blob(&bytes)?;
        let changed = handle.record(&id, &manifest, Some(&name), Some(&repo_digest))?;
        Ok((handle.resolve(&id.to_string())?, changed))
    })
    .await?;
    for layer in distinct(&parts.layers).into_iter().filter(|layer| fresh.contains(&layer.digest)) {
        options.progress.event(&Event::Layer { digest: &layer.digest, state: LayerState::PullComplete });
    }
    Ok(Pulled { image, digest: top, changed })
}

/// A reference by digest can be answered without the registry, since it can never mean anything else.
async fn present(store: &Store, reference: &Reference, options: &PullOptions) -> Result<Option<Pulled>> {
    let Some(digest) = reference.digest().cloned() else { return Ok(None) };
    let (store, query, wanted) = (store.clone(), reference.full(), options.platform.clone());
    blocking(move || {
        let usable =
            |image: &Image| wanted.rank(&image.platform).is_some() && store.layer_blobs(image).is_ok();
        let found = store.resolve(&query).ok().filter(usable);
        Ok(found.map(|image| Pulled { image, digest, changed: false }))
    })
    .await
}

/// Fetches the manifest for the platform. Returns the digest of what the reference names, which may be an index.
async fn find_manifest(
    registry: &Registry,
    reference: &Reference,
    platform: &Platform,
) -> Result<(Digest, Fetched, Parts)> {
    let what = reference.to_string();
    let mut fetched = registry.manifest(&reference.wanted()).await?;
    let top = fetched.digest.clone();
    for _ in 0..MAX_INDEX_DEPTH {
        match manifest::parse(&fetched.bytes, fetched.content_type.as_deref(), &what)? {
            Document::Manifest(manifest) => {
                let parts = manifest::parts(&manifest, &what)?;
                return Ok((top, fetched, parts));
            }
            Document::Index(index) => {
                let entry = manifest::select(&index, platform, &what)?;
                fetched = registry.manifest(&entry.digest.to_string()).await?;
                let found = fetched.bytes.len() as u64;
                if found != entry.size_bytes {
                    let what = format!("manifest {} of {what}", entry.digest);
                    return Err(ImageError::WrongSize { what, declared: entry.size_bytes, found });
                }
            }
        }
    }
    let why = format!("it nests indexes deeper than {MAX_INDEX_DEPTH}");
    Err(ImageError::Malformed { what: format!("manifest of {what}"), why })
}

/// Gets the configuration, checks that the image is one that can run, and gets the layers. Returns those layers
/// that were not stored before.
async fn fetch_content(
    store: &Store,
    registry: &Registry,
    parts: &Parts,
    fetched: &Fetched,
    options: &PullOptions,
    what: &str,
) -> Result<HashSet<Digest>> {
    blob::fetch(store, registry, &parts.config, &|_| {}).await?;
    let config = store.read_blob(&parts.config.digest, MAX_CONFIG_BYTES)?.unwrap_or_default();
    let assembled = image::assemble(&fetched.bytes, &config, what)?;
    image::check_platform(&assembled.document.platform, &options.platform, what)?;
    let layers = distinct(&parts.layers);
    for layer in &layers {
        if !store.has_blob(&layer.digest, layer.size_bytes)? {
            let state = LayerState::PullingFsLayer;
            options.progress.event(&Event::Layer { digest: &layer.digest, state });
        }
    }
    let downloads: Vec<_> =
        layers.into_iter().map(|layer| fetch_layer(store, registry, layer, options)).collect();
    let at_once = options.concurrency.clamp(1, MAX_CONCURRENCY);
    let fresh: Vec<Option<Digest>> = stream::iter(downloads).buffer_unordered(at_once).try_collect().await?;
    Ok(fresh.into_iter().flatten().collect())
}

/// Gets one layer and tells how far it is. Returns its digest if it was not stored before.
async fn fetch_layer(
    store: &Store,
    registry: &Registry,
    layer: &BlobRef,
    options: &PullOptions,
) -> Result<Option<Digest>> {
    let report = |state| options.progress.event(&Event::Layer { digest: &layer.digest, state });
    let fresh = blob::fetch(store, registry, layer, &report).await?;
    Ok(fresh.then(|| layer.digest.clone()))
}

/// The blobs of a list, each once.
fn distinct(blobs: &[BlobRef]) -> Vec<&BlobRef> {
    let mut seen = HashSet::new();
    blobs.iter().filter(|blob| seen.insert(&blob.digest)).collect()
}

/// Removes what other pulls have left to be resumed. Returns the bytes that it freed.
async fn make_room(store: &Store, parts: &Parts) -> Result<u64> {
    let keep: HashSet<Digest> = parts.layers.iter().map(|layer| layer.digest.clone()).collect();
    let store = store.clone();
    blocking(move || store.discard_partials(&keep)).await
}

/// Adds to a full disk's error what the pull has kept.
fn with_kept(store: &Store, error: ImageError, parts: &Parts, what: &str) -> ImageError {
    let ImageError::DiskFull { source, .. } = error else { return error };
    let layers = distinct(&parts.layers);
    let complete = layers.iter().filter(|layer| store.blob_path(&layer.digest).exists()).count();
    let started: u64 = layers.iter().map(|layer| store.partial_len(&layer.digest)).sum();
    ImageError::DiskFull {
        what: format!("image {what}"),
        dir: store.root().to_owned(),
        kept: format!(
            "{complete} of {} layers and {} of the others are kept, free some space and pull again to go on",
            layers.len(),
            human_bytes(started)
        ),
        source,
    }
}

/// A size as Docker writes it: `12.3MB`.
fn human_bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut units = ["B", "kB", "MB", "GB", "TB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    for larger in units {
        if value < 1000.0 {
            break;
        }
        value /= 1000.0;
        unit = larger;
    }
    if unit == "B" { format!("{bytes}B") } else { format!("{value:.1}{unit}") }
}

#[cfg(test)]
mod tests;
