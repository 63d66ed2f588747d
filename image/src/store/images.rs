//! Looking images up, naming them, and removing them with Docker's manners.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::PathBuf;

use crate::config::MAX_CONFIG_BYTES;
use crate::digest::Digest;
use crate::error::{ImageError, Result, clean};
use crate::image::{self, Image};
use crate::manifest::{self, Document, MAX_MANIFEST_BYTES};
use crate::reference::Reference;
use crate::store::Store;
use crate::store::gc::GcReport;
use crate::store::index::{Index, Record};

/// What containers need; whoever knows the containers fills it in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// By image id: who uses it, such as `container web`.
    pub images: BTreeMap<Digest, String>,
    /// Disks (paths as handed out by [`Store::disk`]) that containers have.
    pub disks: BTreeSet<PathBuf>,
}

/// One step of a removal, in the order in which Docker prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removed {
    /// A name is gone; familiar form.
    Untagged(String),
    /// An image is gone; its id.
    Deleted(Digest),
}

/// Outcome of a removal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removal {
    /// What went, in order.
    pub removed: Vec<Removed>,
    /// What that freed. Deferred to a later clean-up if a pull or start is under way.
    pub freed: GcReport,
}

impl Store {
    /// All images, the newest first. An image whose content is damaged is left out with a warning in the log.
    ///
    /// # Errors
    /// Only if the index itself cannot be read.
    pub fn images(&self) -> Result<Vec<Image>> {
        let index = self.index()?;
        let mut images = Vec::with_capacity(index.images.len());
        for (id, record) in &index.images {
            match self.load_image(&index, id, record) {
                Ok(image) => images.push(image),
                Err(error) => tracing::warn!(%id, error = error.one_line(), "image left out of the list"),
            }
        }
        images.sort_by(|a, b| (b.created_unix_s, &b.id).cmp(&(a.created_unix_s, &a.id)));
        Ok(images)
    }

    /// Finds an image by name (`nginx`, `nginx:1`, `nginx@sha256:...`), by id, or by any unambiguous beginning of
    /// its id, with or without `sha256:`.
    ///
    /// # Errors
    /// [`ImageError::NoSuchImage`], [`ImageError::AmbiguousId`], or [`ImageError::Damaged`] if content is missing.
    pub fn resolve(&self, query: &str) -> Result<Image> {
        let index = self.index()?;
        let (id, record) = find(&index, query)?;
        self.load_image(&index, id, record)
    }

    /// The configuration document as the image has it, for `inspect` and `history`.
    ///
    /// # Errors
    /// [`ImageError::Damaged`] if it is missing or altered.
    pub fn config_json(&self, image: &Image) -> Result<Vec<u8>> {
        self.needed_blob(&image.id, MAX_CONFIG_BYTES)
    }

    /// Gives an image another name, taking it from whichever image had it.
    ///
    /// # Errors
    /// As [`Store::resolve`]; [`ImageError::InvalidReference`] if `name` has a digest.
    pub fn tag(&self, query: &str, name: &Reference) -> Result<()> {
        if name.digest().is_some() || name.tag().is_none() {
            let why = "a new name needs a tag and cannot have a digest";
            return Err(ImageError::InvalidReference { text: name.to_string(), why });
        }
        self.update_index(|index| {
            let id = find(index, query)?.0.clone();
            index.references.insert(name.full(), id);
            Ok(())
        })
    }

    /// Removes a name, and the image with its last name; or an image by id. Docker's rules:
    /// a name that is not the last one goes alone; an image with several names goes by id only with `force`;
    /// an image that a container uses keeps its content even with `force` and loses only its names.
    ///
    /// # Errors
    /// As [`Store::resolve`], [`ImageError::InUse`], [`ImageError::SeveralNames`].
    pub fn remove(&self, query: &str, force: bool, used: &Used) -> Result<Removal> {
        let (removed, blobs) = self.update_index(|index| {
            let (id, record) = find(index, query)?;
            let (id, manifest) = (id.clone(), record.manifest.clone());
            let removed = untag(index, query, &id, force, used)?;
            let gone = !index.images.contains_key(&id);
            Ok((removed, if gone { self.blobs_of(&id, &manifest) } else { HashSet::new() }))
        })?;
        let freed = if blobs.is_empty() { GcReport::default() } else { self.collect(false, &blobs, used)? };
        Ok(Removal { removed, freed })
    }

    /// Records an image all of whose content is stored. Returns whether that changed anything.
    pub(crate) fn record(
        &self,
        id: &Digest,
        manifest: &Digest,
        name: Option<&Reference>,
        digest: Option<&Reference>,
    ) -> Result<bool> {
        self.update_index(|index| {
            let before = (index.images.get(id).map(|r| r.manifest.clone()), index.references.clone());
            index.add(id, manifest, name, digest);
            Ok(before != (index.images.get(id).map(|r| r.manifest.clone()), index.references.clone()))
        })
    }

