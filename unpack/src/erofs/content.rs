//! Copies a file's content to the image and finds its holes on the way.

use super::BLOCK;
use crate::error::Fault;
use crate::limits::Budget;
use crate::output::{BlockSink, Output};
use crate::tar::{Content, Piece};
use crate::tree::{Chunks, FileData, FileLayout, Run};

/// Content read at a time.
pub(super) const READ_BYTES: usize = 256 << 10;
/// Shorter runs of zeros are stored: a hole costs an entry in a map, and mapped files are read chunk by chunk.
const MIN_HOLE: u64 = 64 << 10;
/// Most chunks of a file. A map of 4 bytes per chunk takes at most 1 MiB of the image; chunks are single blocks
/// up to 1 GiB.
const MAX_CHUNKS: u64 = 1 << 18;
/// Memory that a [`Run`] takes.
const RUN_BYTES: u64 = 8;

const BLOCK_U64: u64 = BLOCK as u64;
static ZERO_BLOCK: [u8; BLOCK] = [0; BLOCK];

/// A file whose content is on the image but for `tail`, which is to follow its inode.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) data: FileData,
    /// Empty unless the layout is [`FileLayout::Inline`].
    pub(crate) tail: Vec<u8>,
}

/// Copies `content`, which must yield `size` bytes. The end that does not fill a block is kept for the inode when it
/// has at most `inline_room` bytes.
pub(super) fn write<W: BlockSink>(
    out: &mut Output<'_, W>,
    scratch: &mut [u8],
    size: u64,
    inline_room: usize,
    content: &mut impl Content,
    memory: &mut Budget,
) -> Result<Written, Fault> {
    let chunk_bits = chunk_bits(size);
    let first_block = out.block();
    let chunk_bytes = BLOCK_U64 << chunk_bits;
    let mut writer = Writer { out, memory, first_block, chunk_bytes, at: 0, zeros: 0, runs: Vec::new() };
    let mut tail = Vec::new();
    loop {
        match content.next_piece(scratch)? {
            Piece::End => break,
            Piece::Hole(len) => writer.zeros(len),
            Piece::Data(len) => {
                let (piece, _) = scratch.split_at(len.min(scratch.len()));
                let (whole, rest) = piece.split_at(piece.len() - piece.len() % BLOCK);
                writer.data(whole)?;
                tail = rest.to_vec();
            }
        }
    }
    writer.finish(size, tail, inline_room, chunk_bits)
}

/// Logarithm of blocks per chunk for a file of `size` bytes.
fn chunk_bits(size: u64) -> u8 {
    let blocks = size.div_ceil(BLOCK_U64);
    let chunks = blocks.div_ceil(MAX_CHUNKS).max(1);
    u8::try_from(chunks.next_power_of_two().trailing_zeros()).unwrap_or(u8::MAX)
}

struct Writer<'w, 'o, W> {
    out: &'w mut Output<'o, W>,
    memory: &'w mut Budget,
    /// Where the file's content starts.
    first_block: u32,
    chunk_bytes: u64,
    /// Bytes of content so far, whole blocks.
    at: u64,
    /// Zeros at the end of those that are not yet written.
    zeros: u64,
    /// Empty while no hole was found.
    runs: Vec<Run>,
}

impl<W: BlockSink> Writer<'_, '_, W> {
    fn zeros(&mut self, len: u64) {
        self.at += len;
        self.zeros += len;
    }

    /// Takes whole blocks.
    fn data(&mut self, mut blocks: &[u8]) -> Result<(), Fault> {
        while !blocks.is_empty() {
            let is_zero = |block: &[u8]| block == ZERO_BLOCK;
            let zeros = blocks.chunks(BLOCK).take_while(|block| is_zero(block)).count() * BLOCK;
            self.zeros(zeros as u64);
            let (_, rest) = blocks.split_at(zeros);
            let data = rest.chunks(BLOCK).take_while(|block| !is_zero(block)).count() * BLOCK;
            let (data, rest) = rest.split_at(data);
            if !data.is_empty() {
                self.settle(None)?;
                self.out.write(data)?;
                self.at += data.len() as u64;
            }
            blocks = rest;
        }
        Ok(())
    }

