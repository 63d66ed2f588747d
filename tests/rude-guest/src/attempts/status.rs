//! The status register, features and resets (virtio 1.3, 2.1, 2.2, 3.1.1).

use crate::device::{Device, F_VERSION_1, Kind, reg, status};
use crate::memory;
use crate::requests;
use crate::ring::{Ring, USUAL_SIZE};
use crate::sys;
use crate::tally::{Must, Outcome, Tally, answered, refused};

/// Rounds of a reset with requests in flight.
const ROUNDS: u32 = 20;
/// Ticks for a device to go on in, after it has said that it does not.
const AFTERWARDS: u64 = 3_000_000;

pub(super) fn run(device: &Device, tally: &mut Tally) {
    tally.attempt(device, "DRIVER_OK before anything", Must::Refuse, |d| writes(d, &[status::LIVE], 0));
    tally.attempt(device, "FEATURES_OK before DRIVER", Must::Refuse, |d| writes(d, &[1, 9], 1));
    tally.attempt(device, "DRIVER before ACKNOWLEDGE", Must::Refuse, |d| writes(d, &[2], 0));
    tally.attempt(device, "DRIVER_OK without FEATURES_OK", Must::Refuse, |d| writes(d, &[1, 3, 7], 3));
    tally.attempt(device, "every value of the register", Must::Refuse, every_value);
    tally.attempt(device, "values above the register", Must::Refuse, above);
    tally.attempt(device, "FAILED, then on as if nothing were", Must::Refuse, failed);
    tally.attempt(device, "features that are not offered", Must::Refuse, unoffered);
    tally.attempt(device, "no features", Must::Refuse, |d| refused(!d.negotiate(0), "it takes no VERSION_1"));
    tally.attempt(device, "feature pages that are none", Must::Refuse, pages);
    tally.attempt(device, "features after FEATURES_OK", Must::Refuse, late_features);
    tally.attempt(device, "FEATURES_OK and DRIVER_OK again while it runs", Must::Refuse, again);
    tally.attempt(device, "DRIVER_OK with no queue", Must::NeedReset, no_queue);
    tally.attempt(device, "reset in each state", Must::Answer, reset_everywhere);
    // The threads of a file server finish what they have begun, whatever the device is told meanwhile.
    if device.kind != Kind::Fs {
        tally.attempt(device, "reset with requests in flight", Must::Answer, reset_in_flight);
    }
}

fn writes(device: &Device, values: &[u32], stays: u32) -> Outcome {
    device.reset();
    for value in values {
        device.set_status(*value);
    }
    refused(device.status() == stays, "the register takes a step that is none")
}

fn every_value(device: &Device) -> Outcome {
    for value in 1..=255 {
        device.reset();
        device.set_status(value);
        let now = device.status();
        let expected = match value & !status::NEEDS_RESET {
            failed if failed & status::FAILED != 0 => status::FAILED,
            status::ACKNOWLEDGE => status::ACKNOWLEDGE,
            _ => 0,
        };
        if now & status::DRIVER_OK != 0 || now & expected != expected {
            return Outcome::Bad("a value leads where it must not");
        }
    }
    Outcome::Refused
}

/// Only the low byte exists: nothing above is a reset.
fn above(device: &Device) -> Outcome {
    device.reset();
    device.set_status(status::ACKNOWLEDGE);
    for value in [0x100, 0xffff_ff00, 0x8000_0000] {
        device.set_status(value);
    }
    refused(device.status() == status::ACKNOWLEDGE, "high bits change the status")
}

fn failed(device: &Device) -> Outcome {
    if device.live().is_none() {
        return Outcome::Bad("it does not start");
    }
    device.set_status(status::LIVE | status::FAILED);
    for value in [status::ACKNOWLEDGE, 3, status::NEGOTIATED, status::LIVE] {
        device.set_status(value);
    }
    refused(device.status() & status::FAILED != 0, "it is no longer failed")
}

/// 2.2.2: a device must not settle on what it has not offered.
fn unoffered(device: &Device) -> Outcome {
    let offered = device.offered();
    for bit in 0..64 {
        if offered & 1 << bit == 0 && device.negotiate(offered | 1 << bit) {
            return Outcome::Bad("it takes a feature that it has not");
        }
    }
    refused(!device.negotiate(u64::MAX), "it takes all features")
}

