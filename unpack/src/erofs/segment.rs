//! Inodes of small files, each with the end of its content right behind it, packed into blocks.
//!
//! Content is only at hand while its layer is read, and keeping it until all inodes are written would cost memory
//! without bound. So these inodes are written early, 1 MiB at a time. All that can change about them later is their
//! number of links.

use super::BLOCK;
use super::record::{INODE_SLOT, NLINK_AT};
use crate::error::Fault;
use crate::output::{BlockSink, Output};
use crate::tree::{InodeId, Place, Tree};

/// Blocks in a segment: few enough to search them all for the best fit, many enough to leave few gaps.
const BLOCKS: usize = 256;

/// The segment being filled.
#[derive(Debug)]
pub(super) struct Segment {
    bytes: Vec<u8>,
    /// Bytes used of each block begun.
    used: Vec<usize>,
    members: Vec<(InodeId, u32)>,
}

impl Segment {
    pub(super) fn new() -> Self {
        Self {
            bytes: Vec::with_capacity(BLOCKS * BLOCK),
            used: Vec::with_capacity(BLOCKS),
            members: Vec::new(),
        }
    }

    /// Puts `record`, at most a block, where it leaves the least room. Returns its offset in the segment, or `None`
    /// when it is full.
    pub(super) fn add(&mut self, id: InodeId, record: &[u8]) -> Option<u32> {
        let need = record.len().next_multiple_of(INODE_SLOT as usize);
        let fits = self.used.iter_mut().enumerate().filter(|(_, used)| **used + need <= BLOCK);
        let (block, at) = match fits.max_by_key(|(_, used)| **used) {
            Some((block, used)) => {
                let at = *used;
                *used += need;
                (block, at)
            }
            None if self.bytes.len() == BLOCKS * BLOCK => return None,
            None => {
                self.used.push(need);
                self.bytes.resize(self.bytes.len() + BLOCK, 0);
                (self.used.len() - 1, 0)
            }
        };
        let at = block * BLOCK + at;
        self.bytes.get_mut(at..at + record.len())?.copy_from_slice(record);
        let offset = u32::try_from(at).ok()?;
        self.members.push((id, offset));
        Some(offset)
    }

    /// Writes the segment, tells its inodes where they are, and starts an empty one.
    pub(super) fn flush<W: BlockSink>(
        &mut self,
        tree: &mut Tree,
        out: &mut Output<'_, W>,
    ) -> Result<(), Fault> {
        let base = out.position();
        for (id, at) in self.members.drain(..) {
            // Others were removed since, and their id may be another file's by now.
            let Some(inode) = tree.get_mut(id).filter(|inode| inode.place == Place::InSegment(at)) else {
                continue;
            };
            let nlink = inode.nlink;
            inode.place = Place::At { offset: base + u64::from(at), nlink };
            let field = at as usize + NLINK_AT;
            if let Some(field) = self.bytes.get_mut(field..field + 4) {
                field.copy_from_slice(&nlink.to_le_bytes());
            }
        }
        out.write(&self.bytes)?;
        self.bytes.clear();
        self.used.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_fit_wins_and_a_full_segment_says_so() {
        let mut segment = Segment::new();
        let id = InodeId::ROOT;
        assert_eq!(segment.add(id, &[1; 3000]), Some(0));
        assert_eq!(segment.add(id, &[2; 2000]), Some(4096));
        assert_eq!(segment.add(id, &[3; 1056]), Some(3008));
        assert_eq!(segment.add(id, &[4; 100]), Some(4096 + 2016));
        for block in 2..BLOCKS {
            assert_eq!(segment.add(id, &[5; 4096]), Some((block * BLOCK) as u32));
        }
        assert_eq!(segment.add(id, &[6; 2000]), None);
        assert_eq!(segment.bytes[3007..3009], [0, 3]);
    }
}
