//! Maps of sparse files: GNU's old format (in the header), and its pax formats 0.0, 0.1 and 1.0.

use std::io::Read;

use super::header::{self, Header};
use super::{BLOCK, pax};
use crate::error::{ArchiveError, Fault};
use crate::limits;
use crate::stream::LayerStream;

/// A run of bytes that the archive stores; all others are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// A map as an archive has it, not yet [validated](validate).
#[derive(Debug)]
pub(super) struct SparseMap {
    pub(super) segments: Vec<Segment>,
    /// Apparent size of the file.
    pub(super) size: u64,
}

/// Bytes of one offset and one length in GNU's old format.
const OLD_SEGMENT: usize = 24;
/// Segments in a block that continues a map of GNU's old format; the byte after them says whether more follow.
const OLD_SEGMENTS_PER_BLOCK: usize = 21;

/// Checks that segments are in order, do not overlap, lie in the file and account for all content stored.
pub(super) fn validate(segments: &[Segment], size: u64, stored: u64) -> Result<(), ArchiveError> {
    let mut end = 0;
    let mut total = 0_u64;
    for segment in segments {
        if segment.offset < end {
            return Err(ArchiveError::SparseMap("segments overlap or are out of order"));
        }
        end = segment.offset.checked_add(segment.len).filter(|end| *end <= size).ok_or(OUTSIDE)?;
        total = total.checked_add(segment.len).ok_or(OUTSIDE)?;
    }
    if total == stored {
        Ok(())
    } else {
        Err(ArchiveError::SparseMap("segments and stored content differ in length"))
    }
}

const OUTSIDE: ArchiveError = ArchiveError::SparseMap("segment lies outside the file");

/// A decimal number of a pax map.
pub(super) fn number(text: &[u8]) -> Result<u64, ArchiveError> {
    pax::digits(text).ok_or(ArchiveError::SparseMap("number is malformed"))
}

/// Reads a map of GNU's old format: four segments in the header, then blocks of 21. Returns the apparent size too.
pub(super) fn read_old_gnu<R: Read>(
    header: &Header,
    stream: &mut LayerStream<'_, R>,
    max: u64,
) -> Result<(Vec<Segment>, u64), Fault> {
    let (map, mut more) = header.gnu_sparse_map();
    let mut segments = Vec::new();
    add_old_segments(&mut segments, map)?;
    while more {
        limits::check("data segments in a sparse file", segments.len() as u64, max)?;
        let mut block = [0; BLOCK];
        if stream.read_full(&mut block)? < BLOCK {
            return Err(ArchiveError::TruncatedHeader.into());
        }
        let (map, rest) = block.split_at(OLD_SEGMENT * OLD_SEGMENTS_PER_BLOCK);
        add_old_segments(&mut segments, map)?;
        more = rest.first() != Some(&0);
    }
    limits::check("data segments in a sparse file", segments.len() as u64, max)?;
    Ok((segments, header.gnu_real_size()?))
}

/// Adds the segments of `map` up to the first that is blank.
fn add_old_segments(segments: &mut Vec<Segment>, map: &[u8]) -> Result<(), ArchiveError> {
    for pair in map.chunks_exact(OLD_SEGMENT) {
        let (offset, len) = pair.split_at(OLD_SEGMENT / 2);
        if offset.first() == Some(&0) || len.first() == Some(&0) {
            break;
        }
        let number = |field| {
            let number = header::number(field).and_then(|number| u64::try_from(number).ok());
            number.ok_or(ArchiveError::SparseMap("number is malformed"))
        };
        segments.push(Segment { offset: number(offset)?, len: number(len)? });
    }
    Ok(())
}

/// Reads the map at the start of content of `stored` bytes (format 1.0): numbers one to a line, first how many
/// segments, then offset and length of each, filled up to whole blocks. Returns the length of the map too.
pub(super) fn read_leading_map<R: Read>(
    stream: &mut LayerStream<'_, R>,
    stored: u64,
    max: u64,
) -> Result<(Vec<Segment>, u64), Fault> {
    let mut lines = Lines { stream, left: stored, block: [0; BLOCK], at: BLOCK };
    let count = lines.number()?;
    limits::check("data segments in a sparse file", count, max)?;
    let mut segments = Vec::new();
    for _ in 0..count {
        segments.push(Segment { offset: lines.number()?, len: lines.number()? });
    }
    Ok((segments, stored - lines.left))
}

/// Reads numbers from whole blocks.
struct Lines<'s, 'b, R> {
    stream: &'s mut LayerStream<'b, R>,
    /// Content that was not yet read.
    left: u64,
    block: [u8; BLOCK],
    at: usize,
}

/// Digits in the largest 64-bit number.
const MAX_DIGITS: usize = 20;

impl<R: Read> Lines<'_, '_, R> {
    fn number(&mut self) -> Result<u64, Fault> {
        let mut text = Vec::with_capacity(MAX_DIGITS);
        loop {
            match self.byte()? {
                b'\n' => return Ok(number(&text)?),
                _ if text.len() == MAX_DIGITS => {
                    return Err(ArchiveError::SparseMap("number is malformed").into());
                }
                digit => text.push(digit),
            }
        }
    }

    fn byte(&mut self) -> Result<u8, Fault> {
        if self.at == BLOCK {
            self.left =
                self.left.checked_sub(BLOCK as u64).ok_or(ArchiveError::SparseMap("map is cut short"))?;
            if self.stream.read_full(&mut self.block)? < BLOCK {
                return Err(ArchiveError::TruncatedContent.into());
            }
            self.at = 0;
        }
        let byte = self.block.get(self.at).copied().unwrap_or_default();
        self.at += 1;
        Ok(byte)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(u64, u64)]) -> Vec<Segment> {
        pairs.iter().map(|(offset, len)| Segment { offset: *offset, len: *len }).collect()
    }

    #[test]
    fn maps_must_add_up() {
        assert!(validate(&map(&[(0, 10), (10, 5), (100, 0)]), 100, 15).is_ok());
        assert!(validate(&map(&[]), 100, 0).is_ok());
        assert!(validate(&map(&[(0, 10), (9, 5)]), 100, 15).is_err());
        assert!(validate(&map(&[(50, 10), (0, 5)]), 100, 15).is_err());
        assert!(validate(&map(&[(95, 10)]), 100, 10).is_err());
        assert!(validate(&map(&[(u64::MAX, 2)]), 100, 2).is_err());
        assert!(validate(&map(&[(0, 10)]), 100, 11).is_err());
        assert!(validate(&map(&[(0, 10)]), 100, 9).is_err());
    }
}
