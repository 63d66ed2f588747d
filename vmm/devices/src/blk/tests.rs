//! The disk against a driver that is played here.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hyper_vmm_spec::DiskId;
use hyper_vmm_spec::control::MAX_DISK_PARTS;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::disk::BOUNCE_BYTES;
use super::request::{MAX_DISCARD_SECTORS, MAX_RANGES, MAX_ZERO_SECTORS};
use super::{Blk, BlkError};
use crate::device::{ActivateContext, GuestMem, VirtioDevice};
use crate::mock::{CountingInterrupt, Driver, memory};

const HEADER: u64 = 0x10_0000;
const STATUS: u64 = 0x10_1000;
const DATA: u64 = 0x20_0000;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

fn file(bytes: u64) -> (tempfile::NamedTempFile, File) {
    let named = tempfile::NamedTempFile::new().unwrap();
    named.as_file().set_len(bytes).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(named.path()).unwrap();
    (named, file)
}

fn id() -> DiskId {
    DiskId::new("rootfs-1").unwrap()
}

struct Machine<'m> {
    blk: Blk,
    driver: Driver<'m>,
    kick: EventFd,
    mem: &'m GuestMemoryMmap,
    interrupt: Arc<CountingInterrupt>,
}

impl<'m> Machine<'m> {
    fn new(mem: &'m GuestMem, mut blk: Blk) -> Self {
        let driver = Driver::new(mem, GuestAddress(0), 256);
        let (active, kick) = driver.active(0, true);
        let interrupt = Arc::new(CountingInterrupt::default());
        let context = ActivateContext {
            mem: Arc::clone(mem),
            interrupt: interrupt.clone(),
            features: blk.features(),
            queues: vec![active],
        };
        assert!(blk.activate(context).unwrap().is_empty());
        Self { blk, driver, kick, mem, interrupt }
    }

    fn wait(&mut self) -> (u16, u32) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(used) = self.driver.used() {
                return used;
            }
            assert!(Instant::now() < deadline, "the disk does not answer");
            std::thread::yield_now();
        }
    }

    /// One request with the given data buffers; returns its status and length.
    fn ask(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
        let header = [u64::from(kind), sector].map(u64::to_le_bytes).concat();
        self.mem.write_slice(&header, GuestAddress(HEADER)).unwrap();
        self.mem.write_obj(0xff_u8, GuestAddress(STATUS)).unwrap();
        let mut buffers = vec![(HEADER, 16, false)];
        buffers.extend_from_slice(data);
        buffers.push((STATUS, 1, true));
        self.driver.offer(&buffers);
        self.kick.write(1).unwrap();
        let (_, len) = self.wait();
        (self.mem.read_obj(GuestAddress(STATUS)).unwrap(), len)
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let bytes: Vec<u8> = ranges
            .iter()
            .flat_map(|(sector, count, flags)| {
                [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
            })
            .collect();
        self.mem.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        self.ask(kind, 0, &[(DATA, bytes.len() as u32, false)]).0
    }

    fn counter(&self, name: &str) -> u64 {
        self.blk.counters().into_iter().find(|(n, _)| *n == name).unwrap().1
    }
}

#[test]
fn what_is_written_is_read_back_across_odd_buffers() {
    let mem = memory();
    let (_named, disk) = file(8 << 20);
    let mut vm = Machine::new(&mem, Blk::new(&id(), disk, false).unwrap());
    let len = BOUNCE_BYTES * 2 + 512 * 3;
    let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + i / 512) as u8).collect();
    mem.write_slice(&bytes, GuestAddress(DATA)).unwrap();
    let cut = 1001;
    let pieces = |w| [(DATA, cut, w), (DATA + u64::from(cut), len as u32 - cut, w)];
    assert_eq!(vm.ask(OUT, 5, &pieces(false)), (OK, 1));
    assert_eq!(vm.ask(FLUSH, 0, &[]), (OK, 1));
    mem.write_slice(&vec![0; len], GuestAddress(DATA)).unwrap();
    assert_eq!(vm.ask(IN, 5, &pieces(true)), (OK, len as u32 + 1));
    let mut read = vec![0; len];
    mem.read_slice(&mut read, GuestAddress(DATA)).unwrap();
    assert!(read == bytes);
    assert_eq!((vm.counter("read_bytes"), vm.counter("flushes")), (len as u64, 1));
    assert!(vm.interrupt.used.load(Ordering::SeqCst) >= 3);
}

