//! The other side of a device, for tests: a driver with a split ring in ordinary memory, and an interrupt that counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{ActiveQueue, GuestMem, Interrupt};

/// Size of [`memory`].
pub(crate) const MEMORY_BYTES: usize = 16 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Guest memory from address 0.
pub(crate) fn memory() -> GuestMem {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap())
}

/// Counts what a device raises.
#[derive(Debug, Default)]
pub(crate) struct CountingInterrupt {
    pub(crate) used: AtomicUsize,
    pub(crate) config: AtomicUsize,
    pub(crate) reset: AtomicUsize,
}

impl Interrupt for CountingInterrupt {
    fn used_queue(&self) {
        self.used.fetch_add(1, Ordering::SeqCst);
    }
    fn config_changed(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }
    fn needs_reset(&self) {
        self.reset.fetch_add(1, Ordering::SeqCst);
    }
    fn share_with_other_process(&self) -> std::io::Result<EventFd> {
        EventFd::new(EFD_NONBLOCK)
    }
}

/// The driver's half of one queue. (The mock of `virtio-queue` lays its rings over each other beyond a few entries and does
/// not wrap, so long runs need their own.)
pub(crate) struct Driver<'m> {
    mem: &'m GuestMemoryMmap,
    start: u64,
    size: u16,
    free: Vec<u16>,
    next_avail: u16,
    next_used: u16,
    /// The descriptors of each chain in flight, by head.
    chains: Vec<Vec<u16>>,
}

impl<'m> Driver<'m> {
    /// Rings at `start`, a multiple of 16; a queue of 256 takes less than 8 KiB.
    pub(crate) fn new(mem: &'m GuestMemoryMmap, start: GuestAddress, size: u16) -> Self {
        let driver = Self {
            mem,
            start: start.0,
            size,
            free: (0..size).rev().collect(),
            next_avail: 0,
            next_used: 0,
            chains: vec![Vec::new(); usize::from(size)],
        };
        let bytes = driver.used_ring() + 8 * u64::from(size) + 6 - start.0;
        mem.write_slice(&vec![0; bytes as usize], start).unwrap();
        driver
    }

    fn avail_ring(&self) -> u64 {
        self.start + 16 * u64::from(self.size)
    }

    fn used_ring(&self) -> u64 {
        (self.avail_ring() + 2 * u64::from(self.size) + 6).next_multiple_of(4)
    }

    /// The device's half.
    pub(crate) fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_desc_table_address(Some(self.start as u32), Some(0));
        queue.set_avail_ring_address(Some(self.avail_ring() as u32), Some(0));
        queue.set_used_ring_address(Some(self.used_ring() as u32), Some(0));
        queue.set_ready(true);
        queue
    }

    /// The device's half with a kick that never blocks, and the driver's end of the kick.
    pub(crate) fn active(&self, index: usize, event_idx: bool) -> (ActiveQueue, EventFd) {
        let mut queue = self.queue();
        queue.set_event_idx(event_idx);
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let ours = kick.try_clone().unwrap();
        (ActiveQueue { index, queue, kick }, ours)
    }

    /// Descriptors that are not in flight.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    fn publish(&mut self, head: u16) {
        let slot = self.avail_ring() + 4 + 2 * u64::from(self.next_avail % self.size);
        self.mem.write_obj(head, GuestAddress(slot)).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        // The driver wants to hear of every buffer: used_event follows what it has seen.
        let event = self.avail_ring() + 4 + 2 * u64::from(self.size);
        self.mem.write_obj(self.next_used, GuestAddress(event)).unwrap();
        self.mem.store(self.next_avail, GuestAddress(self.avail_ring() + 2), Ordering::SeqCst).unwrap();
    }

    fn store(&self, index: u16, descriptor: Descriptor) {
        let addr = self.start + 16 * u64::from(index);
        self.mem.write_obj(RawDescriptor::from(descriptor), GuestAddress(addr)).unwrap();
    }

    /// Offers one chain of (address, length, device may write); returns its head.
    pub(crate) fn offer(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        let ids: Vec<u16> = buffers.iter().map(|_| self.free.pop().unwrap()).collect();
        for (i, (addr, len, writable)) in buffers.iter().enumerate() {
            let next = ids.get(i + 1).copied();
            let flags = if *writable { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            self.store(ids[i], Descriptor::new(*addr, *len, flags, next.unwrap_or(0)));
        }
        let head = ids[0];
        self.chains[usize::from(head)] = ids;
        self.publish(head);
        head
    }

    /// Offers a table that lies in guest memory.
    pub(crate) fn offer_indirect(&mut self, table: u64, bytes: u32) -> u16 {
        let head = self.free.pop().unwrap();
        self.store(head, Descriptor::new(table, bytes, INDIRECT, 0));
        self.chains[usize::from(head)] = vec![head];
        self.publish(head);
        head
    }

    /// Offers a head again that is in flight, as no driver may.
    pub(crate) fn offer_again(&mut self, head: u16) {
        self.publish(head);
    }

    /// The next chain that the device has used: (head, bytes written).
    pub(crate) fn used(&mut self) -> Option<(u16, u32)> {
        let idx: u16 = self.mem.load(GuestAddress(self.used_ring() + 2), Ordering::SeqCst).unwrap();
        if idx == self.next_used {
            return None;
        }
        let slot = self.used_ring() + 4 + 8 * u64::from(self.next_used % self.size);
        let [head, len]: [u32; 2] = [0, 4].map(|o| self.mem.read_obj(GuestAddress(slot + o)).unwrap());
        self.next_used = self.next_used.wrapping_add(1);
        self.free.append(&mut self.chains[head as usize]);
        Some((head as u16, len))
    }
}
