//! A place without a disk, and a disk that comes and goes under a driver that does not care.

use crate::attempts::{blk, chains_of, storm};
use crate::device::{Device, Kind, reg, status};
use crate::owner::Owner;
use crate::ring::{Ring, USUAL_SIZE};
use crate::tally::{Must, Outcome, Tally, answered, refused};

/// Rounds of a disk that comes, is used, and goes.
const ROUNDS: u32 = 5;

/// Everything that fits an empty place. It is empty again afterwards.
pub(crate) fn empty(base: u64, owner: &mut Owner, tally: &mut Tally) {
    let device = Device { base, kind: Kind::Blk, queues: 1 };
    tally.note("bay", "a driver where nothing is", Must::NeedReset, driver_of_nothing(&device));
    tally.note("bay", "a request where nothing is", Must::Refuse, request_of_nothing(&device));
    for _ in 0..ROUNDS {
        owner.ask("attach");
        tally.attempt(&device, "a disk that came", Must::Answer, |d| {
            answered(d.read(reg::DEVICE_ID) == 2, "no disk")
        });
        let Some(mut live) = device.live() else {
            return tally.note("bay", "a disk that came", Must::Answer, Outcome::Bad("it does not start"));
        };
        owner.ask("detach");
        tally.note("bay", "a disk that went under its driver", Must::Refuse, blk::lost(&mut live));
        device.reset();
    }
    owner.ask("attach");
    chains_of(&device, tally);
    blk::run(&device, tally);
    storm::run(&device, tally);
    // Another kind of features is settled than the disk has that comes.
    owner.ask("detach");
    let settled = device.negotiate(device.wanted());
    device.set_queue(&Ring::new(0, USUAL_SIZE));
    owner.ask("attach");
    let started = settled && device.start();
    tally.attempt(&device, "a disk that came between features and DRIVER_OK", Must::Live, |_| {
        answered(started, "it does not start")
    });
    owner.ask("detach");
    tally.end_device(
        "bay",
        usize::try_from((base - crate::memory::HOLE) / crate::device::WINDOW_BYTES).unwrap_or(0),
    );
}

fn driver_of_nothing(device: &Device) -> Outcome {
    if !device.negotiate(device.wanted()) {
        return Outcome::Bad("it takes no features");
    }
    device.set_queue(&Ring::new(0, USUAL_SIZE));
    match device.start() {
        true => Outcome::Answered,
        false if device.needs_reset() => Outcome::NeedsReset,
        false => Outcome::Bad("it neither runs nor wants a reset"),
    }
}

fn request_of_nothing(device: &Device) -> Outcome {
    for queue in 0..4 {
        device.notify(queue);
    }
    device.reset();
    refused(device.status() == 0 && device.status() & status::DRIVER_OK == 0, "it runs")
}
