//! One descriptor chain as two runs of guest memory: what the device reads, then what it writes (virtio 1.3, 2.7).
//!
//! Everything that a driver may get wrong about a chain is refused here, once: order, length, addresses.

use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

/// Most buffers of one chain. The largest queue of any device here has 1024 entries, and no chain may be longer than its
/// queue (2.7.5.3.1); an indirect table could otherwise name 65535.
pub(crate) const MAX_BUFFERS: usize = 1024;

/// Chains that the driver has offered and the device has not taken.
///
/// # Errors
/// When the index in the ring cannot be, which only a reset mends.
pub(crate) fn offered(queue: &Queue, mem: &GuestMemoryMmap) -> Result<usize, Error> {
    let ahead = queue.avail_idx(mem, Ordering::Acquire)?.0.wrapping_sub(queue.next_avail());
    if ahead > queue.size() { Err(Error::InvalidAvailRingIndex) } else { Ok(usize::from(ahead)) }
}

/// The next chain that the driver has offered.
///
/// # Errors
/// When the ring makes no sense: its index cannot be, or it names a head that there is not. Such a head could not even be given back, so
/// the device has to be reset (virtio 1.3, 2.1.2).
pub(crate) fn take<'m>(
    queue: &mut Queue,
    mem: &'m GuestMemoryMmap,
) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, Error> {
    let chain = queue.iter(mem)?.next();
    match chain {
        Some(chain) if chain.head_index() >= queue.size() => Err(Error::InvalidDescriptorIndex),
        chain => Ok(chain),
    }
}

/// Has the driver notify again; true when there is already more to take.
pub(crate) fn listen(queue: &mut Queue, mem: &GuestMemoryMmap) -> Result<bool, Error> {
    Ok(queue.enable_notification(mem)? && offered(queue, mem)? > 0)
}

/// Has the driver notify when it offers more than is there now and is too little; true when it already has.
pub(crate) fn listen_beyond(queue: &mut Queue, mem: &GuestMemoryMmap) -> Result<bool, Error> {
    let (start, count) = (queue.next_avail(), offered(queue, mem)?);
    // `count` is at most the size of the queue.
    queue.set_next_avail(start.wrapping_add(count as u16));
    let more = queue.enable_notification(mem);
    queue.set_next_avail(start);
    Ok(more? && offered(queue, mem)? > count)
}

/// Why a chain was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChainError {
    #[error("chain of more than {MAX_BUFFERS} buffers")]
    TooManyBuffers,
    #[error("a device-readable buffer follows a device-writable one")]
    Order,
    #[error("a chain that does not end, or leads to where no descriptor is")]
    Endless,
    #[error("a buffer lies outside guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
    #[error("chain ends before what it should hold")]
    TooShort,
}

/// A parsed chain.
#[derive(Debug)]
pub(crate) struct Chain<'m> {
    /// What the driver wrote for the device.
    pub(crate) readable: Span<'m>,
    /// Where the device may write.
    pub(crate) writable: Span<'m>,
}

impl<'m> Chain<'m> {
    /// Walks the descriptors of `chain`; each is read once.
    pub(crate) fn parse(
        mem: &'m GuestMemoryMmap,
        chain: DescriptorChain<&'m GuestMemoryMmap>,
    ) -> Result<Self, ChainError> {
        let mut parsed = Self { readable: Span::default(), writable: Span::default() };
        // The iterator ends quietly where it cannot go on: in a loop, behind the table, at a bad table, beyond 4 GiB.
        let mut whole = false;
        for (count, descriptor) in chain.enumerate() {
            if count == MAX_BUFFERS {
                return Err(ChainError::TooManyBuffers);
            }
            whole = !descriptor.has_next();
            let (span, access) = if descriptor.is_write_only() {
                (&mut parsed.writable, Permissions::Write)
            } else if parsed.writable.slices.is_empty() {
                (&mut parsed.readable, Permissions::Read)
            } else {
                return Err(ChainError::Order);
            };
            let len = descriptor.len() as usize;
            if len == 0 {
                continue;
            }
            for slice in mem.get_slices(descriptor.addr(), len, access).map_err(ChainError::Memory)? {
                span.push(slice.map_err(ChainError::Memory)?);
            }
        }
        if whole { Ok(parsed) } else { Err(ChainError::Endless) }
    }
}

/// A run of guest memory, consumed from its front.
#[derive(Debug, Default)]
pub(crate) struct Span<'m> {
    /// None of them is empty, or what goes on until nothing is left would go on for ever.
    slices: Vec<VolatileSlice<'m>>,
    /// Index of the first slice that has not been consumed.
    first: usize,
    /// Bytes left.
    len: usize,
}

impl<'m> Span<'m> {
    fn push(&mut self, slice: VolatileSlice<'m>) {
        // The sum cannot overflow: the iterator ends a chain at 2^32 bytes.
        self.len = self.len.saturating_add(slice.len());
        self.slices.push(slice);
    }

