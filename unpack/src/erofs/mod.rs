//! Writes an EROFS image (Linux 6.1 and later), uncompressed, in blocks of 4096 bytes.
//!
//! ```text
//! block 0      superblock at byte 1024, root inode at byte 1152; written last, so that a torn image never mounts
//! then, as layers are read:
//!   content    whole blocks of files
//!   segments   up to 1 MiB of inodes of small files, each followed by the end of its content
//! then, when the last layer is done:
//!   inodes     all others, each followed by its attributes and a short directory, link target or map of chunks
//!   names      blocks of longer directories
//! ```
//! An inode's number is its offset divided by 32, so inodes may be anywhere; the number of the root has 16 bits,
//! which is why it lives in block 0. Inodes are all of the extended form (64 bytes), the only one with a time.

mod content;
mod directory;
mod finish;
mod record;
mod segment;

use crate::error::Fault;
use crate::limits::Budget;
use crate::output::{BlockSink, Output};
use crate::tar::Content;
use crate::tree::{FileData, FileLayout, InodeId, Kind, Place, Symlink, Tree};
use crate::xattrs::XattrSets;
pub(crate) use content::Written;
pub(crate) use record::device_number;
use segment::Segment;

/// Size of a block.
pub(crate) const BLOCK: usize = 4096;

/// An image in the making.
pub(crate) struct Image<'o, W> {
    out: Output<'o, W>,
    segment: Segment,
    scratch: Vec<u8>,
    /// Inodes written, which also numbers them for 32-bit programs.
    inodes: u32,
}

impl<'o, W: BlockSink> Image<'o, W> {
    /// Takes away whatever file system `sink` holds and starts behind its block 0.
    pub(crate) fn begin(sink: &'o mut W, max_bytes: u64) -> Result<Self, Fault> {
        let mut out = Output::new(sink, BLOCK as u64, max_bytes);
        out.rewrite(&[0; BLOCK], 0)?;
        out.sync()?;
        Ok(Self { out, segment: Segment::new(), scratch: vec![0; content::READ_BYTES], inodes: 0 })
    }

    /// Copies a file's content of `size` bytes to the image. `xattr_bytes` is the room that its attributes take.
    pub(crate) fn write_content(
        &mut self,
        size: u64,
        xattr_bytes: usize,
        content: &mut impl Content,
        memory: &mut Budget,
    ) -> Result<Written, Fault> {
        let inline_room = BLOCK.saturating_sub(record::INODE_BYTES + xattr_bytes);
        content::write(&mut self.out, &mut self.scratch, size, inline_room, content, memory)
    }

    /// Writes the target of a link that is too long to follow its inode and `xattr_bytes` of attributes.
    pub(crate) fn write_symlink(&mut self, target: &[u8], xattr_bytes: usize) -> Result<Symlink, Fault> {
        let mut block = None;
        if record::INODE_BYTES + xattr_bytes + target.len() > BLOCK {
            block = Some(self.out.block());
            self.out.write(target)?;
            self.out.align()?;
        }
        Ok(Symlink { target: target.into(), block })
    }

    /// Gives the inode of a file its place, if the end of its content is to follow it.
    pub(crate) fn place_file(
        &mut self,
        tree: &mut Tree,
        xattrs: &XattrSets,
        id: InodeId,
        tail: &[u8],
    ) -> Result<(), Fault> {
        let Some(inode) = tree.get(id) else { return Ok(()) };
        let Kind::File(FileData { size, layout: FileLayout::Inline(block), .. }) = inode.kind else {
            return Ok(());
        };
        self.inodes += 1;
        let body = xattrs.body(inode.attributes.xattrs);
        let data = record::Data { layout: record::FLAT_INLINE, size, location: block };
        let mut bytes = record::inode(inode, record::REGULAR, inode.nlink, data, body, self.inodes);
        bytes.extend_from_slice(body);
        bytes.extend_from_slice(tail);
        let offset = match self.segment.add(id, &bytes) {
            Some(offset) => offset,
            None => {
                self.segment.flush(tree, &mut self.out)?;
                self.segment.add(id, &bytes).unwrap_or(0)
            }
        };
        if let Some(inode) = tree.get_mut(id) {
            inode.place = Place::InSegment(offset);
        }
        Ok(())
    }
}
