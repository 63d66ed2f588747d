//! Chains that no driver may offer (virtio 1.3, 2.7.5): a list that is tried on the request queue of every device that the VMM serves.
//!
//! A device gives back what it cannot serve with nothing written, or with the error status of its kind; when the ring itself makes no
//! sense it wants a reset.

use crate::device::{Device, F_INDIRECT_DESC, Kind, Live, WINDOW_BYTES};
use crate::memory::{self, HOLE, MEMORY_END};
use crate::requests::{self, ANSWER, REQUEST, SECTOR, Shape};
use crate::ring::{Buffer, End, INDIRECT, NEXT, Ring, USUAL_SIZE, WRITE};
use crate::tally::{Must, Outcome, Tally};

/// Where tables of indirect descriptors are.
const TABLE: u64 = 0x280_0000;
const OTHER_TABLE: u64 = 0x290_0000;
/// Longest indirect table that has a place: more entries than any queue.
const LONG_TABLE: u16 = 1025;

/// What is done to the buffers of a good request.
enum Change {
    /// The last one is changed.
    Last(fn(&mut Buffer)),
    /// The first one is.
    First(fn(&mut Buffer)),
    /// The good chain is in the ring, and this is done with it: it has to offer something.
    Ring(fn(&mut Ring, usize)),
    /// The chain is a single descriptor that this makes of the indirect table at [`TABLE`] with its good entries. Only where the device
    /// offers such tables.
    Table(fn(usize) -> Buffer),
}

use Change::{First, Last, Ring as InRing, Table};
use Must::{Answer, Live as Lives, NeedReset, Refuse};

