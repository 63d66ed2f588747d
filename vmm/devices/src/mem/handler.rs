//! The blocks of the region, and the queue by which the driver plugs and unplugs them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::request::{ANSWER_BYTES, Answer, BLOCK_BYTES, Plugged, Request, Sizes};
use super::{Goal, PlugMemory, Reached};
use crate::chain::{Chain, ChainError};
use crate::serve::{Counter, ServeChain};

/// Which blocks are plugged, and how many are to be.
#[derive(Debug)]
pub(super) struct Region {
    start: u64,
    plugged: Vec<bool>,
    count: u64,
    goal: Goal,
}

impl Region {
    pub(super) fn new(start: GuestAddress, bytes: u64) -> Self {
        let blocks = usize::try_from(bytes / BLOCK_BYTES).unwrap_or(0);
        Self { start: start.0, plugged: vec![false; blocks], count: 0, goal: Goal::default() }
    }

    pub(super) fn sizes(&self) -> Sizes {
        Sizes {
            addr: self.start,
            region: self.plugged.len() as u64 * BLOCK_BYTES,
            plugged: self.count * BLOCK_BYTES,
            requested: self.goal.blocks * BLOCK_BYTES,
        }
    }

    /// Sets how much the guest is to have, no more than there is.
    pub(super) fn set_goal(&mut self, bytes: u64, serial: u64) {
        let blocks = bytes.div_ceil(BLOCK_BYTES).min(self.plugged.len() as u64);
        self.goal = Goal { blocks, serial: Some(serial) };
    }

    /// The request that has just been met, once.
    pub(super) fn reached(&mut self) -> Option<u64> {
        if self.count == self.goal.blocks { self.goal.serial.take() } else { None }
    }

    /// Indices of `blocks` blocks at `addr`: aligned, at least one, and inside.
    fn find(&self, addr: u64, blocks: u16) -> Option<std::ops::Range<usize>> {
        let from = addr.checked_sub(self.start).filter(|from| from.is_multiple_of(BLOCK_BYTES))?;
        let first = usize::try_from(from / BLOCK_BYTES).ok()?;
        let end = first.checked_add(usize::from(blocks))?;
        (blocks > 0 && end <= self.plugged.len()).then_some(first..end)
    }

    fn state(&self, range: std::ops::Range<usize>) -> Plugged {
        let blocks = self.plugged.get(range).unwrap_or_default();
        match blocks.iter().filter(|plugged| **plugged).count() {
            0 => Plugged::None,
            all if all == blocks.len() => Plugged::All,
            _ => Plugged::Some,
        }
    }

    /// Every block of the range is what it is not to be any more: a guest that asks over and over costs what it asks for, not the region.
    fn set(&mut self, range: std::ops::Range<usize>, plugged: bool) {
        let blocks = self.plugged.get_mut(range).unwrap_or_default();
        blocks.fill(plugged);
        let changed = blocks.len() as u64;
        self.count = if plugged { self.count + changed } else { self.count.saturating_sub(changed) };
    }
}

/// A region that the device, its handler and the owner's handle share.
pub(super) type Shared = Arc<Mutex<Region>>;

pub(super) fn held(region: &Shared) -> MutexGuard<'_, Region> {
    region.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves the one queue.
#[derive(Debug)]
pub(super) struct Plugger<P> {
    pub(super) region: Shared,
    pub(super) memory: P,
    pub(super) reached: Reached,
    pub(super) failed: Counter,
}

impl<P: PlugMemory> Plugger<P> {
    pub(super) fn answer(&self, request: Request) -> Answer {
        let mut region = held(&self.region);
        match request {
            Request::Plug { addr, blocks } => self.plug(&mut region, addr, blocks),
            Request::Unplug { addr, blocks } => self.unplug(&mut region, addr, blocks),
            Request::UnplugAll => self.unplug_all(&mut region),
            Request::State { addr, blocks } => {
                region.find(addr, blocks).map_or(Answer::Error, |range| Answer::State(region.state(range)))
            }
            Request::Unknown => Answer::Error,
        }
    }

    fn plug(&self, region: &mut Region, addr: u64, blocks: u16) -> Answer {
        let Some(range) = region.find(addr, blocks).filter(|r| region.state(r.clone()) == Plugged::None)
        else {
            return Answer::Error;
        };
        if region.count + u64::from(blocks) > region.goal.blocks {
            return Answer::Nack;
        }
        if self.memory.plug(GuestAddress(addr), u64::from(blocks) * BLOCK_BYTES).is_err() {
            self.failed.add(1);
            return Answer::Busy;
        }
        region.set(range, true);
        Answer::Ack
    }

    fn unplug(&self, region: &mut Region, addr: u64, blocks: u16) -> Answer {
        let Some(range) = region.find(addr, blocks).filter(|r| region.state(r.clone()) == Plugged::All)
        else {
            return Answer::Error;
        };
        if self.memory.unplug(GuestAddress(addr), u64::from(blocks) * BLOCK_BYTES).is_err() {
            self.failed.add(1);
            return Answer::Busy;
        }
        region.set(range, false);
        Answer::Ack
    }

    /// Block by block: they lie anywhere.
    fn unplug_all(&self, region: &mut Region) -> Answer {
        for index in 0..region.plugged.len() {
            if region.plugged.get(index).copied().unwrap_or(false) {
                let addr = region.start + index as u64 * BLOCK_BYTES;
                if self.memory.unplug(GuestAddress(addr), BLOCK_BYTES).is_err() {
                    self.failed.add(1);
                    return Answer::Busy;
                }
                region.set(index..index + 1, false);
            }
        }
        Answer::Ack
    }
}

impl<P: PlugMemory> ServeChain for Plugger<P> {
    fn serve<'m>(
        &mut self,
        mem: &'m GuestMemoryMmap,
        chain: DescriptorChain<&'m GuestMemoryMmap>,
    ) -> Result<u32, ChainError> {
        let mut chain = Chain::parse(mem, chain)?;
        let request = Request::parse(&mut chain.readable)?;
        // What cannot be answered is not done either.
        if chain.writable.len() < ANSWER_BYTES {
            return Err(ChainError::TooShort);
        }
        let bytes = self.answer(request).bytes();
        chain.writable.write(&bytes);
        let reached = held(&self.region).reached();
        self.reached.tell(reached);
        Ok(bytes.len() as u32)
    }
}
