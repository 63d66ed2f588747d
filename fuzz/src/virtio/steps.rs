//! One thing that a driver does.

use std::time::Instant;

use arbitrary::{Arbitrary, Result, Unstructured};
use vm_memory::{Bytes, GuestAddress};

use super::{SETTLE, Window};

/// Registers, virtio 1.3, 4.2.2.
const DRIVER_FEATURES_SEL: u64 = 0x24;
const DRIVER_FEATURES: u64 = 0x20;
const DEVICE_FEATURES_SEL: u64 = 0x14;
const DEVICE_FEATURES: u64 = 0x10;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM_MAX: u64 = 0x34;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const STATUS: u64 = 0x70;
const QUEUE_DESC: u64 = 0x80;
const QUEUE_DRIVER: u64 = 0x90;
const QUEUE_DEVICE: u64 = 0xa0;
const CONFIG: u64 = 0x100;
/// `ACKNOWLEDGE`, with `DRIVER`, with `FEATURES_OK`, with `DRIVER_OK`.
const WAY: [u32; 4] = [1, 3, 11, 15];

/// Where a good driver has its rings: a place of this many bytes for each queue.
const RINGS_AT: u64 = 0x1_0000;
const RINGS_BYTES: u64 = 0x1000;
/// And its buffers.
const BUFFERS_AT: u64 = 0x2_0000;
const BUFFERS_BYTES: u64 = 0x1_0000;
/// Entries of its rings.
const SIZE: u16 = 16;