#[test]
fn the_serial_is_the_id() {
    let mem = memory();
    let (_named, disk) = file(512);
    let mut vm = Machine::new(&mem, Blk::new(&id(), disk, false).unwrap());
    assert_eq!(vm.ask(GET_ID, 0, &[(DATA, 20, true)]), (OK, 21));
    let serial: [u8; 20] = mem.read_obj(GuestAddress(DATA)).unwrap();
    assert_eq!(&serial, b"rootfs-1\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(vm.ask(GET_ID, 0, &[(DATA, 4, true)]), (OK, 5));
    assert_eq!(vm.ask(GET_ID, 0, &[]), (OK, 1), "no room for it is no reason to look for ever");
}

#[test]
fn nothing_outside_the_disk_is_reached() {
    let mem = memory();
    // Not a whole number of sectors: the rest is out of reach.
    let (mut named, disk) = file(10 * 512 + 100);
    let mut vm = Machine::new(&mem, Blk::new(&id(), disk, false).unwrap());
    let mut capacity = [0; 8];
    vm.blk.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 10);
    let sector = |w| [(DATA, 512, w)];
    assert_eq!(vm.ask(IN, 9, &sector(true)).0, OK);
    assert_eq!(vm.ask(OUT, 9, &sector(false)).0, OK);
    for first in [10, 11, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(vm.ask(IN, first, &sector(true)), (IOERR, 1), "{first}");
        assert_eq!(vm.ask(OUT, first, &sector(false)).0, IOERR, "{first}");
    }
    assert_eq!(vm.ask(IN, 9, &[(DATA, 1024, true)]).0, IOERR);
    assert_eq!(vm.ask(IN, 0, &[(DATA, 100, true)]).0, IOERR);
    assert_eq!(vm.ask(IN, 0, &[]).0, OK);
    let mut all = Vec::new();
    named.seek(SeekFrom::Start(0)).unwrap();
    named.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 10 * 512 + 100);
}

#[test]
fn unknown_and_malformed_requests() {
    let mem = memory();
    let (_named, disk) = file(4096);
    let mut vm = Machine::new(&mem, Blk::new(&id(), disk, false).unwrap());
    assert_eq!(vm.ask(2, 0, &[]), (UNSUPP, 1));
    // No status byte, a header that is too short, nothing at all.
    for buffers in
        [vec![(HEADER, 16, false)], vec![(HEADER, 8, false), (STATUS, 1, true)], vec![(0, 0, false)]]
    {
        vm.driver.offer(&buffers);
        vm.kick.write(1).unwrap();
        assert_eq!(vm.wait().1, 0);
    }
    assert_eq!(vm.counter("malformed"), 3);
    // The disk still serves.
    assert_eq!(vm.ask(IN, 0, &[(DATA, 512, true)]).0, OK);
}

