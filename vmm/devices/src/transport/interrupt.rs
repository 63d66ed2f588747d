//! The interrupt line of one device: status bits and configuration generation that outlive activations.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::device::Interrupt;
use crate::state::{Reader, StateError, Writer};

/// `VIRTIO_MMIO_INT_VRING`: buffers were used.
pub(super) const USED_QUEUE: u32 = 1;
/// `VIRTIO_MMIO_INT_CONFIG`: the configuration changed.
pub(super) const CONFIG_CHANGED: u32 = 2;

/// State that the transport and the device's handlers share.
#[derive(Debug)]
pub(super) struct InterruptLine {
    event: EventFd,
    status: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    shared: AtomicBool,
}

impl InterruptLine {
    pub(super) fn new(event: EventFd) -> Self {
        Self {
            event,
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            shared: AtomicBool::new(false),
        }
    }

    pub(super) fn status(&self) -> u32 {
        let always = if self.shared.load(Ordering::SeqCst) { USED_QUEUE } else { 0 };
        self.status.load(Ordering::SeqCst) | always
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn is_broken(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// The generation goes on: a driver must see that what it read before the reset is old.
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
        self.shared.store(false, Ordering::SeqCst);
    }

    /// Bits that are set, and the generation.
    pub(super) fn save(&self, to: &mut Writer) {
        to.u32(self.status.load(Ordering::SeqCst));
        to.u32(self.generation());
    }

    /// What [`InterruptLine::save`] wrote.
    pub(super) fn restore(&self, from: &mut Reader<'_>) -> Result<(), StateError> {
        self.status.store(from.u32()? & (USED_QUEUE | CONFIG_CHANGED), Ordering::SeqCst);
        self.generation.store(from.u32()?, Ordering::SeqCst);
        Ok(())
    }

    /// Raises the line if a bit is set: whether the guest has seen the interrupt before it was saved is not known, and one too many
    /// does no harm.
    pub(super) fn raise_again(&self) {
        if self.status.load(Ordering::SeqCst) != 0 {
            // Fails only when the counter is full, and then the line is already up.
            let _already_up = self.event.write(1);
        }
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        // Fails only when the counter is full, and then the line is already up.
        let _already_up = self.event.write(1);
    }
}

impl Interrupt for InterruptLine {
    fn used_queue(&self) {
        self.raise(USED_QUEUE);
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIG_CHANGED);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(CONFIG_CHANGED);
    }

    fn share_with_other_process(&self) -> std::io::Result<EventFd> {
        let event = self.event.try_clone()?;
        self.shared.store(true, Ordering::SeqCst);
        Ok(event)
    }
}
