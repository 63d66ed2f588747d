//! One stored image: identity, names, manifest, configuration, layers.

use std::path::PathBuf;

use oci_spec::image::ImageManifest;

use crate::config::{self, ImageConfig};
use crate::digest::Digest;
use crate::error::{ImageError, Result};
use crate::manifest::{self, BlobRef, Document};
use crate::platform::Platform;
use crate::reference::Reference;

/// An image of the store. Its blobs are all there when it is handed out.
#[derive(Clone, Debug)]
pub struct Image {
    /// What `docker images` calls the image id: the digest of the configuration.
    pub id: Digest,
    /// Names with tags that point at it; empty for a dangling image.
    pub references: Vec<Reference>,
    /// Names with the digest under which registries serve it.
    pub repo_digests: Vec<Reference>,
    /// Digest of the manifest.
    pub manifest_digest: Digest,
    /// The manifest.
    pub manifest: ImageManifest,
    /// What to run and how.
    pub config: ImageConfig,
    /// What it runs on.
    pub platform: Platform,
    /// Layers, lowest first.
    pub layers: Vec<Layer>,
    /// Bytes that its blobs take on disk, each counted once.
    pub size_bytes: u64,
    /// When it was built, RFC 3339, as the image says.
    pub created: Option<String>,
    /// The same in seconds since 1970, if it can be understood.
    pub created_unix_s: Option<i64>,
    /// When it was stored here, seconds since 1970.
    pub stored_unix_s: u64,
}

/// One layer of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Digest of the blob as stored (mostly compressed).
    pub digest: Digest,
    /// Bytes of the blob as stored.
    pub size_bytes: u64,
    /// Media type from the manifest.
    pub media_type: String,
    /// Digest of the uncompressed tar; claimed by the configuration, checked by whoever unpacks.
    pub diff_id: Digest,
}

/// A stored layer as whoever unpacks it wants it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerBlob {
    /// The blob's file, read-only, content checked against `digest`.
    pub path: PathBuf,
    /// Digest of the file.
    pub digest: Digest,
    /// Bytes of the file.
    pub size_bytes: u64,
    /// How the tar is compressed, found by its first bytes (media types are often wrong).
    pub compression: Compression,
    /// Digest that the uncompressed tar must have.
    pub diff_id: Digest,
}

/// Compression of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// A plain tar.
    None,
    /// RFC 1952, possibly several members.
    Gzip,
    /// RFC 8878, possibly several and skippable frames.
    Zstd,
}

impl Compression {
    /// Bytes of a file's beginning that [`Compression::detect`] needs.
    pub const MAGIC_LEN: usize = 4;

