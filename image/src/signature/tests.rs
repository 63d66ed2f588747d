//! Signatures that are right, and those that are not.

use std::sync::Arc;

use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair};

use super::*;
use crate::pull::pull;
use crate::registry::Patience;
use crate::registry::credentials::Auth;
use crate::testing::registry::Server;
use crate::testing::{MANIFEST, Sample, store};

/// The beginnings of the keys' encodings (RFC 5480, RFC 8410).
const P256: &str = "3059301306072a8648ce3d020106082a8648ce3d030107034200";
const ED: &str = "302a300506032b6570032100";

enum Pair {
    Curve(EcdsaKeyPair),
    Edwards(Ed25519KeyPair),
}

impl Pair {
    fn curve() -> Self {
        let random = SystemRandom::new();
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, document.as_ref(), &random);
        Self::Curve(pair.unwrap())
    }

    fn edwards() -> Self {
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        Self::Edwards(Ed25519KeyPair::from_pkcs8(document.as_ref()).unwrap())
    }

    fn pem(&self) -> String {
        let (prefix, key) = match self {
            Self::Curve(pair) => (P256, pair.public_key().as_ref()),
            Self::Edwards(pair) => (ED, pair.public_key().as_ref()),
        };
        let prefix =
            (0..prefix.len()).step_by(2).map(|at| u8::from_str_radix(&prefix[at..at + 2], 16).unwrap());
        let der: Vec<u8> = prefix.chain(key.iter().copied()).collect();
        format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", STANDARD.encode(der))
    }

    fn key(&self) -> VerifyKey {
        VerifyKey::parse("a.pub", &self.pem()).unwrap()
    }

    fn sign(&self, text: &str) -> String {
        match self {
            Self::Curve(pair) => STANDARD.encode(pair.sign(&SystemRandom::new(), text.as_bytes()).unwrap()),
            Self::Edwards(pair) => STANDARD.encode(pair.sign(text.as_bytes())),
        }
    }
}

fn payload(digest: &Digest) -> String {
    format!(
        r#"{{"critical":{{"identity":{{"docker-reference":"x"}},"image":{{"docker-manifest-digest":"{digest}"}},"type":"{KIND}"}},"optional":null}}"#
    )
}

/// Offers a text with a signature for an image.
fn offer(server: &Server, name: &str, image: &Digest, text: &str, signature: &str) {
    let blob = Digest::of(text.as_bytes());
    server.content().blobs.insert(blob.to_string(), text.as_bytes().to_vec());
    let config = Digest::of(b"{}");
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","size":2,"digest":"{config}"}},
            "layers":[{{"mediaType":"application/vnd.dev.cosign.simplesigning.v1+json","size":{},"digest":"{blob}","annotations":{{"{SIGNATURE}":"{signature}"}}}}]}}"#,
        text.len()
    );
    server.offer_manifest(&format!("{name}:sha256-{}.sig", image.hex()), MANIFEST, manifest.as_bytes());
}

fn options(keys: &[&Pair]) -> PullOptions {
    PullOptions {
        auth: Auth::Anonymous,
        patience: Patience { connect_ms: 5000, stall_ms: 5000, tries: 1, backoff_ms: 1, max_backoff_ms: 2 },
        keys: keys.iter().map(|pair| pair.key()).collect(),
        progress: Arc::new(crate::progress::Quiet),
        ..PullOptions::default()
    }
}

async fn refused(store: &Store, reference: &Reference, keys: &[&Pair]) -> String {
    let error = pull(store, reference, &options(keys)).await.unwrap_err();
    assert!(matches!(error, ImageError::Unsigned { .. }), "{error}");
    assert!(store.images().unwrap().is_empty(), "an image that is not signed was kept");
    error.one_line()
}

#[tokio::test]
async fn a_signed_image_is_pulled_and_checked_again_without_the_registry() {
    for pair in [Pair::curve(), Pair::edwards()] {
        let (server, (_dir, store)) = (Server::start().await, store());
        let sample = Sample::new(1, "amd64", &[100]);
        let (reference, digest) = (server.offer(&sample, "a/b:1"), sample.digest());
        let line = refused(&store, &reference, &[&pair]).await;
        assert!(line.contains("no signature") && line.contains("a.pub"), "{line}");
        let text = payload(&digest);
        offer(&server, "a/b", &digest, &text, &pair.sign(&text));
        let other = Pair::curve();
        refused(&store, &reference, &[&other]).await;
        let image = pull(&store, &reference, &options(&[&other, &pair])).await.unwrap().image;
        let before = server.content().seen.len();
        verify(&store, &image, &options(&[&pair])).await.unwrap();
        let pinned = reference.with_digest(digest);
        pull(&store, &pinned, &options(&[&pair])).await.unwrap();
        assert_eq!(server.content().seen.len(), before, "what was kept is enough");
        assert!(verify(&store, &image, &options(&[&other])).await.is_err());
        assert!(pull(&store, &pinned, &options(&[&other])).await.is_err());
        // What is kept goes with the image.
        store.remove(&image.id.to_string(), true, &crate::Used::default()).unwrap();
        store.gc(&crate::Used::default()).unwrap();
        assert_eq!(std::fs::read_dir(store.signatures_dir()).unwrap().count(), 0);
    }
}

#[tokio::test]
async fn signatures_of_something_else_count_for_nothing() {
    let (server, (_dir, store)) = (Server::start().await, store());
    let pair = Pair::curve();
    let sample = Sample::new(1, "amd64", &[100]);
    let (reference, digest) = (server.offer(&sample, "a:1"), sample.digest());
    let right = payload(&digest);
    let (other, kind) = (payload(&Digest::of(b"another")), right.replace(KIND, "atomic container signature"));
    let signature = pair.sign(&right);
    for (text, signature) in [
        (&other, pair.sign(&other)),
        (&kind, pair.sign(&kind)),
        (&other, signature.clone()),
        (&right, String::new()),
        (&right, "no base64!".to_owned()),
        (&right, STANDARD.encode(b"not asn.1")),
        (&right, "A".repeat(MAX_SIGNATURE + 1)),
        (&"{}".to_owned(), pair.sign("{}")),
        (&String::new(), pair.sign("")),
    ] {
        offer(&server, "a", &digest, text, &signature);
        refused(&store, &reference, &[&pair]).await;
    }
    offer(&server, "a", &digest, &right, &signature);
    pull(&store, &reference, &options(&[&pair])).await.unwrap();
}

#[tokio::test]
async fn what_did_not_come_from_a_registry_is_signed_by_nobody() {
    let (server, (_dir, store)) = (Server::start().await, store());
    let reference = server.offer(&Sample::new(1, "amd64", &[100]), "a:1");
    let mut image = pull(&store, &reference, &options(&[])).await.unwrap().image;
    verify(&store, &image, &options(&[])).await.unwrap();
    image.repo_digests.clear();
    let error = verify(&store, &image, &options(&[&Pair::curve()])).await.unwrap_err().one_line();
    assert!(error.contains("did not come from a registry"), "{error}");
}

#[test]
fn what_is_no_key_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key.pub");
    assert!(VerifyKey::read(&path).unwrap_err().one_line().contains("key.pub"));
    let pem = Pair::curve().pem();
    std::fs::write(&path, &pem).unwrap();
    VerifyKey::read(&path).unwrap();
    for text in [String::new(), "x".into(), pem.replace("PUBLIC", "PRIVATE"), pem.replace("MFk", "MFs")] {
        std::fs::write(&path, &text).unwrap();
        assert!(matches!(VerifyKey::read(&path), Err(ImageError::BadKey { .. })), "{text}");
    }
}