/// One thing that a driver does.
pub(super) enum Step<'a> {
    /// A store to a register: offset in words.
    Register(u8, u32),
    /// A store anywhere in the window.
    Store(u16, &'a [u8]),
    /// A load from anywhere in it.
    Load(u16, u8),
    /// All that a good driver does, with these features left out.
    SetUp(u64),
    /// A descriptor of a queue.
    Describe {
        queue: u8,
        index: u8,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    },
    /// A chain of a request as a good driver would lay it out, then offered: (length, device may write) of its buffers.
    Offer {
        queue: u8,
        first: u8,
        buffers: &'a [u8],
    },
    /// Heads that are offered, and by how much the index moves.
    Publish {
        queue: u8,
        head: u16,
        ahead: u16,
    },
    /// Bytes in the buffers.
    Fill(u16, &'a [u8]),
    /// Bytes anywhere.
    Poke(u32, &'a [u8]),
    /// The driver rings.
    Notify(u8),
    Reset,
    /// The host's side does something.
    Host(u8),
    /// The machine is saved and goes on elsewhere.
    MoveOn,
    /// A machine goes on from a file that is not ours.
    Restore(&'a [u8]),
}

impl<'a> Step<'a> {
    pub(super) fn take(data: &mut Unstructured<'a>) -> Result<Self> {
        fn bytes<'a>(data: &mut Unstructured<'a>) -> Result<&'a [u8]> {
            let len = usize::from(u8::arbitrary(data)?).min(data.len());
            data.bytes(len)
        }
        Ok(match u8::arbitrary(data)? % 24 {
            0 => Self::Register(u8::arbitrary(data)?, u32::arbitrary(data)?),
            1 => Self::Store(u16::arbitrary(data)?, bytes(data)?),
            2 => Self::Load(u16::arbitrary(data)?, u8::arbitrary(data)?),
            3 | 4 => Self::SetUp(match u8::arbitrary(data)? {
                0..200 => 0,
                _ => u64::arbitrary(data)?,
            }),
            5 => Self::Describe {
                queue: u8::arbitrary(data)?,
                index: u8::arbitrary(data)?,
                address: u64::arbitrary(data)?,
                len: u32::arbitrary(data)?,
                flags: u16::arbitrary(data)?,
                next: u16::arbitrary(data)?,
            },
            6..=11 => Self::Offer {
                queue: u8::arbitrary(data)?,
                first: u8::arbitrary(data)?,
                buffers: {
                    let count = usize::from(u8::arbitrary(data)? % 6) * 2;
                    data.bytes(count.min(data.len()))?
                },
            },
            12 => Self::Publish {
                queue: u8::arbitrary(data)?,
                head: u16::arbitrary(data)?,
                ahead: u16::arbitrary(data)?,
            },
            13..=15 => Self::Fill(u16::arbitrary(data)?, bytes(data)?),
            16 => Self::Poke(u32::arbitrary(data)?, bytes(data)?),
            17 | 18 => Self::Notify(u8::arbitrary(data)?),
            19 => Self::Reset,
            20 | 21 => Self::Host(u8::arbitrary(data)?),
            22 => Self::MoveOn,
            _ => Self::Restore(bytes(data)?),
        })
    }

    pub(super) fn perform(&self, window: &mut Window) {
        match *self {
            Self::Register(word, value) => window.set(u64::from(word % 64) * 4, value),
            Self::Store(offset, bytes) => window.transport.write(u64::from(offset % 0x1000), bytes),
            Self::Load(offset, len) => {
                let mut place = [0; 16];
                let len = usize::from(len % 17);
                window.transport.read(u64::from(offset % 0x1000), place.get_mut(..len).unwrap_or_default());
            }
            Self::SetUp(left_out) => window.set_up(left_out),
            Self::Describe { queue, index, address, len, flags, next } => {
                // Half of the addresses are near the guest's memory.
                let address = if address & 1 == 0 { address >> 1 & 0x1f_ffff } else { address };
                window.describe(queue, u16::from(index % 16), address, len, flags, next);
            }
            Self::Offer { queue, first, buffers } => window.offer(queue, first, buffers),
            Self::Publish { queue, head, ahead } => window.publish(queue, head, ahead),
            Self::Fill(at, bytes) => {
                window.put(BUFFERS_AT + u64::from(at) % BUFFERS_BYTES, bytes);
            }
            Self::Poke(at, bytes) => window.put(u64::from(at % 0x12_0000), bytes),
            Self::Notify(queue) => window.notify(queue),
            Self::Reset => window.set(STATUS, 0),
            Self::Host(_) | Self::MoveOn | Self::Restore(_) => {}
        }
    }
}

fn rings(queue: u8) -> u64 {
    RINGS_AT + u64::from(queue % 4) * RINGS_BYTES
}

fn available(queue: u8) -> u64 {
    rings(queue) + 16 * u64::from(SIZE)
}

fn used(queue: u8) -> u64 {
    available(queue) + 0x100
}

impl Window {
    fn set(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    fn get(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(register, &mut word);
        u32::from_le_bytes(word)
    }

    /// Memory that is not there stays as it is.
    fn put(&self, at: u64, bytes: &[u8]) {
        drop(self.mem.write(bytes, GuestAddress(at)));
    }

    fn set_up(&mut self, left_out: u64) {
        self.set(STATUS, 0);
        let [acknowledge, driver, features_ok, driver_ok] = WAY;
        self.set(STATUS, acknowledge);
        self.set(STATUS, driver);
        for half in [0, 1] {
            self.set(DEVICE_FEATURES_SEL, half);
            let offered = self.get(DEVICE_FEATURES);
            let left_out = u32::try_from(left_out >> (32 * half) & u64::from(u32::MAX)).unwrap_or_default();
            self.set(DRIVER_FEATURES_SEL, half);
            self.set(DRIVER_FEATURES, offered & !left_out);
        }
        self.set(STATUS, features_ok);
        self.put(RINGS_AT, &[0; 4 * RINGS_BYTES as usize]);
        for queue in 0..4_u8 {
            self.set(QUEUE_SEL, queue.into());
            if self.get(QUEUE_NUM_MAX) == 0 {
                continue;
            }
            self.set(QUEUE_NUM, SIZE.into());
            for (register, address) in
                [(QUEUE_DESC, rings(queue)), (QUEUE_DRIVER, available(queue)), (QUEUE_DEVICE, used(queue))]
            {
                self.set(register, u32::try_from(address).unwrap_or_default());
                self.set(register + 4, 0);
            }
            self.set(QUEUE_READY, 1);
        }
        self.set(STATUS, driver_ok);
        let mut config = [0; 8];
        self.transport.read(CONFIG, &mut config);
    }

    fn describe(&self, queue: u8, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut entry = [0; 16];
        let fields = address.to_le_bytes().into_iter().chain(len.to_le_bytes());
        let fields = fields.chain(flags.to_le_bytes()).chain(next.to_le_bytes());
        entry.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
        self.put(rings(queue) + 16 * u64::from(index), &entry);
    }

    /// Buffers one after the other from the beginning of the buffers' place, two bytes each: length in units that depend on the second one's upper
    /// half, and whether the device may write.
    fn offer(&mut self, queue: u8, first: u8, buffers: &[u8]) {
        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        let first = u16::from(first) % SIZE;
        let mut at = BUFFERS_AT;
        let count = buffers.chunks_exact(2).len();
        for (index, pair) in (0_u16..).zip(buffers.chunks_exact(2)) {
            let [len, kind] = *pair else { continue };
            let unit = match kind >> 4 {
                0..10 => 1,
                10..13 => 16,
                13 => 512,
                14 => 4096,
                _ => 0x0100_0000,
            };
            let len = u32::from(len).wrapping_mul(unit);
            let last = usize::from(index) + 1 == count;
            let flags = if last { 0 } else { NEXT } | if kind & 1 == 1 { WRITE } else { 0 };
            let next = (first + index + 1) % SIZE;
            self.describe(queue, (first + index) % SIZE, at, len, flags, next);
            at += u64::from(len.min(4096));
        }
        self.publish(queue, first, 1);
        self.notify(queue);
    }

    /// Waits until all that was offered where a good driver has its first ring was used, or will not be.
    pub(super) fn settle(&self) {
        let index = |at: u64| self.mem.read_obj::<u16>(GuestAddress(at)).unwrap_or_default();
        let start = Instant::now();
        while index(available(0) + 2) != index(used(0) + 2) && start.elapsed() < SETTLE {
            std::thread::yield_now();
        }
    }

    fn publish(&self, queue: u8, head: u16, ahead: u16) {
        let index: u16 = self.mem.read_obj(GuestAddress(available(queue) + 2)).unwrap_or_default();
        self.put(available(queue) + 4 + 2 * u64::from(index % SIZE), &head.to_le_bytes());
        self.put(available(queue) + 2, &index.wrapping_add(ahead).to_le_bytes());
    }

    /// As KVM does it for a store to the register of notifications: through the eventfd.
    fn notify(&mut self, queue: u8) {
        match self.transport.queue_kicks().get(usize::from(queue)) {
            Some(kick) => drop(kick.write(1)),
            None => self.set(hyper_vmm_devices::transport::QUEUE_NOTIFY, queue.into()),
        }
    }
}