    /// Decides about the zeros that wait: a hole of whole chunks, stored zeros around it. `size` at the file's end,
    /// where also a part of a chunk can be a hole.
    fn settle(&mut self, size: Option<u64>) -> Result<(), Fault> {
        let start = self.at - self.zeros;
        let hole_start = start.next_multiple_of(self.chunk_bytes);
        let hole_end = size.unwrap_or(self.at - self.at % self.chunk_bytes);
        let len = hole_end.saturating_sub(hole_start);
        if len < MIN_HOLE {
            self.out.zeros(std::mem::take(&mut self.zeros))?;
            return Ok(());
        }
        if self.runs.is_empty() && hole_start > 0 {
            self.push(Run { first_chunk: 0, block: Some(self.first_block) })?;
        }
        self.out.zeros(hole_start - start)?;
        self.push(Run { first_chunk: self.chunk(hole_start), block: None })?;
        self.zeros = 0;
        if size.is_none() {
            let block = Some(self.out.block());
            self.push(Run { first_chunk: self.chunk(hole_end), block })?;
            self.out.zeros(self.at - hole_end)?;
        }
        Ok(())
    }

    fn chunk(&self, at: u64) -> u32 {
        u32::try_from(at / self.chunk_bytes).unwrap_or(u32::MAX)
    }

    fn push(&mut self, run: Run) -> Result<(), Fault> {
        self.memory.take(RUN_BYTES)?;
        self.runs.push(run);
        Ok(())
    }

