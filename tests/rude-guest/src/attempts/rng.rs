//! Requests that are too large, and buffers that hold something (virtio 1.3, 5.4.6).

use crate::device::Device;
use crate::memory::{ADDED, MEMORY_END};
use crate::requests::{ANSWER, SPARE};
use crate::ring::{Buffer, End, USUAL_SIZE};
use crate::tally::{Must, Outcome, Tally, answered, refused};

/// Most that a device gives at once (a device may give less than there is room for: 5.4.6.2).
const MOST: u32 = 64 * 1024;

pub(super) fn run(device: &Device, tally: &mut Tally) {
    tally.attempt(device, "a quarter of a GiB at once", Must::Answer, all_of_memory);
    tally.attempt(device, "a buffer that is not writable", Must::Refuse, not_writable);
    tally.attempt(device, "over its own ring", Must::Live, over_its_ring);
    tally.attempt(device, "into memory that may be added and is not", Must::Live, into_added);
}

fn all_of_memory(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    let mut buffers = [Buffer::writable(SPARE, (MEMORY_END - SPARE) as u32); USUAL_SIZE as usize];
    buffers[0] = Buffer::writable(ANSWER, MOST / 2);
    buffers[1] = Buffer::writable(ANSWER + u64::from(MOST), MOST / 2);
    live.rings[0].offer_chain(0, &buffers);
    match live.rings[0].ask(device) {
        End::Used { len, .. } => answered(len > 0 && len <= MOST, "a request is not bounded"),
        _ => Outcome::Bad("it is not answered"),
    }
}

fn not_writable(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    live.rings[0].offer_chain(0, &[Buffer::readable(ANSWER, 64)]);
    refused(matches!(live.rings[0].ask(device), End::Used { len: 0, .. }), "it writes what it may not")
}

fn over_its_ring(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    let ring = live.rings[0];
    for at in [ring.descriptors, ring.available, ring.used] {
        live.rings[0].offer_chain(0, &[Buffer::writable(at, 512)]);
        device.notify(0);
        let _whatever = live.rings[0].wait_briefly(device);
    }
    match device.needs_reset() {
        true => Outcome::NeedsReset,
        false => Outcome::Answered,
    }
}

fn into_added(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    live.rings[0].offer_chain(0, &[Buffer::writable(ADDED, 4096)]);
    match live.rings[0].ask(device) {
        End::Used { len: 0, .. } => Outcome::Refused,
        End::Used { .. } => Outcome::Answered,
        _ => Outcome::Bad("it is not answered"),
    }
}
