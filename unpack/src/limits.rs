//! Bounds on what an image may ask for. An image is untrusted: whatever it can make grow has a bound here.

use crate::error::LimitExceeded;

/// Most layers: Docker's own bound is 127; tools that squash nothing stay below 200.
pub const MAX_LAYERS: u32 = 512;
/// Most archive entries and implied directories over all layers. The largest public images (machine learning,
/// whole package mirrors) have about one million files; an inode costs about 200 bytes of memory here.
pub const MAX_ENTRIES: u64 = 2 << 20;
/// Longest name of an entry or target of a link, in bytes: Linux's `PATH_MAX`, so nothing longer could be
/// opened in the container.
pub const MAX_PATH_BYTES: usize = 4096;
/// Most uncompressed bytes of all layers together. The largest public images have about 60 GiB.
pub const MAX_UNCOMPRESSED_BYTES: u64 = 256 << 30;
/// Longest image, in bytes. Directories and maps of sparse files can make an image longer than its layers.
pub const MAX_IMAGE_BYTES: u64 = 320 << 30;
/// Largest apparent size of one file, in bytes. Sparse files can claim any size at no cost: ext4's bound.
pub const MAX_FILE_BYTES: u64 = 16 << 40;
/// Longest extended header or long name record, in bytes. The same bound as Go's `archive/tar`.
pub const MAX_HEADER_BYTES: u64 = 1 << 20;
/// Most data segments in the map of one sparse file; 16 bytes of memory each.
pub const MAX_SPARSE_SEGMENTS: u64 = 1 << 20;
/// Most bytes of extended attributes of one file, as stored. Linux allows 64 KiB for one value.
pub const MAX_XATTR_BYTES: usize = 64 << 10;
/// Most memory for names, link targets, distinct sets of extended attributes and maps of sparse files over all
/// layers, in bytes. A million files with names of 30 bytes need 30 MB.
pub const MAX_METADATA_BYTES: u64 = 256 << 20;
/// Most symbolic links followed while resolving one name: Linux's own bound.
pub const MAX_LINK_DEPTH: u32 = 40;

/// Bounds on what an image may ask for; [`Limits::default`] has the constants of this module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// See [`MAX_LAYERS`].
    pub max_layers: u32,
    /// See [`MAX_ENTRIES`].
    pub max_entries: u64,
    /// See [`MAX_PATH_BYTES`].
    pub max_path_bytes: usize,
    /// See [`MAX_UNCOMPRESSED_BYTES`].
    pub max_uncompressed_bytes: u64,
    /// See [`MAX_IMAGE_BYTES`]; also set it to the length of the block device.
    pub max_image_bytes: u64,
    /// See [`MAX_FILE_BYTES`].
    pub max_file_bytes: u64,
    /// See [`MAX_HEADER_BYTES`].
    pub max_header_bytes: u64,
    /// See [`MAX_SPARSE_SEGMENTS`].
    pub max_sparse_segments: u64,
    /// See [`MAX_XATTR_BYTES`].
    pub max_xattr_bytes: usize,
    /// See [`MAX_METADATA_BYTES`].
    pub max_metadata_bytes: u64,
    /// See [`MAX_LINK_DEPTH`].
    pub max_link_depth: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_layers: MAX_LAYERS,
            max_entries: MAX_ENTRIES,
            max_path_bytes: MAX_PATH_BYTES,
            max_uncompressed_bytes: MAX_UNCOMPRESSED_BYTES,
            max_image_bytes: MAX_IMAGE_BYTES,
            max_file_bytes: MAX_FILE_BYTES,
            max_header_bytes: MAX_HEADER_BYTES,
            max_sparse_segments: MAX_SPARSE_SEGMENTS,
            max_xattr_bytes: MAX_XATTR_BYTES,
            max_metadata_bytes: MAX_METADATA_BYTES,
            max_link_depth: MAX_LINK_DEPTH,
        }
    }
}

/// A count that never passes its bound.
#[derive(Debug)]
pub(crate) struct Budget {
    what: &'static str,
    max: u64,
    used: u64,
}

impl Budget {
    pub(crate) fn new(what: &'static str, max: u64) -> Self {
        Self { what, max, used: 0 }
    }

    /// Takes `amount`, or fails and takes nothing.
    pub(crate) fn take(&mut self, amount: u64) -> Result<(), LimitExceeded> {
        match self.used.checked_add(amount) {
            Some(used) if used <= self.max => {
                self.used = used;
                Ok(())
            }
            _ => Err(LimitExceeded { what: self.what, max: self.max }),
        }
    }

    pub(crate) fn used(&self) -> u64 {
        self.used
    }
}

/// Fails when `value` is above `max`.
pub(crate) fn check(what: &'static str, value: u64, max: u64) -> Result<(), LimitExceeded> {
    if value > max { Err(LimitExceeded { what, max }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_ends_exactly_at_its_bound() {
        let mut budget = Budget::new("bytes", 10);
        assert_eq!(budget.take(10), Ok(()));
        assert_eq!(budget.take(1), Err(LimitExceeded { what: "bytes", max: 10 }));
        assert_eq!(budget.take(0), Ok(()));
        assert_eq!(budget.used(), 10);
    }

    #[test]
    fn a_budget_does_not_wrap() {
        let mut budget = Budget::new("bytes", u64::MAX);
        assert_eq!(budget.take(u64::MAX), Ok(()));
        assert!(budget.take(1).is_err());
    }
}
