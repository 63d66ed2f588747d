//! The device as its driver and its owner see it.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::handler::Plugger;
use super::request::{Answer, BLOCK_BYTES, Plugged, Request};
use super::{F_VERSION_1, Mem, PlugMemory, Reached};
use crate::device::{ActivateContext, ActivateError, VirtioDevice};
use crate::mock::{CountingInterrupt, Driver, memory};
use crate::serve::{Counter, ServeChain};

const START: u64 = 1 << 32;

#[derive(Debug, Clone, Default)]
struct Notes {
    done: Arc<Mutex<Vec<(bool, u64, u64)>>>,
    refuses: bool,
}

impl Notes {
    fn note(&self, plug: bool, start: GuestAddress, len: u64) -> io::Result<()> {
        if self.refuses {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.done.lock().unwrap().push((plug, (start.0 - START) / BLOCK_BYTES, len / BLOCK_BYTES));
        Ok(())
    }
}

impl PlugMemory for Notes {
    fn plug(&self, start: GuestAddress, len: u64) -> io::Result<()> {
        self.note(true, start, len)
    }
    fn unplug(&self, start: GuestAddress, len: u64) -> io::Result<()> {
        self.note(false, start, len)
    }
}

type Told = Arc<Mutex<Vec<u64>>>;

/// A device of 64 blocks, what serves its queue, and the goals that were met.
fn device(notes: &Notes) -> (Mem<Notes>, Plugger<Notes>, Told) {
    let told = Told::default();
    let tell = Arc::clone(&told);
    let reached = Reached::new(move |serial| tell.lock().unwrap().push(serial));
    let mem = Mem::new(notes.clone(), GuestAddress(START), 64 * BLOCK_BYTES, reached.clone());
    let region = Arc::clone(&mem.goal.region);
    let plugger = Plugger { region, memory: notes.clone(), reached, failed: Counter::default() };
    (mem, plugger, told)
}

fn at(block: u64) -> u64 {
    START + block * BLOCK_BYTES
}

#[test]
fn the_guest_gets_what_it_is_to_have_and_no_more() {
    let notes = Notes::default();
    let (mem, plugger, _) = device(&notes);
    assert_eq!(plugger.answer(Request::Plug { addr: at(0), blocks: 1 }), Answer::Nack);
    mem.goal().set(10 * BLOCK_BYTES - 1, 1);
    assert_eq!(plugger.answer(Request::Plug { addr: at(4), blocks: 8 }), Answer::Ack);
    assert_eq!(plugger.answer(Request::Plug { addr: at(0), blocks: 3 }), Answer::Nack);
    assert_eq!(plugger.answer(Request::Plug { addr: at(0), blocks: 2 }), Answer::Ack);
    assert_eq!(*notes.done.lock().unwrap(), [(true, 4, 8), (true, 0, 2)]);
    let mut config = [0; 16];
    mem.read_config(40, &mut config);
    let full = 10 * BLOCK_BYTES;
    assert_eq!(config, [full.to_le_bytes(), full.to_le_bytes()].as_flattened());
    let state = |addr, blocks| plugger.answer(Request::State { addr, blocks });
    assert_eq!(state(at(0), 2), Answer::State(Plugged::All));
    assert_eq!(state(at(2), 2), Answer::State(Plugged::None));
    assert_eq!(state(at(3), 2), Answer::State(Plugged::Some));
    assert_eq!(plugger.answer(Request::Unplug { addr: at(3), blocks: 2 }), Answer::Error);
    assert_eq!(plugger.answer(Request::Unplug { addr: at(4), blocks: 4 }), Answer::Ack);
    assert_eq!(plugger.answer(Request::UnplugAll), Answer::Ack);
    assert_eq!(
        notes.done.lock().unwrap()[2..],
        [
            (false, 4, 4),
            (false, 0, 1),
            (false, 1, 1),
            (false, 8, 1),
            (false, 9, 1),
            (false, 10, 1),
            (false, 11, 1)
        ]
    );
    assert_eq!(state(at(0), 64), Answer::State(Plugged::None));
}

#[test]
fn ranges_that_are_none_are_refused() {
    let notes = Notes::default();
    let (mem, plugger, _) = device(&notes);
    mem.goal().set(u64::MAX, 1);
    for (addr, blocks) in [
        (at(0), 0),
        (at(0) + 4096, 1),
        (at(0) - BLOCK_BYTES, 1),
        (0, 1),
        (at(63), 2),
        (at(64), 1),
        (u64::MAX - BLOCK_BYTES + 1, u16::MAX),
    ] {
        for request in [
            Request::Plug { addr, blocks },
            Request::Unplug { addr, blocks },
            Request::State { addr, blocks },
        ] {
            assert_eq!(plugger.answer(request), Answer::Error, "{request:?}");
        }
    }
    assert_eq!(plugger.answer(Request::Plug { addr: at(0), blocks: 64 }), Answer::Ack);
    assert_eq!(plugger.answer(Request::Plug { addr: at(0), blocks: 1 }), Answer::Error, "twice");
    assert_eq!(notes.done.lock().unwrap().len(), 1);
}

#[test]
fn a_host_that_cannot_leaves_all_as_it_was() {
    let notes = Notes { refuses: true, ..Notes::default() };
    let (mem, plugger, _) = device(&notes);
    mem.goal().set(BLOCK_BYTES, 1);
    assert_eq!(plugger.answer(Request::Plug { addr: at(0), blocks: 1 }), Answer::Busy);
    assert_eq!(plugger.answer(Request::State { addr: at(0), blocks: 1 }), Answer::State(Plugged::None));
    assert_eq!(plugger.failed.get(), 1);
}

#[test]
fn a_goal_is_told_once_when_it_is_met() {
    let (mem, mut plugger, told) = device(&Notes::default());
    let guest = memory();
    let mut driver = Driver::new(&guest, GuestAddress(0), 8);
    let mut queue = driver.queue();
    let mut ask = |kind: u8, block: u64, blocks: u16| {
        let bytes =
            [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &at(block).to_le_bytes(), &blocks.to_le_bytes()].concat();
        guest.write_slice(&bytes, GuestAddress(0x10_0000)).unwrap();
        driver.offer(&[(0x10_0000, 24, false), (0x11_0000, 10, true)]);
        let written = plugger.serve(&guest, queue.pop_descriptor_chain(&*guest).unwrap()).unwrap();
        (written, guest.read_obj::<u8>(GuestAddress(0x11_0000)).unwrap())
    };
    mem.goal().set(4 * BLOCK_BYTES, 7);
    assert_eq!(ask(0, 0, 2), (10, 0));
    assert!(told.lock().unwrap().is_empty());
    assert_eq!(ask(0, 2, 2), (10, 0));
    assert_eq!(ask(3, 2, 2), (10, 0));
    assert_eq!(*told.lock().unwrap(), [7]);
    mem.goal().set(4 * BLOCK_BYTES, 8);
    assert_eq!(*told.lock().unwrap(), [7, 8], "what is so already is told at once");
    mem.goal().set(0, 9);
    mem.goal().set(2 * BLOCK_BYTES, 10);
    assert_eq!(ask(1, 0, 2), (10, 0));
    assert_eq!(*told.lock().unwrap(), [7, 8, 10], "only the latest");
}

#[test]
fn a_running_driver_hears_of_a_new_goal() {
    let (mut mem, ..) = device(&Notes::default());
    let guest = memory();
    let driver = Driver::new(&guest, GuestAddress(0), 8);
    let interrupt = Arc::new(CountingInterrupt::default());
    let context = |queues| ActivateContext {
        mem: Arc::clone(&guest),
        interrupt: Arc::clone(&interrupt) as Arc<dyn crate::device::Interrupt>,
        features: F_VERSION_1,
        queues,
    };
    assert!(matches!(mem.activate(context(vec![])), Err(ActivateError::MissingQueue(0))));
    mem.goal().set(BLOCK_BYTES, 1);
    assert_eq!(interrupt.config.load(Ordering::SeqCst), 0);
    assert_eq!(mem.activate(context(vec![driver.active(0, false).0])).unwrap().len(), 1);
    mem.goal().set(2 * BLOCK_BYTES, 2);
    assert_eq!(interrupt.config.load(Ordering::SeqCst), 1);
    mem.reset();
    mem.goal().set(BLOCK_BYTES, 3);
    assert_eq!(interrupt.config.load(Ordering::SeqCst), 1);
}

#[test]
fn what_cannot_be_answered_is_not_done() {
    let notes = Notes::default();
    let (device, mut plugger, _) = device(&notes);
    device.goal().set(BLOCK_BYTES, 1);
    let mem = memory();
    let request = [0_u64.to_le_bytes(), at(0).to_le_bytes(), 1_u64.to_le_bytes()].concat();
    mem.write_slice(&request, GuestAddress(0x1_0000)).unwrap();
    let mut driver = Driver::new(&mem, GuestAddress(0), 8);
    let mut queue = driver.queue();
    for (room, done) in [(9, false), (10, true)] {
        driver.offer(&[(0x1_0000, 24, false), (0x2_0000, room, true)]);
        let served = plugger.serve(&mem, queue.pop_descriptor_chain(&*mem).unwrap());
        assert_eq!((served.is_ok(), notes.done.lock().unwrap().len()), (done, usize::from(done)));
    }
}