/// Name, what is done, and what it must come to.
type Row = (&'static str, Change, Must);

const ROWS: &[Row] = &[
    // 2.7.5: what `next` may be.
    ("chain that leads to itself", Last(|b| *b = b.then(0)), Refuse),
    ("chain that ends in a circle", InRing(circle), Refuse),
    ("chain that goes on behind the table", Last(|b| *b = b.then(USUAL_SIZE)), Refuse),
    ("chain that goes on at 65535", Last(|b| *b = b.then(u16::MAX)), Refuse),
    // 2.7.4.2: order.
    ("readable buffer behind a writable one", InRing(turned_around), Refuse),
    // Addresses and lengths.
    ("buffer in the hole", Last(|b| b.address = HOLE + 64 * WINDOW_BYTES), Refuse),
    ("buffer in a device's registers", Last(|b| b.address = HOLE + 0x50), Refuse),
    ("buffer in the local APIC", Last(|b| b.address = 0xfee0_0000), Refuse),
    ("buffer behind the end of memory", Last(|b| b.address = MEMORY_END), Refuse),
    ("buffer across the end of memory", Last(|b| b.address = MEMORY_END - 1), Refuse),
    ("buffer at the last address", Last(|b| b.address = u64::MAX), Refuse),
    ("buffer that wraps", Last(|b| b.address = u64::MAX - 2), Refuse),
    ("buffer at 2^63", Last(|b| b.address = 1 << 63), Refuse),
    ("first buffer outside memory", First(|b| b.address = HOLE), Refuse),
    ("buffer of 4 GiB less a byte", Last(|b| b.len = u32::MAX), Refuse),
    ("buffer of 2 GiB", Last(|b| b.len = 1 << 31), Refuse),
    ("buffers of more than 4 GiB", InRing(beyond_4_gib), Refuse),
    ("buffer of no bytes", Last(|b| b.len = 0), Lives),
    ("all buffers of no bytes", InRing(nothing), Lives),
    ("chain as long as the queue", InRing(as_long_as_the_queue), Answer),
    // Roles and flags.
    ("readable where it is to be written, or the other way round", Last(|b| b.flags ^= WRITE), Lives),
    ("unknown flags", Last(|b| b.flags |= 0xfff8), Answer),
    // 2.7.6: the ring of what is available.
    ("head behind the table", InRing(|ring, _| ring.offer(USUAL_SIZE)), NeedReset),
    ("head 65535", InRing(|ring, _| ring.offer(u16::MAX)), NeedReset),
    ("index one too far", InRing(|ring, _| ring.run_ahead(USUAL_SIZE + 1)), NeedReset),
    ("index half a round too far", InRing(|ring, _| ring.run_ahead(1 << 15)), NeedReset),
    ("index that goes back", InRing(|ring, _| ring.run_ahead(u16::MAX)), NeedReset),
    // 2.7.5.3: indirect tables.
    ("table of no entries", Table(|_| table(TABLE, 0)), Refuse),
    ("table of one byte too many", Table(|count| table(TABLE, count as u32 * 16 + 1)), Refuse),
    ("table of less than an entry", Table(|_| table(TABLE, 15)), Refuse),
    ("table in the hole", Table(|count| table(HOLE, count as u32 * 16)), Refuse),
    ("table across the end of memory", Table(|count| table(MEMORY_END - 8, count as u32 * 16)), Refuse),
    ("table that wraps", Table(|count| table(u64::MAX - 7, count as u32 * 16)), Refuse),
    ("table of 65536 entries", Table(|_| table(TABLE, 1 << 20)), Refuse),
    ("table of 4 GiB", Table(|_| table(TABLE, 0xffff_fff0)), Refuse),
    ("table in a table", Table(nested), Refuse),
    ("table that leads to itself", Table(looped_table), Refuse),
    ("table that goes on behind its end", Table(open_table), Refuse),
    ("table longer than the queue may be", Table(long_table), Refuse),
    ("table that is writable", Table(|count| with(table(TABLE, count as u32 * 16), WRITE)), Answer),
    (
        "table with another descriptor behind it",
        Table(|count| with(table(TABLE, count as u32 * 16), NEXT)),
        Lives,
    ),
];

fn table(at: u64, len: u32) -> Buffer {
    Buffer { flags: INDIRECT, ..Buffer::readable(at, len) }
}

fn with(buffer: Buffer, flag: u16) -> Buffer {
    Buffer { flags: buffer.flags | flag, next: 3, ..buffer }
}

fn circle(ring: &mut Ring, count: usize) {
    // A good chain, then two that lead to each other.
    let last = count as u16 - 1;
    let (_, flags) = end_of(ring, last);
    let more = Buffer { flags, ..Buffer::readable(ANSWER + 0x1000, 16) };
    ring.set(last, Buffer { flags, ..Buffer::readable(ANSWER + 0x800, 16) }.then(10));
    ring.set(10, more.then(11));
    ring.set(11, more.then(10));
    ring.offer(0);
}

/// Length and flags of a descriptor.
fn end_of(ring: &Ring, index: u16) -> (u32, u16) {
    let at = ring.descriptors + u64::from(index) * 16;
    (u32::from_le_bytes(memory::read(at + 8)), u16::from_le_bytes(memory::read(at + 12)) & WRITE)
}

fn turned_around(ring: &mut Ring, _: usize) {
    let buffers = [Buffer::writable(ANSWER, 64), Buffer::readable(REQUEST, 64)];
    ring.offer_chain(0, &buffers);
}

/// The same memory over and over.
fn beyond_4_gib(ring: &mut Ring, count: usize) {
    let (_, flags) = end_of(ring, count as u16 - 1);
    let len = (MEMORY_END - memory::ARENA) as u32;
    let huge = Buffer { flags, ..Buffer::readable(memory::ARENA, len) };
    // A table: the queue itself is too short for so many. Devices without them refuse the flag's buffer or follow it.
    let entries = (1_u64 << 32).div_ceil(u64::from(len)) as u16 + 1;
    for index in 0..entries {
        huge.then(index + 1).put(TABLE, index);
    }
    huge.put(TABLE, entries - 1);
    ring.set(0, table(TABLE, u32::from(entries) * 16));
    ring.offer(0);
}

fn nothing(ring: &mut Ring, count: usize) {
    for index in 0..count as u16 {
        let (_, flags) = end_of(ring, index);
        let next = if usize::from(index) + 1 == count { 0 } else { NEXT };
        ring.set(index, Buffer { address: 0, len: 0, flags: flags | next, next: index + 1 });
    }
    ring.offer(0);
}

/// The good chain behind buffers of no bytes of its first one's kind.
fn as_long_as_the_queue(ring: &mut Ring, count: usize) {
    let first = USUAL_SIZE - count as u16;
    for index in (0..count as u16).rev() {
        let at = ring.descriptors + u64::from(index) * 16;
        let (len, flags) = end_of(ring, index);
        let buffer = Buffer { flags, ..Buffer::readable(u64::from_le_bytes(memory::read(at)), len) };
        let last = usize::from(index) + 1 == count;
        let place = first + index;
        ring.set(place, if last { buffer } else { buffer.then(place + 1) });
    }
    let (_, flags) = end_of(ring, first);
    for index in 0..first {
        ring.set(index, Buffer { flags, ..Buffer::readable(REQUEST, 0) }.then(index + 1));
    }
    ring.offer(0);
}

fn nested(count: usize) -> Buffer {
    // What is at TABLE moves into a table of its own, which the outer one names.
    for entry in 0..count as u64 {
        memory::write(OTHER_TABLE + entry * 16, &memory::read::<16>(TABLE + entry * 16));
    }
    table(OTHER_TABLE, count as u32 * 16).put(TABLE, 0);
    table(TABLE, 16)
}

fn looped_table(count: usize) -> Buffer {
    relink(count, 0);
    table(TABLE, count as u32 * 16)
}

fn open_table(count: usize) -> Buffer {
    relink(count, count as u16);
    table(TABLE, count as u32 * 16)
}

/// Has the last entry go on at `next`.
fn relink(count: usize, next: u16) {
    let last = TABLE + (count as u64 - 1) * 16;
    let flags = u16::from_le_bytes(memory::read(last + 12)) | NEXT;
    memory::write(last + 12, &flags.to_le_bytes());
    memory::write(last + 14, &next.to_le_bytes());
}

fn long_table(count: usize) -> Buffer {
    let last = TABLE + (count as u64 - 1) * 16;
    let flags = u16::from_le_bytes(memory::read(last + 12)) & WRITE;
    for index in count as u16 - 1..LONG_TABLE {
        let buffer = Buffer { flags, ..Buffer::readable(ANSWER + 0x1000, 1) };
        if index + 1 < LONG_TABLE { buffer.then(index + 1) } else { buffer }.put(TABLE, index);
    }
    table(TABLE, u32::from(LONG_TABLE) * 16)
}

/// Tries the whole list, and what takes more than a chain.
pub(crate) fn run(device: &Device, tally: &mut Tally) {
    let has_tables = device.offered() & F_INDIRECT_DESC != 0;
    for (name, change, must) in ROWS {
        if has_tables || !matches!(change, Table(_)) {
            tally.attempt(device, name, must_here(device, *must), |device| broken(device, change));
        }
    }
    tally.attempt(device, "the same head twice", Answer, twice);
    tally.attempt(device, "answer over the ring of what was used", Lives, over_used);
    tally.attempt(device, "a full ring of loops", Refuse, full_of_loops);
}

/// What a kind leaves open.
fn must_here(device: &Device, must: Must) -> Must {
    match (device.kind, must) {
        // Only looks at what it is to write, or at nothing.
        (Kind::Balloon, Refuse) => Lives,
        // Nothing is ever written to them: whether it was served is not to be seen here.
        (Kind::Net | Kind::Vsock | Kind::Console | Kind::Balloon, Answer) => Lives,
        _ => must,
    }
}

/// A device that runs, and its request queue with a good chain in it that is not offered.
fn begin<'d>(device: &'d Device) -> Option<(Live<'d>, Shape, [Buffer; 2], usize)> {
    let live = device.live()?;
    requests::prepare(device.kind);
    let (buffers, count) = requests::buffers(device.kind);
    Some((live, requests::shape(device.kind), buffers, count))
}

