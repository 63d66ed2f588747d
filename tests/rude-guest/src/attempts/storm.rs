//! Notifications by the thousand, on queues that there are and that there are not (virtio 1.3, 2.9).

use crate::device::{Device, reg};
use crate::requests;
use crate::tally::{Must, Outcome, Tally, answered};

/// Notifications of each queue, and of as many numbers that are no queue.
const ON_QUEUES: u32 = 1000;
const ON_NONE: u32 = 300;
/// Starts and resets.
const STARTS: u32 = 40;

pub(super) fn run(device: &Device, tally: &mut Tally) {
    tally.attempt(device, "a storm of notifications", Must::Answer, storm);
    tally.attempt(device, "a storm before it runs", Must::Answer, early_storm);
    tally.attempt(device, "a storm of starts and resets", Must::Answer, starts);
}

fn notify(device: &Device) {
    for n in 0..ON_QUEUES {
        for queue in 0..device.queues {
            device.notify(queue);
        }
        if n < ON_NONE {
            device.notify(device.queues + n * 0x101);
        }
    }
}

fn storm(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    notify(device);
    match requests::good_on(&mut live) {
        Ok(()) => Outcome::Answered,
        Err(why) => Outcome::Bad(why),
    }
}

fn early_storm(device: &Device) -> Outcome {
    device.reset();
    notify(device);
    answered(device.status() == 0 && device.read(reg::INTERRUPT_STATUS) == 0, "it does something")
}

fn starts(device: &Device) -> Outcome {
    for _ in 0..STARTS {
        if device.live().is_none() {
            return Outcome::Bad("it does not start");
        }
        device.notify(0);
        device.reset();
    }
    Outcome::Answered
}
