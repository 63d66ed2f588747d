//! virtio-mmio, version 2 (virtio 1.3, 4.2): one register window in front of one device.
//!
//! All access comes from vCPU threads, one at a time. The states and what each allows are in [`status`]; queue registers are
//! written only between `FEATURES_OK` and `DRIVER_OK`, so what a running device was given can never change under it.

mod interrupt;
mod queue;
mod registers;
mod state;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{ActivateContext, ActiveQueue, EventLoop, GuestMem, HandlerId, Interrupt, VirtioDevice};
use interrupt::InterruptLine;
use queue::{Half, QueueSetup, Ring};
use registers as reg;
pub use registers::QUEUE_NOTIFY;
use status::{Status, Step, bit};

/// Bit 32: the device follows virtio 1.0 or later. No other kind of driver is served.
pub const F_VERSION_1: u64 = 1 << 32;
/// Bit 29: notifications are asked for by ring index.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// Size of the register window, bytes.
pub const WINDOW_BYTES: u64 = 0x1000;

/// A device behind its register window.
#[derive(Debug)]
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    mem: GuestMem,
    event_loop: Arc<dyn EventLoop>,
    line: Arc<InterruptLine>,
    status: Status,
    queues: Vec<QueueSetup>,
    kicks: Vec<EventFd>,
    handlers: Vec<HandlerId>,
    device_features_page: u32,
    driver_features_page: u32,
    driver_features: u64,
    selected_queue: u32,
}

