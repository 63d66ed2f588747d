//! A split ring (virtio 1.3, 2.7) whose driver may put anything into it.

use crate::device::Device;
use crate::memory::{self, ARENA};
use crate::sys;

/// Most queues of a device here.
pub(crate) const MOST_QUEUES: usize = 4;
/// Entries of a ring: enough for every good request, few enough that loops are short.
pub(crate) const USUAL_SIZE: u16 = 16;
/// Where rings are, and how far apart: room for 1024 entries.
const RINGS: u64 = ARENA + (1 << 20);
const RING_BYTES: u64 = 1 << 16;
const AVAILABLE_AT: u64 = 0x8000;
const USED_AT: u64 = 0xa000;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// A buffer descriptor (2.7.5).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Buffer {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Buffer {
    /// The device reads it.
    pub(crate) const fn readable(address: u64, len: u32) -> Self {
        Self { address, len, flags: 0, next: 0 }
    }

    /// The device writes it.
    pub(crate) const fn writable(address: u64, len: u32) -> Self {
        Self { address, len, flags: WRITE, next: 0 }
    }

    /// Another follows.
    pub(crate) const fn then(self, next: u16) -> Self {
        Self { flags: self.flags | NEXT, next, ..self }
    }

    /// As it lies in a table at `table`, in place `index`.
    pub(crate) fn put(self, table: u64, index: u16) {
        let at = table + u64::from(index) * 16;
        memory::write(at, &self.address.to_le_bytes());
        memory::write(at + 8, &self.len.to_le_bytes());
        memory::write(at + 12, &self.flags.to_le_bytes());
        memory::write(at + 14, &self.next.to_le_bytes());
    }
}

/// What came of what was offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// It came back, with so many bytes written.
    Used { head: u32, len: u32 },
    /// The device wants a reset.
    NeedsReset,
    /// Nothing, for a long time.
    Silence,
}

/// How long an answer may take, ticks of a processor clock of 1 to 4 GHz: seconds on a machine whose processor is emulated.
const PATIENCE: u64 = 20_000_000_000;
/// How long is enough to see that nothing comes.
const SHORT: u64 = 30_000_000;
/// Looks at the ring between two looks at the status.
const LOOKS: u32 = 64;

/// A ring, and how far the driver is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ring {
    pub(crate) index: u32,
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    offered: u16,
    seen: u16,
}

impl Ring {
    /// An empty ring of queue `index`.
    pub(crate) fn new(index: u32, size: u16) -> Self {
        let start = RINGS + u64::from(index) * RING_BYTES;
        memory::fill(start, RING_BYTES, 0);
        let (available, used) = (start + AVAILABLE_AT, start + USED_AT);
        Self { index, size, descriptors: start, available, used, offered: 0, seen: 0 }
    }

    pub(crate) fn set(&self, index: u16, buffer: Buffer) {
        buffer.put(self.descriptors, index);
    }

    /// Buffers one behind the other from descriptor `first` on, offered as one chain.
    pub(crate) fn offer_chain(&mut self, first: u16, buffers: &[Buffer]) {
        self.set_chain(first, buffers);
        self.offer(first);
    }

    /// The same, not offered yet.
    pub(crate) fn set_chain(&self, first: u16, buffers: &[Buffer]) {
        for (index, buffer) in (first..).zip(buffers) {
            let last = usize::from(index - first) + 1 == buffers.len();
            self.set(index, if last { *buffer } else { buffer.then(index + 1) });
        }
    }

    /// Puts a head into the ring.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.offered % self.size);
        memory::store16(self.available + 4 + slot * 2, head);
        self.run_ahead(1);
    }

    /// Moves the index of what is offered.
    pub(crate) fn run_ahead(&mut self, by: u16) {
        self.offered = self.offered.wrapping_add(by);
        memory::store16(self.available + 2, self.offered);
    }

    /// Takes what has come back, if something has.
    pub(crate) fn take(&mut self) -> Option<End> {
        if memory::load16(self.used + 2) == self.seen {
            return None;
        }
        let at = self.used + 4 + u64::from(self.seen % self.size) * 8;
        self.seen = self.seen.wrapping_add(1);
        let (head, len) = (memory::read(at), memory::read(at + 4));
        Some(End::Used { head: u32::from_le_bytes(head), len: u32::from_le_bytes(len) })
    }

    /// Notifies, and waits for what comes back next.
    pub(crate) fn ask(&mut self, device: &Device) -> End {
        device.notify(self.index);
        self.wait(device)
    }

    pub(crate) fn wait(&mut self, device: &Device) -> End {
        self.wait_for(device, PATIENCE)
    }

    /// Nothing is expected to come.
    pub(crate) fn wait_briefly(&mut self, device: &Device) -> End {
        self.wait_for(device, SHORT)
    }

    fn wait_for(&mut self, device: &Device, patience: u64) -> End {
        let start = sys::ticks();
        loop {
            for _ in 0..LOOKS {
                if let Some(end) = self.take() {
                    return end;
                }
                sys::pause();
            }
            if device.needs_reset() {
                return End::NeedsReset;
            }
            if sys::ticks().wrapping_sub(start) > patience {
                return End::Silence;
            }
        }
    }
}
