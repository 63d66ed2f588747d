//! Frames that are none, headers that contradict themselves, and buffers that take no frame (virtio 1.3, 5.1.6).
//!
//! Nothing is written to a transmit buffer, so that only whoever has the other end of the wire sees what came out; nothing may.

use crate::device::{Device, HOLE_BUFFER, Live};
use crate::memory::{self, ARENA};
use crate::requests::{self, INCOMING, NET_HEADER, REQUEST};
use crate::ring::{Buffer, End, USUAL_SIZE};
use crate::tally::{Must, Outcome, Tally, answered, refused};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CSUM: u8 = 1;
const TCPV4: u8 = 1;
const TCPV6: u8 = 4;
/// Length of the frame of a good request, with its header.
const FRAME: u32 = 72;

/// Header fields: flags, GSO type, GSO size, where the checksum starts, and where in what follows it is.
const HEADERS: &[(&str, u8, u8, u16, u16, u16)] = &[
    ("a flag of the other direction", 2, 0, 0, 0, 0),
    ("all flags", 0xff, 0, 0, 34, 16),
    ("checksum behind the frame", CSUM, 0, 0, 60, 0),
    ("checksum across the end", CSUM, 0, 0, 50, 9),
    ("checksum far behind", CSUM, 0, 0, u16::MAX, u16::MAX),
    ("segments without a checksum", 0, TCPV4, 1448, 34, 16),
    ("segments of no bytes", CSUM, TCPV4, 0, 34, 16),
    ("segments of no bytes, IPv6", CSUM, TCPV6, 0, 42, 16),
    ("segments of UDP", CSUM, 3, 1448, 34, 16),
    ("segments of a kind that is none", CSUM, 7, 1448, 34, 16),
    ("segments with ECN, which is not offered", CSUM, 0x81, 1448, 34, 16),
    ("segments with nothing but ECN", CSUM, 0x80, 1448, 34, 16),
];

pub(super) fn run(device: &Device, tally: &mut Tally) {
    for (name, flags, gso, size, start, offset) in HEADERS {
        tally.attempt(device, name, Must::Refuse, |d| {
            send(d, &[Buffer::readable(REQUEST, FRAME)], || {
                requests::frame(*flags, *gso, *size, *start, *offset)
            })
        });
    }
    for (name, len) in [
        ("a frame of no bytes", 0),
        ("half a header", 11),
        ("a header alone", 12),
        ("a frame of 1 byte", 13),
        ("a frame of 13 bytes", 25),
        ("a frame of one byte too many", 65550 + 12 + 1),
        ("a frame of 1 MiB", 1 << 20),
        ("a frame of 50 MiB", 50 << 20),
    ] {
        let from = if len > FRAME { ARENA } else { REQUEST };
        tally.attempt(device, name, Must::Refuse, |d| send(d, &[Buffer::readable(from, len)], good_frame));
    }
    tally.attempt(device, "another one's address", Must::Refuse, |d| {
        send(d, &[Buffer::readable(REQUEST, FRAME)], || {
            good_frame();
            memory::write(REQUEST + NET_HEADER as u64 + 6, &[2, 0, 0, 0, 0, 9]);
        })
    });
    tally.attempt(device, "a frame that is to be written", Must::Refuse, |d| {
        send(d, &[Buffer::writable(REQUEST, FRAME)], good_frame)
    });
    tally.attempt(device, "a frame in single bytes", Must::Live, in_bytes);
    for (name, buffer) in [
        ("no room for a frame", Buffer::writable(INCOMING, 0)),
        ("room for part of a header", Buffer::writable(INCOMING, 11)),
        ("room for a header alone", Buffer::writable(INCOMING, 12)),
        ("room that is not writable", Buffer::readable(INCOMING, 4096)),
        ("room in the hole", HOLE_BUFFER),
        ("room of 4 GiB", Buffer::writable(INCOMING, u32::MAX)),
        ("room that leads to itself", Buffer::writable(INCOMING, 16).then(0)),
    ] {
        tally.attempt(device, name, Must::Live, |d| receive_into(d, buffer));
    }
    tally.attempt(device, "frames that nobody takes", Must::Answer, nobody_takes);
    tally.attempt(device, "room of single bytes", Must::Live, room_of_bytes);
    tally.attempt(device, "heads of receive buffers that there are not", Must::NeedReset, no_such_room);
}

fn good_frame() {
    requests::frame(0, 0, 0, 0, 0);
}