impl MmioTransport {
    /// Puts `device` behind a window. `irq` is signalled for interrupts; handlers run on `event_loop`.
    ///
    /// # Errors
    /// When the eventfds for the queues cannot be made.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        mem: GuestMem,
        irq: EventFd,
        event_loop: Arc<dyn EventLoop>,
    ) -> std::io::Result<Self> {
        let queues: Vec<_> = device.queue_max_sizes().iter().map(|max| QueueSetup::new(*max)).collect();
        let kicks = queues.iter().map(|_| EventFd::new(EFD_NONBLOCK)).collect::<Result<_, _>>()?;
        Ok(Self {
            device,
            mem,
            event_loop,
            line: Arc::new(InterruptLine::new(irq)),
            status: Status::Reset,
            queues,
            kicks,
            handlers: Vec::new(),
            device_features_page: 0,
            driver_features_page: 0,
            driver_features: 0,
            selected_queue: 0,
        })
    }

    /// One eventfd per queue, to be signalled when the driver writes the queue's number to [`QUEUE_NOTIFY`].
    #[must_use]
    pub fn queue_kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// The device's short name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.device.name()
    }

    /// The device's counters.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.device.counters()
    }

    /// A load of `data.len()` bytes at `offset` in the window. Registers are read as aligned 32-bit words; any other access to
    /// them reads zero. The configuration space is read in 1 to 8 bytes.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(reg::CONFIG) {
            if (1..=8).contains(&data.len()) {
                self.device.read_config(at, data);
            }
        } else if offset.is_multiple_of(4)
            && let Ok(word) = <&mut [u8; 4]>::try_from(data)
        {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    /// A store of `data` at `offset` in the window; widths as for [`MmioTransport::read`], anything else is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(reg::CONFIG) {
            if (1..=8).contains(&data.len()) && self.status.config_open() {
                self.device.write_config(at, data);
            }
        } else if offset.is_multiple_of(4)
            && let Ok(word) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            reg::MAGIC => reg::MAGIC_VALUE,
            reg::VERSION => reg::VERSION_VALUE,
            reg::DEVICE_ID => self.device.device_type(),
            reg::VENDOR_ID => reg::VENDOR_VALUE,
            reg::DEVICE_FEATURES => page(self.device.features(), self.device_features_page),
            reg::QUEUE_NUM_MAX => self.queue().map_or(0, |q| u32::from(q.max_size())),
            reg::QUEUE_READY => self.queue().map_or(0, |q| u32::from(q.ready)),
            reg::INTERRUPT_STATUS => self.line.status(),
            reg::STATUS => self.status_bits(),
            reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH => reg::NO_SHARED_MEMORY,
            reg::CONFIG_GENERATION => self.line.generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            reg::DEVICE_FEATURES_SEL => self.device_features_page = value,
            reg::DRIVER_FEATURES_SEL => self.driver_features_page = value,
            reg::DRIVER_FEATURES if self.status.features_open() => self.accept_features(value),
            reg::QUEUE_SEL => self.selected_queue = value,
            QUEUE_NOTIFY if self.status == Status::Live => self.kick(value),
            reg::INTERRUPT_ACK => self.line.acknowledge(value),
            reg::STATUS => self.step(value),
            _ if self.status.queues_open() => self.write_queue_register(offset, value),
            _ => {}
        }
    }

    fn write_queue_register(&mut self, offset: u64, value: u32) {
        let Some(queue) = usize::try_from(self.selected_queue).ok().and_then(|n| self.queues.get_mut(n))
        else {
            return;
        };
        match offset {
            reg::QUEUE_NUM => queue.set_size(value),
            reg::QUEUE_READY => queue.ready = value == 1,
            reg::QUEUE_DESC_LOW => queue.set_address(Ring::Descriptors, Half::Low, value),
            reg::QUEUE_DESC_HIGH => queue.set_address(Ring::Descriptors, Half::High, value),
            reg::QUEUE_DRIVER_LOW => queue.set_address(Ring::Available, Half::Low, value),
            reg::QUEUE_DRIVER_HIGH => queue.set_address(Ring::Available, Half::High, value),
            reg::QUEUE_DEVICE_LOW => queue.set_address(Ring::Used, Half::Low, value),
            reg::QUEUE_DEVICE_HIGH => queue.set_address(Ring::Used, Half::High, value),
            _ => {}
        }
    }

    fn queue(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.selected_queue).ok()?)
    }

    fn status_bits(&self) -> u32 {
        let broken = if self.line.is_broken() { bit::NEEDS_RESET } else { 0 };
        u32::from(self.status.bits() | broken)
    }

    fn accept_features(&mut self, value: u32) {
        self.driver_features = match self.driver_features_page {
            0 => self.driver_features & !u64::from(u32::MAX) | u64::from(value),
            1 => self.driver_features & u64::from(u32::MAX) | u64::from(value) << 32,
            _ => return,
        };
    }

    fn kick(&self, queue: u32) {
        let ready = usize::try_from(queue).ok().filter(|n| self.queues.get(*n).is_some_and(|q| q.ready));
        if let Some(kick) = ready.and_then(|n| self.kicks.get(n)) {
            // Fails only when the counter is full, and then the handler is already called.
            let _already_rung = kick.write(1);
        }
    }

    fn step(&mut self, value: u32) {
        match self.status.step(value) {
            Step::Stay => {}
            Step::Go(status) => self.status = status,
            Step::SettleFeatures if self.features_are_good() => self.status = Status::FeaturesOk,
            Step::SettleFeatures => {}
            Step::Activate => {
                self.status = if self.activate() { Status::Live } else { Status::NeedsReset };
                if self.status == Status::NeedsReset {
                    self.line.needs_reset();
                }
            }
            Step::Reset => self.reset(),
        }
    }

    /// Nothing that was not offered, and the one feature without which the registers would mean something else.
    fn features_are_good(&self) -> bool {
        self.driver_features & !self.device.features() == 0 && self.driver_features & F_VERSION_1 != 0
    }

    fn activate(&mut self) -> bool {
        let Some(queues) = self.active_queues() else { return false };
        let context = ActivateContext {
            mem: Arc::clone(&self.mem),
            interrupt: Arc::clone(&self.line) as Arc<dyn Interrupt>,
            features: self.driver_features,
            queues,
        };
        let Ok(handlers) = self.device.activate(context) else { return false };
        for handler in handlers {
            match self.event_loop.add(handler) {
                Ok(id) => self.handlers.push(id),
                Err(_) => return false,
            }
        }
        true
    }

    /// The queues that the driver made ready; `None` if one of them is not sound.
    fn active_queues(&self) -> Option<Vec<ActiveQueue>> {
        let event_idx = self.driver_features & F_EVENT_IDX != 0;
        let ready = self.queues.iter().zip(&self.kicks).enumerate().filter(|(_, (setup, _))| setup.ready);
        ready
            .map(|(index, (setup, kick))| {
                let queue = setup.build(&self.mem, event_idx)?;
                Some(ActiveQueue { index, queue, kick: kick.try_clone().ok()? })
            })
            .collect()
    }

    fn reset(&mut self) {
        if self.status == Status::Reset {
            return;
        }
        for id in self.handlers.drain(..) {
            // Fails only when the loop has ended, and then no handler runs any more.
            let _loop_ended = self.event_loop.remove(id);
        }
        self.device.reset();
        for queue in &mut self.queues {
            *queue = QueueSetup::new(queue.max_size());
        }
        self.line.reset();
        self.status = Status::Reset;
        self.driver_features = 0;
        self.driver_features_page = 0;
        self.device_features_page = 0;
        self.selected_queue = 0;
    }
}

/// 32 bits of a feature set: page 0 is bits 0 to 31, page 1 bits 32 to 63; there are no more.
fn page(features: u64, page: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = features.to_le_bytes();
    match page {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}
