//! Gives pages back to the host: inflate and free page reports. Deflating needs nothing: pages return on first touch.

use std::fmt;
use std::io;

use rustix::fs::{FallocateFlags, fallocate};
use virtio_queue::DescriptorChain;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::request::{ranges, whole_pages};
use crate::chain::{Chain, ChainError, MAX_BUFFERS};
use crate::device::GuestMem;
use crate::serve::{Counter, ServeChain};

/// Gives guest memory back to the host.
pub trait PageRelease: Clone + Send + fmt::Debug + 'static {
    /// Forgets the content of `len` bytes at `start`, both multiples of 4096: the guest reads zeroes there from now on, and the
    /// host has the memory back.
    ///
    /// # Errors
    /// When the range is not inside one region of guest memory, or the host refuses.
    fn release(&self, start: GuestAddress, len: u64) -> io::Result<()>;
}

/// Guest memory whose regions are parts of a memfd: a hole is punched into it, which takes the pages out of every mapping.
#[derive(Debug, Clone)]
pub struct MemfdPages(pub GuestMem);

impl PageRelease for MemfdPages {
    fn release(&self, start: GuestAddress, len: u64) -> io::Result<()> {
        let refused = || io::Error::from(io::ErrorKind::InvalidInput);
        let region = self.0.find_region(start).ok_or_else(refused)?;
        let inside = start.unchecked_offset_from(region.start_addr());
        if inside.checked_add(len).is_none_or(|end| end > region.len()) {
            return Err(refused());
        }
        let file = region.file_offset().ok_or_else(refused)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(file.file(), flags, file.start() + inside, len)?)
    }
}

fn release<P: PageRelease>(pages: &P, range: (u64, u64), done: &Counter, failed: &Counter) {
    match pages.release(GuestAddress(range.0), range.1) {
        Ok(()) => done.add(range.1),
        Err(_) => failed.add(1),
    }
}

/// Queue 0: page numbers that the driver hands over.
#[derive(Debug)]
pub(super) struct Inflate<P> {
    pages: P,
    released: Counter,
    failed: Counter,
}

impl<P> Inflate<P> {
    pub(super) fn new(pages: P, released: Counter, failed: Counter) -> Self {
        Self { pages, released, failed }
    }
}

impl<P: PageRelease> ServeChain for Inflate<P> {
    fn serve<'m>(
        &mut self,
        mem: &'m GuestMemoryMmap,
        chain: DescriptorChain<&'m GuestMemoryMmap>,
    ) -> Result<u32, ChainError> {
        for range in ranges(&mut Chain::parse(mem, chain)?.readable) {
            release(&self.pages, range, &self.released, &self.failed);
        }
        Ok(0)
    }
}

/// Queue 1: page numbers that the driver takes back.
#[derive(Debug)]
pub(super) struct Deflate;

impl ServeChain for Deflate {
    fn serve<'m>(
        &mut self,
        _mem: &'m GuestMemoryMmap,
        _chain: DescriptorChain<&'m GuestMemoryMmap>,
    ) -> Result<u32, ChainError> {
        Ok(0)
    }
}

/// The reporting queue: each buffer *is* free memory.
#[derive(Debug)]
pub(super) struct Report<P> {
    pages: P,
    reported: Counter,
    failed: Counter,
}

impl<P> Report<P> {
    pub(super) fn new(pages: P, reported: Counter, failed: Counter) -> Self {
        Self { pages, reported, failed }
    }
}

impl<P: PageRelease> ServeChain for Report<P> {
    fn serve<'m>(
        &mut self,
        _mem: &'m GuestMemoryMmap,
        chain: DescriptorChain<&'m GuestMemoryMmap>,
    ) -> Result<u32, ChainError> {
        for (count, buffer) in chain.writable().enumerate() {
            if count == MAX_BUFFERS {
                return Err(ChainError::TooManyBuffers);
            }
            if let Some(range) = whole_pages(buffer.addr().0, u64::from(buffer.len())) {
                release(&self.pages, range, &self.reported, &self.failed);
            }
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::Driver;
    use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
    use std::fs::File;
    use std::sync::{Arc, Mutex};
    use virtio_queue::QueueT;
    use vm_memory::{Bytes, FileOffset};

    #[derive(Debug, Clone, Default)]
    struct Notes(Arc<Mutex<Vec<(u64, u64)>>>);
    impl PageRelease for Notes {
        fn release(&self, start: GuestAddress, len: u64) -> io::Result<()> {
            self.0.lock().unwrap().push((start.0, len));
            Ok(())
        }
    }

    #[test]
    fn free_buffers_are_released_whole_pages_only() {
        let mem = crate::mock::memory();
        let mut driver = Driver::new(&mem, GuestAddress(0), 8);
        let mut queue = driver.queue();
        driver.offer(&[
            (0x5000, 4096, false),
            (0x10_0000, 0x20_0000, true),
            (0x8001, 0x1fff, true),
            (0x9000, 12, true),
        ]);
        let (notes, reported) = (Notes::default(), Counter::default());
        let mut report = Report::new(notes.clone(), reported.clone(), Counter::default());
        report.serve(&mem, queue.pop_descriptor_chain(&*mem).unwrap()).unwrap();
        assert_eq!(*notes.0.lock().unwrap(), [(0x10_0000, 0x20_0000), (0x9000, 0x1000)]);
        assert_eq!(reported.get(), 0x20_1000);
    }

    /// Two regions of one memfd, with a hole between them as a large machine has.
    fn memfd_memory() -> (File, MemfdPages) {
        let file = File::from(memfd_create("mem", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, 0x20_0000).unwrap();
        let shared = Arc::new(file.try_clone().unwrap());
        let mem = GuestMemoryMmap::from_ranges_with_files([
            (GuestAddress(0), 0x10_0000, Some(FileOffset::from_arc(Arc::clone(&shared), 0))),
            (GuestAddress(1 << 32), 0x10_0000, Some(FileOffset::from_arc(shared, 0x10_0000))),
        ])
        .unwrap();
        (file, MemfdPages(Arc::new(mem)))
    }

    #[test]
    fn released_pages_are_the_hosts_again() {
        let (file, pages) = memfd_memory();
        for start in [0, 1 << 32] {
            pages.0.write_slice(&[1; 0x4000], GuestAddress(start)).unwrap();
        }
        let before = fstat(&file).unwrap().st_blocks;
        pages.release(GuestAddress((1 << 32) + 0x1000), 0x2000).unwrap();
        assert_eq!(before - fstat(&file).unwrap().st_blocks, 0x2000 / 512);
        let byte = |at: u64| pages.0.read_obj::<u8>(GuestAddress(at)).unwrap();
        let high = 1 << 32;
        assert_eq!(
            [high + 0xfff, high + 0x1000, high + 0x2fff, high + 0x3000, 0x1000].map(byte),
            [1, 0, 0, 1, 1]
        );
    }

    #[test]
    fn what_is_not_guest_memory_is_refused() {
        let (_file, pages) = memfd_memory();
        for (start, len) in
            [(0x10_0000, 4096), (0xf_f000, 0x2000), (1 << 33, 4096), (0, u64::MAX), (0x1000, u64::MAX - 4095)]
        {
            assert!(pages.release(GuestAddress(start), len).is_err(), "{start:#x} {len:#x}");
        }
    }
}