    fn finish(
        mut self,
        size: u64,
        mut tail: Vec<u8>,
        inline_room: usize,
        bits: u8,
    ) -> Result<Written, Fault> {
        let tail_is_zero = tail.iter().all(|byte| *byte == 0);
        let may_end_in_hole = tail_is_zero && self.zeros > 0;
        self.settle(may_end_in_hole.then_some(size))?;
        // Runs of content are only begun when content follows.
        let ends_in_hole = may_end_in_hole && self.runs.last().is_some_and(|run| run.block.is_none());
        let inline = self.runs.is_empty() && !tail.is_empty() && tail.len() <= inline_room;
        if ends_in_hole {
            tail.clear();
        } else if !inline {
            self.out.write(&std::mem::take(&mut tail))?;
            self.out.align()?;
        }
        let blocks = self.out.block().saturating_sub(self.first_block);
        let layout = if !self.runs.is_empty() {
            self.runs.shrink_to_fit();
            FileLayout::Chunked(Box::new(Chunks { bits, runs: self.runs }))
        } else if inline {
            FileLayout::Inline(self.first_block)
        } else {
            FileLayout::Plain(self.first_block)
        };
        Ok(Written { data: FileData { size, blocks, layout }, tail })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Yields prepared pieces.
    struct Pieces(Vec<Result<Vec<u8>, u64>>);

    impl Content for Pieces {
        fn next_piece(&mut self, buf: &mut [u8]) -> Result<Piece, Fault> {
            if self.0.is_empty() {
                return Ok(Piece::End);
            }
            Ok(match self.0.remove(0) {
                Ok(data) => {
                    buf[..data.len()].copy_from_slice(&data);
                    Piece::Data(data.len())
                }
                Err(hole) => Piece::Hole(hole),
            })
        }
    }

    /// Writes the pieces and returns what was written, its layout and the image.
    fn write_pieces(pieces: Vec<Result<Vec<u8>, u64>>) -> (Written, Vec<u8>) {
        let size =
            pieces.iter().map(|piece| piece.as_ref().map_or_else(|hole| *hole, |data| data.len() as u64));
        let size = size.sum();
        let mut image = Vec::new();
        let mut out = Output::new(&mut image, BLOCK_U64, 1 << 30);
        let mut memory = Budget::new("bytes", 1 << 20);
        let mut scratch = vec![0; READ_BYTES];
        let written = write(&mut out, &mut scratch, size, 1000, &mut Pieces(pieces), &mut memory).unwrap();
        out.flush().unwrap();
        (written, image)
    }

    fn runs(written: &Written) -> Vec<(u32, Option<u32>)> {
        match &written.data.layout {
            FileLayout::Chunked(chunks) => {
                chunks.runs.iter().map(|run| (run.first_chunk, run.block)).collect()
            }
            _ => Vec::new(),
        }
    }

    #[test]
    fn a_short_end_goes_inline_and_a_long_one_into_a_block() {
        let (written, image) = write_pieces(vec![Ok(vec![1; 4096 + 1000])]);
        assert!(matches!(written.data.layout, FileLayout::Inline(1)));
        assert_eq!((written.tail.len(), written.data.blocks, image.len()), (1000, 1, 8192));
        let (written, image) = write_pieces(vec![Ok(vec![1; 4096 + 1001])]);
        assert!(matches!(written.data.layout, FileLayout::Plain(1)));
        assert_eq!((written.tail.len(), written.data.blocks, image.len()), (0, 2, 3 * 4096));
        let (written, _) = write_pieces(vec![]);
        assert!(matches!(written.data, FileData { size: 0, blocks: 0, layout: FileLayout::Plain(_) }));
    }

    #[test]
    fn holes_need_sixteen_blocks() {
        let (written, _) = write_pieces(vec![Ok(vec![1; 4096]), Err(15 * 4096), Ok(vec![1; 4096])]);
        assert_eq!((runs(&written), written.data.blocks), (vec![], 17));
        let (written, _) = write_pieces(vec![Ok(vec![1; 4096]), Err(16 * 4096), Ok(vec![1; 4096])]);
        assert_eq!(runs(&written), [(0, Some(1)), (1, None), (17, Some(2))]);
        assert_eq!(written.data.blocks, 2);
    }

    #[test]
    fn stored_zeros_are_found_and_join_holes() {
        let mut data = vec![1; 4096];
        data.extend_from_slice(&[0; 10 * 4096]);
        let (written, _) = write_pieces(vec![Ok(data), Err(6 * 4096), Ok(vec![0; 4096]), Ok(vec![1; 10])]);
        assert_eq!(runs(&written), [(0, Some(1)), (1, None), (18, Some(2))]);
        assert_eq!(written.tail, b"");
    }

    #[test]
    fn a_file_may_start_and_end_in_a_hole() {
        let (written, image) = write_pieces(vec![Err(1 << 20), Ok(vec![0; 7])]);
        assert_eq!(runs(&written), [(0, None)]);
        assert_eq!((written.data.blocks, image.len()), (0, 0));
        let (written, _) = write_pieces(vec![Ok(vec![1; 4096]), Err(60 << 10), Ok(vec![0; 4095])]);
        assert_eq!((runs(&written), written.data.blocks), (vec![], 17));
        let (written, _) = write_pieces(vec![Ok(vec![1; 4096]), Err(64 << 10)]);
        assert_eq!(runs(&written), [(0, Some(1)), (1, None)]);
    }

    #[test]
    fn large_files_have_large_chunks() {
        assert_eq!((chunk_bits(0), chunk_bits(1 << 30), chunk_bits((1 << 30) + 1)), (0, 0, 1));
        assert_eq!(chunk_bits(16 << 40), 14);
        // Chunks of two blocks: holes start and end where chunks do.
        let (written, image) = write_pieces(vec![
            Ok(vec![1; 4096]),
            Err(1 << 30),
            Ok(vec![2; 4096]),
            Err(17 * 4096),
            Ok(vec![3; 8192]),
        ]);
        let end = 1 << 17;
        let expected = [(0, Some(1)), (1, None), (end, Some(3)), (end + 1, None), (end + 9, Some(5))];
        assert_eq!(runs(&written), expected);
        let blocks: Vec<_> = image.chunks(BLOCK).map(|block| block[0]).collect();
        assert_eq!(blocks, [0, 1, 0, 0, 2, 0, 3, 3][..blocks.len()]);
    }
}
