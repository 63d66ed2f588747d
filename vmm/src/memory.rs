//! Guest memory, mapped in one or two regions: this process's own, in large pages where the host has them, or one sealed memfd when a
//! file server needs to see it too (ADR 0010).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper_vmm_devices::device::GuestMem;
use rustix::fs::{
    MemfdFlags, OFlags, SealFlags, SeekFrom, fcntl_add_seals, ftruncate, memfd_create, seek, sendfile,
};
use rustix::io::retry_on_intr;
use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::snapshot::{SnapshotError, io_error};

/// Why guest memory could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    /// The file could not be made.
    #[error("cannot make a memory file of {mem_mib} MiB")]
    File {
        /// Asked for.
        mem_mib: u32,
        /// Why not.
        #[source]
        source: rustix::io::Errno,
    },
    /// The file could not be mapped.
    #[error("cannot map {mem_mib} MiB of guest memory: ask for less memory or raise the address space limit")]
    Map {
        /// Asked for.
        mem_mib: u32,
        /// Why not.
        #[source]
        source: vm_memory::mmap::FromRangesError,
    },
    /// The process has no room for it.
    #[error("cannot map {mem_mib} MiB of guest memory: ask for less memory or raise the address space limit")]
    Private {
        /// Asked for.
        mem_mib: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Makes guest memory at `ranges` (start, length) that only this process sees. Nothing is touched: the host gives pages when the guest
/// first uses them.
pub(crate) fn create_private(mem_mib: u32, ranges: &[(u64, u64)]) -> Result<GuestMem, MemoryError> {
    let fail = |source| MemoryError::Private { mem_mib, source };
    let mut regions = Vec::new();
    for (start, len) in ranges {
        let size = usize::try_from(*len).unwrap_or(usize::MAX);
        let mapped = hyper_vmm_hv::memory::zeroes(size).map_err(fail)?;
        // Fails for a region that passes the end of the address space, which no range does.
        regions.extend(GuestRegionMmap::new(mapped, GuestAddress(*start)));
    }
    let mem = GuestMemoryMmap::from_regions(regions).map_err(|e| fail(io::Error::other(e)))?;
    Ok(Arc::new(mem))
}

/// Makes guest memory of `mem_mib` MiB at `ranges` (start, length), which add up to that, in a file that another process can map.
/// Nothing is touched either.
pub(crate) fn create_shared(mem_mib: u32, ranges: &[(u64, u64)]) -> Result<GuestMem, MemoryError> {
    let no_file = |source| MemoryError::File { mem_mib, source };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = memfd_create("guest-memory", flags).map_err(no_file)?;
    ftruncate(&fd, u64::from(mem_mib) << 20).map_err(no_file)?;
    // Whoever gets the descriptor later must not be able to cut the file under a running guest.
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(no_file)?;
    let file = Arc::new(File::from(fd));
    let mut offset = 0;
    let mut parts = Vec::new();
    for (start, len) in ranges {
        let size = usize::try_from(*len).unwrap_or(usize::MAX);
        parts.push((GuestAddress(*start), size, Some(FileOffset::from_arc(Arc::clone(&file), offset))));
        offset += len;
    }
    let mem = GuestMemoryMmap::from_ranges_with_files(parts)
        .map_err(|source| MemoryError::Map { mem_mib, source })?;
    Ok(Arc::new(mem))
}

/// Bytes looked at at once when memory is saved, and the unit in which zeroes are left out.
const SAVED_AT_ONCE: usize = 256 << 10;
const PAGE_BYTES: usize = 4096;
/// `PROT_READ | PROT_WRITE`.
const READ_WRITE: i32 = (ProtFlags::READ.bits() | ProtFlags::WRITE.bits()).cast_signed();
/// `MAP_PRIVATE | MAP_NORESERVE`.
const PRIVATE_NO_RESERVE: i32 = (MapFlags::PRIVATE.bits() | MapFlags::NORESERVE.bits()).cast_signed();

/// Maps the memory that [`save`] wrote to `file` at `ranges`, which add up to `mem_mib` MiB. Pages are the file's, shared by all that
/// map it, until they are written to; then they are this machine's own.
///
/// Memory is not given back through the file, which others use: it is open for reading only.
pub(crate) fn map_private(
    mem_mib: u32,
    ranges: &[(u64, u64)],
    file: File,
) -> Result<GuestMem, SnapshotError> {
    let wanted = u64::from(mem_mib) << 20;
    let found = file.metadata().map_err(io_error("ask for the saved memory's length"))?.len();
    if found != wanted {
        return Err(SnapshotError::MemoryLength { found, wanted });
    }
    let mode =
        rustix::fs::fcntl_getfl(&file).map_err(|e| io_error("ask how the saved memory is open")(e.into()))?;
    if mode & OFlags::RWMODE != OFlags::RDONLY {
        return Err(SnapshotError::MemoryMode);
    }
    let file = Arc::new(file);
    let mut offset = 0;
    let mut regions = Vec::new();
    for (start, len) in ranges {
        let size = usize::try_from(*len).unwrap_or(usize::MAX);
        let from = FileOffset::from_arc(Arc::clone(&file), offset);
        let mapped = MmapRegion::build(Some(from), size, READ_WRITE, PRIVATE_NO_RESERVE);
        let mapped = mapped.map_err(|e| io_error("map the saved memory")(io::Error::other(e)))?;
        // Fails for a region that passes the end of the address space, which no range does.
        regions.extend(GuestRegionMmap::new(mapped, GuestAddress(*start)));
        offset += len;
    }
    let mem = GuestMemoryMmap::from_regions(regions);
    mem.map(Arc::new).map_err(|e| io_error("map the saved memory")(io::Error::other(e)))
}

/// Writes memory to an empty file: region after region, holes where there are zeroes.
///
/// # Errors
/// What the file system answers, and [`SnapshotError::Late`] when it takes longer than `limit_ms`.
pub(crate) fn save(mem: &GuestMemoryMmap, to: &File, limit_ms: u32) -> Result<(), SnapshotError> {
    let begun = Instant::now();
    let failed = || io_error("write the machine's memory");
    to.set_len(mem.iter().map(GuestMemoryRegion::len).sum()).map_err(failed())?;
    let mut buffer = vec![0; SAVED_AT_ONCE];
    let mut offset = 0;
    for region in mem.iter() {
        for (start, end) in data_ranges(region).map_err(failed())? {
            let mut at = start;
            while at < end {
                if begun.elapsed() > Duration::from_millis(limit_ms.into()) {
                    return Err(SnapshotError::Late(limit_ms));
                }
                let count = SAVED_AT_ONCE.min(usize::try_from(end - at).unwrap_or(usize::MAX));
                let part = buffer.get_mut(..count).unwrap_or_default();
                let from = GuestAddress(region.start_addr().0 + at);
                mem.read_slice(part, from).map_err(|e| failed()(io::Error::other(e)))?;
                write_sparse(to, offset + at, part).map_err(failed())?;
                at += count as u64;
            }
        }
        offset += region.len();
    }
    Ok(())
}

/// Parts of a region that are not all zero, as far as its file knows; start and end within the region.
fn data_ranges(region: &GuestRegionMmap) -> io::Result<Vec<(u64, u64)>> {
    let shared = region.file_offset().filter(|_| region.flags() & PRIVATE_NO_RESERVE != PRIVATE_NO_RESERVE);
    // What was written to a private mapping is not in its file.
    let Some(backing) = shared else { return Ok(vec![(0, region.len())]) };
    let (first, end) = (backing.start(), backing.start() + region.len());
    let mut ranges = Vec::new();
    let mut at = first;
    while at < end {
        let start = match seek(backing.file(), SeekFrom::Data(at)) {
            Ok(start) if start < end => start,
            Ok(_) | Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        at = seek(backing.file(), SeekFrom::Hole(start))?.min(end);
        ranges.push((start - first, at - first));
    }
    Ok(ranges)
}

/// Writes runs of pages that are not all zero.
fn write_sparse(to: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let is_data = |page: &&[u8]| page.iter().any(|byte| *byte != 0);
    let pages: Vec<&[u8]> = bytes.chunks(PAGE_BYTES).collect();
    let mut at = offset;
    for run in pages.chunk_by(|one, next| is_data(one) == is_data(next)) {
        let len: usize = run.iter().map(|page| page.len()).sum();
        if run.first().is_some_and(is_data) {
            let inside = usize::try_from(at - offset).unwrap_or(usize::MAX);
            to.write_all_at(bytes.get(inside..).and_then(|rest| rest.get(..len)).unwrap_or_default(), at)?;
        }
        at += len as u64;
    }
    Ok(())
}

/// Copies `len` bytes from `offset` of `file` to guest address `at`; the position of `file`, which others may share, stays where it is.
///
/// To shared memory they go from page cache to page cache: no page is cleared first and none is mapped here. Compared with reading into
/// the mapping this saves a quarter of the instructions (14 MiB of kernel on the lab's instruction clock: 17 M instead of 23 M).
///
/// # Errors
/// `InvalidInput` when the range is not inside one region of memory, `UnexpectedEof` when the file is too short.
pub(crate) fn copy_file(
    mem: &GuestMemoryMmap,
    at: u64,
    file: &File,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    let refused = || io::Error::from(io::ErrorKind::InvalidInput);
    let region = mem.find_region(GuestAddress(at)).ok_or_else(refused)?;
    let inside = at - region.start_addr().0;
    if inside.checked_add(len).is_none_or(|end| end > region.len()) {
        return Err(refused());
    }
    let Some(target) = region.file_offset() else {
        return hyper_vmm_hv::memory::read_file(mem, at, file, offset, len);
    };
    seek(target.file(), SeekFrom::Start(target.start() + inside))?;
    let (mut from, mut left) = (offset, len);
    while left > 0 {
        let count = usize::try_from(left).unwrap_or(usize::MAX);
        match retry_on_intr(|| sendfile(target.file(), file, Some(&mut from), count))? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            copied => left = left.saturating_sub(copied as u64),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::Bytes;

    #[test]
    fn memory_past_the_hole_is_one_sealed_file() {
        let ranges = crate::arch::memory_ranges(6 << 30);
        let mem = create_shared(6 << 10, &ranges).unwrap();
        mem.write_obj(1_u8, GuestAddress((1 << 32) + 5)).unwrap();
        assert!(mem.write_obj(1_u8, GuestAddress(0xd000_0000)).is_err());
        let high = mem.find_region(GuestAddress(1 << 32)).unwrap();
        let file = high.file_offset().unwrap();
        assert_eq!(file.start(), 0xd000_0000);
        assert!(ftruncate(file.file(), 0).is_err(), "sealed");
        assert_eq!(mem.iter().map(GuestMemoryRegion::len).sum::<u64>(), 6 << 30);
    }

    #[test]
    fn saved_memory_is_copied_on_write() {
        let ranges = [(0, 16 << 20), (1 << 32, 16 << 20)];
        for mem in [create_shared(32, &ranges), create_private(32, &ranges)] {
            saved_memory_is_copied_on_write_from(&mem.unwrap(), &ranges);
        }
    }

    fn saved_memory_is_copied_on_write_from(mem: &GuestMemoryMmap, ranges: &[(u64, u64)]) {
        let places = [0x1003_u64, 0x5_0000, (1 << 32) + 0x1ffe, (1 << 32) + (9 << 20)];
        for at in places {
            mem.write_slice(b"saved", GuestAddress(at)).unwrap();
        }
        // Touched, and zero all the same.
        mem.write_slice(&[0; 1 << 20], GuestAddress(8 << 20)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let late = save(mem, &File::create(dir.path().join("late")).unwrap(), 0);
        assert!(matches!(late, Err(SnapshotError::Late(0))), "{late:?}");
        save(mem, &File::create(&path).unwrap(), 60_000).unwrap();
        let on_disk = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap()) * 512;
        assert!(on_disk < 256 << 10, "{on_disk} bytes for a few pages");

        let open = || File::open(&path).unwrap();
        let clones = [0, 1].map(|_| map_private(32, ranges, open()).unwrap());
        let in_a_hole = (1 << 32) + (3 << 20);
        for at in [places[2], in_a_hole] {
            clones[0].write_slice(b"mine!", GuestAddress(at)).unwrap();
        }
        for at in places {
            let mut found = [0; 5];
            clones[1].read_slice(&mut found, GuestAddress(at)).unwrap();
            assert_eq!(&found, b"saved", "{at:#x}");
        }
        // Saved once more, from a mapping that is a file's and its own.
        let again = dir.path().join("again");
        save(&clones[0], &File::create(&again).unwrap(), 60_000).unwrap();
        let third = map_private(32, ranges, File::open(&again).unwrap()).unwrap();
        for at in [places[2], in_a_hole] {
            let mut found = [0; 5];
            third.read_slice(&mut found, GuestAddress(at)).unwrap();
            assert_eq!(&found, b"mine!", "{at:#x}");
        }

        assert!(matches!(map_private(31, ranges, open()), Err(SnapshotError::MemoryLength { .. })));
        let writable = File::options().read(true).write(true).open(&path).unwrap();
        assert!(matches!(map_private(32, ranges, writable), Err(SnapshotError::MemoryMode)));
    }

    #[test]
    fn files_are_copied_to_both_sides_of_the_hole() {
        for create in [create_shared, create_private] {
            let mem = create(6 << 10, &crate::arch::memory_ranges(6 << 30)).unwrap();
            files_are_copied_to(&mem);
        }
    }

    fn files_are_copied_to(mem: &GuestMemoryMmap) {
        let mut file = File::from(memfd_create("source", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(b"0123456789").unwrap();
        for at in [0x1003, (1 << 32) + 0x1ffe] {
            copy_file(mem, at, &file, 2, 5).unwrap();
            let mut copy = [0xff; 7];
            mem.read_slice(&mut copy, GuestAddress(at - 1)).unwrap();
            assert_eq!(&copy, b"\x0023456\0");
        }
        let kind = |at, offset, len| copy_file(mem, at, &file, offset, len).unwrap_err().kind();
        assert_eq!(kind(0x1000, 8, 5), io::ErrorKind::UnexpectedEof);
        assert_eq!(kind(0xd000_0000 - 2, 0, 5), io::ErrorKind::InvalidInput);
        assert_eq!(kind(0xd000_0000, 0, 5), io::ErrorKind::InvalidInput);
        assert_eq!(kind(0, 0, u64::MAX), io::ErrorKind::InvalidInput);
    }
}