    /// Bytes left.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The first `max` bytes that lie in one piece, or `None` at the end.
    pub(crate) fn front(&self, max: usize) -> Option<VolatileSlice<'m>> {
        let slice = self.slices.get(self.first)?;
        slice.subslice(0, slice.len().min(max)).ok()
    }

    /// Steps over `count` bytes, or over all that is left.
    pub(crate) fn skip(&mut self, mut count: usize) {
        while count > 0 {
            let Some(slice) = self.slices.get_mut(self.first) else { return };
            let step = count.min(slice.len());
            match slice.offset(step) {
                Ok(rest) if !rest.is_empty() => *slice = rest,
                _ => self.first += 1,
            }
            self.len -= step;
            count -= step;
        }
    }

    /// Drops everything after the first `len` bytes.
    pub(crate) fn truncate(&mut self, len: usize) {
        if len == 0 {
            *self = Self::default();
            return;
        }
        let mut seen = 0;
        for (index, slice) in self.slices.iter_mut().enumerate().skip(self.first) {
            if seen + slice.len() >= len {
                if let Ok(part) = slice.subslice(0, len - seen) {
                    *slice = part;
                }
                self.slices.truncate(index + 1);
                self.len = len;
                return;
            }
            seen += slice.len();
        }
    }

    /// Takes the last `count` bytes off.
    pub(crate) fn split_back(&mut self, count: usize) -> Result<Self, ChainError> {
        let keep = self.len.checked_sub(count).ok_or(ChainError::TooShort)?;
        let mut back = Self { slices: self.slices.clone(), first: self.first, len: self.len };
        back.skip(keep);
        self.truncate(keep);
        Ok(back)
    }

    /// Copies up to `buf.len()` bytes out of guest memory and steps over them; returns how many.
    pub(crate) fn read(&mut self, buf: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let Some(slice) = self.front(rest.len()) else { break };
            let count = slice.copy_to(rest);
            self.skip(count);
            done += count;
        }
        done
    }

    /// Copies `N` bytes out of guest memory.
    pub(crate) fn read_array<const N: usize>(&mut self) -> Result<[u8; N], ChainError> {
        let mut buf = [0; N];
        if self.read(&mut buf) == N { Ok(buf) } else { Err(ChainError::TooShort) }
    }

    /// Copies up to `buf.len()` bytes into guest memory and steps over them; returns how many.
    pub(crate) fn write(&mut self, buf: &[u8]) -> usize {
        let mut done = 0;
        while let Some(rest) = buf.get(done..).filter(|rest| !rest.is_empty()) {
            let Some(slice) = self.front(rest.len()) else { break };
            let count = slice.len();
            slice.copy_from(rest);
            self.skip(count);
            done += count;
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::{Driver, memory};
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use vm_memory::{Bytes, GuestAddress};

    fn parse<'m>(mem: &'m GuestMemoryMmap, buffers: &[(u64, u32, bool)]) -> Result<Chain<'m>, ChainError> {
        let mut driver = Driver::new(mem, GuestAddress(0), 16);
        let mut queue = driver.queue();
        driver.offer(buffers);
        Chain::parse(mem, queue.pop_descriptor_chain(mem).unwrap())
    }

    #[test]
    fn bytes_cross_buffers_in_order() {
        let mem = memory();
        mem.write_slice(b"abcdefgh", GuestAddress(0x1000)).unwrap();
        mem.write_slice(b"ijkl", GuestAddress(0x3000)).unwrap();
        let mut chain = parse(&mem, &[(0x1000, 8, false), (0x2000, 0, false), (0x3000, 4, false)]).unwrap();
        assert_eq!(chain.readable.len(), 12);
        assert_eq!(&chain.readable.read_array::<10>().unwrap(), b"abcdefghij");
        let mut rest = [0; 9];
        assert_eq!(chain.readable.read(&mut rest), 2);
        assert_eq!(&rest[..2], b"kl");
        assert_eq!(chain.readable.len(), 0);
        assert!(chain.readable.read_array::<1>().is_err());
    }

    #[test]
    fn writes_stop_at_the_end_of_the_chain() {
        let mem = memory();
        let mut chain = parse(&mem, &[(0x1000, 3, true), (0x2000, 3, true)]).unwrap();
        let mut status = chain.writable.split_back(1).unwrap();
        assert_eq!(status.write(b"Z!"), 1);
        assert_eq!(chain.writable.write(b"123456"), 5);
        let mut seen = [0; 3];
        mem.read_slice(&mut seen, GuestAddress(0x2000)).unwrap();
        assert_eq!(&seen, b"45Z");
    }

    #[test]
    fn truncate_and_split_at_edges() {
        let mem = memory();
        let mut chain = parse(&mem, &[(0x1000, 4, false), (0x2000, 4, false)]).unwrap();
        chain.readable.skip(2);
        chain.readable.truncate(2);
        assert_eq!((chain.readable.len(), chain.readable.front(9).unwrap().len()), (2, 2));
        assert!(chain.readable.split_back(3).is_err());
        let back = chain.readable.split_back(2).unwrap();
        assert_eq!((back.len(), chain.readable.len()), (2, 0));
        assert!(chain.readable.front(1).is_none());
    }

    #[test]
    fn nothing_left_is_the_end() {
        let mem = memory();
        let mut chain = parse(&mem, &[(0x1000, 1, true)]).unwrap();
        let status = chain.writable.split_back(1).unwrap();
        assert_eq!((status.len(), chain.writable.len()), (1, 0));
        assert_eq!((chain.writable.write(b"abc"), chain.writable.read(&mut [0; 3])), (0, 0));
    }

    #[test]
    fn broken_chains_are_refused() {
        let mem = memory();
        assert!(matches!(parse(&mem, &[(0x1000, 4, true), (0x2000, 4, false)]), Err(ChainError::Order)));
        assert!(matches!(parse(&mem, &[(u64::MAX - 2, 4, true)]), Err(ChainError::Memory(_))));
        let end = crate::mock::MEMORY_BYTES as u64;
        assert!(matches!(parse(&mem, &[(end - 2, 4, true)]), Err(ChainError::Memory(_))));
    }

    /// The chain of descriptor 0, of a table that is written here: address, length, flags, next.
    fn parse_table<'m>(
        mem: &'m GuestMemoryMmap,
        table: &[(u64, u32, u16, u16)],
    ) -> Result<Chain<'m>, ChainError> {
        let mut driver = Driver::new(mem, GuestAddress(0), 16);
        let mut queue = driver.queue();
        driver.offer(&[(0x1000, 4, false)]);
        for (index, (addr, len, flags, next)) in (0..).zip(table) {
            let raw = RawDescriptor::from(Descriptor::new(*addr, *len, *flags, *next));
            mem.write_obj(raw, GuestAddress(index * 16)).unwrap();
        }
        Chain::parse(mem, take(&mut queue, mem).unwrap().unwrap())
    }

    #[test]
    fn chains_without_an_end_are_refused() {
        const NEXT: u16 = 1;
        const INDIRECT: u16 = 4;
        let mem = memory();
        for table in [
            &[(0x1000, 4, NEXT, 0)][..],
            &[(0x1000, 4, NEXT, 1), (0x1000, 4, NEXT, 0)],
            &[(0x1000, 4, NEXT, 16)],
            &[(0x1000, 4, NEXT, u16::MAX)],
            &[(0x1000, 4, NEXT, 1), (0x2000, 15, INDIRECT, 0)],
            &[(u64::MAX - 7, 16, INDIRECT, 0)],
            &[(0x2000, 0, INDIRECT, 0)],
        ] {
            assert!(matches!(parse_table(&mem, table), Err(ChainError::Endless)), "{table:?}");
        }
        assert_eq!(parse_table(&mem, &[(0x1000, 4, 0, 7)]).unwrap().readable.len(), 4);
    }

    #[test]
    fn a_ring_that_makes_no_sense_is_an_error() {
        let mem = memory();
        let mut driver = Driver::new(&mem, GuestAddress(0), 16);
        let mut queue = driver.queue();
        assert!(take(&mut queue, &mem).unwrap().is_none());
        driver.offer(&[(0x1000, 4, false)]);
        let ring = 16 * 16;
        mem.write_obj(16_u16, GuestAddress(ring + 4)).unwrap();
        assert!(matches!(take(&mut queue, &mem), Err(Error::InvalidDescriptorIndex)));
        for ahead in [18_u16, 0x8000, 0] {
            mem.write_obj(ahead, GuestAddress(ring + 2)).unwrap();
            assert!(matches!(take(&mut queue, &mem), Err(Error::InvalidAvailRingIndex)));
            assert!(offered(&queue, &mem).is_err() && listen_beyond(&mut queue, &mem).is_err());
            assert!(listen(&mut queue, &mem).is_err());
        }
    }

    #[test]
    fn an_indirect_table_is_bounded() {
        let mem = memory();
        let entries = (MAX_BUFFERS + 1) as u16;
        for i in 0..entries {
            let next = u16::from(i + 1 < entries);
            let raw = RawDescriptor::from(Descriptor::new(0x1000, 1, next, i + 1));
            mem.write_obj(raw, GuestAddress(0x10_0000 + u64::from(i) * 16)).unwrap();
        }
        let mut driver = Driver::new(&mem, GuestAddress(0), 16);
        let mut queue = driver.queue();
        let _ = driver.offer_indirect(0x10_0000, u32::from(entries) * 16);
        let chain = queue.pop_descriptor_chain(&*mem).unwrap();
        assert!(matches!(Chain::parse(&mem, chain), Err(ChainError::TooManyBuffers)));
    }
}