fn broken(device: &Device, change: &Change) -> Outcome {
    let Some((mut live, shape, mut buffers, count)) = begin(device) else {
        return Outcome::Bad("it does not start");
    };
    let ring = &mut live.rings[shape.queue];
    match change {
        First(change) => change(&mut buffers[0]),
        Last(change) => change(&mut buffers[count - 1]),
        InRing(_) | Table(_) => {}
    }
    match change {
        InRing(offer) => {
            ring.set_chain(0, &buffers[..count]);
            offer(ring, count);
        }
        Table(make) => {
            for (index, buffer) in (0..).zip(&buffers[..count]) {
                let last = usize::from(index) + 1 == count;
                if last { *buffer } else { buffer.then(index + 1) }.put(TABLE, index);
            }
            ring.set(3, Buffer::writable(ANSWER + 0x1800, 8));
            ring.set(0, make(count));
            ring.offer(0);
        }
        // As `offer_chain`, but what was done to the last one stays.
        _ => {
            for (index, buffer) in (0..).zip(&buffers[..count]) {
                let last = usize::from(index) + 1 == count;
                ring.set(index, if last { *buffer } else { buffer.then(index + 1) });
            }
            ring.offer(0);
        }
    }
    judge(device.kind, ring.ask(device))
}

/// What came back of a single chain.
pub(crate) fn judge(kind: Kind, end: End) -> Outcome {
    match end {
        End::NeedsReset => Outcome::NeedsReset,
        End::Silence => Outcome::Bad("it is silent"),
        End::Used { len, .. } => match kind {
            // Nothing is ever written: whether it was served is not to be seen here, and for the owner to judge.
            Kind::Net | Kind::Vsock | Kind::Console | Kind::Balloon if len == 0 => Outcome::Refused,
            Kind::Net | Kind::Vsock | Kind::Console | Kind::Balloon => {
                Outcome::Bad("it claims to have written")
            }
            _ if len == 0 => Outcome::Refused,
            Kind::Blk => match memory::read::<1>(ANSWER + u64::from(SECTOR))[0] {
                requests::BLK_OK => Outcome::Answered,
                _ => Outcome::Refused,
            },
            Kind::Mem => match memory::read::<1>(ANSWER)[0] {
                0 => Outcome::Answered,
                _ => Outcome::Refused,
            },
            Kind::Rng | Kind::Fs => Outcome::Answered,
        },
    }
}

