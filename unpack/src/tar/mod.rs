//! Reads a tar stream: POSIX ustar and pax, GNU and old formats, as one sequence of [`Entry`]s with their content.
//!
//! Where readers of tar differ, this one follows Go's `archive/tar`, since that is what images were made for. In
//! particular the length of an entry's content is the one of the pax record `size` if there is one, links and
//! directories never have content whatever their header says, and one zero block ends the archive.

mod header;
mod pax;
mod sparse;

use std::io::Read;

use crate::error::{ArchiveError, Fault};
use crate::limits::{self, Limits};
use crate::stream::LayerStream;
use header::Header;
use pax::Records;
pub(crate) use sparse::Segment;

/// Size of a header and unit of content.
const BLOCK: usize = 512;

/// Chunks of a file of this size have the most bits that the image's format has room for.
const LARGEST_FILE: u64 = 1 << 60;

/// Zero runs are reported as holes in units of this many bytes.
pub(crate) const HOLE_UNIT: u64 = 4096;

/// Seconds and nanoseconds since 1970; nanoseconds count forward also before 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Timestamp {
    pub(crate) sec: i64,
    pub(crate) nsec: u32,
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// With [`Content`], which the [`Tar`] gives.
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// One entry, every extension of its header applied.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) kind: EntryKind,
    pub(crate) path: Vec<u8>,
    /// Target of a symbolic or hard link.
    pub(crate) link: Vec<u8>,
    /// Permission bits with set-id and sticky bits.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    /// Apparent size of a file, holes included.
    pub(crate) size: u64,
    pub(crate) dev_major: u64,
    pub(crate) dev_minor: u64,
    /// Full names and values, in the order of the archive; later ones win.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A file's content, in parts.
pub(crate) trait Content {
    /// The next part. `buf` must be a multiple of [`HOLE_UNIT`] long and not empty.
    fn next_piece(&mut self, buf: &mut [u8]) -> Result<Piece, Fault>;
}

/// The next part of a file's content.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// So many bytes of the buffer; a multiple of [`HOLE_UNIT`] unless the file ends with them.
    Data(usize),
    /// So many zeros, a multiple of [`HOLE_UNIT`]; the buffer was not touched.
    Hole(u64),
    End,
}

/// A tar stream and where in it the reader is.
pub(crate) struct Tar<'b, R> {
    stream: LayerStream<'b, R>,
    limits: &'b Limits,
    globals: Records,
    /// Stored content of the current entry not yet read.
    stored_left: u64,
    /// Padding after that content.
    padding: usize,
    /// Data segments of the current file, in order, the next one last.
    segments: Vec<Segment>,
    /// Position in and apparent size of the current file.
    at: u64,
    size: u64,
}

impl<'b, R: Read> Tar<'b, R> {
    pub(crate) fn new(stream: LayerStream<'b, R>, limits: &'b Limits) -> Self {
        let globals = Records::default();
        Self { stream, limits, globals, stored_left: 0, padding: 0, segments: Vec::new(), at: 0, size: 0 }
    }

    pub(crate) fn stream(&mut self) -> &mut LayerStream<'b, R> {
        &mut self.stream
    }

    /// The next entry; `None` at the end of the archive. What was not read of the one before is passed over.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, Fault> {
        let mut records = Records::default();
        let mut long_name = Vec::new();
        let mut long_link = Vec::new();
        loop {
            self.stream.skip(std::mem::take(&mut self.stored_left))?;
            let Some(header) = self.read_header()? else { return Ok(None) };
            match header.kind() {
                b'x' => records = Records::parse(&self.read_payload(&header)?)?,
                b'g' => {
                    let records = Records::parse(&self.read_payload(&header)?)?;
                    self.globals.update_times_and_owners(records);
                }
                b'L' => long_name = header::until_nul(&self.read_payload(&header)?).to_vec(),
                b'K' => long_link = header::until_nul(&self.read_payload(&header)?).to_vec(),
                _ => {
                    let mut entry = self.entry(&header, records)?;
                    if !long_name.is_empty() {
                        entry.path = long_name;
                    }
                    if !long_link.is_empty() {
                        entry.link = long_link;
                    }
                    let max = self.limits.max_path_bytes as u64;
                    limits::check("bytes in a path", entry.path.len() as u64, max)?;
                    limits::check("bytes in a link", entry.link.len() as u64, max)?;
                    return Ok(Some(entry));
                }
            }
        }
    }
}

impl<R: Read> Content for Tar<'_, R> {
    fn next_piece(&mut self, buf: &mut [u8]) -> Result<Piece, Fault> {
        let mut filled = 0;
        while self.at < self.size && filled < buf.len() {
            let gap_end = self.segments.last().map_or(self.size, |segment| segment.offset);
            let gap = gap_end.saturating_sub(self.at);
            let to_unit = HOLE_UNIT - filled as u64 % HOLE_UNIT;
            if gap >= HOLE_UNIT && to_unit == HOLE_UNIT {
                if filled > 0 {
                    break;
                }
                let hole = gap - gap % HOLE_UNIT;
                self.at += hole;
                return Ok(Piece::Hole(hole));
            }
            let room = buf.get_mut(filled..).unwrap_or_default();
            let n = if gap > 0 {
                let zeros = if gap >= HOLE_UNIT { to_unit } else { gap };
                let n = room.len().min(usize::try_from(zeros).unwrap_or(usize::MAX));
                room.split_at_mut(n).0.fill(0);
                n
            } else {
                self.read_segment(room)?
            };
            self.at += n as u64;
            filled += n;
        }
        Ok(if filled == 0 { Piece::End } else { Piece::Data(filled) })
    }
}

