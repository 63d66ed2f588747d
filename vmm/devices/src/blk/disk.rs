//! The backing files: bounds, reads, writes, holes.
//!
//! A disk is one file, or several, one behind the other:
//!
//! ```text
//!  sector 0          part_starts()[1]      part_starts()[2]           sectors
//!  | file 0 | nothing | file 1    | nothing | file 2                   |
//! ```
//!
//! A request that is not inside one file is refused, so that each file is bounded by itself whatever the guest makes of the disk.
//!
//! All transfers go through a bounce buffer at explicit file offsets. Reading straight into guest memory would need either
//! unsafe code or the file position, which descriptors of other processes may share; the buffer stays in the processor's
//! cache, and one system call serves many small guest buffers.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use hyper_vmm_spec::control::{MAX_DISK_PARTS, part_starts};
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
    /// The file holds not even one sector, or less than is to be used of it.
    #[error("disk {id}: backing file has {bytes} bytes, less than {wanted}")]
    Size {
        /// Serial of the disk.
        id: String,
        /// Length of the file.
        bytes: u64,
        /// How many it has to have.
        wanted: u64,
    },
    /// Too many files, none, or more sectors than can be numbered.
    #[error("disk {id}: {count} files cannot be one disk")]
    Parts {
        /// Serial of the disk.
        id: String,
        /// How many there are.
        count: usize,
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

/// One file of a disk.
#[derive(Debug)]
struct Part {
    file: File,
    /// Byte of the disk at which it begins.
    start: u64,
    bytes: u64,
    read_only: bool,
}

impl Part {
    /// A file from its first sector on; all of its sectors, or as many as `sectors` says.
    fn open(id: &str, file: File, sectors: Option<u64>) -> Result<Self, BlkError> {
        let io = |what| move |source: Errno| BlkError::Io { id: id.to_owned(), what, source: source.into() };
        let flags = rustix::fs::fcntl_getfl(&file).map_err(io("ask how it is open"))?;
        let read_only = match flags & OFlags::RWMODE {
            _ if flags.contains(OFlags::PATH) => None,
            OFlags::RDONLY => Some(true),
            OFlags::RDWR => Some(false),
            _ => None,
        };
        let Some(read_only) = read_only else {
            return Err(BlkError::Mode {
                id: id.to_owned(),
                mode: "for writing only",
                wanted: "for reading",
            });
        };
        // The end also tells the size of a block device, for which `stat` says 0.
        let there = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(io("find its size"))?;
        let bytes = sectors.unwrap_or(there / SECTOR_BYTES).saturating_mul(SECTOR_BYTES);
        if bytes == 0 || bytes > there {
            let wanted = bytes.max(SECTOR_BYTES);
            return Err(BlkError::Size { id: id.to_owned(), bytes: there, wanted });
        }
        Ok(Self { file, start: 0, bytes, read_only })
    }

    fn allocate(&self, start: u64, len: u64, how: FallocateFlags) -> Result<(), Errno> {
        if len == 0 {
            return Ok(());
        }
        retry(|| rustix::fs::fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, start, len))
    }
}

/// An open disk. Clones are the same disk.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    /// In order of where they begin.
    parts: Arc<[Part]>,
    bytes: u64,
    read_only: bool,
}

impl Disk {
    /// A disk of one file, whose descriptor must be open as `read_only` says.
    pub(super) fn new(id: &str, file: File, read_only: bool) -> Result<Self, BlkError> {
        let part = Part::open(id, file, None)?;
        let name = |read_only| if read_only { "read-only" } else { "read-write" };
        if part.read_only != read_only {
            let (mode, wanted) = (name(part.read_only), name(read_only));
            return Err(BlkError::Mode { id: id.to_owned(), mode, wanted });
        }
        Ok(Self { bytes: part.bytes, parts: Arc::new([part]), read_only })
    }

    /// A disk of files and how many sectors are used of each; what is open for reading only is not written to.
    pub(super) fn of_parts(id: &str, files: Vec<(File, u64)>) -> Result<Self, BlkError> {
        let sectors: Vec<u64> = files.iter().map(|(_, sectors)| *sectors).collect();
        let laid_out = part_starts(&sectors).filter(|_| (1..=MAX_DISK_PARTS).contains(&sectors.len()));
        let (starts, end) =
            laid_out.ok_or_else(|| BlkError::Parts { id: id.to_owned(), count: sectors.len() })?;
        let parts = files.into_iter().zip(starts).map(|((file, sectors), start)| {
            Ok(Part { start: start * SECTOR_BYTES, ..Part::open(id, file, Some(sectors))? })
        });
        let parts = parts.collect::<Result<Arc<[Part]>, BlkError>>()?;
        let read_only = parts.iter().all(|part| part.read_only);
        Ok(Self { parts, bytes: end * SECTOR_BYTES, read_only })
    }