/// 2.7.13: a driver takes a head back before it offers it again.
fn twice(device: &Device) -> Outcome {
    let Some((mut live, shape, buffers, count)) = begin(device) else {
        return Outcome::Bad("it does not start");
    };
    let ring = &mut live.rings[shape.queue];
    ring.set_chain(0, &buffers[..count]);
    for _ in 0..USUAL_SIZE {
        ring.offer(0);
    }
    device.notify(ring.index);
    for _ in 0..USUAL_SIZE {
        match ring.wait(device) {
            End::Used { head: 0, .. } => {}
            other => return judge(device.kind, other),
        }
    }
    Outcome::Answered
}

/// The answer lies where the device says that it has answered.
fn over_used(device: &Device) -> Outcome {
    let Some((mut live, shape, mut buffers, count)) = begin(device) else {
        return Outcome::Bad("it does not start");
    };
    let ring = &mut live.rings[shape.queue];
    buffers[count - 1].address = ring.used;
    ring.offer_chain(0, &buffers[..count]);
    device.notify(ring.index);
    // Whatever is read there is not to be believed.
    match ring.wait_briefly(device) {
        End::NeedsReset => Outcome::NeedsReset,
        _ => Outcome::Answered,
    }
}

fn full_of_loops(device: &Device) -> Outcome {
    let Some((mut live, shape, buffers, count)) = begin(device) else {
        return Outcome::Bad("it does not start");
    };
    let ring = &mut live.rings[shape.queue];
    for index in 0..USUAL_SIZE {
        ring.set(index, buffers[count - 1].then((index + 1) % USUAL_SIZE));
    }
    for head in 0..USUAL_SIZE {
        ring.offer(head);
    }
    device.notify(ring.index);
    for _ in 0..USUAL_SIZE {
        match judge(device.kind, ring.wait(device)) {
            Outcome::Refused => {}
            other => return other,
        }
    }
    Outcome::Refused
}
