//! Loading images from `docker save` and `podman save` archives and from OCI layouts (archive or directory).
//!
//! Only the outer archive is read here. Layers are stored as they are, for a guest to unpack.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Cursor, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest, ImageManifestBuilder, MediaType};
use serde::Deserialize;

use crate::config::{self, MAX_CONFIG_BYTES};
use crate::digest::Digest;
use crate::error::{ImageError, Result, blocking, clean};
use crate::image::{self, Compression, Image};
use crate::load::source::Source;
use crate::load::tar::normalise;
use crate::manifest::{self, BlobRef, Document, MAX_LAYERS, MAX_MANIFEST_BYTES, bound};
use crate::platform::Platform;
use crate::reference::Reference;
use crate::store::Store;

mod source;
pub(crate) mod tar;

/// Most images of one archive.
const MAX_IMAGES: usize = 1024;
/// Most names of one image in an archive.
const MAX_NAMES: usize = 256;
/// Indexes that may lie inside of each other.
const MAX_INDEX_DEPTH: usize = 3;
/// Bytes of all content of one archive, unless the caller says otherwise.
const DEFAULT_MAX_BYTES: u64 = 256 << 30;
/// Annotations that name an image in an index, in order of preference.
const NAME_ANNOTATIONS: [&str; 2] = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];

/// How to load.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Which of a multi-platform image's variants is wanted.
    pub platform: Platform,
    /// Most bytes that the archive may unpack to.
    pub max_bytes: u64,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { platform: Platform::default(), max_bytes: DEFAULT_MAX_BYTES }
    }
}

/// A loaded image.
#[derive(Clone, Debug)]
pub struct LoadedImage {
    /// The image.
    pub image: Image,
    /// The names that the archive gives it; empty for a nameless one (Docker then prints the id).
    pub references: Vec<Reference>,
}

/// One entry of a docker archive's `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

/// What all steps of a load need.
struct Loader<'a> {
    store: &'a Store,
    source: Source,
    platform: Platform,
}

/// Loads an archive from a reader: a docker archive or an OCI layout, plain or gzip-compressed.
///
/// # Errors
/// [`ImageError::Archive`] for anything that is not one, [`ImageError::WrongDigest`] and other content errors,
/// [`ImageError::DiskFull`]. Images before the bad one stay loaded; no image is ever half loaded.
pub async fn load<R: Read + Send + 'static>(
    store: &Store,
    reader: R,
    options: &LoadOptions,
) -> Result<Vec<LoadedImage>> {
    let _hold = store.hold().await?;
    let (store, options) = (store.clone(), options.clone());
    blocking(move || {
        let plain = decompress(reader)?;
        let source = Source::read_archive(&store, plain, options.max_bytes)?;
        Loader { store: &store, source, platform: options.platform }.run()
    })
    .await
}

/// Loads from a file, or from a directory with an OCI layout.
///
/// # Errors
/// As [`load`]; [`ImageError::Io`] if the path cannot be opened.
pub async fn load_path(store: &Store, path: &Path, options: &LoadOptions) -> Result<Vec<LoadedImage>> {
    let fail = |error| ImageError::io("open", path, error);
    if !std::fs::metadata(path).map_err(fail)?.is_dir() {
        return load(store, BufReader::new(File::open(path).map_err(fail)?), options).await;
    }
    let _hold = store.hold().await?;
    let (store, platform, source) =
        (store.clone(), options.platform.clone(), Source::Directory(path.to_owned()));
    blocking(move || Loader { store: &store, source, platform }.run()).await
}

/// Takes off a gzip compression, if there is one.
fn decompress<R: Read + Send + 'static>(mut reader: R) -> Result<Box<dyn Read>> {
    let mut start = Vec::new();
    (&mut reader).take(6).read_to_end(&mut start).map_err(|source| ImageError::ArchiveRead { source })?;
    let compression = Compression::detect(&start);
    let other = match start.as_slice() {
        [] => Some("it is empty"),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => Some("it is compressed with xz, decompress it first"),
        [b'B', b'Z', b'h', ..] => Some("it is compressed with bzip2, decompress it first"),
        _ if compression == Compression::Zstd => Some("it is compressed with zstd, decompress it first"),
        _ => None,
    };
    if let Some(why) = other {
        return Err(ImageError::Archive { why: why.to_owned() });
    }
    let whole = Cursor::new(start).chain(reader);
    Ok(match compression {
        Compression::Gzip => Box::new(MultiGzDecoder::new(BufReader::new(whole))),
        _ => Box::new(whole),
    })
}

