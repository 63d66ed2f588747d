//! Manifests and indexes: told apart, bounded, and reduced to what can be run.

use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::digest::Digest;
use crate::error::{ImageError, Result, clean};
use crate::platform::Platform;

/// Largest manifest or index, what registries and Docker accept.
pub const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// Most layers of an image. Docker itself stops at 127.
pub const MAX_LAYERS: usize = 512;
/// Largest single layer, compressed.
pub const MAX_LAYER_BYTES: u64 = 64 << 30;
/// Most entries of an index that are looked at.
const MAX_INDEX_ENTRIES: usize = 1024;
/// Platforms listed in an error.
const MAX_OFFERED: usize = 16;

/// What a registry is told we understand.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// A parsed document.
#[derive(Clone, Debug)]
pub(crate) enum Document {
    /// One image.
    Manifest(Box<ImageManifest>),
    /// One image for several platforms.
    Index(Box<ImageIndex>),
}

/// Reference to content: digest and exact size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlobRef {
    pub(crate) digest: Digest,
    pub(crate) size_bytes: u64,
    pub(crate) media_type: String,
}

/// What a checked manifest refers to.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    pub(crate) config: BlobRef,
    pub(crate) layers: Vec<BlobRef>,
}

/// Enough of any document to tell what it is.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Probe {
    schema_version: Option<u64>,
    media_type: Option<String>,
    config: Option<IgnoredAny>,
    layers: Option<IgnoredAny>,
    manifests: Option<IgnoredAny>,
    fs_layers: Option<IgnoredAny>,
}

/// Parses a manifest or index; `content_type` is what the server called it, `what` names it in errors.
pub(crate) fn parse(bytes: &[u8], content_type: Option<&str>, what: &str) -> Result<Document> {
    let subject = format!("manifest of {what}");
    if bytes.len() as u64 > MAX_MANIFEST_BYTES {
        let found = bytes.len() as u64;
        return Err(ImageError::TooLarge { what: subject, found, limit: MAX_MANIFEST_BYTES });
    }
    let malformed = |why: &str| ImageError::Malformed { what: subject.clone(), why: why.to_owned() };
    let bad_json = |error: serde_json::Error| malformed(&clean(&error.to_string()));
    let probe: Probe = serde_json::from_slice(bytes).map_err(bad_json)?;
    let kind = probe.media_type.as_deref().or(content_type).unwrap_or_default();
    if probe.schema_version == Some(1)
        || probe.fs_layers.is_some()
        || kind.contains("distribution.manifest.v1")
    {
        return Err(ImageError::Unsupported {
            what: subject,
            why: "it has the retired schema 1; push the image again with a current tool".to_owned(),
        });
    }
    // A document that can be read both ways would let two readers see two images under one digest.
    match (probe.manifests.is_some(), probe.layers.is_some() || probe.config.is_some()) {
        (true, true) => Err(malformed("it claims to be both an index and a manifest")),
        (true, false) => {
            if kind.contains("image.manifest") || kind.contains("distribution.manifest.v2") {
                return Err(malformed("its media type says manifest but it is an index"));
            }
            Ok(Document::Index(serde_json::from_slice(bytes).map_err(bad_json)?))
        }
        (false, true) => {
            if kind.contains("image.index") || kind.contains("manifest.list") {
                return Err(malformed("its media type says index but it is a manifest"));
            }
            Ok(Document::Manifest(serde_json::from_slice(bytes).map_err(bad_json)?))
        }
        (false, false) => Err(malformed("it is neither a manifest nor an index")),
    }
}

/// Checks a manifest against our bounds and returns what it refers to.
pub(crate) fn parts(manifest: &ImageManifest, what: &str) -> Result<Parts> {
    let config = blob_ref(manifest.config())?;
    let kind = config.media_type.as_str();
    if !matches!(
        kind,
        "application/vnd.oci.image.config.v1+json" | "application/vnd.docker.container.image.v1+json"
    ) {
        return Err(ImageError::Unsupported {
            what: what.to_owned(),
            why: format!("it is no container image but \"{}\"", clean(kind)),
        });
    }
    bound(&format!("configuration of {what}"), config.size_bytes, crate::config::MAX_CONFIG_BYTES)?;
    bound(&format!("number of layers of {what}"), manifest.layers().len() as u64, MAX_LAYERS as u64)?;
    let mut layers = Vec::with_capacity(manifest.layers().len());
    for descriptor in manifest.layers() {
        let layer = blob_ref(descriptor)?;
        check_layer_type(&layer, what)?;
        bound(&format!("layer {} of {what}", layer.digest.short()), layer.size_bytes, MAX_LAYER_BYTES)?;
        layers.push(layer);
    }
    Ok(Parts { config, layers })
}