impl<R: Read> Tar<'_, R> {
    /// Reads from the segment that starts at or before the current position.
    fn read_segment(&mut self, room: &mut [u8]) -> Result<usize, Fault> {
        let Some(segment) = self.segments.last_mut() else { return Ok(0) };
        let left = segment.offset + segment.len - self.at;
        let n = room.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let (room, _) = room.split_at_mut(n);
        if self.stream.read_full(room)? < n {
            return Err(ArchiveError::TruncatedContent.into());
        }
        self.stored_left -= n as u64;
        segment.offset += n as u64;
        segment.len -= n as u64;
        if segment.len == 0 {
            self.segments.pop();
        }
        Ok(n)
    }

    /// The next header; `None` at a zero block or the end of the stream, be it before the padding of what precedes.
    fn read_header(&mut self) -> Result<Option<Header>, Fault> {
        let mut block = [0; BLOCK];
        let (padding, _) = block.split_at_mut(std::mem::take(&mut self.padding));
        if self.stream.read_full(padding)? < padding.len() {
            return Ok(None);
        }
        match self.stream.read_full(&mut block)? {
            0 => return Ok(None),
            BLOCK => {}
            _ => return Err(ArchiveError::TruncatedHeader.into()),
        }
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        Ok(Some(Header::parse(block)?))
    }

    /// The content of a header that extends the next one. Its length is always that of its own header.
    fn read_payload(&mut self, header: &Header) -> Result<Vec<u8>, Fault> {
        let size = header.size()?;
        limits::check("bytes in an extended header", size, self.limits.max_header_bytes)?;
        let mut payload = vec![0; usize::try_from(size).unwrap_or(0)];
        if self.stream.read_full(&mut payload)? < payload.len() {
            return Err(ArchiveError::TruncatedContent.into());
        }
        self.padding = padding(size);
        Ok(payload)
    }

    fn entry(&mut self, header: &Header, records: Records) -> Result<Entry, Fault> {
        let owner = |own: Option<i64>, global: Option<i64>, field: Result<i64, ArchiveError>, name| {
            let number = own.or(global).map_or_else(|| field, Ok)?;
            // The highest number means "no owner" to Linux, and no file can have it.
            u32::try_from(number).ok().filter(|id| *id != u32::MAX).ok_or(ArchiveError::Number(name))
        };
        let uid = owner(records.uid, self.globals.uid, header.uid(), "uid")?;
        let gid = owner(records.gid, self.globals.gid, header.gid(), "gid")?;
        let mtime = match records.mtime.or(self.globals.mtime) {
            Some(mtime) => mtime,
            None => Timestamp { sec: header.mtime()?, nsec: 0 },
        };
        let mut entry = Entry {
            kind: header.entry_kind()?,
            path: records.path.clone().unwrap_or_else(|| header.path()),
            link: records.linkpath.clone().unwrap_or_else(|| header.link()),
            mode: header.mode()?,
            uid,
            gid,
            mtime,
            size: 0,
            dev_major: 0,
            dev_minor: 0,
            xattrs: Vec::new(),
        };
        match entry.kind {
            EntryKind::File => self.open_file(header, &records, &mut entry)?,
            EntryKind::CharDevice | EntryKind::BlockDevice => {
                (entry.dev_major, entry.dev_minor) = (header.dev_major()?, header.dev_minor()?);
            }
            _ => self.set_content(0, 0, Vec::new()),
        }
        entry.xattrs = records.xattrs;
        Ok(entry)
    }

    /// Finds out how a file's content is stored and gets ready to read it.
    fn open_file(&mut self, header: &Header, records: &Records, entry: &mut Entry) -> Result<(), Fault> {
        let stored = match records.size {
            Some(size) => size,
            None => header.size()?,
        };
        let max = self.limits.max_sparse_segments;
        let (mut used, mut is_sparse) = (0, true);
        let (segments, size) = if header.kind() == b'S' {
            sparse::read_old_gnu(header, &mut self.stream, max)?
        } else if let Some(map) = records.sparse_map()? {
            limits::check("data segments in a sparse file", map.segments.len() as u64, max)?;
            (map.segments, map.size)
        } else if let Some(size) = records.sparse_in_content()? {
            let (segments, map_bytes) = sparse::read_leading_map(&mut self.stream, stored, max)?;
            used = map_bytes;
            (segments, size)
        } else {
            is_sparse = false;
            (vec![Segment { offset: 0, len: stored }], stored)
        };
        limits::check("bytes in one file", size, self.limits.max_file_bytes.min(LARGEST_FILE))?;
        sparse::validate(&segments, size, stored - used)?;
        if let (true, Some(name)) = (is_sparse, &records.sparse.name) {
            entry.path.clone_from(name);
        }
        entry.size = size;
        self.set_content(stored - used, size, segments);
        self.padding = padding(stored);
        Ok(())
    }

    fn set_content(&mut self, stored: u64, size: u64, mut segments: Vec<Segment>) {
        segments.retain(|segment| segment.len > 0);
        segments.reverse();
        self.segments = segments;
        (self.stored_left, self.at, self.size) = (stored, 0, size);
    }
}

/// Bytes between the end of content of `size` bytes and the next header.
fn padding(size: u64) -> usize {
    usize::try_from(size.wrapping_neg() % BLOCK as u64).unwrap_or(0)
}
