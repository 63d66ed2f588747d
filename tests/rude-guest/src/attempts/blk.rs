//! Requests that no disk has (virtio 1.3, 5.2.6).

use crate::device::{Device, F_INDIRECT_DESC, Live, reg};
use crate::memory::{self, ARENA, MEMORY_END};
use crate::requests::{ANSWER, BLK_OK as OK, REQUEST, SECTOR};
use crate::ring::{Buffer, End, INDIRECT, USUAL_SIZE};
use crate::tally::{Must, Outcome, Tally, answered, refused};

const STATUS: u64 = ANSWER + 0x1_0000;
const DATA: u64 = ANSWER + 0x2_0000;
const TABLE: u64 = 0x280_0000;

const UNSUPPORTED: u8 = 2;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const F_READ_ONLY: u64 = 1 << 5;
const F_DISCARD: u64 = 1 << 13;
/// Sectors at the end of a disk that may be written to: who set up the machine looks at all others.
const SCRATCH_SECTORS: u64 = 8;

/// Type, first sector, length of the data that is read by the device, and of that which it writes.
type Row = (&'static str, u32, fn(u64) -> u64, u32, u32);

const WRAP: u64 = 1 << 55;

/// What must fail on every disk. The function has the number of sectors.
const ERRORS: &[Row] = &[
    ("read behind the end", IN, |end| end, 0, SECTOR),
    ("read across the end", IN, |end| end - 1, 0, 2 * SECTOR),
    ("read at the last number", IN, |_| u64::MAX, 0, SECTOR),
    ("read at 2^55, whose byte is 2^64", IN, |_| WRAP, 0, SECTOR),
    ("read across 2^64", IN, |_| WRAP - 1, 0, 2 * SECTOR),
    ("read of part of a sector", IN, |_| 0, 0, 100),
    ("read of more than there is", IN, |_| 0, 0, 32 << 20),
    ("write behind the end", OUT, |end| end, SECTOR, 0),
    ("write across the end", OUT, |end| end - 1, 2 * SECTOR, 0),
    ("write at the last number", OUT, |_| u64::MAX, SECTOR, 0),
    ("write at 2^55, whose byte is 2^64", OUT, |_| WRAP, SECTOR, 0),
    ("write across 2^64", OUT, |_| WRAP - 1, 2 * SECTOR, 0),
    ("write of part of a sector", OUT, |end| end - 1, 511, 0),
    ("write of more than there is", OUT, |_| 0, 32 << 20, 0),
    ("request 2", 2, |_| 0, SECTOR, 0),
    ("request 3", 3, |_| 0, 0, SECTOR),
    ("request 5", 5, |_| 0, SECTOR, SECTOR),
    ("request 10", 10, |_| 0, SECTOR, 0),
    ("request 14, secure erase", 14, |_| 0, 16, 0),
    ("request 15, zone append", 15, |_| 0, SECTOR, 8),
    ("request 2^31", 1 << 31, |_| 0, SECTOR, 0),
    ("request 2^32 - 1", u32::MAX, |_| 0, 0, SECTOR),
];

/// Ranges of a discard or a write of zeroes: first sector by number of sectors, length, flags, how often, and bytes of the last one.
type Ranges = (&'static str, fn(u64) -> u64, u32, u32, u32, u32);

const RANGES: &[Ranges] = &[
    ("behind the end", |end| end, 1, 0, 1, 16),
    ("across the end", |end| end - 1, 2, 0, 1, 16),
    ("that wrap", |_| u64::MAX, u32::MAX, 0, 1, 16),
    ("whose bytes wrap", |_| WRAP - 1, 2, 0, 1, 16),
    ("of 2 TiB", |_| 0, u32::MAX, 0, 1, 16),
    ("with unknown flags", |end| end - 1, 1, 0xffff_fffe, 1, 16),
    ("more than allowed", |end| end - 1, 1, 0, 33, 16),
    ("by the thousand", |end| end - 1, 1, 0, 4000, 16),
    ("cut short", |end| end - 1, 1, 0, 1, 15),
    ("none", |_| 0, 0, 0, 0, 16),
];

fn sectors(device: &Device) -> u64 {
    u64::from(device.read(reg::CONFIG + 4)) << 32 | u64::from(device.read(reg::CONFIG))
}

/// A request with a status; none when it came back without one.
fn request(live: &mut Live<'_>, kind: u32, sector: u64, data: &[Buffer]) -> Result<u8, Outcome> {
    header(kind, sector);
    let mut all = [Buffer::writable(STATUS, 1); 4];
    all[0] = Buffer::readable(REQUEST, 16);
    all[1..=data.len()].copy_from_slice(data);
    memory::fill(STATUS, 1, 0x77);
    ask(live, &all[..data.len() + 2])
}

fn header(kind: u32, sector: u64) {
    memory::write(REQUEST, &kind.to_le_bytes());
    memory::write(REQUEST + 4, &[0xff; 4]);
    memory::write(REQUEST + 8, &sector.to_le_bytes());
}

fn ask(live: &mut Live<'_>, chain: &[Buffer]) -> Result<u8, Outcome> {
    live.rings[0].offer_chain(0, chain);
    match live.rings[0].ask(live.device) {
        End::Used { head: 0, len: 0 } => Err(Outcome::Refused),
        End::Used { head: 0, .. } => match memory::read::<1>(STATUS)[0] {
            0x77 => Err(Outcome::Bad("it came back without a status")),
            status => Ok(status),
        },
        End::Used { .. } => Err(Outcome::Bad("another head came back")),
        End::NeedsReset => Err(Outcome::NeedsReset),
        End::Silence => Err(Outcome::Bad("it is silent")),
    }
}

pub(super) fn run(device: &Device, tally: &mut Tally) {
    let end = sectors(device);
    let read_only = device.offered() & F_READ_ONLY != 0;
    for (name, kind, sector, out, into) in ERRORS {
        tally.attempt(device, name, Must::Refuse, |d| fails(d, *kind, sector(end), *out, *into));
    }
    for (kind, kind_name) in [(DISCARD, "discard of ranges"), (WRITE_ZEROES, "zeroes to ranges")] {
        for (name, sector, len, flags, count, bytes) in RANGES {
            let all = [sector(end), u64::from(*len), u64::from(*flags), u64::from(*count), u64::from(*bytes)];
            tally.attempt(device, kind_name, Must::Refuse, |d| match ranges(d, kind, all) {
                Outcome::Bad(_) => Outcome::Bad(name),
                other => other,
            });
        }
        let scratch = [end - SCRATCH_SECTORS, 1, 0, 1, 16];
        let must = if read_only { Must::Refuse } else { Must::Answer };
        tally.attempt(device, kind_name, must, |d| ranges(d, kind, scratch));
        if !read_only {
            tally.attempt(device, "ranges that were not negotiated", Must::Refuse, |d| {
                unnegotiated(d, kind, scratch)
            });
        }
    }
    let must = if read_only { Must::Refuse } else { Must::Answer };
    tally.attempt(device, "a write", must, |d| write(d, end - 1));
    tally.attempt(device, "names of every length", Must::Answer, names);
    tally.attempt(device, "flush with data and a sector", Must::Live, flush);
    tally.attempt(device, "header in single bytes", Must::Answer, header_in_bytes);
    tally.attempt(device, "header of 15 bytes", Must::Refuse, short_header);
    tally.attempt(device, "no room for the status", Must::Refuse, no_status);
    tally.attempt(device, "data and status in one buffer", Must::Answer, one_buffer);
    tally.attempt(device, "read over its own ring", Must::Live, over_its_ring);
    tally.attempt(device, "4 GiB by a table", Must::Refuse, four_gib);
    tally.attempt(device, "as many at once as the queue holds", Must::Answer, full);
}

fn status(answer: Result<u8, Outcome>) -> Outcome {
    match answer {
        Ok(OK) => Outcome::Answered,
        Ok(_) => Outcome::Refused,
        Err(other) => other,
    }
}

fn fails(device: &Device, kind: u32, sector: u64, out: u32, into: u32) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    memory::fill(DATA, 1024, 0x11);
    let data = [Buffer::readable(DATA, out), Buffer::writable(DATA, into)];
    let first = usize::from(out == 0);
    let last = if into == 0 { 1 } else { 2 };
    let answer = request(&mut live, kind, sector, &data[first..last]);
    if memory::read::<1024>(DATA) != [0x11; 1024] {
        return Outcome::Bad("it fails and writes data all the same");
    }
    match answer {
        Ok(status) if !matches!(kind, IN | OUT) && status != UNSUPPORTED => {
            Outcome::Bad("unknown, but not called so")
        }
        answer => status(answer),
    }
}

fn ranges(device: &Device, kind: u32, what: [u64; 5]) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    status(ask_ranges(&mut live, kind, what))
}

