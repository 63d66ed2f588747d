//! Blocks that are none, that are more than the guest is to have, and memory that is taken away (virtio 1.3, 5.15).

use crate::device::{Device, Live, reg};
use crate::memory::{self, ADDED};
use crate::owner::Owner;
use crate::requests::{ANSWER, REQUEST, mem_request};
use crate::ring::{Buffer, End};
use crate::tally::{Must, Outcome, Tally, answered};

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: u8 = 0;
const NACK: u8 = 1;
const ERROR: u8 = 3;
const BLOCK: u64 = 2 << 20;
/// Blocks of all that may be added, 128 MiB, and of what the owner then gives.
const ALL: u16 = 64;
const GIVEN: u16 = 32;

/// What is refused whatever the guest has: type, address, blocks, answer.
const ROWS: &[(&str, u16, u64, u16, u8)] = &[
    ("more than it is to have", PLUG, ADDED, 1, NACK),
    ("all of it", PLUG, ADDED, ALL, NACK),
    ("no blocks", PLUG, ADDED, 0, ERROR),
    ("more blocks than there are", PLUG, ADDED, ALL + 1, ERROR),
    ("65535 blocks", PLUG, ADDED, u16::MAX, ERROR),
    ("below the region", PLUG, ADDED - BLOCK, 1, ERROR),
    ("the memory at boot", PLUG, 0, 1, ERROR),
    ("behind the region", PLUG, ADDED + ALL as u64 * BLOCK, 1, ERROR),
    ("across the end", PLUG, ADDED + (ALL as u64 - 1) * BLOCK, 2, ERROR),
    ("not aligned", PLUG, ADDED + 4096, 1, ERROR),
    ("at the last address", PLUG, u64::MAX, 1, ERROR),
    ("at the last block that wraps", PLUG, u64::MAX - BLOCK + 1, 2, ERROR),
    ("unplug what is not plugged", UNPLUG, ADDED, 1, ERROR),
    ("unplug the memory at boot", UNPLUG, 0, 1, ERROR),
    ("unplug no blocks", UNPLUG, ADDED, 0, ERROR),
    ("unplug at the last address", UNPLUG, u64::MAX, u16::MAX, ERROR),
    ("state of what is none", STATE, 0, 1, ERROR),
    ("state of too much", STATE, ADDED, ALL + 1, ERROR),
    ("request 4", 4, ADDED, 1, ERROR),
    ("request 65535", u16::MAX, ADDED, 1, ERROR),
];

pub(super) fn run(device: &Device, owner: &mut Owner, tally: &mut Tally) {
    for (name, kind, at, blocks, answer) in ROWS {
        tally.attempt(device, name, Must::Refuse, |d| {
            expect(d, *kind, *at, *blocks, *answer, Outcome::Refused)
        });
    }
    for len in [0, 1, 7, 8, 17] {
        tally.attempt(device, "a request cut short", Must::Refuse, |d| cut(d, len, 10));
    }
    owner.ask("grow");
    for len in [0, 1, 9] {
        tally.attempt(device, "a request without room for its answer", Must::Refuse, |d| cut(d, 24, len));
    }
    tally.attempt(device, "nothing was plugged on the way", Must::Answer, |d| {
        answered(plugged(d) == 0, "a request that was given back unserved was served")
    });
    tally.attempt(device, "plug, use, plug twice, unplug in part", Must::Answer, in_order);
    tally.attempt(device, "unplug all, over and over", Must::Answer, unplug_all);
    owner.ask("shrink");
}

fn plugged(device: &Device) -> u64 {
    u64::from(device.read(reg::CONFIG + 44)) << 32 | u64::from(device.read(reg::CONFIG + 40))
}

fn ask(live: &mut Live<'_>, kind: u16, at: u64, blocks: u16) -> Option<u8> {
    mem_request(kind, at, blocks);
    memory::fill(ANSWER, 10, 0x77);
    live.rings[0].offer_chain(0, &[Buffer::readable(REQUEST, 24), Buffer::writable(ANSWER, 10)]);
    match live.rings[0].ask(live.device) {
        End::Used { len: 10, .. } => Some(memory::read::<1>(ANSWER)[0]),
        _ => None,
    }
}

fn expect(device: &Device, kind: u16, at: u64, blocks: u16, answer: u8, outcome: Outcome) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    if ask(&mut live, kind, at, blocks) == Some(answer) { outcome } else { Outcome::Bad("another answer") }
}

/// A request to plug a block, in buffers that are too short.
fn cut(device: &Device, reads: u32, writes: u32) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    mem_request(PLUG, ADDED, 1);
    live.rings[0].offer_chain(0, &[Buffer::readable(REQUEST, reads), Buffer::writable(ANSWER, writes)]);
    match live.rings[0].ask(device) {
        End::Used { len: 0, .. } => Outcome::Refused,
        _ => Outcome::Bad("it is answered"),
    }
}

/// By the steps of the list: each is type, first block, blocks, answer.
fn in_order(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    for (kind, first, blocks, answer) in [
        (PLUG, 0, GIVEN / 2, ACK),
        (PLUG, 0, 1, ERROR),
        (PLUG, GIVEN / 2 - 1, 2, ERROR),
        (STATE, 0, ALL, ACK),
        (PLUG, GIVEN, GIVEN / 2, ACK),
        (PLUG, ALL - 1, 1, NACK),
        (UNPLUG, GIVEN / 2 - 1, 2, ERROR),
        (UNPLUG, 3, 1, ACK),
        (UNPLUG, 3, 1, ERROR),
        (PLUG, ALL - 1, 1, ACK),
    ] {
        if ask(&mut live, kind, ADDED + u64::from(first) * BLOCK, blocks) != Some(answer) {
            return Outcome::Bad("another answer");
        }
    }
    answered(plugged(device) == u64::from(GIVEN) * BLOCK, "another size is told")
}

fn unplug_all(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    for _ in 0..10 {
        if ask(&mut live, UNPLUG_ALL, 0, 0) != Some(ACK) || ask(&mut live, PLUG, ADDED, GIVEN) != Some(ACK) {
            return Outcome::Bad("another answer");
        }
    }
    answered(
        ask(&mut live, UNPLUG_ALL, u64::MAX, u16::MAX) == Some(ACK) && plugged(device) == 0,
        "something is left",
    )
}