    pub(super) fn sectors(&self) -> u64 {
        self.bytes / SECTOR_BYTES
    }

    /// Whether none of it can be written to.
    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    /// The file that holds `len` bytes at `sector`, all of them, and where in it they begin.
    fn locate(&self, sector: u64, len: u64) -> Result<(&Part, u64), Status> {
        let start = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
        let before = self.parts.partition_point(|part| part.start <= start);
        let part = before.checked_sub(1).and_then(|index| self.parts.get(index)).ok_or(Status::IoError)?;
        let offset = start - part.start;
        let end = offset.checked_add(len).ok_or(Status::IoError)?;
        if !len.is_multiple_of(SECTOR_BYTES) || end > part.bytes {
            return Err(Status::IoError);
        }
        Ok((part, offset))
    }

    /// As [`Self::locate`], for writing.
    fn locate_writable(&self, sector: u64, len: u64) -> Result<(&Part, u64), Status> {
        self.locate(sector, len)
            .and_then(|found| if found.0.read_only { Err(Status::IoError) } else { Ok(found) })
    }

    /// Fills `data` from `sector` on.
    pub(super) fn read(&self, sector: u64, data: &mut Span<'_>, bounce: &mut [u8]) -> Result<(), Status> {
        let (disk, mut offset) = self.locate(sector, data.len() as u64)?;
        while data.len() > 0 {
            let step = data.len().min(bounce.len());
            let part = bounce.get_mut(..step).ok_or(Status::IoError)?;
            disk.file.read_exact_at(part, offset).map_err(|_| Status::IoError)?;
            data.write(part);
            offset += step as u64;
        }
        Ok(())
    }

    /// Writes `data` at `sector`.
    pub(super) fn write(&self, sector: u64, data: &mut Span<'_>, bounce: &mut [u8]) -> Result<(), Status> {
        let (disk, mut offset) = self.locate_writable(sector, data.len() as u64)?;
        while data.len() > 0 {
            let step = data.read(bounce);
            let part = bounce.get(..step).ok_or(Status::IoError)?;
            disk.file.write_all_at(part, offset).map_err(|_| Status::IoError)?;
            offset += step as u64;
        }
        Ok(())
    }

    /// Makes all that was written durable.
    pub(super) fn flush(&self) -> Result<(), Status> {
        let mut written = self.parts.iter().filter(|part| !part.read_only);
        written.try_for_each(|part| retry(|| rustix::fs::fdatasync(&part.file))).map_err(|_| Status::IoError)
    }

    /// Gives the space of a range back. What cannot be given back stays: discard is advice.
    pub(super) fn discard(&self, range: Range) -> Result<(), Status> {
        let (disk, offset) = self.locate_writable(range.sector, range.bytes())?;
        match disk.allocate(offset, range.bytes(), FallocateFlags::PUNCH_HOLE) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            other => other.map_err(|_| Status::IoError),
        }
    }

    /// Makes a range read as zeroes, as a hole when that is allowed.
    pub(super) fn write_zeroes(&self, range: Range, bounce: &mut [u8]) -> Result<(), Status> {
        let how = if range.unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        let mut left = range.bytes();
        let (disk, mut offset) = self.locate_writable(range.sector, left)?;
        match disk.allocate(offset, left, how) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            other => return other.map_err(|_| Status::IoError),
        }
        bounce.fill(0);
        while left > 0 {
            let step = left.min(bounce.len() as u64);
            let part = bounce.get(..step as usize).ok_or(Status::IoError)?;
            disk.file.write_all_at(part, offset).map_err(|_| Status::IoError)?;
            offset += step;
            left -= step;
        }
        Ok(())
    }

    /// Whether every range can be written to.
    pub(super) fn check_ranges(&self, ranges: &[Range]) -> Result<(), Status> {
        ranges.iter().try_for_each(|range| self.locate_writable(range.sector, range.bytes()).map(drop))
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
