//! Memory of a guest that no other process sees.
#![expect(
    unsafe_code,
    reason = "mapping memory at a chosen address, and reading a file into it past the guest's other views"
)]
// UNSAFETY: `mmap` with MAP_FIXED inside a range that was reserved a moment before, and `pread` to an address that a volatile slice
// vouches for.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, MmapRegion};

/// What a large page of x86_64 covers.
const LARGE_PAGE: usize = 2 << 20;
/// `PROT_READ | PROT_WRITE`.
const READ_WRITE: i32 = (ProtFlags::READ.bits() | ProtFlags::WRITE.bits()).cast_signed();
/// `MAP_PRIVATE | MAP_NORESERVE`.
const PRIVATE: i32 = (MapFlags::PRIVATE.bits() | MapFlags::NORESERVE.bits()).cast_signed();

/// Maps `len` bytes of zeroes, a multiple of 4096, which stay mapped as long as this process lives.
///
/// They begin at a multiple of 2 MiB, and the host is advised to use large pages for them: when the guest's address has the same
/// remainder, one fault of the guest brings 2 MiB instead of 4 KiB.
///
/// # Errors
/// What `mmap` answers.
pub fn zeroes(len: usize) -> io::Result<MmapRegion> {
    let reserved = len.checked_add(LARGE_PAGE).ok_or(io::ErrorKind::InvalidInput)?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping where the kernel finds room.
    let start = unsafe { mmap_anonymous(std::ptr::null_mut(), reserved, ProtFlags::empty(), flags) }?;
    let before = start.cast::<u8>().align_offset(LARGE_PAGE).min(LARGE_PAGE);
    let (at, behind) = (start.wrapping_byte_add(before), LARGE_PAGE - before);
    // SAFETY: inside what was just reserved, of which nobody knows.
    unsafe { mmap_anonymous(at, len, ProtFlags::READ | ProtFlags::WRITE, flags | MapFlags::FIXED) }?;
    for (unused, bytes) in [(start, before), (at.wrapping_byte_add(len), behind)] {
        if bytes > 0 {
            // SAFETY: the rest of the reservation, on both sides.
            unsafe { munmap(unused, bytes) }?;
        }
    }
    // A host without large pages goes on with small ones.
    // SAFETY: advice changes no content.
    let _ = unsafe { madvise(at, len, Advice::LinuxHugepage) };
    // SAFETY: `len` bytes are mapped there and stay so: nobody unmaps them.
    let region = unsafe { MmapRegion::build_raw(at.cast(), len, READ_WRITE, PRIVATE) };
    region.map_err(io::Error::other)
}

/// Reads `len` bytes from `offset` of `file` to guest address `at`; the file's position stays where it is.
///
/// # Errors
/// `InvalidInput` when the range is not inside one region of memory, `UnexpectedEof` when the file is too short.
pub fn read_file(mem: &GuestMemoryMmap, at: u64, file: &File, offset: u64, len: u64) -> io::Result<()> {
    let refused = || io::Error::from(io::ErrorKind::InvalidInput);
    let len = usize::try_from(len).map_err(|_| refused())?;
    let slice = mem.get_slice(GuestAddress(at), len).map_err(|_| refused())?;
    let target = slice.ptr_guard_mut();
    let mut done = 0;
    while done < len {
        let from = offset.checked_add(done as u64).and_then(|from| libc::off_t::try_from(from).ok());
        let from = from.ok_or_else(refused)?;
        let to = target.as_ptr().wrapping_add(done);
        // SAFETY: `slice` says that `len` bytes are mapped from `target`, and `done` is less.
        let count = unsafe { libc::pread(file.as_raw_fd(), to.cast(), len - done, from) };
        match usize::try_from(count) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestRegionMmap};

    #[test]
    fn zeroes_begin_at_a_large_page_and_take_files() {
        let region = zeroes(LARGE_PAGE + 4096).unwrap();
        assert_eq!(region.as_ptr().addr() % LARGE_PAGE, 0);
        let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
        let mem = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        let dir = std::env::temp_dir().join(format!("hv-memory-{}", std::process::id()));
        std::fs::write(&dir, b"0123456789").unwrap();
        let file = File::open(&dir).unwrap();
        std::fs::remove_file(&dir).unwrap();
        let end = LARGE_PAGE as u64 + 4096;
        read_file(&mem, end - 5, &file, 2, 5).unwrap();
        let mut copy = [0xff; 6];
        mem.read_slice(&mut copy, GuestAddress(end - 6)).unwrap();
        assert_eq!(&copy, b"\x0023456");
        let kind = |at, offset, len| read_file(&mem, at, &file, offset, len).unwrap_err().kind();
        assert_eq!(kind(end - 4, 0, 5), io::ErrorKind::InvalidInput);
        assert_eq!(kind(u64::MAX, 0, 5), io::ErrorKind::InvalidInput);
        assert_eq!(kind(0, 8, 5), io::ErrorKind::UnexpectedEof);
        assert_eq!(kind(0, u64::MAX, 5), io::ErrorKind::InvalidInput);
    }
}
