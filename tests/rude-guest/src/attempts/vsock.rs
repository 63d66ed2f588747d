//! Packets that lie, connections by the thousand, and credit that goes backwards (virtio 1.3, 5.10.6).

use crate::device::{Device, HOLE_BUFFER, Live};
use crate::memory;
use crate::owner::Owner;
use crate::requests::{CID, CLOSED_PORT, INCOMING, OPEN_PORT, Packet, REQUEST, packet_at};
use crate::ring::{Buffer, End, USUAL_SIZE};
use crate::tally::{Must, Outcome, Tally, answered, refused};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const HEADER: u32 = 44;
const ROOM: u32 = 4096;

const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// Connections asked for in a flood: twice as many as a device has.
const FLOOD: u32 = 2048;
const MOST_CONNECTIONS: u32 = 1024;
/// Size of the queues in a flood.
const FLOOD_SIZE: u16 = 256;

/// Name, and what is done to a request for a connection.
type Row = (&'static str, fn(&mut Packet));

/// What belongs to no connection, and is answered with a reset that names its ports.
const STRANGERS: &[Row] = &[
    ("data without a connection", |p| p.op = DATA),
    ("an answer to nothing", |p| p.op = RESPONSE),
    ("a shutdown of nothing", |p| (p.op, p.flags) = (SHUTDOWN, 3)),
    ("credit for nothing", |p| p.op = CREDIT_UPDATE),
    ("a question of credit for nothing", |p| p.op = CREDIT_REQUEST),
    ("operation 0", |p| p.op = 0),
    ("operation 8", |p| p.op = 8),
    ("operation 65535", |p| p.op = u16::MAX),
    ("a request for datagrams", |p| p.kind = 3),
    ("a request for packets in order", |p| (p.kind, p.to_port) = (2, OPEN_PORT)),
    ("a request of kind 0", |p| (p.kind, p.to_port) = (0, OPEN_PORT)),
    ("a request to port 0", |p| p.to_port = 0),
    ("a request to the last port", |p| p.to_port = u32::MAX),
    ("a request with data", |p| p.len = 16),
];

/// What is not answered at all: it cannot be said who it came from, or an answer would be answered.
const FORGED: &[Row] = &[
    ("another guest's id", |p| p.from = CID + 1),
    ("the host's id", |p| p.from = 2),
    ("an id of 64 bits", |p| p.from = CID | 1 << 32),
    ("to another guest", |p| p.to = CID + 1),
    ("to itself", |p| p.to = CID),
    ("to the hypervisor", |p| p.to = 0),
    ("to the last id", |p| p.to = u64::MAX),
    ("longer than its buffers", |p| (p.op, p.len) = (DATA, 1 << 15)),
    ("of 64 KiB and a byte", |p| (p.op, p.len) = (DATA, (1 << 16) + 1)),
    ("of 4 GiB less a byte", |p| (p.op, p.len) = (DATA, u32::MAX)),
    ("a reset of nothing", |p| p.op = RESET),
];

/// What ends a connection that there is.
const ENDS: &[Row] = &[
    ("a second request", |p| p.op = 1),
    ("a second answer", |p| p.op = RESPONSE),
    ("operation 9 on a connection", |p| p.op = 9),
    ("another kind on a connection", |p| p.kind = 2),
];

/// What it bears.
const BORNE: &[Row] = &[
    ("credit of nothing", |p| (p.op, p.window) = (CREDIT_UPDATE, 0)),
    ("credit that goes backwards", |p| (p.op, p.forwarded) = (CREDIT_UPDATE, u32::MAX)),
    ("credit of 4 GiB", |p| (p.op, p.window, p.forwarded) = (CREDIT_UPDATE, u32::MAX, 1 << 31)),
    ("a shutdown of no direction", |p| p.op = SHUTDOWN),
    ("a shutdown of directions that there are not", |p| (p.op, p.flags) = (SHUTDOWN, 0xffff_fffc)),
    ("data of no bytes", |p| p.op = DATA),
];

pub(super) fn run(device: &Device, owner: &mut Owner, tally: &mut Tally) {
    for (name, change) in STRANGERS {
        tally.attempt(device, name, Must::Refuse, |d| stranger(d, *change));
    }
    for (name, change) in FORGED {
        tally.attempt(device, name, Must::Refuse, |d| forged(d, *change));
    }
    for len in [0, 1, 43] {
        tally.attempt(device, "part of a header", Must::Refuse, |d| part(d, len));
    }
    for (name, change) in ENDS {
        tally.attempt(device, name, Must::Refuse, |d| on_connection(d, *change, Some(RESET)));
    }
    for (name, change) in BORNE {
        tally.attempt(device, name, Must::Answer, |d| on_connection(d, *change, None));
    }
    tally.attempt(device, "more data than there is credit", Must::Refuse, beyond_credit);
    tally.attempt(device, "a storm of shutdowns", Must::Refuse, shutdowns);
    tally.attempt(device, "data after a shutdown", Must::Refuse, after_shutdown);
    for (name, buffer) in [
        ("room for a header alone", Buffer::writable(INCOMING, HEADER)),
        ("no room", Buffer::writable(INCOMING, 0)),
        ("room that is not writable", Buffer::readable(INCOMING, ROOM)),
        ("room in the hole", HOLE_BUFFER),
        ("room of 4 GiB", Buffer::writable(INCOMING, u32::MAX)),
        ("room that leads to itself", Buffer::writable(INCOMING, ROOM).then(0)),
    ] {
        tally.attempt(device, name, Must::Refuse, |d| no_room(d, buffer));
    }
    tally.attempt(device, "answers that nobody takes", Must::Answer, nobody_takes);
    // What a flood leaves would add up.
    for _ in 0..3 {
        tally.attempt(device, "a flood of connections", Must::Answer, |d| flood(d, owner));
    }
}

fn send(live: &mut Live<'_>, packet: Packet, payload: u32) -> bool {
    packet.put();
    live.rings[TRANSMIT].offer_chain(0, &[Buffer::readable(REQUEST, HEADER + payload)]);
    live.rings[TRANSMIT].ask(live.device) == (End::Used { head: 0, len: 0 })
}

/// Room for one more packet.
fn make_room(live: &mut Live<'_>) {
    live.rings[RECEIVE].offer_chain(0, &[Buffer::writable(INCOMING, ROOM)]);
    live.device.notify(RECEIVE as u32);
}

/// The next packet: operation and ports.
fn next(live: &mut Live<'_>) -> Option<(u16, u32, u32)> {
    make_room(live);
    match live.rings[RECEIVE].wait(live.device) {
        End::Used { len, .. } if len >= HEADER => Some(packet_at(INCOMING)),
        _ => None,
    }
}

/// Whether nothing comes of what was sent before: the first that comes is the answer to a request that is sent now, which nothing that is
/// earlier comes behind.
fn nothing_comes(live: &mut Live<'_>) -> bool {
    const MARK: u32 = 77;
    let mark = Packet { from_port: MARK, ..Packet::request(OPEN_PORT) };
    send(live, mark, 0) && next(live) == Some((RESPONSE, OPEN_PORT, MARK))
}

fn stranger(device: &Device, change: fn(&mut Packet)) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    let mut packet = Packet::request(CLOSED_PORT);
    change(&mut packet);
    if !send(&mut live, packet, packet.len) {
        return Outcome::Bad("it does not come back as it was");
    }
    refused(next(&mut live) == Some((RESET, packet.to_port, packet.from_port)), "no reset comes of it")
}

