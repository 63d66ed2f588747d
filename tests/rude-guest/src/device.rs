//! A register window (virtio 1.3, 4.2.2) as a driver uses it, or as none should.

use crate::ring::{Buffer, MOST_QUEUES, Ring};
use crate::sys;

pub(crate) mod reg {
    //! Offsets of registers.
    pub(crate) const MAGIC: u64 = 0x000;
    pub(crate) const DEVICE_ID: u64 = 0x008;
    pub(crate) const DEVICE_FEATURES: u64 = 0x010;
    pub(crate) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(crate) const DRIVER_FEATURES: u64 = 0x020;
    pub(crate) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(crate) const QUEUE_SEL: u64 = 0x030;
    pub(crate) const QUEUE_NUM_MAX: u64 = 0x034;
    pub(crate) const QUEUE_NUM: u64 = 0x038;
    pub(crate) const QUEUE_READY: u64 = 0x044;
    pub(crate) const QUEUE_NOTIFY: u64 = 0x050;
    pub(crate) const INTERRUPT_STATUS: u64 = 0x060;
    pub(crate) const INTERRUPT_ACK: u64 = 0x064;
    pub(crate) const STATUS: u64 = 0x070;
    pub(crate) const QUEUE_DESC: u64 = 0x080;
    pub(crate) const QUEUE_DRIVER: u64 = 0x090;
    pub(crate) const QUEUE_DEVICE: u64 = 0x0a0;
    pub(crate) const CONFIG: u64 = 0x100;
}

pub(crate) mod status {
    //! Bits of the status register (2.1).
    pub(crate) const ACKNOWLEDGE: u32 = 1;
    pub(crate) const DRIVER: u32 = 2;
    pub(crate) const DRIVER_OK: u32 = 4;
    pub(crate) const FEATURES_OK: u32 = 8;
    pub(crate) const NEEDS_RESET: u32 = 0x40;
    pub(crate) const FAILED: u32 = 0x80;
    pub(crate) const NEGOTIATED: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    pub(crate) const LIVE: u32 = NEGOTIATED | DRIVER_OK;
}

/// Size of a window, bytes.
pub(crate) const WINDOW_BYTES: u64 = 0x1000;
pub(crate) const F_VERSION_1: u64 = 1 << 32;
pub(crate) const F_INDIRECT_DESC: u64 = 1 << 28;
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
/// Room where no memory is.
pub(crate) const HOLE_BUFFER: Buffer = Buffer::writable(crate::memory::HOLE + (1 << 20), 4096);
const MAGIC_VALUE: u32 = 0x7472_6976;

/// Which device it is, by its id (section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Net,
    Blk,
    Console,
    Rng,
    Balloon,
    Vsock,
    Mem,
    Fs,
}

impl Kind {
    fn of(id: u32) -> Option<Self> {
        Some(match id {
            1 => Self::Net,
            2 => Self::Blk,
            3 => Self::Console,
            4 => Self::Rng,
            5 => Self::Balloon,
            19 => Self::Vsock,
            24 => Self::Mem,
            26 => Self::Fs,
            _ => return None,
        })
    }
}

/// A device behind its window.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Device {
    pub(crate) base: u64,
    pub(crate) kind: Kind,
    /// Queues that it has.
    pub(crate) queues: u32,
}

impl Device {
    /// What is behind a window; none when it is nothing that is known.
    pub(crate) fn find(base: u64) -> Option<Self> {
        let kind = Kind::of(u32::try_from(sys::load(base + reg::DEVICE_ID, 4)).ok()?)?;
        let mut device = Self { base, kind, queues: 0 };
        let there =
            |device: &Self| device.read(reg::MAGIC) == MAGIC_VALUE && device.size_of(device.queues) > 0;
        while (device.queues as usize) < MOST_QUEUES && there(&device) {
            device.queues += 1;
        }
        device.reset();
        Some(device)
    }

