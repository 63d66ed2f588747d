//! Requests of the driver (virtio 1.3, 5.2.6) and the configuration space.

use crate::chain::{Chain, ChainError, Span};

/// Bytes of a sector, the unit of all addresses of the protocol.
pub(super) const SECTOR_BYTES: u64 = 512;
/// Bytes of the serial.
pub(super) const ID_BYTES: usize = 20;
/// Most ranges of one discard or write-zeroes request.
pub(super) const MAX_RANGES: u32 = 32;
/// Longest range of a discard request, sectors (1 GiB): punching a hole takes time in proportion to what is mapped there.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Longest range of a write-zeroes request, sectors (32 MiB): where the file system cannot zero, bytes are written.
pub(super) const MAX_ZERO_SECTORS: u32 = 1 << 16;
/// Most data segments of one request: the queue without header and status.
pub(super) const MAX_SEGMENTS: u32 = super::QUEUE_SIZE as u32 - 2;

const RANGE_BYTES: usize = 16;
/// The range may be unmapped (write-zeroes only).
const UNMAP: u32 = 1;

/// How a request ended, as the driver reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What the driver asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Read { sector: u64 },
    Write { sector: u64 },
    Flush,
    Id,
    Discard,
    WriteZeroes,
    Unknown,
}

/// A request, its header read once.
#[derive(Debug)]
pub(super) struct Request<'m> {
    pub(super) command: Command,
    /// What the driver gives.
    pub(super) data_out: Span<'m>,
    /// Where the answer goes.
    pub(super) data_in: Span<'m>,
    /// One byte for the [`Status`].
    pub(super) status: Span<'m>,
}

impl<'m> Request<'m> {
    /// Splits a chain into header, data and status, wherever the driver put the borders of its buffers.
    pub(super) fn parse(chain: Chain<'m>) -> Result<Self, ChainError> {
        let Chain { mut readable, mut writable } = chain;
        let status = writable.split_back(1)?;
        let kind = u32::from_le_bytes(readable.read_array()?);
        let _reserved = readable.read_array::<4>()?;
        let sector = u64::from_le_bytes(readable.read_array()?);
        let command = match kind {
            0 => Command::Read { sector },
            1 => Command::Write { sector },
            4 => Command::Flush,
            8 => Command::Id,
            11 => Command::Discard,
            13 => Command::WriteZeroes,
            _ => Command::Unknown,
        };
        Ok(Self { command, data_out: readable, data_in: writable, status })
    }
}

/// One range of a discard or write-zeroes request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) sector: u64,
    pub(super) sectors: u32,
    pub(super) unmap: bool,
}

impl Range {
    pub(super) fn bytes(self) -> u64 {
        u64::from(self.sectors) * SECTOR_BYTES
    }
}

/// Reads the ranges of a discard (`zeroes` false) or write-zeroes request.
pub(super) fn parse_ranges(mut data: Span<'_>, zeroes: bool) -> Result<Vec<Range>, Status> {
    let len = data.len();
    if len == 0 || !len.is_multiple_of(RANGE_BYTES) || len > MAX_RANGES as usize * RANGE_BYTES {
        return Err(Status::IoError);
    }
    let longest = if zeroes { MAX_ZERO_SECTORS } else { MAX_DISCARD_SECTORS };
    let known = if zeroes { UNMAP } else { 0 };
    let mut ranges = Vec::with_capacity(len / RANGE_BYTES);
    while data.len() > 0 {
        let mut field = || data.read_array::<4>().map_err(|_| Status::IoError).map(u32::from_le_bytes);
        let (low, high, sectors, flags) = (field()?, field()?, field()?, field()?);
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > longest {
            return Err(Status::IoError);
        }
        let sector = u64::from(high) << 32 | u64::from(low);
        ranges.push(Range { sector, sectors, unmap: flags & UNMAP != 0 });
    }
    Ok(ranges)
}

/// The configuration space of a disk of `sectors` sectors (5.2.4).
pub(super) fn config_space(sectors: u64, read_only: bool) -> Vec<u8> {
    let mut space = Vec::with_capacity(60);
    space.extend(sectors.to_le_bytes());
    space.extend(0_u32.to_le_bytes()); // size_max: not offered
    space.extend(MAX_SEGMENTS.to_le_bytes());
    space.extend([0; 4]); // geometry: not offered
    space.extend((SECTOR_BYTES as u32).to_le_bytes());
    space.extend([0; 8]); // topology: not offered
    space.extend([0, 0]); // writeback: not offered
    space.extend(1_u16.to_le_bytes()); // one queue
    let ranges = |sectors: u32| if read_only { [0; 3] } else { [sectors, MAX_RANGES, 1] };
    space.extend(ranges(MAX_DISCARD_SECTORS).iter().flat_map(|field| field.to_le_bytes()));
    let [longest, count, _] = ranges(MAX_ZERO_SECTORS);
    space.extend(longest.to_le_bytes());
    space.extend(count.to_le_bytes());
    space.extend([u8::from(!read_only), 0, 0, 0]); // write_zeroes_may_unmap
    space
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_fields_are_where_the_standard_puts_them() {
        let space = config_space(0x1122, false);
        let word = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
        assert_eq!(space.len(), 60);
        assert_eq!((word(0), word(12), word(20)), (0x1122, 254, 512));
        assert_eq!((word(36), word(40), word(44)), (MAX_DISCARD_SECTORS, MAX_RANGES, 1));
        assert_eq!((word(48), word(52), word(56)), (MAX_ZERO_SECTORS, MAX_RANGES, 1));
        assert_eq!(&space[34..36], &[1, 0]);
        assert!(config_space(1, true)[36..].iter().all(|byte| *byte == 0));
    }
}