fn pages(device: &Device) -> Outcome {
    device.reset();
    for page in [2, 3, 1 << 16, u32::MAX] {
        device.write(reg::DEVICE_FEATURES_SEL, page);
        if device.read(reg::DEVICE_FEATURES) != 0 {
            return Outcome::Bad("there are features where there are none");
        }
        device.set_status(status::ACKNOWLEDGE);
        device.set_status(status::ACKNOWLEDGE | status::DRIVER);
        device.accept(F_VERSION_1);
        device.write(reg::DRIVER_FEATURES_SEL, page);
        device.write(reg::DRIVER_FEATURES, u32::MAX);
        device.set_status(status::NEGOTIATED);
        if device.status() != status::NEGOTIATED {
            return Outcome::Bad("a page that is none counts");
        }
        device.reset();
    }
    Outcome::Refused
}

fn late_features(device: &Device) -> Outcome {
    if !device.negotiate(device.wanted()) {
        return Outcome::Bad("it takes no features");
    }
    device.accept(u64::MAX);
    device.accept(0);
    for n in 0..device.queues {
        device.set_queue(&Ring::new(n, USUAL_SIZE));
    }
    refused(device.start(), "features change when they are settled")
}

fn again(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    for value in [status::LIVE, status::NEGOTIATED, status::ACKNOWLEDGE, 3, status::LIVE, 0x4f] {
        device.set_status(value);
    }
    if device.status() != status::LIVE {
        return Outcome::Bad("the status of a device that runs changes");
    }
    refused(requests::good_on(&mut live).is_ok(), "it no longer serves")
}

fn no_queue(device: &Device) -> Outcome {
    if !device.negotiate(device.wanted()) {
        return Outcome::Bad("it takes no features");
    }
    match device.start() {
        true => Outcome::Answered,
        false if device.needs_reset() => Outcome::NeedsReset,
        false => Outcome::Bad("it neither runs nor wants a reset"),
    }
}

fn reset_everywhere(device: &Device) -> Outcome {
    let steps = [status::ACKNOWLEDGE, 3, status::NEGOTIATED, status::LIVE, status::FAILED];
    for last in 0..=steps.len() {
        for step in &steps[..last] {
            if *step == status::NEGOTIATED {
                device.accept(device.wanted());
            }
            if *step == status::LIVE {
                for n in 0..device.queues {
                    device.set_queue(&Ring::new(n, USUAL_SIZE));
                }
            }
            device.set_status(*step);
        }
        device.reset();
        device.reset();
        let blank = device.status() == 0 && device.read(reg::INTERRUPT_STATUS) == 0;
        device.write(reg::QUEUE_SEL, 0);
        if !blank || device.read(reg::QUEUE_READY) != 0 {
            return Outcome::Bad("something is left after a reset");
        }
    }
    Outcome::Answered
}

/// When the status reads 0, nothing of the device touches memory any more (2.4.1).
fn reset_in_flight(device: &Device) -> Outcome {
    for round in 0..ROUNDS {
        let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
        requests::prepare(device.kind);
        let (buffers, count) = requests::buffers(device.kind);
        let ring = &mut live.rings[requests::shape(device.kind).queue];
        ring.set_chain(0, &buffers[..count]);
        for _ in 0..USUAL_SIZE {
            ring.offer(0);
        }
        device.notify(ring.index);
        for _ in 0..round * 50 {
            sys::pause();
        }
        device.reset();
        if device.status() != 0 {
            return Outcome::Bad("it is not reset");
        }
        let ring = *ring;
        memory::fill(ring.used, 256, 0x5a);
        memory::fill(requests::ANSWER, 1024, 0x5a);
        let start = sys::ticks();
        while sys::ticks().wrapping_sub(start) < AFTERWARDS {
            sys::pause();
        }
        let same = |at| memory::read::<256>(at).iter().all(|byte| *byte == 0x5a);
        if !same(ring.used) || !same(requests::ANSWER) {
            return Outcome::Bad("it writes after a reset");
        }
    }
    answered(true, "")
}