fn forged(device: &Device, change: fn(&mut Packet)) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    let mut packet = Packet::request(OPEN_PORT);
    change(&mut packet);
    if !send(&mut live, packet, 16) {
        return Outcome::Bad("it does not come back as it was");
    }
    refused(nothing_comes(&mut live), "it is answered")
}

fn part(device: &Device, len: u32) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    Packet::request(OPEN_PORT).put();
    live.rings[TRANSMIT].offer_chain(0, &[Buffer::readable(REQUEST, len)]);
    if live.rings[TRANSMIT].ask(device) != (End::Used { head: 0, len: 0 }) {
        return Outcome::Bad("it does not come back as it was");
    }
    refused(nothing_comes(&mut live), "it is answered")
}

/// A device with a connection.
fn connected(device: &Device) -> Option<Live<'_>> {
    let mut live = device.live()?;
    let asked = send(&mut live, Packet::request(OPEN_PORT), 0);
    (asked && next(&mut live)?.0 == RESPONSE).then_some(live)
}

/// A packet of the connection that [`connected`] makes.
fn of_connection(change: impl FnOnce(&mut Packet)) -> Packet {
    let mut packet = Packet::request(OPEN_PORT);
    change(&mut packet);
    packet
}

fn on_connection(device: &Device, change: fn(&mut Packet), answer: Option<u16>) -> Outcome {
    let Some(mut live) = connected(device) else { return Outcome::Bad("it does not connect") };
    if !send(&mut live, of_connection(change), 0) {
        return Outcome::Bad("it does not come back as it was");
    }
    match answer {
        Some(op) => refused(next(&mut live).is_some_and(|packet| packet.0 == op), "it is not answered so"),
        None => {
            // The connection is still there: it says how much credit it has.
            let asked = send(&mut live, of_connection(|p| p.op = CREDIT_REQUEST), 0);
            answered(asked && next(&mut live).is_some_and(|packet| packet.0 == CREDIT_UPDATE), "it is gone")
        }
    }
}

/// Nobody reads at the other end, and the device holds what it has promised to hold, no more.
fn beyond_credit(device: &Device) -> Outcome {
    const PIECE: u32 = 60_000;
    let Some(mut live) = connected(device) else { return Outcome::Bad("it does not connect") };
    // Where the stream's own buffers end is the host's affair: this is more than both.
    for _ in 0..64 {
        if !send(&mut live, of_connection(|p| (p.op, p.len) = (DATA, PIECE)), PIECE) {
            return Outcome::Bad("it does not come back as it was");
        }
    }
    for _ in 0..16 {
        match next(&mut live) {
            Some((RESET, ..)) => return Outcome::Refused,
            Some((CREDIT_UPDATE, ..)) => {}
            _ => return Outcome::Bad("something else comes of it"),
        }
    }
    Outcome::Bad("it takes everything")
}

