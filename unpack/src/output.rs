//! Where the image goes: a block device or a file, written front to back in large pieces.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::erofs::BLOCK;
use crate::error::{Fault, LimitExceeded};

/// Takes the image. Offsets are bytes from the start of the device or file.
pub trait BlockSink {
    /// Writes all of `data` at `offset`. Almost all writes are in rising order, 1 MiB or more and whole blocks of
    /// 4096 bytes; a few of 4 bytes correct what was written before.
    ///
    /// # Errors
    /// Whatever keeps the device from taking the bytes.
    fn write_all_at(&mut self, data: &[u8], offset: u64) -> io::Result<()>;

    /// Brings all that was written to stable storage. Called three times per image: once before and twice after
    /// its content.
    ///
    /// # Errors
    /// Whatever the device reports.
    fn sync(&mut self) -> io::Result<()>;
}

impl BlockSink for File {
    fn write_all_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(self, data, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}

/// An image in memory, for tests and for measuring without a disk.
impl BlockSink for Vec<u8> {
    fn write_all_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let end = start.checked_add(data.len()).ok_or(io::ErrorKind::FileTooLarge)?;
        if self.len() < end {
            self.resize(end, 0);
        }
        if let Some(room) = self.get_mut(start..end) {
            room.copy_from_slice(data);
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes collected before they are written.
const BUFFER: usize = 1 << 20;
/// Block addresses have 32 bits, and the highest one marks a hole.
const MAX_BLOCKS: u64 = u32::MAX as u64;

/// Collects what is written in sequence.
pub(crate) struct Output<'o, W> {
    sink: &'o mut W,
    buf: Vec<u8>,
    /// Offset of the first byte of `buf`.
    start: u64,
    max_bytes: u64,
}

impl<'o, W: BlockSink> Output<'o, W> {
    /// Goes on at byte `start` of `sink`, up to `max_bytes` from its beginning.
    pub(crate) fn new(sink: &'o mut W, start: u64, max_bytes: u64) -> Self {
        let max_bytes = max_bytes.min(MAX_BLOCKS * BLOCK as u64);
        Self { sink, buf: Vec::with_capacity(2 * BUFFER), start, max_bytes }
    }

    /// Offset of the next byte.
    pub(crate) fn position(&self) -> u64 {
        self.start + self.buf.len() as u64
    }

    /// Address of the next block; the position must be at the start of one.
    pub(crate) fn block(&self) -> u32 {
        u32::try_from(self.position() / BLOCK as u64).unwrap_or(u32::MAX)
    }

    pub(crate) fn write(&mut self, data: &[u8]) -> Result<(), Fault> {
        self.check(data.len() as u64)?;
        self.buf.extend_from_slice(data);
        if self.buf.len() >= BUFFER { self.flush() } else { Ok(()) }
    }

    pub(crate) fn zeros(&mut self, count: u64) -> Result<(), Fault> {
        self.check(count)?;
        let mut left = count;
        while left > 0 {
            let n = usize::try_from(left).unwrap_or(BUFFER).min(BUFFER);
            self.buf.resize(self.buf.len() + n, 0);
            left -= n as u64;
            if self.buf.len() >= BUFFER {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Fills up to `offset`, which must not lie behind.
    pub(crate) fn zeros_until(&mut self, offset: u64) -> Result<(), Fault> {
        self.zeros(offset.saturating_sub(self.position()))
    }

    /// Fills up to the start of a block.
    pub(crate) fn align(&mut self) -> Result<(), Fault> {
        self.zeros_until(self.position().next_multiple_of(BLOCK as u64))
    }

    /// Writes what was collected.
    pub(crate) fn flush(&mut self) -> Result<(), Fault> {
        if !self.buf.is_empty() {
            write_at(self.sink, &self.buf, self.start)?;
            self.start += self.buf.len() as u64;
            self.buf.clear();
        }
        Ok(())
    }

    /// Overwrites what was flushed before.
    pub(crate) fn rewrite(&mut self, data: &[u8], offset: u64) -> Result<(), Fault> {
        write_at(self.sink, data, offset)
    }

    pub(crate) fn sync(&mut self) -> Result<(), Fault> {
        self.sink.sync().map_err(Fault::Sync)
    }

    fn check(&self, more: u64) -> Result<(), LimitExceeded> {
        match self.position().checked_add(more) {
            Some(end) if end <= self.max_bytes => Ok(()),
            _ => Err(LimitExceeded { what: "bytes in the image", max: self.max_bytes }),
        }
    }
}

fn write_at(sink: &mut impl BlockSink, data: &[u8], offset: u64) -> Result<(), Fault> {
    sink.write_all_at(data, offset).map_err(|source| Fault::Output { offset, len: data.len(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_pieces_in_order_and_corrections_after() {
        let mut image = Vec::new();
        let mut out = Output::new(&mut image, 4096, 16 << 20);
        out.write(&[1; 5000]).unwrap();
        out.align().unwrap();
        assert_eq!((out.position(), out.block()), (12_288, 3));
        out.zeros(3 << 20).unwrap();
        out.write(&[2; 4096]).unwrap();
        out.flush().unwrap();
        out.rewrite(&[3; 4], 4096).unwrap();
        assert_eq!(image.len(), 12_288 + (3 << 20) + 4096);
        assert_eq!(image[4095..4101], [0, 3, 3, 3, 3, 1]);
        assert_eq!(image[image.len() - 4097..][..2], [0, 2]);
    }

    #[test]
    fn the_end_of_the_device_is_not_passed() {
        let mut image = Vec::new();
        let mut out = Output::new(&mut image, 4096, 8192);
        out.write(&[1; 4096]).unwrap();
        assert!(matches!(out.write(&[1]), Err(Fault::Limit(_))));
        assert!(matches!(out.zeros(u64::MAX), Err(Fault::Limit(_))));
    }
}