fn ask_ranges(
    live: &mut Live<'_>,
    kind: u32,
    [sector, len, flags, count, bytes]: [u64; 5],
) -> Result<u8, Outcome> {
    for n in 0..count {
        memory::write(DATA + n * 16, &sector.to_le_bytes());
        memory::write(DATA + n * 16 + 8, &(len as u32).to_le_bytes());
        memory::write(DATA + n * 16 + 12, &(flags as u32).to_le_bytes());
    }
    let len = (count * 16).saturating_sub(16 - bytes) as u32;
    request(live, kind, 0, &[Buffer::readable(DATA, len)])
}

/// 5.2.6.1: such a request is for those who have accepted it.
fn unnegotiated(device: &Device, kind: u32, what: [u64; 5]) -> Outcome {
    let bit = if kind == DISCARD { F_DISCARD } else { F_DISCARD << 1 };
    match device.live_with(device.wanted() & !bit, USUAL_SIZE) {
        Some(mut live) => status(ask_ranges(&mut live, kind, what)),
        None => Outcome::Bad("it does not start"),
    }
}

fn write(device: &Device, sector: u64) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    memory::fill(DATA, 512, 0xc3);
    let written = status(request(&mut live, OUT, sector, &[Buffer::readable(DATA, SECTOR)]));
    memory::fill(DATA, 512, 0);
    let read = request(&mut live, IN, sector, &[Buffer::writable(DATA, SECTOR)]);
    let same = memory::read::<512>(DATA) == [0xc3; 512];
    match written {
        _ if read != Ok(OK) => Outcome::Bad("what was written cannot be read"),
        Outcome::Answered if !same => Outcome::Bad("what was written is not there"),
        Outcome::Refused if same => Outcome::Bad("what was refused is there"),
        other => other,
    }
}

