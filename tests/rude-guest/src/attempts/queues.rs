//! Queue registers (virtio 1.3, 4.2.2, 4.2.3.2): values that no queue has, and writes when it is too early or too late.

use crate::device::{Device, Kind, reg, status};
use crate::memory::{self, HOLE, MEMORY_END};
use crate::requests;
use crate::ring::{Ring, USUAL_SIZE};
use crate::tally::{Must, Outcome, Tally, refused};

const REGISTERS: [u64; 8] = [
    reg::QUEUE_NUM,
    reg::QUEUE_READY,
    reg::QUEUE_DESC,
    reg::QUEUE_DESC + 4,
    reg::QUEUE_DRIVER,
    reg::QUEUE_DRIVER + 4,
    reg::QUEUE_DEVICE,
    reg::QUEUE_DEVICE + 4,
];

/// What is done to the registers of a queue that is set up as it should be.
type Row = (&'static str, fn(&Device), Must);

const ROWS: &[Row] = &[
    ("a queue of no entries", |d| d.write(reg::QUEUE_NUM, 0), Must::NeedReset),
    ("a queue of 3 entries", |d| d.write(reg::QUEUE_NUM, 3), Must::NeedReset),
    (
        "a queue of twice as many entries",
        |d| d.write(reg::QUEUE_NUM, d.read(reg::QUEUE_NUM_MAX) * 2),
        Must::NeedReset,
    ),
    ("a queue of 65536 entries", |d| d.write(reg::QUEUE_NUM, 1 << 16), Must::NeedReset),
    ("a queue of 65552 entries", |d| d.write(reg::QUEUE_NUM, (1 << 16) + 16), Must::NeedReset),
    ("a queue of 2^32 - 1 entries", |d| d.write(reg::QUEUE_NUM, u32::MAX), Must::NeedReset),
    (
        "descriptors that are not aligned",
        |d| d.write_address(reg::QUEUE_DESC, memory::ARENA + 8),
        Must::NeedReset,
    ),
    (
        "available ring that is not aligned",
        |d| d.write_address(reg::QUEUE_DRIVER, memory::ARENA + 1),
        Must::NeedReset,
    ),
    (
        "used ring that is not aligned",
        |d| d.write_address(reg::QUEUE_DEVICE, memory::ARENA + 2),
        Must::NeedReset,
    ),
    ("descriptors in the hole", |d| d.write_address(reg::QUEUE_DESC, HOLE - 64), Must::NeedReset),
    ("available ring in the hole", |d| d.write_address(reg::QUEUE_DRIVER, HOLE + (1 << 20)), Must::NeedReset),
    ("used ring in the hole", |d| d.write_address(reg::QUEUE_DEVICE, HOLE + (1 << 20)), Must::NeedReset),
    ("descriptors in a device's registers", |d| d.write_address(reg::QUEUE_DESC, d.base), Must::NeedReset),
    (
        "available ring in a device's registers",
        |d| d.write_address(reg::QUEUE_DRIVER, d.base),
        Must::NeedReset,
    ),
    ("used ring in a device's registers", |d| d.write_address(reg::QUEUE_DEVICE, d.base), Must::NeedReset),
    ("used ring in the local APIC", |d| d.write_address(reg::QUEUE_DEVICE, 0xfee0_0000), Must::NeedReset),
    (
        "descriptors across the end of memory",
        |d| d.write_address(reg::QUEUE_DESC, MEMORY_END - 16),
        Must::NeedReset,
    ),
    (
        "available ring across the end of memory",
        |d| d.write_address(reg::QUEUE_DRIVER, MEMORY_END - 4),
        Must::NeedReset,
    ),
    (
        "used ring across the end of memory",
        |d| d.write_address(reg::QUEUE_DEVICE, MEMORY_END - 8),
        Must::NeedReset,
    ),
    ("descriptors that wrap", |d| d.write_address(reg::QUEUE_DESC, u64::MAX - 15), Must::NeedReset),
    ("available ring that wraps", |d| d.write_address(reg::QUEUE_DRIVER, u64::MAX - 1), Must::NeedReset),
    ("used ring that wraps", |d| d.write_address(reg::QUEUE_DEVICE, u64::MAX - 3), Must::NeedReset),
    ("used ring at 2^63", |d| d.write_address(reg::QUEUE_DEVICE, 1 << 63), Must::NeedReset),
    // No device here serves those, though memory is there.
    ("rings at address 0", rings_at_0, Must::NeedReset),
    // Memory all the same: the guest harms itself alone.
    ("all rings in one place", one_place, Must::Live),
    ("used ring over the available ring", used_over_available, Must::Live),
    ("a queue that is not ready", |d| d.write(reg::QUEUE_READY, 0), Must::Live),
    ("ready with another value than 1", |d| d.write(reg::QUEUE_READY, 0x101), Must::Live),
];

fn one_place(device: &Device) {
    for register in [reg::QUEUE_DESC, reg::QUEUE_DRIVER, reg::QUEUE_DEVICE] {
        device.write_address(register, memory::ARENA + (2 << 20));
    }
}

fn used_over_available(device: &Device) {
    let ring = Ring::new(requests::shape(device.kind).queue as u32, USUAL_SIZE);
    device.write_address(reg::QUEUE_DEVICE, ring.available);
}

fn rings_at_0(device: &Device) {
    for register in [reg::QUEUE_DESC, reg::QUEUE_DRIVER, reg::QUEUE_DEVICE] {
        device.write_address(register, 0);
    }
}

pub(super) fn run(device: &Device, tally: &mut Tally) {
    for (name, change, must) in ROWS {
        tally.attempt(device, name, *must, |device| changed(device, *change));
    }
    tally.attempt(device, "queues that there are not", Must::Refuse, no_such_queue);
    tally.attempt(device, "queue registers before FEATURES_OK", Must::Refuse, early);
    tally.attempt(device, "every queue register while it runs", Must::Refuse, late);
}

/// Sets up all queues, spoils the one for requests, starts, and offers a request.
fn changed(device: &Device, change: fn(&Device)) -> Outcome {
    if !device.negotiate(device.wanted()) {
        return Outcome::Bad("it takes no features");
    }
    for n in 0..device.queues {
        device.set_queue(&Ring::new(n, USUAL_SIZE));
    }
    let queue = requests::shape(device.kind).queue as u32;
    device.write(reg::QUEUE_SEL, queue);
    change(device);
    if !device.start() {
        return match device.needs_reset() {
            true => Outcome::NeedsReset,
            false => Outcome::Bad("it neither runs nor wants a reset"),
        };
    }
    for _ in 0..8 {
        device.notify(queue);
    }
    match device.needs_reset() {
        true => Outcome::NeedsReset,
        false => Outcome::Answered,
    }
}

fn no_such_queue(device: &Device) -> Outcome {
    if !device.negotiate(device.wanted()) {
        return Outcome::Bad("it takes no features");
    }
    for n in 0..device.queues {
        device.set_queue(&Ring::new(n, USUAL_SIZE));
    }
    for queue in [device.queues, device.queues + 1, 0x100, 0x1_0000, 0x8000_0000, u32::MAX] {
        if device.size_of(queue) != 0 || device.read(reg::QUEUE_READY) != 0 {
            return Outcome::Bad("a queue is there that is not");
        }
        for register in REGISTERS {
            device.write(register, 1);
        }
    }
    if !device.start() {
        return Outcome::Bad("it does not start");
    }
    for queue in [device.queues, 0x100, 0x1_0000, u32::MAX] {
        device.notify(queue);
    }
    refused(device.status() == status::LIVE, "it minds")
}

fn early(device: &Device) -> Outcome {
    device.reset();
    for step in [0, status::ACKNOWLEDGE, 3] {
        device.set_status(step);
        device.write(reg::QUEUE_SEL, 0);
        for register in REGISTERS {
            device.write(register, 1);
        }
        if device.read(reg::QUEUE_READY) != 0 {
            return Outcome::Bad("a queue is ready before features are settled");
        }
    }
    Outcome::Refused
}

/// Writes that a device once took for another queue's size and addresses (CVE-2026-5747): out of bounds, or divided by zero.
fn late(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    for value in [0, 1, 3, 0x8000, 0x1_0000, u32::MAX] {
        for queue in 0..device.queues + 1 {
            device.write(reg::QUEUE_SEL, queue);
            for register in REGISTERS {
                device.write(register, value);
            }
        }
        // What it has is what it was given: only a share's process could not be asked again.
        device.write(reg::QUEUE_SEL, 0);
        if device.read(reg::QUEUE_READY) != 1 {
            return Outcome::Bad("a queue stops being ready while it runs");
        }
    }
    if device.kind == Kind::Fs || device.status() == status::LIVE {
        refused(requests::good_on(&mut live).is_ok(), "it no longer serves")
    } else {
        Outcome::Bad("it minds")
    }
}
