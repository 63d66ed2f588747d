//! FUSE requests that lie about themselves (virtio 1.3, 5.11.6). Another process serves them; it may answer with an error, or not at
//! all, and must be there afterwards.

use crate::device::Device;
use crate::memory::{self, ARENA, MEMORY_END};
use crate::requests::{ANSWER, FUSE_INIT, REQUEST, fuse};
use crate::ring::{Buffer, End};
use crate::tally::{Must, Outcome, Tally};

const REQUESTS: usize = 1;
const HEADER: u32 = 40;
const ROOM: u32 = 4096;
const READ: u32 = 15;
const READDIR: u32 = 28;

pub(super) fn run(device: &Device, tally: &mut Tally) {
    tally.attempt(device, "a request that claims 4 GiB", Must::Refuse, |d| {
        ask(d, FUSE_INIT, u32::MAX, HEADER + 16)
    });
    tally
        .attempt(device, "a request that claims no bytes", Must::Live, |d| ask(d, FUSE_INIT, 0, HEADER + 16));
    tally.attempt(device, "a request that claims more than there is", Must::Live, |d| {
        ask(d, FUSE_INIT, 4096, HEADER + 16)
    });
    tally.attempt(device, "operations that there are not", Must::Refuse, unknown);
    tally.attempt(device, "a read of a file that is not open", Must::Refuse, |d| sized(d, READ, 4096));
    tally.attempt(device, "a read of 4 GiB", Must::Refuse, |d| sized(d, READ, u32::MAX));
    tally.attempt(device, "a folder read of 4 GiB", Must::Refuse, |d| sized(d, READDIR, u32::MAX));
    tally.attempt(device, "an answer into all of memory", Must::Refuse, all_of_memory);
}

/// What a file server does not bear: it ends, and so it is said to the guest (2.1.2). Nothing is served from here on.
pub(super) fn end(device: &Device, tally: &mut Tally) {
    let ended = match device.live() {
        Some(mut live) => {
            fuse(FUSE_INIT, HEADER);
            live.rings[REQUESTS]
                .offer_chain(0, &[Buffer::readable(REQUEST, 12), Buffer::writable(ANSWER, ROOM)]);
            match live.rings[REQUESTS].ask(device) {
                End::NeedsReset => Outcome::NeedsReset,
                End::Used { .. } => Outcome::Refused,
                End::Silence => Outcome::Bad("its server has ended, and it is silent"),
            }
        }
        None => Outcome::Bad("it does not start"),
    };
    device.reset();
    tally.note(device.name(), "part of a header, which ends the server", Must::NeedReset, ended);
    let again = match device.live() {
        None if device.needs_reset() => Outcome::NeedsReset,
        _ => Outcome::Bad("it starts without a server"),
    };
    device.reset();
    tally.note(device.name(), "a start without a server", Must::NeedReset, again);
}

fn come_to(end: End) -> Outcome {
    match end {
        End::NeedsReset => Outcome::NeedsReset,
        End::Silence => Outcome::Bad("it is silent"),
        End::Used { len, .. } if len >= 16 && memory::read::<4>(ANSWER + 4) == [0; 4] => Outcome::Answered,
        End::Used { .. } => Outcome::Refused,
    }
}

fn ask(device: &Device, opcode: u32, claimed: u32, reads: u32) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    fuse(opcode, claimed);
    let ring = &mut live.rings[REQUESTS];
    ring.offer_chain(0, &[Buffer::readable(REQUEST, reads), Buffer::writable(ANSWER, ROOM)]);
    come_to(ring.ask(device))
}

fn unknown(device: &Device) -> Outcome {
    for opcode in [7, 19, 100, 0x8000, u32::MAX] {
        match ask(device, opcode, HEADER, HEADER) {
            Outcome::Refused => {}
            other => return other,
        }
    }
    Outcome::Refused
}

/// Handle, offset and size of a read.
fn sized(device: &Device, opcode: u32, size: u32) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    fuse(opcode, HEADER + 40);
    memory::fill(REQUEST + u64::from(HEADER), 40, 0);
    memory::write(REQUEST + u64::from(HEADER) + 16, &size.to_le_bytes());
    let ring = &mut live.rings[REQUESTS];
    ring.offer_chain(0, &[Buffer::readable(REQUEST, HEADER + 40), Buffer::writable(ANSWER, ROOM)]);
    come_to(ring.ask(device))
}

fn all_of_memory(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    fuse(u32::MAX, HEADER);
    let ring = &mut live.rings[REQUESTS];
    let room = (MEMORY_END - ARENA - (1 << 22)) as u32;
    ring.offer_chain(
        0,
        &[
            Buffer::readable(REQUEST, HEADER),
            Buffer::writable(ANSWER, 64),
            Buffer::writable(ARENA + (1 << 22), room),
        ],
    );
    come_to(ring.ask(device))
}