/// 5.2.6.1: 20 bytes at most.
fn names(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    for len in [1, 19, 20, 21, 4096] {
        memory::fill(DATA, 4096, 0x11);
        if request(&mut live, GET_ID, 0, &[Buffer::writable(DATA, len)]) != Ok(OK) {
            return Outcome::Bad("the name is not told");
        }
        if memory::read::<64>(DATA + u64::from(len.min(20)))[..] != [0x11; 64] {
            return Outcome::Bad("more than the name is written");
        }
    }
    status(request(&mut live, GET_ID, 0, &[]))
}

fn flush(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    status(request(
        &mut live,
        FLUSH,
        u64::MAX,
        &[Buffer::readable(DATA, SECTOR), Buffer::writable(DATA, SECTOR)],
    ))
}

fn header_in_bytes(device: &Device) -> Outcome {
    let Some(mut live) = device.live_with(device.wanted(), 32) else {
        return Outcome::Bad("it does not start");
    };
    header(IN, 0);
    let mut chain = [Buffer::writable(STATUS, 1); 18];
    for (n, buffer) in (0..16).zip(&mut chain) {
        *buffer = Buffer::readable(REQUEST + n, 1);
    }
    chain[16] = Buffer::writable(DATA, SECTOR);
    status(ask(&mut live, &chain))
}

fn short_header(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    header(IN, 0);
    let chain = [Buffer::readable(REQUEST, 15), Buffer::writable(DATA, SECTOR), Buffer::writable(STATUS, 1)];
    status(ask(&mut live, &chain))
}

fn no_status(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    header(OUT, 0);
    status(ask(&mut live, &[Buffer::readable(REQUEST, 16), Buffer::readable(DATA, SECTOR)]))
}

fn one_buffer(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    header(IN, 0);
    let from = STATUS - u64::from(SECTOR);
    status(ask(&mut live, &[Buffer::readable(REQUEST, 16), Buffer::writable(from, SECTOR + 1)]))
}

fn over_its_ring(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    let ring = live.rings[0];
    header(IN, 0);
    for at in [ring.descriptors, ring.available & !0x1ff, ring.used & !0x1ff] {
        let chain =
            [Buffer::readable(REQUEST, 16), Buffer::writable(at, SECTOR), Buffer::writable(STATUS, 1)];
        live.rings[0].offer_chain(0, &chain);
        device.notify(0);
        let _whatever = live.rings[0].wait_briefly(device);
    }
    match device.needs_reset() {
        true => Outcome::NeedsReset,
        false => Outcome::Answered,
    }
}

fn four_gib(device: &Device) -> Outcome {
    if device.offered() & F_INDIRECT_DESC == 0 {
        return Outcome::Bad("it has no tables");
    }
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    header(IN, 0);
    let len = (MEMORY_END - ARENA) as u32;
    let most = (u32::MAX / len) as u16;
    Buffer::readable(REQUEST, 16).then(1).put(TABLE, 0);
    for entry in 1..=most {
        Buffer::writable(ARENA, len).then(entry + 1).put(TABLE, entry);
    }
    Buffer::writable(STATUS, 1).put(TABLE, most + 1);
    let table = Buffer { flags: INDIRECT, ..Buffer::readable(TABLE, (u32::from(most) + 2) * 16) };
    status(ask(&mut live, &[table]))
}

fn full(device: &Device) -> Outcome {
    const SIZE: u16 = 256;
    const CHAINS: u16 = SIZE / 3;
    let Some(mut live) = device.live_with(device.wanted(), SIZE) else {
        return Outcome::Bad("it does not start");
    };
    header(IN, 0);
    let ring = &mut live.rings[0];
    for n in 0..CHAINS {
        let status = Buffer::writable(STATUS + u64::from(n), 1);
        ring.offer_chain(n * 3, &[Buffer::readable(REQUEST, 16), Buffer::writable(DATA, SECTOR), status]);
    }
    device.notify(0);
    let all = (0..CHAINS).all(|_| matches!(ring.wait(device), End::Used { len: 513, .. }));
    answered(all, "not all came back")
}

/// A disk that went away while its driver ran: nothing is answered, and nothing else happens.
pub(super) fn lost(live: &mut Live<'_>) -> Outcome {
    header(IN, 0);
    live.rings[0].offer_chain(0, &[Buffer::readable(REQUEST, 16), Buffer::writable(DATA, 513)]);
    live.device.notify(0);
    refused(live.rings[0].wait_briefly(live.device) == End::Silence, "a disk that is not there answers")
}
