//! One queue's registers, and the checks that turn them into a queue.

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::state::{Reader, StateError, Writer};

/// What the driver wrote for one queue. Nothing is believed before [`QueueSetup::build`].
#[derive(Debug, Clone, Copy)]
pub(super) struct QueueSetup {
    max_size: u16,
    size: u32,
    pub(super) ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    /// How many chains were used when the queue was saved.
    position: u16,
}

/// Which ring address a register belongs to.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ring {
    Descriptors,
    Available,
    Used,
}

/// Which half of an address.
#[derive(Debug, Clone, Copy)]
pub(super) enum Half {
    Low,
    High,
}

impl QueueSetup {
    pub(super) fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: u32::from(max_size),
            ready: false,
            descriptors: 0,
            available: 0,
            used: 0,
            position: 0,
        }
    }

    pub(super) fn max_size(&self) -> u16 {
        self.max_size
    }

    pub(super) fn used(&self) -> u64 {
        self.used
    }

    /// All but the position.
    pub(super) fn save(&self, to: &mut Writer) {
        to.u32(self.size);
        to.u8(u8::from(self.ready));
        for address in [self.descriptors, self.available, self.used] {
            to.u64(address);
        }
    }

    /// What [`QueueSetup::save`] wrote, and the position.
    pub(super) fn restore(&mut self, from: &mut Reader<'_>) -> Result<(), StateError> {
        self.size = from.u32()?;
        self.ready = from.u8()? == 1;
        for address in [&mut self.descriptors, &mut self.available, &mut self.used] {
            *address = from.u64()?;
        }
        self.position = from.u16()?;
        Ok(())
    }

    pub(super) fn set_size(&mut self, size: u32) {
        self.size = size;
    }

    pub(super) fn set_address(&mut self, ring: Ring, half: Half, value: u32) {
        let address = match ring {
            Ring::Descriptors => &mut self.descriptors,
            Ring::Available => &mut self.available,
            Ring::Used => &mut self.used,
        };
        *address = match half {
            Half::Low => *address & !u64::from(u32::MAX) | u64::from(value),
            Half::High => *address & u64::from(u32::MAX) | u64::from(value) << 32,
        };
    }

    /// The queue, if the size is a power of two within the limit and all three rings are aligned and inside memory. What is available
    /// cannot be at address 0, which the code of the ring, here and in a file server, takes for an address that was never set.
    pub(super) fn build(&self, mem: &GuestMemoryMmap, event_idx: bool) -> Option<Queue> {
        if self.available == 0 {
            return None;
        }
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(u16::try_from(self.size).ok()?).ok()?;
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(self.available)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(self.used)).ok()?;
        queue.set_event_idx(event_idx);
        queue.set_next_avail(self.position);
        queue.set_next_used(self.position);
        queue.set_ready(true);
        queue.is_valid(mem).then_some(queue)
    }
}