/// A device that runs, with room for one frame, and nothing left on the wire of what was sent before.
fn quiet(device: &Device, size: u16) -> Option<Live<'_>> {
    let mut live = device.live_with(device.wanted(), size)?;
    let ring = &mut live.rings[RECEIVE];
    ring.offer_chain(0, &[Buffer::writable(INCOMING, 4096)]);
    device.notify(RECEIVE as u32);
    // What was sent takes the owner a moment to send back.
    let mut silences = 0;
    while silences < 3 {
        match ring.wait_briefly(device) {
            End::Used { .. } => {
                ring.offer(0);
                device.notify(RECEIVE as u32);
                silences = 0;
            }
            _ => silences += 1,
        }
    }
    Some(live)
}

fn send(device: &Device, chain: &[Buffer], prepare: impl FnOnce()) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    prepare();
    live.rings[TRANSMIT].offer_chain(0, chain);
    if live.rings[TRANSMIT].ask(device) != (End::Used { head: 0, len: 0 }) {
        return Outcome::Bad("it does not come back as it was");
    }
    // For the owner to judge.
    Outcome::Refused
}

fn in_bytes(device: &Device) -> Outcome {
    const SIZE: u16 = 128;
    let Some(mut live) = quiet(device, SIZE) else { return Outcome::Bad("it does not start") };
    good_frame();
    let chain: [Buffer; FRAME as usize] = core::array::from_fn(|n| Buffer::readable(REQUEST + n as u64, 1));
    live.rings[TRANSMIT].offer_chain(0, &chain);
    let sent = live.rings[TRANSMIT].ask(device);
    let came = live.rings[RECEIVE].wait(device);
    answered(
        sent == (End::Used { head: 0, len: 0 }) && came == (End::Used { head: 0, len: FRAME }),
        "it was not sent",
    )
}

/// Sends a frame, which comes back; returns what came of the transmit buffer.
fn echo(live: &mut Live<'_>) -> bool {
    good_frame();
    live.rings[TRANSMIT].offer_chain(0, &[Buffer::readable(REQUEST, FRAME)]);
    live.rings[TRANSMIT].ask(live.device) == (End::Used { head: 0, len: 0 })
}

fn receive_into(device: &Device, buffer: Buffer) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    memory::fill(INCOMING, 4096, 0x11);
    live.rings[RECEIVE].set(0, buffer);
    live.rings[RECEIVE].offer(0);
    device.notify(RECEIVE as u32);
    if !echo(&mut live) {
        return Outcome::Bad("a frame is not taken");
    }
    match live.rings[RECEIVE].wait_briefly(device) {
        End::NeedsReset => Outcome::NeedsReset,
        End::Used { len: 0, .. } | End::Silence => {
            // What is left of it is lost with the next buffer, and the one after that is for the next frame.
            refused(memory::read::<64>(INCOMING) == [0x11; 64], "it writes where it has no room")
        }
        End::Used { .. } => Outcome::Bad("it writes into a buffer that is none"),
    }
}

/// More frames than the wire holds, and then all that there is room for.
fn nobody_takes(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    for _ in 0..300 {
        if !echo(&mut live) {
            return Outcome::Bad("a frame is not taken");
        }
    }
    for head in 0..USUAL_SIZE {
        live.rings[RECEIVE].offer_chain(head, &[Buffer::writable(INCOMING, 4096)]);
    }
    device.notify(RECEIVE as u32);
    let first = live.rings[RECEIVE].wait(device);
    answered(matches!(first, End::Used { len: FRAME, .. }), "nothing comes in")
}

/// With merged buffers a frame goes into as many as it takes, up to a number.
fn room_of_bytes(device: &Device) -> Outcome {
    const SIZE: u16 = 256;
    let Some(mut live) = device.live_with(device.wanted(), SIZE) else {
        return Outcome::Bad("it does not start");
    };
    for head in 0..SIZE {
        live.rings[RECEIVE].offer_chain(head, &[Buffer::writable(INCOMING + u64::from(head), 1)]);
    }
    device.notify(RECEIVE as u32);
    if !echo(&mut live) {
        return Outcome::Bad("a frame is not taken");
    }
    match live.rings[RECEIVE].wait_briefly(device) {
        End::NeedsReset => Outcome::NeedsReset,
        End::Used { len: 1, .. } => Outcome::Bad("a header is cut in pieces"),
        _ => Outcome::Refused,
    }
}

fn no_such_room(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    for head in [USUAL_SIZE, u16::MAX, 0x8000] {
        live.rings[RECEIVE].offer(head);
    }
    device.notify(RECEIVE as u32);
    // It may want a reset before it takes the frame, when one was on the wire.
    let _sent = echo(&mut live);
    match live.rings[RECEIVE].wait(device) {
        End::NeedsReset => Outcome::NeedsReset,
        _ => Outcome::Bad("a head that there is not comes back"),
    }
}
