//! On-disk structures: the superblock and the extended inode (Linux, `fs/erofs/erofs_fs.h`). All little endian.

use super::BLOCK;
use crate::tree::Inode;
use crate::xattrs;

/// Offset of the superblock.
pub(super) const SUPERBLOCK_OFFSET: usize = 1024;
/// Its length without extensions.
pub(super) const SUPERBLOCK_BYTES: usize = 128;
const MAGIC: u32 = 0xe0f5_e1e2;
/// Logarithm of [`BLOCK`].
const BLOCK_BITS: u8 = 12;
/// Offset of the checksum in the superblock.
const CHECKSUM_AT: usize = SUPERBLOCK_OFFSET + 4;
/// Compatible features: a checksum over block 0, and times that are those of modification.
const COMPAT_CHECKSUM: u32 = 0x1;
const COMPAT_MTIME: u32 = 0x2;
/// Incompatible feature: files in chunks.
const INCOMPAT_CHUNKED: u32 = 0x4;

/// Length of an extended inode.
pub(super) const INODE_BYTES: usize = 64;
/// Inodes start at multiples of this; their number counts in it.
pub(super) const INODE_SLOT: u64 = 32;
/// Offset of the number of links in an inode.
pub(super) const NLINK_AT: usize = 44;
/// Marks the extended form.
const EXTENDED: u16 = 1;

/// Data layouts.
pub(super) const FLAT_PLAIN: u16 = 0;
pub(super) const FLAT_INLINE: u16 = 2;
pub(super) const CHUNK_BASED: u16 = 4;

/// Types in an inode's mode.
pub(super) const FIFO: u16 = 0o010_000;
pub(super) const CHAR_DEVICE: u16 = 0o020_000;
pub(super) const DIRECTORY: u16 = 0o040_000;
pub(super) const BLOCK_DEVICE: u16 = 0o060_000;
pub(super) const REGULAR: u16 = 0o100_000;
pub(super) const SYMLINK: u16 = 0o120_000;

/// Block address that means none.
pub(super) const NO_BLOCK: u32 = u32::MAX;

/// An inode's content.
#[derive(Debug, Clone, Copy)]
pub(super) struct Data {
    /// One of the data layouts.
    pub(super) layout: u16,
    pub(super) size: u64,
    /// First block, device number, or how chunks are mapped.
    pub(super) location: u32,
}

/// An inode, to be followed by `xattr_body` and whatever its layout wants. `number` is for 32-bit programs only.
pub(super) fn inode(
    inode: &Inode,
    file_type: u16,
    nlink: u32,
    data: Data,
    xattr_body: &[u8],
    number: u32,
) -> Vec<u8> {
    let attributes = &inode.attributes;
    let mut bytes = Vec::with_capacity(BLOCK);
    bytes.extend_from_slice(&(EXTENDED | data.layout << 1).to_le_bytes());
    bytes.extend_from_slice(&xattrs::icount(xattr_body).to_le_bytes());
    bytes.extend_from_slice(&(file_type | attributes.mode).to_le_bytes());
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&data.size.to_le_bytes());
    bytes.extend_from_slice(&data.location.to_le_bytes());
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(&attributes.uid.to_le_bytes());
    bytes.extend_from_slice(&attributes.gid.to_le_bytes());
    bytes.extend_from_slice(&attributes.mtime.sec.to_le_bytes());
    bytes.extend_from_slice(&attributes.mtime.nsec.to_le_bytes());
    bytes.extend_from_slice(&nlink.to_le_bytes());
    bytes.extend_from_slice(&[0; 16]);
    bytes
}

/// What the superblock says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Superblock {
    pub(super) root_number: u16,
    pub(super) inodes: u64,
    pub(super) blocks: u32,
    pub(super) uuid: [u8; 16],
    pub(super) has_chunks: bool,
}

/// Block 0: the superblock with its checksum, and `behind` right after it.
pub(super) fn block_zero(superblock: &Superblock, behind: &[u8]) -> Vec<u8> {
    let incompat = if superblock.has_chunks { INCOMPAT_CHUNKED } else { 0 };
    let mut block = vec![0; SUPERBLOCK_OFFSET];
    block.extend_from_slice(&MAGIC.to_le_bytes());
    block.extend_from_slice(&[0; 4]); // checksum, below
    block.extend_from_slice(&(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
    block.extend_from_slice(&[BLOCK_BITS, 0]); // and no extension slots
    block.extend_from_slice(&superblock.root_number.to_le_bytes());
    block.extend_from_slice(&superblock.inodes.to_le_bytes());
    block.extend_from_slice(&[0; 12]); // build time: always the same
    block.extend_from_slice(&superblock.blocks.to_le_bytes());
    block.extend_from_slice(&[0; 8]); // inode numbers count from block 0; no shared attributes
    block.extend_from_slice(&superblock.uuid);
    block.extend_from_slice(&[0; 16]); // volume name
    block.extend_from_slice(&incompat.to_le_bytes());
    block.resize(SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES, 0);
    block.extend_from_slice(behind);
    block.resize(BLOCK, 0);
    let checksum = crc32c(block.get(SUPERBLOCK_OFFSET..).unwrap_or_default());
    if let Some(field) = block.get_mut(CHECKSUM_AT..CHECKSUM_AT + 4) {
        field.copy_from_slice(&checksum.to_le_bytes());
    }
    block
}

/// Linux's `crc32c(~0, …)`: CRC-32C without the final inversion. Only ever fed one block, hence no table.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            let carry = if crc & 1 == 1 { POLYNOMIAL } else { 0 };
            crc >> 1 ^ carry
        })
    })
}

/// A device number as Linux keeps it in 32 bits (`new_encode_dev`). `None` when out of range: `mknod(2)` has 12
/// bits for the major and 20 for the minor number.
pub(crate) fn device_number(major: u64, minor: u64) -> Option<u32> {
    let major = u32::try_from(major).ok().filter(|major| *major < 1 << 12)?;
    let minor = u32::try_from(minor).ok().filter(|minor| *minor < 1 << 20)?;
    Some(minor & 0xff | major << 8 | (minor & !0xff) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_has_the_check_value_of_its_catalogue() {
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn device_numbers_split_the_minor() {
        assert_eq!(device_number(1, 3), Some(0x0103));
        assert_eq!(device_number(0xabc, 0x12345), Some(0x123a_bc45));
        assert_eq!(device_number(4096, 0), None);
        assert_eq!(device_number(0, 1 << 20), None);
        assert_eq!(device_number(u64::MAX, 0), None);
    }

    #[test]
    fn block_zero_has_its_fields_in_place() {
        let superblock =
            Superblock { root_number: 36, inodes: 7, blocks: 9, uuid: [5; 16], has_chunks: true };
        let block = block_zero(&superblock, b"root");
        assert_eq!(block.len(), BLOCK);
        let field = |at: usize, len: usize| block[SUPERBLOCK_OFFSET + at..][..len].to_vec();
        assert_eq!(field(0, 4), 0xe0f5_e1e2_u32.to_le_bytes());
        assert_eq!(field(14, 2), [36, 0]);
        assert_eq!(field(36, 4), [9, 0, 0, 0]);
        assert_eq!(field(48, 16), [5; 16]);
        assert_eq!(field(80, 4), [4, 0, 0, 0]);
        assert_eq!(field(128, 4), b"root");
    }
}
