//! One good request for each kind of device, and whether it is served.

use crate::device::{Device, Kind, Live};
use crate::memory;
use crate::ring::{Buffer, End};

/// Where requests begin, and where answers go, in the arena.
pub(crate) const REQUEST: u64 = 0x200_0000;
pub(crate) const ANSWER: u64 = 0x210_0000;
/// Buffers for what a device sends by itself.
pub(crate) const INCOMING: u64 = 0x220_0000;
/// Pages that hold nothing, for the balloon.
pub(crate) const SPARE: u64 = 0x300_0000;
/// Bytes of each part that are cleared before a request.
const CLEARED: u64 = 0x2000;

pub(crate) const SECTOR: u32 = 512;
/// First bytes of every disk: who set up the machine wrote them.
pub(crate) const DISK_MAGIC: &[u8; 8] = b"HYPRDISK";
pub(crate) const BLK_OK: u8 = 0;
pub(crate) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(crate) const NET_HEADER: usize = 12;
pub(crate) const CID: u64 = 3;
/// A port of the host that nobody serves, and one that is served.
pub(crate) const CLOSED_PORT: u32 = 9;
pub(crate) const OPEN_PORT: u32 = 1026;
pub(crate) const FUSE_INIT: u32 = 26;

/// The parts of a request: what the device reads at [`REQUEST`], what it writes at [`ANSWER`], and by which queue.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) queue: usize,
    pub(crate) reads: u32,
    pub(crate) writes: u32,
}

/// How a good request of a kind looks.
pub(crate) fn shape(kind: Kind) -> Shape {
    let (queue, reads, writes) = match kind {
        Kind::Net => (1, 12 + 60, 0),
        Kind::Blk => (0, 16, SECTOR + 1),
        Kind::Console => (1, 8, 0),
        Kind::Rng => (0, 0, 64),
        Kind::Balloon => (0, 4, 0),
        Kind::Vsock => (1, 44, 0),
        Kind::Mem => (0, 24, 10),
        Kind::Fs => (1, 40 + 16, 16 + 64),
    };
    Shape { queue, reads, writes }
}

/// Writes what the device is to read.
pub(crate) fn prepare(kind: Kind) {
    memory::fill(REQUEST, CLEARED, 0);
    memory::fill(ANSWER, CLEARED, 0xaa);
    match kind {
        Kind::Net => frame(0, 0, 0, 0, 0),
        // A read of sector 0.
        Kind::Blk | Kind::Rng => {}
        Kind::Console => memory::write(REQUEST, b"console\n"),
        Kind::Balloon => memory::write(REQUEST, &page(SPARE).to_le_bytes()),
        Kind::Vsock => Packet::request(CLOSED_PORT).put(),
        // STATE of one block.
        Kind::Mem => mem_request(3, memory::ADDED, 1),
        Kind::Fs => fuse(FUSE_INIT, 40 + 16),
    }
}

/// Number of the page at an address.
pub(crate) fn page(address: u64) -> u32 {
    (address / 4096) as u32
}

/// A frame of 60 bytes to everyone behind a header of these fields (5.1.6).
pub(crate) fn frame(flags: u8, gso: u8, gso_size: u16, csum_start: u16, csum_offset: u16) {
    memory::fill(REQUEST, 72, 0);
    memory::write(REQUEST, &[flags, gso]);
    for (at, field) in [(4, gso_size), (6, csum_start), (8, csum_offset)] {
        memory::write(REQUEST + at, &field.to_le_bytes());
    }
    memory::write(REQUEST + 12, &[0xff; 6]);
    memory::write(REQUEST + 18, &MAC);
}

/// A request of virtio-mem (5.15.6.2).
pub(crate) fn mem_request(kind: u16, address: u64, blocks: u16) {
    memory::fill(REQUEST, 24, 0);
    memory::write(REQUEST, &kind.to_le_bytes());
    memory::write(REQUEST + 8, &address.to_le_bytes());
    memory::write(REQUEST + 16, &blocks.to_le_bytes());
}

/// A FUSE request of no node: its header, which says that all of it is `len` bytes long, and for INIT the version.
pub(crate) fn fuse(opcode: u32, len: u32) {
    memory::fill(REQUEST, CLEARED, 0);
    for (at, field) in [(0, len), (4, opcode), (8, 7), (40, 7), (44, 31), (48, 1 << 16)] {
        memory::write(REQUEST + at, &field.to_le_bytes());
    }
}

/// A packet header of virtio-vsock (5.10.6).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packet {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) from_port: u32,
    pub(crate) to_port: u32,
    pub(crate) len: u32,
    pub(crate) kind: u16,
    pub(crate) op: u16,
    pub(crate) flags: u32,
    pub(crate) window: u32,
    pub(crate) forwarded: u32,
}

