//! Public keys in PEM, as `cosign generate-key-pair` and `openssl pkey -pubout` write them (RFC 5280, 4.1: SubjectPublicKeyInfo).

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{ECDSA_P256_SHA256_ASN1, ED25519, UnparsedPublicKey, VerificationAlgorithm};

use crate::error::{ImageError, Result};
use crate::store::read_bounded;

/// Largest file with a key.
const MAX_KEY_BYTES: u64 = 16 << 10;
const BEGIN: &str = "-----BEGIN PUBLIC KEY-----";
const END: &str = "-----END PUBLIC KEY-----";
/// What comes before the 65 bytes of a point of P-256.
const P256: &[u8] = &[
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
    0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
const P256_POINT: usize = 65;
/// What comes before the 32 bytes of an Ed25519 key.
const ED: &[u8] = &[0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
const ED_KEY: usize = 32;
/// A key that signatures of images are held against.
#[derive(Clone)]
pub struct VerifyKey {
    name: String,
    algorithm: &'static dyn VerificationAlgorithm,
    key: Vec<u8>,
}

impl VerifyKey {
    /// Reads a key from a PEM file: ECDSA on P-256, or Ed25519.
    ///
    /// # Errors
    /// [`ImageError::Io`], or [`ImageError::BadKey`] for what is no such key.
    pub fn read(path: &Path) -> Result<Self> {
        let missing = || ImageError::io("open", path, std::io::ErrorKind::NotFound.into());
        let text = read_bounded(path, MAX_KEY_BYTES)?.ok_or_else(missing)?;
        let name = path.display().to_string();
        let bad = || ImageError::BadKey { name: name.clone() };
        let text = str::from_utf8(&text).map_err(|_| bad())?;
        Self::parse(&name, text).ok_or_else(bad)
    }

    /// What it was read from.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn parse(name: &str, pem: &str) -> Option<Self> {
        let (_, rest) = pem.split_once(BEGIN)?;
        let (body, _) = rest.split_once(END)?;
        let body: String = body.split_whitespace().collect();
        let der = STANDARD.decode(body).ok()?;
        let (algorithm, key): (&'static dyn VerificationAlgorithm, &[u8]) =
            if let Some(point) = der.strip_prefix(P256).filter(|point| point.len() == P256_POINT) {
                (&ECDSA_P256_SHA256_ASN1, point)
            } else {
                (&ED25519, der.strip_prefix(ED).filter(|key| key.len() == ED_KEY)?)
            };
        Some(Self { name: name.to_owned(), algorithm, key: key.to_vec() })
    }

    /// Whether the signature is this key's, of these bytes.
    pub(super) fn signed(&self, bytes: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(self.algorithm, &self.key).verify(bytes, signature).is_ok()
    }
}

impl std::fmt::Debug for VerifyKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerifyKey").field("name", &self.name).finish_non_exhaustive()
    }
}