    /// Reads manifest and configuration of a recorded image.
    pub(crate) fn load_image(&self, index: &Index, id: &Digest, record: &Record) -> Result<Image> {
        let what = format!("image {}", id.short());
        let manifest = self.needed_blob(&record.manifest, MAX_MANIFEST_BYTES)?;
        let config = self.needed_blob(id, MAX_CONFIG_BYTES)?;
        let parts = image::assemble(&manifest, &config, &what)?;
        let parse = |names: &[String]| names.iter().filter_map(|name| Reference::parse(name).ok()).collect();
        Ok(Image {
            id: id.clone(),
            references: parse(&index.names_of(id)),
            repo_digests: parse(&record.repo_digests),
            manifest_digest: record.manifest.clone(),
            manifest: parts.manifest,
            created_unix_s: parts.document.created.as_deref().and_then(image::unix_seconds),
            created: parts.document.created,
            config: parts.document.config,
            platform: parts.document.platform,
            layers: parts.layers,
            size_bytes: parts.size_bytes,
            stored_unix_s: record.stored_unix_s,
        })
    }

    /// A blob that an image cannot do without.
    fn needed_blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        self.read_blob(digest, limit)?.ok_or_else(|| ImageError::Damaged {
            what: "a blob is missing, pull the image again",
            path: self.blob_path(digest),
            source: None,
        })
    }

    /// All blobs of an image, as far as its manifest can be read.
    pub(crate) fn blobs_of(&self, id: &Digest, manifest: &Digest) -> HashSet<Digest> {
        let mut blobs = HashSet::from([id.clone(), manifest.clone()]);
        if let Ok(Some(bytes)) = self.read_blob(manifest, MAX_MANIFEST_BYTES)
            && let Ok(Document::Manifest(manifest)) = manifest::parse(&bytes, None, "image")
        {
            let digests = manifest.layers().iter().filter_map(|layer| manifest::blob_ref(layer).ok());
            blobs.extend(digests.map(|layer| layer.digest));
        }
        blobs
    }
}

/// Finds the record that a query means: an exact name first, then an id or its beginning.
fn find<'a>(index: &'a Index, query: &str) -> Result<(&'a Digest, &'a Record)> {
    if let Ok(reference) = Reference::parse(query) {
        let by_name = match reference.digest() {
            None => index.references.get(&reference.full()),
            Some(_) => find_by_digest(index, &reference),
        };
        if let Some((id, record)) = by_name.and_then(|id| index.images.get_key_value(id)) {
            return Ok((id, record));
        }
    }
    let start = query.strip_prefix("sha256:").unwrap_or(query);
    if !start.is_empty() && start.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        let mut fits = index.images.iter().filter(|(id, _)| id.hex().starts_with(start));
        if let Some(first) = fits.next() {
            return match fits.count() {
                0 => Ok(first),
                more => Err(ImageError::AmbiguousId { query: clean(query), count: more + 1 }),
            };
        }
        if let Some(found) = index.images.iter().find(|(_, record)| record.manifest.hex() == start) {
            return Ok(found);
        }
    }
    Err(ImageError::NoSuchImage { query: clean(query) })
}

/// Finds `repository@digest`: the digest under which it was pulled, or that of the manifest itself.
fn find_by_digest<'a>(index: &'a Index, reference: &Reference) -> Option<&'a Digest> {
    let digest = reference.digest()?;
    let full = reference.with_digest(digest.clone()).full();
    let prefix = format!("{}:", reference.repository());
    let found = index.images.iter().find(|(id, record)| {
        let named = record.repo_digests.contains(&full);
        named
            || (record.manifest == *digest && index.names_of(id).iter().any(|name| name.starts_with(&prefix)))
    });
    found.map(|(id, _)| id)
}

/// Applies Docker's rules of removal to the index.
fn untag(index: &mut Index, query: &str, id: &Digest, force: bool, used: &Used) -> Result<Vec<Removed>> {
    let names = index.names_of(id);
    let by_name =
        Reference::parse(query).ok().map(|reference| reference.full()).filter(|full| names.contains(full));
    let going = match &by_name {
        Some(name) => vec![name.clone()],
        None => names.clone(),
    };
    let last = going.len() == names.len();
    let familiar = |name: &String| Reference::parse(name).map_or_else(|_| name.clone(), |r| r.to_string());
    if let (true, Some(user), false) = (last, used.images.get(id), force) {
        return Err(ImageError::InUse { query: clean(query), user: clean(user), id: id.short().to_owned() });
    }
    if by_name.is_none() && names.len() > 1 && !force {
        let names = names.iter().map(familiar).collect::<Vec<_>>().join(", ");
        return Err(ImageError::SeveralNames { id: id.short().to_owned(), names });
    }
    let mut removed: Vec<Removed> = Vec::new();
    for name in &going {
        index.references.remove(name);
        removed.push(Removed::Untagged(familiar(name)));
    }
    if last && !used.images.contains_key(id) {
        if let Some(record) = index.images.remove(id) {
            removed.extend(record.repo_digests.iter().map(|name| Removed::Untagged(familiar(name))));
        }
        removed.push(Removed::Deleted(id.clone()));
    }
    Ok(removed)
}