    /// Tells compressions apart by the first bytes of a file; anything unknown counts as plain.
    pub fn detect(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // A frame, or a skippable frame (0x184D2A50 to 0x184D2A5F).
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// A manifest and its configuration, checked against each other.
#[derive(Clone, Debug)]
pub(crate) struct Assembled {
    pub(crate) manifest: ImageManifest,
    pub(crate) document: config::ConfigDocument,
    pub(crate) layers: Vec<Layer>,
    pub(crate) size_bytes: u64,
}

/// Parses manifest and configuration and checks that they fit; `what` names the image in errors.
pub(crate) fn assemble(manifest_bytes: &[u8], config_bytes: &[u8], what: &str) -> Result<Assembled> {
    let Document::Manifest(manifest) = manifest::parse(manifest_bytes, None, what)? else {
        return Err(ImageError::Malformed {
            what: format!("manifest of {what}"),
            why: "it is an index".into(),
        });
    };
    let parts = manifest::parts(&manifest, what)?;
    let document = config::parse_config(config_bytes, what)?;
    let layers = pair_layers(&parts.layers, &document.diff_ids, what)?;
    let mut seen = std::collections::HashSet::new();
    let distinct = parts.layers.iter().filter(|layer| seen.insert(&layer.digest));
    let size_bytes = distinct.map(|layer| layer.size_bytes).sum::<u64>()
        + manifest_bytes.len() as u64
        + config_bytes.len() as u64;
    Ok(Assembled { manifest: *manifest, document, layers, size_bytes })
}

/// Joins the manifest's blobs with the configuration's uncompressed digests.
fn pair_layers(blobs: &[BlobRef], diff_ids: &[Digest], what: &str) -> Result<Vec<Layer>> {
    if blobs.len() != diff_ids.len() {
        return Err(ImageError::Malformed {
            what: format!("configuration of {what}"),
            why: format!("it lists {} layers but the manifest {}", diff_ids.len(), blobs.len()),
        });
    }
    let pair = |(blob, diff_id): (&BlobRef, &Digest)| Layer {
        digest: blob.digest.clone(),
        size_bytes: blob.size_bytes,
        media_type: blob.media_type.clone(),
        diff_id: diff_id.clone(),
    };
    Ok(blobs.iter().zip(diff_ids).map(pair).collect())
}

/// Refuses an image that does not run on `wanted`.
pub(crate) fn check_platform(offered: &Platform, wanted: &Platform, what: &str) -> Result<()> {
    if offered.os == wanted.os && offered.architecture == wanted.architecture {
        return Ok(());
    }
    Err(ImageError::NoPlatform {
        what: what.into(),
        wanted: wanted.to_string(),
        offered: offered.to_string(),
    })
}

/// Seconds since 1970 of an RFC 3339 time; `None` if it is not one.
pub(crate) fn unix_seconds(text: &str) -> Option<i64> {
    let number = |from: usize, to: usize| -> Option<i64> {
        let digits = text.get(from..to)?;
        digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())?
    };
    let separators = [(4, '-'), (7, '-'), (13, ':'), (16, ':')];
    let bytes = text.as_bytes();
    if separators.iter().any(|(at, c)| bytes.get(*at) != Some(&(*c as u8))) {
        return None;
    }
    if !matches!(bytes.get(10), Some(b'T' | b't' | b' ')) {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let zone = text.get(19..)?.trim_start_matches(|c: char| c == '.' || c.is_ascii_digit());
    let offset_s = match zone.as_bytes() {
        [b'Z' | b'z'] => 0,
        [sign @ (b'+' | b'-'), _, _, b':', _, _] => {
            let hours: i64 = zone.get(1..3)?.parse().ok()?;
            let minutes: i64 = zone.get(4..6)?.parse().ok()?;
            let size = hours * 3600 + minutes * 60;
            if *sign == b'-' { -size } else { size }
        }
        _ => return None,
    };
    // Days since 1970 by counting years that begin in March, so that the leap day comes last.
    let (year, month) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let days = year * 365 + year.div_euclid(4) - year.div_euclid(100)
        + year.div_euclid(400)
        + (month * 153 + 2) / 5
        + (day - 1)
        - 719_468;
    Some(days * 86_400 + hour * 3600 + minute * 60 + second - offset_s)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressions() {
        assert_eq!(Compression::detect(&[0x1f, 0x8b, 8, 0]), Compression::Gzip);
        assert_eq!(Compression::detect(&[0x28, 0xb5, 0x2f, 0xfd]), Compression::Zstd);
        assert_eq!(Compression::detect(&[0x5a, 0x2a, 0x4d, 0x18]), Compression::Zstd);
        assert_eq!(Compression::detect(b"etc/"), Compression::None);
        assert_eq!(Compression::detect(b""), Compression::None);
    }

    #[test]
    fn times() {
        for (text, expected) in [
            ("1970-01-01T00:00:00Z", Some(0)),
            ("2024-02-29T12:34:56.789012345Z", Some(1_709_210_096)),
            ("2024-02-29T12:34:56+02:00", Some(1_709_202_896)),
            ("2000-03-01T00:00:00-00:30", Some(951_870_600)),
            ("1969-12-31T23:59:59Z", Some(-1)),
            ("0001-01-01T00:00:00Z", Some(-62_135_596_800)),
            ("2024-13-01T00:00:00Z", None),
            ("2024-01-01", None),
            ("2024-01-01T00:00:00", None),
            ("+024-01-01T00:00:00Z", None),
            ("", None),
            ("ääääääääääääää", None),
        ] {
            assert_eq!(unix_seconds(text), expected, "{text}");
        }
    }
}