impl Loader<'_> {
    fn run(mut self) -> Result<Vec<LoadedImage>> {
        let docker = self.source.table("manifest.json")?;
        if let Some(bytes) = self.source.table("index.json")? {
            let names = docker.as_deref().map(docker_names).unwrap_or_default();
            return self.load_layout(&bytes, &names);
        }
        match docker {
            Some(bytes) => self.load_docker(&bytes),
            None => Err(ImageError::Archive {
                why: "it has neither an index.json nor a manifest.json".to_owned(),
            }),
        }
    }

    /// Loads all images of an OCI layout. `docker_names` are names by configuration, from `docker save`'s own table.
    fn load_layout(
        &mut self,
        index: &[u8],
        docker_names: &HashMap<Digest, Vec<String>>,
    ) -> Result<Vec<LoadedImage>> {
        let Document::Index(index) = manifest::parse(index, None, "the archive")? else {
            return Err(ImageError::Archive { why: "its index.json is no index".to_owned() });
        };
        bound("number of images in the archive", index.manifests().len() as u64, MAX_IMAGES as u64)?;
        let mut loaded: Vec<LoadedImage> = Vec::new();
        for entry in self.suitable(&index) {
            let (blob, bytes) = self.descend(entry)?;
            let what = annotated_name(entry).unwrap_or_else(|| format!("image {}", blob.digest.short()));
            let Document::Manifest(parsed) = manifest::parse(&bytes, None, &what)? else { continue };
            let id = manifest::parts(&parsed, &what)?.config.digest;
            let mut names: Vec<String> = annotated_name(entry).into_iter().collect();
            if names.is_empty() {
                names.extend(docker_names.get(&id).into_iter().flatten().cloned());
            }
            let image = self.finish(&bytes, &names)?;
            match loaded.iter_mut().find(|other| other.image.id == image.image.id) {
                Some(other) => {
                    other.references.extend(image.references);
                    other.image = image.image;
                }
                None => loaded.push(image),
            }
        }
        if loaded.is_empty() {
            let wanted = self.platform.to_string();
            let offered = index.manifests().iter().filter_map(manifest::platform_of).map(|p| p.to_string());
            let offered = offered.take(16).collect::<Vec<_>>().join(", ");
            return Err(ImageError::NoPlatform { what: "the archive".to_owned(), wanted, offered });
        }
        Ok(loaded)
    }

    /// Entries of the top index that may be images for our platform.
    fn suitable<'i>(&self, index: &'i ImageIndex) -> Vec<&'i Descriptor> {
        let fits = |entry: &&Descriptor| {
            manifest::platform_of(entry).is_none_or(|platform| self.platform.rank(&platform).is_some())
        };
        index.manifests().iter().filter(fits).collect()
    }

    /// Follows indexes down to the manifest of our platform.
    fn descend(&mut self, entry: &Descriptor) -> Result<(BlobRef, Vec<u8>)> {
        let mut blob = manifest::blob_ref(entry)?;
        let what = annotated_name(entry).unwrap_or_else(|| "the archive".to_owned());
        for _ in 0..MAX_INDEX_DEPTH {
            bound(&format!("manifest of {what}"), blob.size_bytes, MAX_MANIFEST_BYTES)?;
            let bytes = self.source.read_blob(self.store, &blob, MAX_MANIFEST_BYTES)?;
            match manifest::parse(&bytes, None, &what)? {
                Document::Manifest(_) => return Ok((blob, bytes)),
                Document::Index(index) => blob = manifest::select(&index, &self.platform, &what)?,
            }
        }
        let why = format!("it nests indexes deeper than {MAX_INDEX_DEPTH}");
        Err(ImageError::Malformed { what: format!("manifest of {what}"), why })
    }

    /// Loads all images of a docker archive.
    fn load_docker(&mut self, table: &[u8]) -> Result<Vec<LoadedImage>> {
        let entries: Vec<DockerEntry> =
            serde_json::from_slice(table).map_err(|error| ImageError::Malformed {
                what: "the archive's manifest.json".to_owned(),
                why: clean(&error.to_string()),
            })?;
        bound("number of images in the archive", entries.len() as u64, MAX_IMAGES as u64)?;
        if entries.is_empty() {
            return Err(ImageError::Archive { why: "it contains no image".to_owned() });
        }
        entries.iter().map(|entry| self.load_docker_entry(entry)).collect()
    }

    /// Loads one image of a docker archive, writing the manifest that such an archive lacks.
    fn load_docker_entry(&mut self, entry: &DockerEntry) -> Result<LoadedImage> {
        let names = entry.repo_tags.as_deref().unwrap_or_default();
        let what = names.first().map_or_else(|| "an image of the archive".to_owned(), |name| clean(name));
        let layers = entry.layers.as_deref().unwrap_or_default();
        bound(&format!("number of layers of {what}"), layers.len() as u64, MAX_LAYERS as u64)?;
        let (id, config) = self.source.read(self.store, &member(&entry.config)?, MAX_CONFIG_BYTES)?;
        let document = config::parse_config(&config, &what)?;
        if document.diff_ids.len() != layers.len() {
            let why = format!("it lists {} layers but the archive {}", document.diff_ids.len(), layers.len());
            return Err(ImageError::Malformed { what: format!("configuration of {what}"), why });
        }
        let mut descriptors = Vec::with_capacity(layers.len());
        for (name, diff_id) in layers.iter().zip(&document.diff_ids) {
            let blob = self.source.commit(self.store, &member(name)?, None)?;
            let compression = crate::store::disk::detect(&self.store.blob_path(&blob.digest))?;
            if compression == Compression::None && blob.digest != *diff_id {
                let what = format!("layer \"{}\" of {what}", clean(name));
                return Err(ImageError::WrongDigest { what, expected: diff_id.clone(), found: blob.digest });
            }
            let media_type = match compression {
                Compression::None => MediaType::ImageLayer,
                Compression::Gzip => MediaType::ImageLayerGzip,
                Compression::Zstd => MediaType::ImageLayerZstd,
            };
            descriptors.push(descriptor(media_type, blob.size_bytes, &blob.digest)?);
        }
        let manifest =
            manifest_of(descriptor(MediaType::ImageConfig, config.len() as u64, &id)?, descriptors)?;
        let bytes = serde_json::to_vec(&manifest).map_err(|error| internal(&error.to_string()))?;
        self.finish(&bytes, names)
    }

    /// Stores what a manifest refers to, then the manifest, then the record.
    fn finish(&mut self, manifest_bytes: &[u8], names: &[String]) -> Result<LoadedImage> {
        bound("number of names of an image", names.len() as u64, MAX_NAMES as u64)?;
        let references: Vec<Reference> =
            names.iter().map(|name| Reference::parse(name)).collect::<Result<_>>()?;
        let what =
            references.first().map_or_else(|| "an image of the archive".to_owned(), ToString::to_string);
        let Document::Manifest(parsed) = manifest::parse(manifest_bytes, None, &what)? else {
            return Err(internal("an index where a manifest should be"));
        };
        let parts = manifest::parts(&parsed, &what)?;
        let config = self.source.read_blob(self.store, &parts.config, MAX_CONFIG_BYTES)?;
        let assembled = image::assemble(manifest_bytes, &config, &what)?;
        image::check_platform(&assembled.document.platform, &self.platform, &what)?;
        for layer in &parts.layers {
            self.source.commit_blob(self.store, layer)?;
        }
        let digest = self.store.put_blob(manifest_bytes)?;
        self.store.record(&parts.config.digest, &digest, None, None)?;
        for reference in &references {
            self.store.record(&parts.config.digest, &digest, Some(reference), None)?;
        }
        Ok(LoadedImage { image: self.store.resolve(&parts.config.digest.to_string())?, references })
    }
}