#[test]
fn one_head_offered_twice_is_served_twice() {
    let mem = memory();
    let (_named, disk) = file(4096);
    let mut vm = Machine::new(&mem, Blk::new(&id(), disk, false).unwrap());
    mem.write_slice(&[0; 16], GuestAddress(HEADER)).unwrap();
    let head = vm.driver.offer(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    for _ in 0..99 {
        vm.driver.offer_again(head);
    }
    vm.kick.write(1).unwrap();
    for _ in 0..100 {
        assert_eq!(vm.wait(), (head, 513));
    }
}

#[test]
fn read_only_is_enforced_by_device_and_descriptor() {
    let mem = memory();
    let (named, writable) = file(4096);
    assert!(matches!(Blk::new(&id(), writable, true), Err(BlkError::Mode { mode: "read-write", .. })));
    let read_only = || File::open(named.path()).unwrap();
    assert!(matches!(Blk::new(&id(), read_only(), false), Err(BlkError::Mode { mode: "read-only", .. })));
    let blk = Blk::new(&id(), read_only(), true).unwrap();
    assert_ne!(blk.features() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(blk.features() & 1 << VIRTIO_BLK_F_FLUSH, 0);
    let mut vm = Machine::new(&mem, blk);
    assert_eq!(vm.ask(IN, 0, &[(DATA, 512, true)]).0, OK);
    assert_eq!(vm.ask(OUT, 0, &[(DATA, 512, false)]).0, IOERR);
    assert_eq!(vm.ranges(DISCARD, &[(0, 8, 0)]), UNSUPP);
    assert_eq!(vm.ranges(WRITE_ZEROES, &[(0, 8, 0)]), UNSUPP);
}

#[test]
fn empty_files_are_no_disks() {
    let (_named, disk) = file(511);
    assert!(matches!(Blk::new(&id(), disk, false), Err(BlkError::Size { .. })));
}

#[test]
fn discard_and_write_zeroes_free_and_clear() {
    let mem = memory();
    let (named, disk) = file(4 << 20);
    (&disk).write_all(&vec![0xaa; 4 << 20]).unwrap();
    disk.sync_all().unwrap();
    let before = named.as_file().metadata().unwrap().blocks();
    let mut vm = Machine::new(&mem, Blk::new(&id(), disk, false).unwrap());
    assert_eq!(vm.ranges(DISCARD, &[(0, 2048, 0), (4096, 1024, 0)]), OK);
    assert!(named.as_file().metadata().unwrap().blocks() < before);
    assert_eq!(vm.ranges(WRITE_ZEROES, &[(2048, 3, 0), (2060, 8, 1)]), OK);
    let mut sectors = vec![0; 32 * 512];
    named.as_file().read_exact_at(&mut sectors, 2048 * 512).unwrap();
    let clear = |n: usize| sectors[n * 512..(n + 1) * 512].iter().all(|b| *b == 0);
    assert_eq!((0..32).filter(|n| clear(*n)).collect::<Vec<_>>(), [0, 1, 2, 12, 13, 14, 15, 16, 17, 18, 19]);
    assert_eq!(named.as_file().metadata().unwrap().len(), 4 << 20);
    // Bounds: outside, too long, unknown flags, too many, not whole, none.
    assert_eq!(vm.ranges(DISCARD, &[(8192, 1, 0)]), IOERR);
    assert_eq!(vm.ranges(DISCARD, &[(u64::MAX, 1, 0)]), IOERR);
    assert_eq!(vm.ranges(DISCARD, &[(0, MAX_DISCARD_SECTORS + 1, 0)]), IOERR);
    assert_eq!(vm.ranges(DISCARD, &[(0, 1, 1)]), UNSUPP);
    assert_eq!(vm.ranges(WRITE_ZEROES, &[(0, MAX_ZERO_SECTORS + 1, 0)]), IOERR);
    assert_eq!(vm.ranges(WRITE_ZEROES, &[(0, 1, 2)]), UNSUPP);
    assert_eq!(vm.ranges(DISCARD, &vec![(0, 1, 0); MAX_RANGES as usize + 1]), IOERR);
    assert_eq!(vm.ask(DISCARD, 0, &[(DATA, 15, false)]).0, IOERR);
    assert_eq!(vm.ask(DISCARD, 0, &[]).0, IOERR);
    // One bad range, and none is served.
    named.as_file().write_all_at(&[1; 512], 0).unwrap();
    assert_eq!(vm.ranges(WRITE_ZEROES, &[(0, 1, 0), (9000, 1, 0)]), IOERR);
    let mut first = [0; 1];
    named.as_file().read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [1]);
}

#[test]
fn reset_stops_the_worker_and_activation_starts_another() {
    let mem = memory();
    let (_named, disk) = file(4096);
    let mut vm = Machine::new(&mem, Blk::new(&id(), disk, false).unwrap());
    assert_eq!(vm.ask(IN, 0, &[(DATA, 512, true)]).0, OK);
    vm.blk.reset();
    assert!(vm.blk.worker.is_none());
    let mut vm = Machine::new(&mem, vm.blk);
    assert_eq!(vm.ask(IN, 0, &[(DATA, 512, true)]).0, OK);
}

#[test]
fn an_impossible_ring_index_does_not_hang_the_worker() {
    let mem = memory();
    let (_named, disk) = file(4096);
    let mut vm = Machine::new(&mem, Blk::new(&id(), disk, false).unwrap());
    mem.write_obj(60_000_u16, GuestAddress(256 * 16 + 2)).unwrap();
    vm.kick.write(1).unwrap();
    vm.blk.reset();
}

#[test]
fn a_paused_disk_serves_nothing_and_goes_on() {
    let mem = memory();
    let (_named, file) = file(8192);
    let mut machine = Machine::new(&mem, Blk::new(&id(), file, false).unwrap());
    assert_eq!(machine.ask(FLUSH, 0, &[]).0, OK);
    machine.blk.pause();
    machine.blk.pause();
    assert!(machine.blk.worker.is_none(), "its thread has ended");
    machine.mem.write_slice(&[[0; 8], [0; 8]].concat(), GuestAddress(HEADER)).unwrap();
    machine.driver.offer(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    machine.kick.write(1).unwrap();
    assert!(machine.driver.used().is_none());
    machine.blk.resume();
    machine.wait();
    assert_eq!(machine.ask(FLUSH, 0, &[]).0, OK);
    machine.blk.resume();
    assert!(machine.blk.worker.is_some());
}

#[test]
fn a_driver_is_told_of_another_disks_size() {
    let mem = memory();
    let disk = |bytes| Blk::new(&id(), file(bytes).1, false).unwrap();
    let state = disk(8192).save().unwrap();
    for (bytes, told) in [(8192, 0), (4096, 1)] {
        let mut blk = disk(bytes);
        blk.restore(&state).unwrap();
        let machine = Machine::new(&mem, blk);
        assert_eq!(machine.interrupt.config.load(Ordering::SeqCst), told, "{bytes}");
    }
    assert!(disk(4096).restore(&state[1..]).is_err());
}

#[test]
fn parts_are_files_of_their_own() {
    let mem = memory();
    let (first, first_file) = file(9 * 512);
    let (second, _) = file(4096);
    let (third, third_file) = file(1 << 20);
    let fixed = File::open(second.path()).unwrap();
    second.as_file().write_all_at(&[7; 512], 0).unwrap();
    // Of the last one, half is used.
    let blk = Blk::of_parts(&id(), vec![(first_file, 9), (fixed, 8), (third_file, 1024)]).unwrap();
    assert_eq!(blk.disk.sectors(), 16 + 8 + 1024);
    assert_eq!(blk.features() & 1 << VIRTIO_BLK_F_RO, 0);
    let mut vm = Machine::new(&mem, blk);
    mem.write_slice(&[9; 4096], GuestAddress(DATA)).unwrap();
    let write = |bytes| [(DATA, bytes, false)];
    assert_eq!(vm.ask(OUT, 8, &write(512)), (OK, 1));
    assert_eq!(vm.ask(OUT, 24, &write(1024)), (OK, 1));
    assert_eq!(vm.ask(OUT, 24 + 1023, &write(512)), (OK, 1));
    // Beyond a part, between parts, over the seam of two parts, behind the last.
    for (sector, bytes) in [(8, 1024), (9, 512), (15, 512), (23, 1024), (24 + 1023, 1024), (24 + 1024, 512)] {
        assert_eq!(vm.ask(OUT, sector, &write(bytes)).0, IOERR, "{sector}");
        assert_eq!(vm.ask(IN, sector, &[(DATA, bytes, true)]).0, IOERR, "{sector}");
    }
    // The one that is read-only.
    assert_eq!(vm.ask(OUT, 16, &write(512)).0, IOERR);
    assert_eq!(vm.ranges(DISCARD, &[(16, 8, 0)]), IOERR);
    assert_eq!(vm.ranges(WRITE_ZEROES, &[(24, 1, 0), (16, 1, 0)]), IOERR);
    assert_eq!(vm.ask(IN, 16, &[(DATA, 512, true)]), (OK, 513));
    assert_eq!(mem.read_obj::<u8>(GuestAddress(DATA)).unwrap(), 7);
    assert_eq!(vm.ranges(WRITE_ZEROES, &[(25, 1, 0)]), OK);
    assert_eq!(vm.ask(FLUSH, 0, &[]), (OK, 1));
    let bytes = |file: &tempfile::NamedTempFile, at| {
        let mut sector = [1; 512];
        file.as_file().read_exact_at(&mut sector, at).unwrap();
        sector
    };
    assert_eq!(bytes(&first, 8 * 512), [9; 512]);
    assert_eq!(
        (bytes(&third, 0), bytes(&third, 512), bytes(&third, 1023 * 512)),
        ([9; 512], [0; 512], [9; 512])
    );
    assert_eq!(bytes(&third, 1024 * 512), [0; 512], "what is not used");
    assert_eq!(bytes(&second, 0), [7; 512]);
}

#[test]
fn parts_that_cannot_be_are_refused() {
    let open = |bytes| File::open(file(bytes).0.path()).unwrap();
    let size = |parts| matches!(Blk::of_parts(&id(), parts), Err(BlkError::Size { .. }));
    assert!(size(vec![(open(4096), 9)]), "shorter than said");
    assert!(size(vec![(open(4096), 8), (open(4096), 0)]));
    let count = |parts| matches!(Blk::of_parts(&id(), parts), Err(BlkError::Parts { .. }));
    assert!(count(vec![]));
    assert!(count(vec![(open(512), u64::MAX)]));
    assert!(count((0..=MAX_DISK_PARTS).map(|_| (open(512), 1)).collect()));
    let only_written = OpenOptions::new().write(true).open(file(512).0.path()).unwrap();
    assert!(matches!(Blk::of_parts(&id(), vec![(only_written, 1)]), Err(BlkError::Mode { .. })));
}

#[test]
fn a_head_that_there_is_not_needs_a_reset() {
    let mem = memory();
    let (_named, disk) = file(4096);
    let mut vm = Machine::new(&mem, Blk::new(&id(), disk, false).unwrap());
    vm.driver.offer_again(256);
    vm.kick.write(1).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while vm.interrupt.reset.load(Ordering::SeqCst) == 0 {
        assert!(Instant::now() < deadline, "nobody is told");
        std::thread::yield_now();
    }
    vm.blk.reset();
}
