//! The backing file: bounds, reads, writes, holes.
//!
//! All transfers go through a bounce buffer at explicit file offsets. Reading straight into guest memory would need either
//! unsafe code or the file position, which descriptors of other processes may share; the buffer stays in the processor's
//! cache, and one system call serves many small guest buffers.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;

use super::request::{Range, SECTOR_BYTES, Status};
use crate::chain::Span;

/// Most bytes per system call, and all the memory that a request takes however long it is.
pub(super) const BOUNCE_BYTES: usize = 256 * 1024;

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// A read-only disk needs a descriptor that cannot write, a writable one a descriptor that can do both.
    #[error("disk {id}: descriptor is open {mode}, but the disk is to be {wanted}")]
    Mode {
        /// Serial of the disk.
        id: String,
        /// How it is open.
        mode: &'static str,
        /// What was asked for.
        wanted: &'static str,
    },
    /// The file holds not even one sector.
    #[error("disk {id}: backing file has {bytes} bytes, less than one sector")]
    Size {
        /// Serial of the disk.
        id: String,
        /// Length of the file.
        bytes: u64,
    },
    /// The kernel refused.
    #[error("disk {id}: cannot {what}")]
    Io {
        /// Serial of the disk.
        id: String,
        /// What was being done.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// An open disk.
#[derive(Debug)]
pub(super) struct Disk {
    file: File,
    bytes: u64,
    read_only: bool,
}

impl Disk {
    pub(super) fn new(id: &str, file: File, read_only: bool) -> Result<Self, BlkError> {
        let io = |what| move |source: Errno| BlkError::Io { id: id.to_owned(), what, source: source.into() };
        let flags = rustix::fs::fcntl_getfl(&file).map_err(io("ask how it is open"))?;
        let mode = match flags & OFlags::RWMODE {
            OFlags::RDONLY => "read-only",
            OFlags::RDWR => "read-write",
            _ => "write-only",
        };
        let wanted = if read_only { "read-only" } else { "read-write" };
        if mode != wanted || flags.contains(OFlags::PATH) {
            return Err(BlkError::Mode { id: id.to_owned(), mode, wanted });
        }
        // The end also tells the size of a block device, for which `stat` says 0.
        let bytes = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(io("find its size"))?;
        let bytes = bytes / SECTOR_BYTES * SECTOR_BYTES;
        if bytes == 0 {
            return Err(BlkError::Size { id: id.to_owned(), bytes });
        }
        Ok(Self { file, bytes, read_only })
    }

    /// Whether a descriptor is open for reading only.
    pub(super) fn is_read_only(file: &File) -> Result<bool, Errno> {
        Ok(rustix::fs::fcntl_getfl(file)? & OFlags::RWMODE == OFlags::RDONLY)
    }

    pub(super) fn sectors(&self) -> u64 {
        self.bytes / SECTOR_BYTES
    }

    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    /// The same disk for a worker.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, ..*self })
    }

    /// Byte offset of `len` bytes at `sector`, which must lie inside the disk.
    fn locate(&self, sector: u64, len: u64) -> Result<u64, Status> {
        let start = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
        let end = start.checked_add(len).ok_or(Status::IoError)?;
        if !len.is_multiple_of(SECTOR_BYTES) || end > self.bytes {
            return Err(Status::IoError);
        }
        Ok(start)
    }

    /// Fills `data` from `sector` on.
    pub(super) fn read(&self, sector: u64, data: &mut Span<'_>, bounce: &mut [u8]) -> Result<(), Status> {
        let mut offset = self.locate(sector, data.len() as u64)?;
        while data.len() > 0 {
            let step = data.len().min(bounce.len());
            let part = bounce.get_mut(..step).ok_or(Status::IoError)?;
            self.file.read_exact_at(part, offset).map_err(|_| Status::IoError)?;
            data.write(part);
            offset += step as u64;
        }
        Ok(())
    }

    /// Writes `data` at `sector`.
    pub(super) fn write(&self, sector: u64, data: &mut Span<'_>, bounce: &mut [u8]) -> Result<(), Status> {
        let mut offset = self.locate(sector, data.len() as u64)?;
        if self.read_only {
            return Err(Status::IoError);
        }
        while data.len() > 0 {
            let step = data.read(bounce);
            let part = bounce.get(..step).ok_or(Status::IoError)?;
            self.file.write_all_at(part, offset).map_err(|_| Status::IoError)?;
            offset += step as u64;
        }
        Ok(())
    }

    /// Makes all that was written durable.
    pub(super) fn flush(&self) -> Result<(), Status> {
        retry(|| rustix::fs::fdatasync(&self.file)).map_err(|_| Status::IoError)
    }

    /// Gives the space of a range back. What cannot be given back stays: discard is advice.
    pub(super) fn discard(&self, range: Range) -> Result<(), Status> {
        match self.allocate(range, FallocateFlags::PUNCH_HOLE) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            other => other.map_err(|_| Status::IoError),
        }
    }

    /// Makes a range read as zeroes, as a hole when that is allowed.
    pub(super) fn write_zeroes(&self, range: Range, bounce: &mut [u8]) -> Result<(), Status> {
        let how = if range.unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match self.allocate(range, how) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            other => return other.map_err(|_| Status::IoError),
        }
        let mut left = u64::from(range.sectors) * SECTOR_BYTES;
        let mut offset = range.sector * SECTOR_BYTES;
        bounce.fill(0);
        while left > 0 {
            let step = left.min(bounce.len() as u64);
            let part = bounce.get(..step as usize).ok_or(Status::IoError)?;
            self.file.write_all_at(part, offset).map_err(|_| Status::IoError)?;
            offset += step;
            left -= step;
        }
        Ok(())
    }

    /// Whether every range lies inside a disk that can be written.
    pub(super) fn check_ranges(&self, ranges: &[Range]) -> Result<(), Status> {
        if self.read_only {
            return Err(Status::IoError);
        }
        for range in ranges {
            self.locate(range.sector, u64::from(range.sectors) * SECTOR_BYTES)?;
        }
        Ok(())
    }

    fn allocate(&self, range: Range, how: FallocateFlags) -> Result<(), Errno> {
        if range.sectors == 0 {
            return Ok(());
        }
        let (offset, len) = (range.sector * SECTOR_BYTES, u64::from(range.sectors) * SECTOR_BYTES);
        retry(|| rustix::fs::fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, len))
    }
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}