/// The entry of an index that serves `platform` best.
pub(crate) fn select(index: &ImageIndex, platform: &Platform, what: &str) -> Result<BlobRef> {
    let entries = index.manifests();
    bound(&format!("index of {what}"), entries.len() as u64, MAX_INDEX_ENTRIES as u64)?;
    let mut best: Option<(u32, &Descriptor)> = None;
    let mut offered = Vec::new();
    for entry in entries {
        let Some(here) = platform_of(entry) else { continue };
        if let Some(rank) = platform.rank(&here)
            && best.is_none_or(|(other, _)| rank < other)
        {
            best = Some((rank, entry));
        }
        if here.os != "unknown" && offered.len() < MAX_OFFERED {
            offered.push(here.to_string());
        }
    }
    // An index of one image that names no platform means that image.
    if let (None, [only]) = (best, entries.as_slice())
        && only.platform().is_none()
    {
        best = Some((0, only));
    }
    match best {
        Some((_, entry)) => blob_ref(entry),
        None => Err(ImageError::NoPlatform {
            what: what.to_owned(),
            wanted: platform.to_string(),
            offered: if offered.is_empty() { "none".to_owned() } else { offered.join(", ") },
        }),
    }
}

/// The platform of an index entry, if it names one.
pub(crate) fn platform_of(entry: &Descriptor) -> Option<Platform> {
    let platform = entry.platform().as_ref()?;
    let variant = platform.variant().as_deref().unwrap_or_default();
    Some(Platform::of(&platform.os().to_string(), &platform.architecture().to_string(), variant))
}

/// Digest, size and type of a descriptor, as ours.
pub(crate) fn blob_ref(descriptor: &Descriptor) -> Result<BlobRef> {
    Ok(BlobRef {
        digest: Digest::parse(descriptor.digest().as_ref())?,
        size_bytes: descriptor.size(),
        media_type: descriptor.media_type().to_string(),
    })
}

/// Fails if `found` exceeds `limit`.
pub(crate) fn bound(what: &str, found: u64, limit: u64) -> Result<()> {
    if found > limit {
        return Err(ImageError::TooLarge { what: what.to_owned(), found, limit });
    }
    Ok(())
}

