//! Signatures of images by public keys, as cosign makes them: a manifest with the tag `sha256-<hex>.sig` beside the image, whose layers are what
//! was signed, each with its signature as an annotation.
//!
//! No transparency log is asked and no certificate is believed: a key that the caller names has signed the digest, or not. What was found is kept
//! with the images, so that it can be checked again without the registry.

mod key;

use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{ImageError, Result, blocking};
use crate::image::Image;
use crate::manifest::{self, BlobRef, Document};
use crate::pull::PullOptions;
use crate::reference::Reference;
use crate::registry::{BlobAnswer, Registry, body};
use crate::store::{Store, read_bounded};

pub use key::VerifyKey;

/// Annotation with the signature, in base64.
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";
/// What is signed says that it is this.
const KIND: &str = "cosign container image signature";
/// Largest text that is signed.
const MAX_PAYLOAD_BYTES: u64 = 64 << 10;
/// Longest signature in base64: one of P-256 has 96 letters.
const MAX_SIGNATURE: usize = 256;
/// Signatures of one image that are looked at.
const MAX_SIGNATURES: usize = 64;
/// Largest file of kept signatures.
const MAX_KEPT_BYTES: u64 = 8 << 20;

/// A text and its signature, as they came; nothing of it has been checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Signed {
    payload: String,
    signature: String,
}

#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    image: SignedImage,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct SignedImage {
    #[serde(rename = "docker-manifest-digest")]
    digest: String,
}

impl Signed {
    fn is_of(&self, digest: &Digest, key: &VerifyKey) -> bool {
        let Ok(signature) = STANDARD.decode(&self.signature) else { return false };
        // Nothing of the text is read before it is known whose it is.
        if !key.signed(self.payload.as_bytes(), &signature) {
            return false;
        }
        let payload: Result<Payload, _> = serde_json::from_str(&self.payload);
        payload.is_ok_and(|Payload { critical }| {
            critical.kind == KIND && critical.image.digest == digest.to_string()
        })
    }
}

/// Checks that one of the keys has signed an image that is stored, by what was kept or else by the registry that it came from.
///
/// # Errors
/// [`ImageError::Unsigned`], and all that [`ImageError`] lists for registries.
pub async fn verify(store: &Store, image: &Image, options: &PullOptions) -> Result<()> {
    if options.keys.is_empty() {
        return Ok(());
    }
    let mut refused = None;
    for reference in &image.repo_digests {
        let Some(digest) = reference.digest() else { continue };
        let registry = Registry::of(reference, options)?;
        match check(store, &registry, reference, digest, options).await {
            Ok(()) => return Ok(()),
            Err(error) => refused = Some(error),
        }
    }
    Err(refused.unwrap_or_else(|| {
        let image = image.references.first().map_or_else(|| image.id.to_string(), ToString::to_string);
        unsigned(&image, options, "it did not come from a registry")
    }))
}

/// Checks that one of the keys has signed the digest.
pub(crate) async fn check(
    store: &Store,
    registry: &Registry,
    reference: &Reference,
    digest: &Digest,
    options: &PullOptions,
) -> Result<()> {
    let right = |found: &[Signed]| {
        found.iter().any(|signed| options.keys.iter().any(|key| signed.is_of(digest, key)))
    };
    let (handle, wanted) = (store.clone(), digest.clone());
    if right(&blocking(move || handle.kept_signatures(&wanted)).await?) {
        return Ok(());
    }
    let what = reference.to_string();
    let found = match fetch(registry, digest, &what).await {
        Err(ImageError::ManifestUnknown { .. }) => {
            return Err(unsigned(&what, options, "it has no signature"));
        }
        found => found?,
    };
    if !right(&found) {
        return Err(unsigned(&what, options, "none of its signatures is by that key"));
    }
    let (store, digest) = (store.clone(), digest.clone());
    blocking(move || store.keep_signatures(&digest, &found)).await
}

fn unsigned(image: &str, options: &PullOptions, why: &'static str) -> ImageError {
    let keys: Vec<&str> = options.keys.iter().map(VerifyKey::name).collect();
    ImageError::Unsigned { image: image.to_owned(), keys: keys.join(" or "), why }
}

/// All signatures that the registry has for a digest.
async fn fetch(registry: &Registry, digest: &Digest, what: &str) -> Result<Vec<Signed>> {
    let fetched = registry.manifest(&format!("sha256-{}.sig", digest.hex())).await?;
    let subject = format!("signatures of {what}");
    let Document::Manifest(manifest) =
        manifest::parse(&fetched.bytes, fetched.content_type.as_deref(), &subject)?
    else {
        let why = "it is an index".to_owned();
        return Err(ImageError::Malformed { what: subject, why });
    };
    let mut found = Vec::new();
    for layer in manifest.layers().iter().take(MAX_SIGNATURES) {
        let annotations = layer.annotations().as_ref();
        let signature =
            annotations.and_then(|all| all.get(SIGNATURE)).filter(|text| text.len() <= MAX_SIGNATURE);
        let Some(signature) = signature else { continue };
        let payload = payload(registry, &manifest::blob_ref(layer)?, &subject).await?;
        found.push(Signed { payload, signature: signature.clone() });
    }
    Ok(found)
}

async fn payload(registry: &Registry, blob: &BlobRef, what: &str) -> Result<String> {
    manifest::bound(what, blob.size_bytes, MAX_PAYLOAD_BYTES)?;
    let BlobAnswer::From(_, response) = registry.blob(&blob.digest, 0).await? else {
        return Err(registry.peer().protocol("it refuses a range that was not asked for"));
    };
    let bytes = body::read_all(registry.peer(), response, MAX_PAYLOAD_BYTES, what).await?;
    let found = Digest::of(&bytes);
    if found != blob.digest {
        return Err(ImageError::WrongDigest { what: what.to_owned(), expected: blob.digest.clone(), found });
    }
    String::from_utf8(bytes)
        .map_err(|_| ImageError::Malformed { what: what.to_owned(), why: "it is no text".to_owned() })
}

impl Store {
    fn signatures_path(&self, digest: &Digest) -> PathBuf {
        self.signatures_dir().join(format!("{}.json", digest.hex()))
    }

    fn kept_signatures(&self, digest: &Digest) -> Result<Vec<Signed>> {
        let path = self.signatures_path(digest);
        let Some(bytes) = read_bounded(&path, MAX_KEPT_BYTES)? else { return Ok(Vec::new()) };
        // What cannot be read is fetched again.
        Ok(serde_json::from_slice(&bytes).unwrap_or_default())
    }

    fn keep_signatures(&self, digest: &Digest, found: &[Signed]) -> Result<()> {
        let path = self.signatures_path(digest);
        let bytes = serde_json::to_vec(found).map_err(|error| ImageError::Damaged {
            what: "signatures cannot be written",
            path: path.clone(),
            source: Some(error),
        })?;
        self.write_atomic(&path, &bytes)
    }
}

#[cfg(test)]
mod tests;