    pub(crate) fn name(&self) -> &'static str {
        match self.kind {
            Kind::Net => "net",
            Kind::Blk => "blk",
            Kind::Console => "console",
            Kind::Rng => "rng",
            Kind::Balloon => "balloon",
            Kind::Vsock => "vsock",
            Kind::Mem => "mem",
            Kind::Fs => "fs",
        }
    }

    pub(crate) fn read(&self, register: u64) -> u32 {
        // Four bytes were read.
        sys::load(self.base + register, 4) as u32
    }

    pub(crate) fn write(&self, register: u64, value: u32) {
        sys::store(self.base + register, 4, value.into());
    }

    /// An address in two registers, the low half first.
    pub(crate) fn write_address(&self, register: u64, address: u64) {
        self.write(register, address as u32);
        self.write(register + 4, (address >> 32) as u32);
    }

    pub(crate) fn status(&self) -> u32 {
        self.read(reg::STATUS)
    }

    pub(crate) fn set_status(&self, status: u32) {
        self.write(reg::STATUS, status);
    }

    pub(crate) fn needs_reset(&self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    pub(crate) fn reset(&self) {
        self.set_status(0);
    }

    /// Most entries of a queue; 0 when there is no such queue.
    pub(crate) fn size_of(&self, queue: u32) -> u32 {
        self.write(reg::QUEUE_SEL, queue);
        self.read(reg::QUEUE_NUM_MAX)
    }

    pub(crate) fn offered(&self) -> u64 {
        self.write(reg::DEVICE_FEATURES_SEL, 0);
        let low = self.read(reg::DEVICE_FEATURES);
        self.write(reg::DEVICE_FEATURES_SEL, 1);
        u64::from(self.read(reg::DEVICE_FEATURES)) << 32 | u64::from(low)
    }

    pub(crate) fn accept(&self, features: u64) {
        self.write(reg::DRIVER_FEATURES_SEL, 0);
        self.write(reg::DRIVER_FEATURES, features as u32);
        self.write(reg::DRIVER_FEATURES_SEL, 1);
        self.write(reg::DRIVER_FEATURES, (features >> 32) as u32);
    }

    /// From a reset to settled features (3.1.1, steps 1 to 6); false when the device does not take them.
    pub(crate) fn negotiate(&self, features: u64) -> bool {
        self.reset();
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        self.accept(features);
        self.set_status(status::NEGOTIATED);
        self.status() == status::NEGOTIATED
    }

    /// Tells the device of a queue.
    pub(crate) fn set_queue(&self, ring: &Ring) {
        self.write(reg::QUEUE_SEL, ring.index);
        self.write(reg::QUEUE_NUM, ring.size.into());
        self.write_address(reg::QUEUE_DESC, ring.descriptors);
        self.write_address(reg::QUEUE_DRIVER, ring.available);
        self.write_address(reg::QUEUE_DEVICE, ring.used);
        self.write(reg::QUEUE_READY, 1);
    }

    /// Sets `DRIVER_OK`; false when the device does not start.
    pub(crate) fn start(&self) -> bool {
        self.set_status(status::LIVE);
        self.status() == status::LIVE
    }

    pub(crate) fn notify(&self, queue: u32) {
        self.write(reg::QUEUE_NOTIFY, queue);
    }

    /// All that it offers but notifications by index, which would let it stay silent about what this driver only looks for.
    pub(crate) fn wanted(&self) -> u64 {
        self.offered() & !F_EVENT_IDX
    }

    /// A device that runs, with all of its queues.
    pub(crate) fn live(&self) -> Option<Live<'_>> {
        self.live_with(self.wanted(), crate::ring::USUAL_SIZE)
    }

    /// The same with these features and sizes of queues, where queues may be so large.
    pub(crate) fn live_with(&self, features: u64, size: u16) -> Option<Live<'_>> {
        if !self.negotiate(features) {
            return None;
        }
        let rings = core::array::from_fn(|n| {
            let index = n as u32;
            let most = u16::try_from(self.size_of(index)).unwrap_or(u16::MAX).max(1);
            let ring = Ring::new(index, size.min(most));
            if index < self.queues {
                self.set_queue(&ring);
            }
            ring
        });
        self.start().then_some(Live { device: self, rings })
    }
}

/// A device that runs.
#[derive(Debug)]
pub(crate) struct Live<'d> {
    pub(crate) device: &'d Device,
    pub(crate) rings: [Ring; MOST_QUEUES],
}
