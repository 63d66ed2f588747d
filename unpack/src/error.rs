//! What can go wrong, named by where it went wrong: the source of the layers, an archive, an entry of it, the
//! output, or one of the [`Limits`](crate::Limits).

use std::error::Error;
use std::fmt;
use std::io;

/// Why no image was made. Nothing mountable is left on the output in any of these cases.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// The caller's iterator could not supply a layer.
    #[error("opening layer {layer}")]
    NextLayer {
        /// Index of the layer, bottom is 0.
        layer: u32,
        /// What the iterator said.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The layer's stream could not be read or is not a well-formed archive.
    #[error("layer {layer}, near byte {offset} of its tar stream")]
    Archive {
        /// Index of the layer, bottom is 0.
        layer: u32,
        /// Uncompressed bytes taken from the layer so far.
        offset: u64,
        /// What is wrong there.
        #[source]
        source: ArchiveError,
    },
    /// An entry asks for something that a root file system cannot hold.
    #[error("layer {layer}, entry {path:?}")]
    Entry {
        /// Index of the layer, bottom is 0.
        layer: u32,
        /// The entry's name as the archive spells it, cut to a printable length.
        path: String,
        /// What is wrong with it.
        #[source]
        source: EntryError,
    },
    /// The uncompressed layer is not the one that the image's configuration names.
    #[error("layer {layer}: uncompressed content has sha256 {actual}, expected {expected}")]
    Digest {
        /// Index of the layer, bottom is 0.
        layer: u32,
        /// The `diff_id` that was asked for.
        expected: Digest,
        /// The digest of what was read.
        actual: Digest,
    },
    /// A bound of [`Limits`](crate::Limits) was reached.
    #[error("layer {layer}: image exceeds the limit of {} {}", source.max, source.what)]
    Limit {
        /// Index of the layer, bottom is 0.
        layer: u32,
        /// Which bound.
        #[source]
        source: LimitExceeded,
    },
    /// The image could not be written.
    #[error("writing {len} bytes of the image at byte {offset}")]
    Output {
        /// Where on the output.
        offset: u64,
        /// How much.
        len: usize,
        /// What the output said.
        #[source]
        source: io::Error,
    },
    /// The image could not be brought to stable storage.
    #[error("syncing the image")]
    Sync(#[source] io::Error),
}

impl UnpackError {
    /// Whether the image itself is at fault, so that trying again cannot help.
    #[must_use]
    pub fn is_image_fault(&self) -> bool {
        match self {
            Self::NextLayer { .. } | Self::Output { .. } | Self::Sync(_) => false,
            Self::Archive { source, .. } => !matches!(source, ArchiveError::Read(_)),
            Self::Entry { .. } | Self::Digest { .. } | Self::Limit { .. } => true,
        }
    }
}

/// What is wrong with a layer's stream.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// Reading or decompressing failed.
    #[error("reading the layer")]
    Read(#[source] io::Error),
    /// Decompressing failed.
    #[error("decompressing the layer")]
    Decompress(#[source] io::Error),
    /// The compression is known, but not one that image layers use.
    #[error("layer is compressed with {0}, which image layers do not use")]
    Compression(&'static str),
    /// The stream ends inside a header.
    #[error("tar stream ends inside a header")]
    TruncatedHeader,
    /// The stream ends inside the content of an entry.
    #[error("tar stream ends inside the content of an entry")]
    TruncatedContent,
    /// A header whose checksum does not match.
    #[error("tar header has a wrong checksum")]
    Checksum,
    /// A number that is malformed or out of range.
    #[error("tar header field {0} is malformed or out of range")]
    Number(&'static str),
    /// An extended header that cannot be parsed.
    #[error("malformed extended header: {0}")]
    ExtendedHeader(&'static str),
    /// A map of a sparse file that contradicts itself.
    #[error("malformed map of a sparse file: {0}")]
    SparseMap(&'static str),
    /// An entry type that has no meaning in a root file system.
    #[error("tar entry type {0:#04x} is not supported")]
    EntryType(u8),
}

/// What is wrong with one entry.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EntryError {
    /// The name climbs above the root.
    #[error("name leaves the image's root")]
    Escapes,
    /// A component is longer than a directory entry can hold.
    #[error("name has a component longer than 255 bytes")]
    ComponentTooLong,
    /// The name holds a NUL byte.
    #[error("name holds a NUL byte")]
    NulInName,
    /// A parent of the name is neither a directory nor a link to one.
    #[error("a parent is not a directory")]
    ParentNotDirectory,
    /// More symbolic links than the limit were followed.
    #[error("too many symbolic links on the way")]
    TooManyLinks,
    /// Something other than a directory is to take the place of the root.
    #[error("root can only be a directory")]
    RootNotDirectory,
    /// A symbolic or hard link without a usable target.
    #[error("link has an empty or overlong target")]
    LinkTarget,
    /// A hard link to a name that is not there.
    #[error("hard link to {0:?}, which does not exist")]
    LinkTargetMissing(String),
    /// A hard link to a directory.
    #[error("hard link to directory {0:?}")]
    LinkToDirectory(String),
    /// A whiteout of nothing, of `.` or of `..`.
    #[error("whiteout names no file")]
    Whiteout,
    /// A device number beyond 12 bits of major and 20 bits of minor.
    #[error("device number {major}:{minor} is out of range")]
    DeviceNumber {
        /// Major number as the archive gives it.
        major: u64,
        /// Minor number as the archive gives it.
        minor: u64,
    },
    /// Extended attributes of the root directory that do not fit beside the superblock.
    #[error("extended attributes of the root take more than {max} bytes")]
    RootXattrs {
        /// What fits.
        max: usize,
    },
}

/// A bound of [`Limits`](crate::Limits) that was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more than {max} {what}")]
pub struct LimitExceeded {
    /// What was counted.
    pub what: &'static str,
    /// The bound.
    pub max: u64,
}

/// A SHA-256 that prints as hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest(pub [u8; 32]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An error before the layer and the entry are known; [`Fault::at`] adds them.
#[derive(Debug)]
pub(crate) enum Fault {
    Archive(ArchiveError),
    Entry(EntryError),
    Limit(LimitExceeded),
    Output { offset: u64, len: usize, source: io::Error },
    Sync(io::Error),
}

impl From<ArchiveError> for Fault {
    fn from(source: ArchiveError) -> Self {
        Self::Archive(source)
    }
}

impl From<EntryError> for Fault {
    fn from(source: EntryError) -> Self {
        Self::Entry(source)
    }
}

impl From<LimitExceeded> for Fault {
    fn from(source: LimitExceeded) -> Self {
        Self::Limit(source)
    }
}

impl Fault {
    /// Adds where in the image the fault was met. `path` is the current entry's name.
    pub(crate) fn at(self, layer: u32, offset: u64, path: &[u8]) -> UnpackError {
        match self {
            Self::Archive(source) => UnpackError::Archive { layer, offset, source },
            Self::Entry(source) => UnpackError::Entry { layer, path: printable(path), source },
            Self::Limit(source) => UnpackError::Limit { layer, source },
            Self::Output { offset, len, source } => UnpackError::Output { offset, len, source },
            Self::Sync(source) => UnpackError::Sync(source),
        }
    }
}

/// Longest part of a name that an error repeats: names come from the image and may be a megabyte long.
const MAX_PRINTED_NAME: usize = 200;

/// `name` as text for an error message, cut to [`MAX_PRINTED_NAME`] bytes.
pub(crate) fn printable(name: &[u8]) -> String {
    match name.get(..MAX_PRINTED_NAME) {
        Some(cut) if cut.len() < name.len() => format!("{}…", String::from_utf8_lossy(cut)),
        _ => String::from_utf8_lossy(name).into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_are_cut() {
        assert_eq!(printable(b"etc/passwd"), "etc/passwd");
        assert_eq!(printable(&[b'x'; 5000]).chars().count(), MAX_PRINTED_NAME + 1);
    }

    #[test]
    fn only_the_image_can_be_at_fault_for_its_content() {
        let fault = Fault::from(ArchiveError::Checksum).at(2, 1024, b"");
        assert!(fault.is_image_fault());
        assert_eq!(fault.to_string(), "layer 2, near byte 1024 of its tar stream");
        let full = Fault::Output { offset: 0, len: 1, source: io::ErrorKind::StorageFull.into() };
        assert!(!full.at(0, 0, b"").is_image_fault());
    }

    #[test]
    fn digests_print_as_hexadecimal() {
        assert_eq!(Digest([0xab; 32]).to_string(), "ab".repeat(32));
    }
}
