//! What is tried on each kind of device. Every attempt begins with a device that is reset and may leave it as it likes.

mod balloon;
pub(crate) mod bay;
mod blk;
mod config;
mod fs;
pub(crate) mod machine;
mod mem;
mod net;
mod queues;
mod rng;
mod status;
mod storm;
mod vsock;

use crate::chains;
use crate::device::{Device, Kind};
use crate::owner::Owner;
use crate::tally::Tally;

/// Everything that fits a device.
pub(crate) fn run(device: &Device, slot: usize, owner: &mut Owner, tally: &mut Tally) {
    status::run(device, tally);
    config::run(device, tally);
    queues::run(device, tally);
    // A file server ends when it is sent what it cannot read: that comes last.
    if device.kind != Kind::Fs {
        chains::run(device, tally);
    }
    match device.kind {
        Kind::Blk => blk::run(device, tally),
        Kind::Net => net::run(device, tally),
        Kind::Vsock => vsock::run(device, owner, tally),
        Kind::Rng => rng::run(device, tally),
        Kind::Balloon => balloon::run(device, tally),
        Kind::Mem => mem::run(device, owner, tally),
        Kind::Fs => fs::run(device, tally),
        Kind::Console => {}
    }
    storm::run(device, tally);
    if device.kind == Kind::Fs {
        fs::end(device, tally);
    }
    tally.end_device(device.name(), slot);
}

/// The chains that no driver may offer, for a disk that is in a bay.
fn chains_of(device: &Device, tally: &mut Tally) {
    queues::run(device, tally);
    chains::run(device, tally);
}
