//! What the tests share: archives in, images out, and both read back as plain trees.

pub(crate) mod archive;
pub(crate) mod erofs;
pub(crate) mod model;
pub(crate) mod random;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::Write;

use hyper_unpack::{Compression, LayerInput, Limits, Summary, UnpackError, unpack};
use sha2::{Digest, Sha256};

/// A path's components joined by slashes; the root is empty. Not text: names may be any bytes.
pub(crate) type Path = Vec<u8>;

/// A file system as a flat map. Equal trees have equal maps.
pub(crate) type Listing = BTreeMap<Path, Node>;

/// A file and everything that is kept about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path, in order, of the same inode.
    pub(crate) first_name: Path,
    pub(crate) nlink: u32,
    pub(crate) content: Content,
}

#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Content {
    File(Vec<u8>),
    Directory,
    Symlink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(data) => {
                write!(f, "File({} bytes, sha256 {:02x?})", data.len(), &Sha256::digest(data)[..4])
            }
            Self::Directory => write!(f, "Directory"),
            Self::Symlink(target) => write!(f, "Symlink({})", String::from_utf8_lossy(target)),
            Self::CharDevice(major, minor) => write!(f, "CharDevice({major}:{minor})"),
            Self::BlockDevice(major, minor) => write!(f, "BlockDevice({major}:{minor})"),
            Self::Fifo => write!(f, "Fifo"),
        }
    }
}

/// Unpacks plain tar streams with default limits.
pub(crate) fn build(layers: &[Vec<u8>]) -> Result<(Vec<u8>, Summary), UnpackError> {
    build_with(layers, &Limits::default())
}

pub(crate) fn build_with(layers: &[Vec<u8>], limits: &Limits) -> Result<(Vec<u8>, Summary), UnpackError> {
    let inputs = layers.iter().map(|tar| {
        let diff_id = Sha256::digest(tar).into();
        Ok::<_, Infallible>(LayerInput { reader: tar.as_slice(), compression: Compression::Detect, diff_id })
    });
    let mut image = Vec::new();
    let summary = unpack(inputs, &mut image, limits, &mut |_| {})?;
    assert_eq!(image.len() as u64, summary.image_bytes);
    Ok((image, summary))
}

/// Unpacks layers that must be good and reads the image back.
pub(crate) fn listing(layers: &[Vec<u8>]) -> Listing {
    let (image, summary) = build(layers).unwrap();
    let listing = erofs::read(&image);
    let inodes: std::collections::BTreeSet<_> = listing.values().map(|node| &node.first_name).collect();
    assert_eq!(inodes.len() as u64, summary.inodes);
    listing
}

/// Compares two trees and names the first path that differs.
pub(crate) fn assert_same(actual: &Listing, expected: &Listing, what: &str) {
    for path in actual.keys().chain(expected.keys()) {
        let name = String::from_utf8_lossy(path);
        assert_eq!(actual.get(path), expected.get(path), "{what}: {name:?} differs (left: image)");
    }
}

/// Runs `fsck.erofs` on an image, where it is installed. Returns whether it ran.
pub(crate) fn fsck(image: &[u8]) -> bool {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(image).unwrap();
    let output = match std::process::Command::new("fsck.erofs").arg("--extract").arg(file.path()).output() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return false,
        output => output.unwrap(),
    };
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "fsck.erofs: {text}");
    true
}
