//! Pages that are none, or that are in use (virtio 1.3, 5.5.6).

use crate::device::{Device, Live};
use crate::memory::{self, HOLE, MEMORY_END};
use crate::requests::{REQUEST, SPARE, page};
use crate::ring::{Buffer, End, Ring};
use crate::tally::{Must, Outcome, Tally, answered};

const DEFLATE: usize = 1;
const REPORT: usize = 2;

pub(super) fn run(device: &Device, tally: &mut Tally) {
    tally.attempt(device, "a page that is given is empty", Must::Answer, given);
    for (name, first, count) in [
        ("the page behind memory", page(MEMORY_END), 1),
        ("pages in the hole", page(HOLE), 64),
        ("pages at 4 GiB", 1 << 20, 64),
        ("the last page that there could be", u32::MAX, 1),
        ("pages up to the last", u32::MAX - 63, 64),
        ("one page a thousand times", page(SPARE), 0),
        ("more pages than one request may name", page(SPARE) + (1 << 20), 5000),
    ] {
        tally.attempt(device, name, Must::Answer, |d| pages(d, 0, first, count));
        tally.attempt(device, name, Must::Answer, |d| pages(d, DEFLATE, first, count));
    }
    tally.attempt(device, "part of a page number", Must::Answer, |d| on(d, 0, Buffer::readable(REQUEST, 3)));
    tally.attempt(device, "a page number and a part", Must::Answer, |d| {
        on(d, 0, Buffer::readable(REQUEST, 5))
    });
    tally.attempt(device, "the pages of its own rings", Must::Live, own_rings);
    if device.queues as usize > REPORT {
        for (name, buffer) in [
            ("report of what is behind memory", Buffer::writable(MEMORY_END, 4096)),
            ("report across the end of memory", Buffer::writable(MEMORY_END - 4096, 8192)),
            ("report of the hole", Buffer::writable(HOLE, 1 << 20)),
            ("report of 4 GiB", Buffer::writable(SPARE, u32::MAX)),
            ("report of nothing", Buffer::writable(SPARE, 0)),
            ("report that is not aligned", Buffer::writable(SPARE + 1, 4097)),
            ("report at the last page", Buffer::writable(u64::MAX - 4095, 4096)),
            ("report that wraps", Buffer::writable(u64::MAX - 4095, 8192)),
            ("report of what is read", Buffer::readable(SPARE, 4096)),
        ] {
            tally.attempt(device, name, Must::Answer, |d| on(d, REPORT, buffer));
        }
        tally.attempt(device, "report of its own rings", Must::Live, reported_rings);
    }
}

fn comes_back(live: &mut Live<'_>, queue: usize, buffer: Buffer) -> Outcome {
    live.rings[queue].offer_chain(0, &[buffer]);
    match live.rings[queue].ask(live.device) {
        End::Used { head: 0, len: 0 } => Outcome::Answered,
        End::NeedsReset => Outcome::NeedsReset,
        _ => Outcome::Bad("it does not come back as it was"),
    }
}

fn on(device: &Device, queue: usize, buffer: Buffer) -> Outcome {
    match device.live() {
        Some(mut live) => comes_back(&mut live, queue, buffer),
        None => Outcome::Bad("it does not start"),
    }
}

/// Names pages from `first` on; the same one a thousand times when `count` is 0.
fn pages(device: &Device, queue: usize, first: u32, count: u32) -> Outcome {
    let (count, step) = if count == 0 { (1000, 0) } else { (count, 1) };
    for n in 0..count {
        memory::write(REQUEST + 4 * u64::from(n), &(first.wrapping_add(n * step)).to_le_bytes());
    }
    on(device, queue, Buffer::readable(REQUEST, count * 4))
}

fn given(device: &Device) -> Outcome {
    memory::write(SPARE, b"something");
    match pages(device, 0, page(SPARE), 1) {
        Outcome::Answered => {
            answered(memory::read::<9>(SPARE) == [0; 9], "a page that was given is not empty")
        }
        other => other,
    }
}

fn rings_pages(ring: &Ring) -> [u32; 3] {
    [page(ring.descriptors), page(ring.available), page(ring.used)]
}

fn own_rings(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    for (n, page) in (0..).zip(rings_pages(&live.rings[0])) {
        memory::write(REQUEST + 4 * n, &page.to_le_bytes());
    }
    live.rings[0].offer_chain(0, &[Buffer::readable(REQUEST, 12)]);
    device.notify(0);
    match live.rings[0].wait_briefly(device) {
        End::NeedsReset => Outcome::NeedsReset,
        _ => Outcome::Answered,
    }
}

fn reported_rings(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    let ring = live.rings[REPORT];
    live.rings[REPORT].offer_chain(0, &[Buffer::writable(ring.descriptors, 1 << 16)]);
    device.notify(REPORT as u32);
    match live.rings[REPORT].wait_briefly(device) {
        End::NeedsReset => Outcome::NeedsReset,
        _ => Outcome::Answered,
    }
}
