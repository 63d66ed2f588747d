//! Memory that is plugged while the machine runs: lent to KVM in slots, so that a guest cannot use what it was not given.
//!
//! The file behind it is as long as the largest machine and mapped from the start; pages come when the guest first touches them. A slot
//! is lent when its first block is plugged and taken back with its last: what a guest may touch is what is plugged, rounded up to slots.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use hyper_vmm_devices::balloon::{MemfdPages, PageRelease};
use hyper_vmm_devices::mem::PlugMemory;
use hyper_vmm_hv::Machine as KvmMachine;
use hyper_vmm_spec::HOT_MEM_STEP_MIB;
use vm_memory::{Address, GuestAddress};

use crate::log;

/// Most slots: a quarter of what KVM before Linux 5.12 has for a machine (509).
const MAX_SLOTS: u64 = 128;

/// Lends guest memory to KVM.
pub(crate) trait Lend: Send + Sync + std::fmt::Debug {
    /// Lends `len` bytes at `start` as slot `number`, or takes them back.
    fn lend(&self, number: u32, start: u64, len: u64, present: bool) -> io::Result<()>;
}

impl Lend for KvmMachine {
    fn lend(&self, number: u32, start: u64, len: u64, present: bool) -> io::Result<()> {
        Self::lend(self, number, start, len, present).map_err(io::Error::other)
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    lent: bool,
    /// Bytes of it that are plugged.
    used: u64,
}

#[derive(Debug)]
struct Slots {
    start: u64,
    bytes: u64,
    slot_bytes: u64,
    slots: Vec<Slot>,
}

impl Slots {
    /// The parts of a range by slot: number, and how many bytes of it lie there.
    fn parts(&self, start: GuestAddress, len: u64) -> Vec<(u32, u64)> {
        let from = start.raw_value().saturating_sub(self.start);
        let (mut at, end) = (from, from.saturating_add(len).min(self.bytes));
        let mut parts = Vec::new();
        while at < end {
            let number = at / self.slot_bytes;
            let until = ((number + 1) * self.slot_bytes).min(end);
            parts.push((u32::try_from(number).unwrap_or(u32::MAX), until - at));
            at = until;
        }
        parts
    }

    /// Where a slot begins and how long it is; the last may be shorter.
    fn place(&self, number: u32) -> (u64, u64) {
        let offset = u64::from(number) * self.slot_bytes;
        (self.start + offset, self.slot_bytes.min(self.bytes.saturating_sub(offset)))
    }

    fn slot(&mut self, number: u32) -> Option<&mut Slot> {
        self.slots.get_mut(usize::try_from(number).ok()?)
    }
}

/// The hot memory of one machine.
#[derive(Debug, Clone)]
pub(crate) struct HotMemory {
    slots: Arc<Mutex<Slots>>,
    lender: Arc<dyn Lend>,
    pages: MemfdPages,
}

impl HotMemory {
    /// `bytes` at guest address `start`, of which nothing is lent yet; `pages` has them.
    pub(crate) fn new(lender: Arc<dyn Lend>, pages: MemfdPages, start: u64, bytes: u64) -> Self {
        let step = u64::from(HOT_MEM_STEP_MIB) << 20;
        let slot_bytes = bytes.div_ceil(MAX_SLOTS).next_multiple_of(step).max(step);
        let count = usize::try_from(bytes.div_ceil(slot_bytes)).unwrap_or(0);
        let slots = Slots { start, bytes, slot_bytes, slots: vec![Slot::default(); count] };
        Self { slots: Arc::new(Mutex::new(slots)), lender, pages }
    }

    /// Lends or takes back what is not so already.
    fn set_lent(&self, slots: &mut Slots, number: u32, lent: bool) -> io::Result<()> {
        let (start, len) = slots.place(number);
        match slots.slot(number) {
            Some(slot) if slot.lent != lent => {
                self.lender.lend(number, start, len, lent)?;
                slot.lent = lent;
                Ok(())
            }
            Some(_) => Ok(()),
            None => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl PlugMemory for HotMemory {
    /// A slot that was lent before a later one failed stays so; it is taken back with the last block of it.
    fn plug(&self, start: GuestAddress, len: u64) -> io::Result<()> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let parts = slots.parts(start, len);
        for (number, _) in &parts {
            self.set_lent(&mut slots, *number, true)?;
        }
        for (number, bytes) in parts {
            if let Some(slot) = slots.slot(number) {
                slot.used += bytes;
            }
        }
        Ok(())
    }

    fn unplug(&self, start: GuestAddress, len: u64) -> io::Result<()> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        self.pages.release(start, len)?;
        for (number, bytes) in slots.parts(start, len) {
            let used = slots.slot(number).map_or(0, |slot| {
                slot.used = slot.used.saturating_sub(bytes);
                slot.used
            });
            // The memory is the host's already; a slot too many is no reason to keep it.
            if used == 0
                && let Err(e) = self.set_lent(&mut slots, number, false)
            {
                log::line(format_args!("cannot take a memory slot back: {e}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    const MIB: u64 = 1 << 20;

    #[derive(Debug, Default)]
    struct Notes(Mutex<Vec<(u32, u64, u64, bool)>>);

    impl Lend for Notes {
        fn lend(&self, number: u32, start: u64, len: u64, present: bool) -> io::Result<()> {
            self.0.lock().unwrap().push((number, start, len, present));
            Ok(())
        }
    }

    fn hot(start: u64, bytes: u64) -> (HotMemory, Arc<Notes>, hyper_vmm_devices::device::GuestMem) {
        let mib = u32::try_from(bytes / MIB).unwrap();
        let mem = crate::memory::create_shared(32 + mib, &[(0, 32 * MIB), (start, bytes)]).unwrap();
        let notes = Arc::new(Notes::default());
        let lender = Arc::clone(&notes) as Arc<dyn Lend>;
        (HotMemory::new(lender, MemfdPages(Arc::clone(&mem)), start, bytes), notes, mem)
    }

    #[test]
    fn slots_are_lent_with_their_first_block_and_taken_back_with_their_last() {
        let start = 4 << 30;
        let (hot, notes, mem) = hot(start, 384 * MIB);
        let took = || std::mem::take(&mut *notes.0.lock().unwrap());
        hot.plug(GuestAddress(start + 126 * MIB), 4 * MIB).unwrap();
        assert_eq!(took(), [(0, start, 128 * MIB, true), (1, start + 128 * MIB, 128 * MIB, true)]);
        hot.plug(GuestAddress(start), 2 * MIB).unwrap();
        assert!(took().is_empty());
        mem.write_obj(7_u8, GuestAddress(start + 126 * MIB)).unwrap();
        hot.unplug(GuestAddress(start + 126 * MIB), 4 * MIB).unwrap();
        assert_eq!(took(), [(1, start + 128 * MIB, 128 * MIB, false)]);
        assert_eq!(mem.read_obj::<u8>(GuestAddress(start + 126 * MIB)).unwrap(), 0);
        hot.unplug(GuestAddress(start), 2 * MIB).unwrap();
        assert_eq!(took(), [(0, start, 128 * MIB, false)]);
    }

    #[test]
    fn large_regions_have_few_slots() {
        let start = 4 << 30;
        let (hot, notes, _) = hot(start, 40 << 30);
        hot.plug(GuestAddress(start + (40 << 30) - 2 * MIB), 2 * MIB).unwrap();
        let (number, at, len, _) = notes.0.lock().unwrap()[0];
        assert!(u64::from(number) < MAX_SLOTS);
        assert_eq!(at + len, start + (40 << 30));
    }
}
