//! What the tests of this crate share: sample images and a registry that can misbehave.

use std::path::Path;

use crate::Store;
use crate::digest::Digest;

pub(crate) mod registry;

pub(crate) const MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// An image in memory.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) manifest: Vec<u8>,
    pub(crate) config: Vec<u8>,
    pub(crate) layers: Vec<Vec<u8>>,
}

impl Sample {
    /// An image for `linux/<arch>` with layers of these sizes; `seed` makes its content different from others.
    pub(crate) fn new(seed: u64, arch: &str, sizes: &[usize]) -> Self {
        let layers: Vec<Vec<u8>> = sizes.iter().zip(seed..).map(|(size, seed)| noise(seed, *size)).collect();
        let diff_ids: Vec<String> = layers.iter().map(|layer| format!("\"{}\"", Digest::of(layer))).collect();
        let config = format!(
            r#"{{"os":"linux","architecture":"{arch}","created":"2024-01-0{}T00:00:00Z","config":{{"Cmd":["sh"],"Env":["SEED={seed}"]}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
            1 + seed % 9,
            diff_ids.join(",")
        )
        .into_bytes();
        let manifest = manifest(&config, &layers, "application/vnd.docker.image.rootfs.diff.tar.gzip");
        Self { manifest, config, layers }
    }

    pub(crate) fn id(&self) -> Digest {
        Digest::of(&self.config)
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    /// All content: configuration, manifest, layers.
    pub(crate) fn blobs(&self) -> Vec<&[u8]> {
        let small = [self.config.as_slice(), self.manifest.as_slice()];
        small.into_iter().chain(self.layers.iter().map(Vec::as_slice)).collect()
    }
}

/// A docker schema 2 manifest for this content.
pub(crate) fn manifest(config: &[u8], layers: &[Vec<u8>], layer_type: &str) -> Vec<u8> {
    let layers: Vec<String> = layers.iter().map(|layer| descriptor(layer_type, layer)).collect();
    let config = descriptor("application/vnd.docker.container.image.v1+json", config);
    format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{config},"layers":[{}]}}"#,
        layers.join(",")
    )
    .into_bytes()
}

/// An index of images for platforms (`os/arch`).
pub(crate) fn index(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let entries: Vec<String> = entries
        .iter()
        .map(|(platform, manifest)| {
            let (os, arch) = platform.split_once('/').unwrap();
            let plain = descriptor(MANIFEST, manifest);
            format!(r#"{},"platform":{{"os":"{os}","architecture":"{arch}"}}}}"#, plain.trim_end_matches('}'))
        })
        .collect();
    format!(r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{}]}}"#, entries.join(",")).into_bytes()
}

pub(crate) fn descriptor(media_type: &str, content: &[u8]) -> String {
    format!(r#"{{"mediaType":"{media_type}","digest":"{}","size":{}}}"#, Digest::of(content), content.len())
}

/// Bytes that look random and are always the same.
pub(crate) fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(size).collect()
}

/// A store in a directory of its own.
pub(crate) fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    (dir, store)
}

/// Puts a sample into a store, as a finished pull would.
pub(crate) fn put(store: &Store, sample: &Sample, name: Option<&str>) -> crate::Image {
    for blob in sample.blobs() {
        store.put_blob(blob).unwrap();
    }
    let name = name.map(|name| crate::Reference::parse(name).unwrap());
    let digest = name.as_ref().map(|name| name.with_digest(sample.digest()));
    store.record(&sample.id(), &sample.digest(), name.as_ref(), digest.as_ref()).unwrap();
    store.resolve(&sample.id().to_string()).unwrap()
}

/// Names of the files below `ingest`.
pub(crate) fn leftovers(root: &Path) -> Vec<String> {
    let names = |dir: &Path| -> Vec<String> {
        std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    };
    names(&root.join("ingest"))
}

/// How many blobs there are, all of which must be what they are named.
pub(crate) fn blobs(root: &Path) -> usize {
    let mut count = 0;
    for entry in std::fs::read_dir(root.join("blobs/sha256")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(
            Digest::of(&bytes).hex(),
            path.file_name().unwrap().to_str().unwrap(),
            "a blob is not what it is named"
        );
        count += 1;
    }
    count
}
