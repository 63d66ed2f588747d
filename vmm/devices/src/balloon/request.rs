//! What an inflate request says: page numbers, gathered into ranges.

use crate::chain::Span;

/// Size of a balloon page, whatever the guest's page size is (virtio 1.3, 5.5.6).
pub(super) const PAGE_BYTES: u64 = 4096;
/// Most page numbers read from one request: 16 MiB of guest memory. Linux sends 256.
pub(super) const MAX_PAGES: usize = 4096;

/// The pages of one request as ranges of guest addresses (start, length), sorted, without overlap. Only whole page numbers
/// count, and no more than [`MAX_PAGES`].
pub(super) fn ranges(span: &mut Span<'_>) -> Vec<(u64, u64)> {
    let mut pages = Vec::new();
    while pages.len() < MAX_PAGES
        && let Ok(number) = span.read_array::<4>()
    {
        pages.push(u32::from_le_bytes(number));
    }
    pages.sort_unstable();
    pages.dedup();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for page in pages {
        let start = u64::from(page) * PAGE_BYTES;
        match ranges.last_mut() {
            Some((first, len)) if *first + *len == start => *len += PAGE_BYTES,
            _ => ranges.push((start, PAGE_BYTES)),
        }
    }
    ranges
}

/// The whole pages inside `start .. start + len`, as (start, length).
pub(super) fn whole_pages(start: u64, len: u64) -> Option<(u64, u64)> {
    let first = start.checked_next_multiple_of(PAGE_BYTES)?;
    let end = start.checked_add(len)? / PAGE_BYTES * PAGE_BYTES;
    end.checked_sub(first).filter(|len| *len > 0).map(|len| (first, len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::Chain;
    use crate::mock::{Driver, memory};
    use virtio_queue::QueueT;
    use vm_memory::{Bytes, GuestAddress};

    fn parse(pages: &[u32], extra: u32) -> Vec<(u64, u64)> {
        let mem = memory();
        let bytes: Vec<u8> = pages.iter().flat_map(|p| p.to_le_bytes()).collect();
        mem.write_slice(&bytes, GuestAddress(0x10_0000)).unwrap();
        let mut driver = Driver::new(&mem, GuestAddress(0), 8);
        let mut queue = driver.queue();
        driver.offer(&[(0x10_0000, bytes.len() as u32 + extra, false)]);
        let mut chain = Chain::parse(&mem, queue.pop_descriptor_chain(&*mem).unwrap()).unwrap();
        ranges(&mut chain.readable)
    }

    #[test]
    fn neighbours_become_one_range() {
        assert_eq!(parse(&[9, 7, 8, 8, 3], 3), [(0x3000, 0x1000), (0x7000, 0x3000)]);
        assert_eq!(parse(&[u32::MAX], 0), [(u64::from(u32::MAX) * PAGE_BYTES, PAGE_BYTES)]);
        assert!(parse(&[], 2).is_empty());
    }

    #[test]
    fn a_request_is_bounded() {
        let pages: Vec<u32> = (0..2 * MAX_PAGES as u32).collect();
        assert_eq!(parse(&pages, 0), [(0, MAX_PAGES as u64 * PAGE_BYTES)]);
    }

    #[test]
    fn parts_of_pages_do_not_count() {
        assert_eq!(whole_pages(0x1000, 0x2000), Some((0x1000, 0x2000)));
        assert_eq!(whole_pages(0x1001, 0x2000), Some((0x2000, 0x1000)));
        assert_eq!(whole_pages(0x1001, 0x1ffe), None);
        assert_eq!(whole_pages(0x1000, 0), None);
        assert_eq!(whole_pages(u64::MAX, 1), None);
        assert_eq!(whole_pages(u64::MAX - 0x1000, u64::MAX), None);
    }
}