impl Packet {
    /// Asks for a connection from guest port 1 on.
    pub(crate) fn request(to_port: u32) -> Self {
        Self {
            from: CID,
            to: 2,
            from_port: 1,
            to_port,
            len: 0,
            kind: 1,
            op: 1,
            flags: 0,
            window: 1 << 16,
            forwarded: 0,
        }
    }

    pub(crate) fn put(self) {
        self.put_at(REQUEST);
    }

    pub(crate) fn put_at(self, at: u64) {
        memory::write(at, &self.from.to_le_bytes());
        memory::write(at + 8, &self.to.to_le_bytes());
        for (n, field) in [self.from_port, self.to_port, self.len].into_iter().enumerate() {
            memory::write(at + 16 + 4 * n as u64, &field.to_le_bytes());
        }
        memory::write(at + 28, &self.kind.to_le_bytes());
        memory::write(at + 30, &self.op.to_le_bytes());
        for (n, field) in [self.flags, self.window, self.forwarded].into_iter().enumerate() {
            memory::write(at + 32 + 4 * n as u64, &field.to_le_bytes());
        }
    }
}

/// Operation and ports (from, to) of a packet that came.
pub(crate) fn packet_at(at: u64) -> (u16, u32, u32) {
    let port = |at| u32::from_le_bytes(memory::read(at));
    (u16::from_le_bytes(memory::read(at + 30)), port(at + 16), port(at + 20))
}

/// The buffers of a good request; how many there are.
pub(crate) fn buffers(kind: Kind) -> ([Buffer; 2], usize) {
    let Shape { reads, writes, .. } = shape(kind);
    let readable = Buffer::readable(REQUEST, reads);
    let writable = Buffer::writable(ANSWER, writes);
    match (reads, writes) {
        (0, _) => ([writable; 2], 1),
        (_, 0) => ([readable; 2], 1),
        _ => ([readable, writable], 2),
    }
}

/// Resets the device, sets it up as a driver does, and has it serve a request. It is left reset.
pub(crate) fn good(device: &Device) -> Result<(), &'static str> {
    let Some(mut live) = device.live() else {
        device.reset();
        return Err("it does not start");
    };
    let served = good_on(&mut live);
    device.reset();
    served
}

/// Has a device that runs serve a good request.
pub(crate) fn good_on(live: &mut Live<'_>) -> Result<(), &'static str> {
    let device = live.device;
    let kind = device.kind;
    prepare(kind);
    if matches!(kind, Kind::Net | Kind::Vsock) {
        live.rings[0].offer_chain(0, &[Buffer::writable(INCOMING, 4096)]);
        device.notify(0);
    }
    let (all, count) = buffers(kind);
    let ring = &mut live.rings[shape(kind).queue];
    ring.offer_chain(0, &all[..count]);
    let len = match ring.ask(device) {
        End::Used { head: 0, len } => len,
        End::Used { .. } => return Err("another head came back"),
        End::NeedsReset => return Err("it wants a reset"),
        End::Silence => return Err("a good request is not answered"),
    };
    served(live, len)
}

/// Whether the answer is right.
fn served(live: &mut Live<'_>, len: u32) -> Result<(), &'static str> {
    let device = live.device;
    let right = match device.kind {
        Kind::Blk => {
            let status = memory::read::<1>(ANSWER + u64::from(SECTOR))[0];
            len == SECTOR + 1 && status == BLK_OK && memory::read::<8>(ANSWER) == *DISK_MAGIC
        }
        Kind::Rng => len == 64 && memory::read::<16>(ANSWER) != [0xaa; 16],
        Kind::Mem => len == 10 && memory::read::<2>(ANSWER) == [0, 0],
        // The length of the answer, no error, and the number of the request.
        Kind::Fs => len >= 16 && memory::read::<12>(ANSWER + 4) == [0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0],
        Kind::Console | Kind::Balloon => len == 0,
        // Whoever has the other end of the wire sends the frame back.
        Kind::Net => match live.rings[0].wait(device) {
            End::Used { head: 0, len } => len == 72 && memory::read::<6>(INCOMING + 18) == MAC,
            _ => return Err("nothing comes in"),
        },
        Kind::Vsock => match live.rings[0].wait(device) {
            End::Used { head: 0, len } => len == 44 && packet_at(INCOMING) == (3, CLOSED_PORT, 1),
            _ => return Err("nothing comes in"),
        },
    };
    if right { Ok(()) } else { Err("a good request is answered wrongly") }
}