/// Accepts plain, gzip and zstd layers; refuses foreign and encrypted ones and everything else.
fn check_layer_type(layer: &BlobRef, what: &str) -> Result<()> {
    let kind = layer.media_type.as_str();
    let why = match kind {
        "application/vnd.docker.image.rootfs.diff.tar"
        | "application/vnd.docker.image.rootfs.diff.tar.gzip"
        | "application/vnd.docker.image.rootfs.diff.tar.zstd"
        | "application/vnd.oci.image.layer.v1.tar"
        | "application/vnd.oci.image.layer.v1.tar+gzip"
        | "application/vnd.oci.image.layer.v1.tar+zstd" => return Ok(()),
        _ if kind.contains("foreign") || kind.contains("nondistributable") => {
            "its content is kept outside of the registry (a foreign layer)".to_owned()
        }
        _ if kind.contains("encrypted") => "it is encrypted".to_owned(),
        _ => format!("it is of type \"{}\"", clean(kind)),
    };
    Err(ImageError::Unsupported { what: format!("layer {} of {what}", layer.digest.short()), why })
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    const CONFIG: &str = "application/vnd.docker.container.image.v1+json";
    const GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

    fn manifest(config: &str, layer: &str, size: u64) -> String {
        format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"{config}","digest":"{D}","size":2}},
            "layers":[{{"mediaType":"{layer}","digest":"{D}","size":{size}}}]}}"#
        )
    }

    fn check(text: &str) -> Result<Parts> {
        match parse(text.as_bytes(), None, "x")? {
            Document::Manifest(manifest) => parts(&manifest, "x"),
            Document::Index(_) => panic!("an index"),
        }
    }

    fn entry(platform: &str) -> String {
        format!(r#"{{"mediaType":"{OCI_MANIFEST}","digest":"{D}","size":7{platform}}}"#)
    }

    fn on(os: &str, arch: &str, variant: &str) -> String {
        let text = format!(
            r#","platform":{{"os":"{os}","architecture":"{arch}","variant":"{variant}"}},"annotations":{{"v":"{variant}"}}"#
        );
        entry(&text)
    }

    fn index(entries: &[String]) -> ImageIndex {
        let text = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
        match parse(text.as_bytes(), None, "x").unwrap() {
            Document::Index(index) => *index,
            Document::Manifest(_) => panic!("a manifest"),
        }
    }

    #[test]
    fn accepts_docker_and_oci_layers() {
        for layer in
            [GZIP, "application/vnd.oci.image.layer.v1.tar+zstd", "application/vnd.oci.image.layer.v1.tar"]
        {
            assert_eq!(check(&manifest(CONFIG, layer, 9)).unwrap().layers[0].size_bytes, 9);
        }
    }

    #[test]
    fn refuses_what_cannot_run() {
        for (config, layer, size, says) in [
            (
                "application/vnd.cncf.helm.config.v1+json",
                GZIP,
                1,
                "x is not supported: it is no container image",
            ),
            (CONFIG, "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", 1, "foreign layer"),
            (CONFIG, "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", 1, "foreign layer"),
            (CONFIG, "application/vnd.oci.image.layer.v1.tar+gzip+encrypted", 1, "encrypted"),
            (CONFIG, "text/html", 1, "it is of type \"text/html\""),
            (CONFIG, GZIP, MAX_LAYER_BYTES + 1, "is too large"),
        ] {
            let error = check(&manifest(config, layer, size)).expect_err(says).one_line();
            assert!(error.contains(says), "{error}");
        }
        let error = check(&manifest(CONFIG, GZIP, 1).replace(D, "sha512:00")).unwrap_err();
        assert!(
            matches!(error, ImageError::InvalidDigest { .. } | ImageError::Malformed { .. }),
            "{error:?}"
        );
    }

    #[test]
    fn counts_are_bounded() {
        let layer = format!(r#"{{"mediaType":"{GZIP}","digest":"{D}","size":1}},"#);
        let text = manifest(CONFIG, GZIP, 1)
            .replace("\"layers\":[", &format!("\"layers\":[{}", layer.repeat(MAX_LAYERS)));
        assert!(matches!(check(&text), Err(ImageError::TooLarge { .. })));
        let many = index(&vec![on("linux", "amd64", ""); MAX_INDEX_ENTRIES + 1]);
        assert!(matches!(select(&many, &Platform::default(), "x"), Err(ImageError::TooLarge { .. })));
        let big = vec![b' '; usize::try_from(MAX_MANIFEST_BYTES).unwrap() + 1];
        assert!(matches!(parse(&big, None, "x"), Err(ImageError::TooLarge { .. })));
    }

    #[test]
    fn schema_one_and_ambiguity_are_refused() {
        let old = parse(br#"{"schemaVersion":1,"fsLayers":[]}"#, None, "x").unwrap_err().one_line();
        assert!(old.contains("schema 1"), "{old}");
        let typed = "application/vnd.docker.distribution.manifest.v1+prettyjws";
        assert!(
            parse(br#"{"schemaVersion":2}"#, Some(typed), "x").unwrap_err().one_line().contains("schema 1")
        );
        let both = manifest(CONFIG, GZIP, 1).replacen('{', r#"{"manifests":[],"#, 1);
        assert!(parse(both.as_bytes(), None, "x").unwrap_err().one_line().contains("both"));
        let index_type = "application/vnd.oci.image.index.v1+json";
        assert!(parse(manifest(CONFIG, GZIP, 1).as_bytes(), Some(index_type), "x").is_err());
        assert!(parse(br#"{"manifests":[]}"#, Some(OCI_MANIFEST), "x").is_err());
    }

    #[test]
    fn selects_the_plain_variant_and_skips_attestations() {
        let all = index(&[
            on("unknown", "unknown", ""),
            on("linux", "amd64", "v3"),
            on("linux", "arm64", "v8"),
            on("linux", "amd64", ""),
        ]);
        assert!(select(&all, &Platform::default(), "x").is_ok());
        assert!(select(&all, &Platform::parse("linux/arm64").unwrap(), "x").is_ok());
        let error = select(&all, &Platform::parse("linux/s390x").unwrap(), "x").unwrap_err().one_line();
        assert_eq!(
            error,
            "no image for platform linux/s390x in x: it has linux/amd64/v3, linux/arm64, linux/amd64"
        );
        assert!(select(&index(&[entry("")]), &Platform::default(), "x").is_ok());
        assert!(select(&index(&[]), &Platform::default(), "x").is_err());
    }

    /// Every truncation and many corruptions of a valid manifest fail or parse, and never panic.
    #[test]
    fn corrupted_manifests_never_panic() {
        let good = manifest(CONFIG, GZIP, 1).into_bytes();
        for end in 0..good.len() {
            assert!(parse(&good[..end], None, "x").is_err());
        }
        let mut state = 1_u64;
        for _ in 0..20_000 {
            let mut bytes = good.clone();
            for _ in 0..3 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = usize::try_from(state >> 33).unwrap() % bytes.len();
                bytes[at] = u8::try_from(state & 0x7f).unwrap();
            }
            if let Ok(Document::Manifest(manifest)) = parse(&bytes, None, "x") {
                let _ = parts(&manifest, "x");
            }
        }
    }
}