/// Names by configuration digest from a `manifest.json` that lies beside an `index.json`; empty if it is malformed.
fn docker_names(table: &[u8]) -> HashMap<Digest, Vec<String>> {
    let entries: Vec<DockerEntry> = serde_json::from_slice(table).unwrap_or_default();
    let named = entries.into_iter().filter_map(|entry| {
        let hex = entry.config.rsplit('/').next()?.trim_end_matches(".json");
        Some((Digest::from_hex(hex)?, entry.repo_tags.unwrap_or_default()))
    });
    named.collect()
}

/// The full name that an index entry carries. A bare tag is no name.
fn annotated_name(entry: &Descriptor) -> Option<String> {
    let annotations = entry.annotations().as_ref()?;
    let names = NAME_ANNOTATIONS.iter().filter_map(|key| annotations.get(*key));
    names.into_iter().find(|name| name.contains([':', '/'])).map(|name| clean(name))
}

/// A name from `manifest.json` as the archive's members are named.
fn member(name: &str) -> Result<String> {
    normalise(name)
        .ok_or_else(|| ImageError::Archive { why: format!("name \"{}\" is not allowed", clean(name)) })
}

fn descriptor(media_type: MediaType, size_bytes: u64, digest: &Digest) -> Result<Descriptor> {
    let digest: oci_spec::image::Digest =
        digest.to_string().parse().map_err(|_| internal("a digest of ours"))?;
    Ok(Descriptor::new(media_type, size_bytes, digest))
}

fn manifest_of(config: Descriptor, layers: Vec<Descriptor>) -> Result<ImageManifest> {
    let builder = ImageManifestBuilder::default()
        .schema_version(2_u32)
        .media_type(MediaType::ImageManifest)
        .config(config)
        .layers(layers);
    builder.build().map_err(|error| internal(&error.to_string()))
}

/// A document that this program made itself cannot be formed.
fn internal(why: &str) -> ImageError {
    ImageError::Malformed { what: "the manifest made for the archive".to_owned(), why: why.to_owned() }
}

#[cfg(test)]
pub(crate) mod tests;
