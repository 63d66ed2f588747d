//! Doors for the fuzzer: what registries and archives of images send, up to where it is believed.

use sha2::Digest as _;

use crate::load::tar::Archive;
use crate::manifest::{self, Document};
use crate::{Platform, Reference, config};

/// A manifest or an index, with all that is taken out of it.
pub fn manifest(bytes: &[u8]) {
    match manifest::parse(bytes, None, "fuzz") {
        Ok(Document::Index(index)) => {
            drop(manifest::select(&index, &Platform::of("linux", "amd64", ""), "fuzz"))
        }
        Ok(Document::Manifest(document)) => drop(manifest::parts(&document, "fuzz")),
        Err(_) => {}
    }
}

/// An image's configuration.
pub fn config(bytes: &[u8]) {
    drop(config::parse_config(bytes, "fuzz"));
}

/// What a user or a pod calls an image. What is understood is understood the same when it is written out.
pub fn reference(text: &str) {
    if let Ok(reference) = Reference::parse(text) {
        let again = Reference::parse(&reference.full());
        assert!(
            again.is_ok_and(|again| again.full() == reference.full()),
            "{text:?} is written otherwise than read"
        );
    }
}

/// A registry's `WWW-Authenticate`.
pub fn challenge(bytes: &[u8]) {
    let found = crate::registry::auth::challenges_in(bytes);
    assert!(found <= bytes.len(), "{found} challenges in {} bytes", bytes.len());
}

/// An archive of images.
pub fn archive(bytes: &[u8]) {
    let mut archive = Archive::new(bytes);
    while let Ok(Some(_member)) = archive.next() {}
}

/// SHA-256.
#[must_use]
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    sha2::Sha256::digest(bytes).into()
}