fn shutdowns(device: &Device) -> Outcome {
    let Some(mut live) = connected(device) else { return Outcome::Bad("it does not connect") };
    for n in 0..200 {
        if !send(&mut live, of_connection(|p| (p.op, p.flags) = (SHUTDOWN, n)), 0) {
            return Outcome::Bad("it does not come back as it was");
        }
    }
    refused(next(&mut live).is_some_and(|packet| packet.0 == RESET), "the connection does not end")
}

fn after_shutdown(device: &Device) -> Outcome {
    let Some(mut live) = connected(device) else { return Outcome::Bad("it does not connect") };
    let down = send(&mut live, of_connection(|p| (p.op, p.flags) = (SHUTDOWN, 2)), 0);
    let sent = send(&mut live, of_connection(|p| (p.op, p.len) = (DATA, 16)), 16);
    let mut last = next(&mut live);
    // The other end may have closed in answer to the shutdown before it saw the data.
    if last.is_some_and(|packet| packet.0 == SHUTDOWN) {
        last = next(&mut live);
    }
    refused(down && sent && last.is_some_and(|packet| packet.0 == RESET), "data is taken after its end")
}

/// Buffers that take no packet: they come back, and what was to go there is lost or waits.
fn no_room(device: &Device, buffer: Buffer) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    memory::fill(INCOMING, 4096, 0x11);
    for head in 0..USUAL_SIZE {
        live.rings[RECEIVE].set(head, buffer);
        live.rings[RECEIVE].offer(head);
    }
    device.notify(RECEIVE as u32);
    for _ in 0..USUAL_SIZE {
        if !send(&mut live, Packet::request(CLOSED_PORT), 0) {
            return Outcome::Bad("it does not come back as it was");
        }
    }
    match live.rings[RECEIVE].wait(device) {
        End::Used { len: 0, .. } => {
            refused(memory::read::<64>(INCOMING) == [0x11; 64], "it writes where it has no room")
        }
        End::NeedsReset => Outcome::NeedsReset,
        _ => Outcome::Bad("it does not come back unused"),
    }
}

/// More resets than the device remembers.
fn nobody_takes(device: &Device) -> Outcome {
    let Some(mut live) = device.live_with(device.wanted(), FLOOD_SIZE) else {
        return Outcome::Bad("it does not start");
    };
    if !requests(&mut live, CLOSED_PORT) {
        return Outcome::Bad("it does not come back as it was");
    }
    answered(next(&mut live).is_some_and(|packet| packet.0 == RESET), "nothing comes of it")
}

/// Asks for [`FLOOD`] connections, a queue full at a time.
fn requests(live: &mut Live<'_>, port: u32) -> bool {
    let device = live.device;
    let ring = &mut live.rings[TRANSMIT];
    for round in 0..FLOOD / u32::from(FLOOD_SIZE) {
        for head in 0..FLOOD_SIZE {
            let at = REQUEST + u64::from(head) * 64;
            Packet {
                from_port: 1 + round * u32::from(FLOOD_SIZE) + u32::from(head),
                ..Packet::request(port)
            }
            .put_at(at);
            ring.offer_chain(head, &[Buffer::readable(at, HEADER)]);
        }
        device.notify(TRANSMIT as u32);
        if !(0..FLOOD_SIZE).all(|_| matches!(ring.wait(device), End::Used { len: 0, .. })) {
            return false;
        }
    }
    true
}

fn flood(device: &Device, owner: &mut Owner) -> Outcome {
    let Some(mut live) = device.live_with(device.wanted(), FLOOD_SIZE) else {
        return Outcome::Bad("it does not start");
    };
    let asked = requests(&mut live, OPEN_PORT);
    owner.ask("flood");
    let (mut made, mut none) = (0, 0);
    let ring = &mut live.rings[RECEIVE];
    for head in 0..FLOOD_SIZE {
        ring.offer_chain(head, &[Buffer::writable(INCOMING + u64::from(head) * 64, 64)]);
    }
    device.notify(RECEIVE as u32);
    while made + none < FLOOD {
        match ring.wait_briefly(device) {
            End::Used { head, .. } => {
                let head = head as u16;
                match packet_at(INCOMING + u64::from(head) * 64).0 {
                    RESPONSE => made += 1,
                    RESET => none += 1,
                    _ => {}
                }
                ring.offer(head);
                if head.is_multiple_of(64) {
                    device.notify(RECEIVE as u32);
                }
            }
            // Some resets may have been forgotten: there is a bound to them.
            _ => break,
        }
        if (made + none).is_multiple_of(64) {
            device.notify(RECEIVE as u32);
        }
    }
    answered(asked && made > 0 && made <= MOST_CONNECTIONS && none > 0, "there is no bound to connections")
}
