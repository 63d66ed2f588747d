//! The device against a back end that is played here, message by message.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use event_manager::{EventManager, SubscriberOps};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::{FsError, VhostUserFs};
use crate::device::{ActivateContext, ActivateError, GuestMem, Handler, VirtioDevice};
use crate::mock::{CountingInterrupt, Driver, memory};

const VERSION_1: u64 = 1 << 32;
const PROTOCOL: u64 = 1 << 30;
const MQ_AND_ACK: u64 = 1 | 8;

const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;

type Log = Arc<Mutex<Vec<(u32, Vec<u8>)>>>;

/// Answers requests as a back end with these features would, and keeps what it was asked.
fn play(mut socket: UnixStream, features: u64, protocol: u64, queues: u64) -> (Log, JoinHandle<()>) {
    let log = Log::default();
    let asked = Arc::clone(&log);
    let thread = std::thread::spawn(move || {
        let mut header = [0; 12];
        while socket.read_exact(&mut header).is_ok() {
            let [request, flags, size] =
                [0, 4, 8].map(|at| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()));
            let mut payload = vec![0; size as usize];
            socket.read_exact(&mut payload).unwrap();
            asked.lock().unwrap().push((request, payload.clone()));
            let answer = match request {
                GET_FEATURES => Some(features),
                GET_PROTOCOL_FEATURES => Some(protocol),
                GET_QUEUE_NUM => Some(queues),
                GET_VRING_BASE => Some(u64::from_le_bytes(payload[..8].try_into().unwrap())),
                _ if flags & 8 != 0 => Some(0),
                _ => None,
            };
            if let Some(value) = answer {
                let reply = [request, 1 | 4, 8].map(u32::to_le_bytes).concat();
                socket.write_all(&[reply, value.to_le_bytes().to_vec()].concat()).unwrap();
            }
        }
    });
    (log, thread)
}

fn file_backed() -> GuestMem {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4 << 20).unwrap();
    let range = (GuestAddress(0), 4 << 20, Some(FileOffset::new(file, 0)));
    Arc::new(GuestMemoryMmap::from_ranges_with_files([range]).unwrap())
}

fn context(mem: &GuestMem, drivers: &[Driver<'_>], interrupt: &Arc<CountingInterrupt>) -> ActivateContext {
    ActivateContext {
        mem: Arc::clone(mem),
        interrupt: interrupt.clone(),
        features: VERSION_1,
        queues: drivers.iter().enumerate().map(|(n, d)| d.active(n, false).0).collect(),
    }
}

#[test]
fn queues_are_handed_over_and_taken_back() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (log, thread) = play(theirs, VERSION_1 | PROTOCOL, MQ_AND_ACK, 2);
    let mut fs = VhostUserFs::new("share", ours).unwrap();
    assert_eq!(fs.features(), VERSION_1);
    let mut tag = [0; 6];
    fs.read_config(0, &mut tag);
    assert_eq!(&tag, b"share\0");

    let mem = file_backed();
    let drivers = [Driver::new(&mem, GuestAddress(0), 64), Driver::new(&mem, GuestAddress(0x8000), 256)];
    let interrupt = Arc::new(CountingInterrupt::default());
    let handlers = fs.activate(context(&mem, &drivers, &interrupt)).unwrap();
    assert_eq!(handlers.len(), 1);
    let asked = std::mem::take(&mut *log.lock().unwrap());
    let count = |request| asked.iter().filter(|(r, _)| *r == request).count();
    for request in [SET_VRING_NUM, SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ENABLE] {
        assert_eq!(count(request), 2, "{request}");
    }
    assert_eq!(count(SET_MEM_TABLE), 1);
    let sizes: Vec<_> = asked.iter().filter(|(r, _)| *r == SET_VRING_NUM).map(|(_, p)| p.clone()).collect();
    assert_eq!(sizes, [vec![0, 0, 0, 0, 64, 0, 0, 0], vec![1, 0, 0, 0, 0, 1, 0, 0]]);

    fs.reset();
    let stopped: Vec<_> = log.lock().unwrap().iter().map(|(request, _)| *request).collect();
    assert_eq!(stopped, [SET_VRING_ENABLE, GET_VRING_BASE, SET_VRING_ENABLE, GET_VRING_BASE]);
    // Another driver may start it again.
    drop(handlers);
    fs.activate(context(&mem, &drivers, &interrupt)).unwrap();
    drop(fs);
    thread.join().unwrap();
}

#[test]
fn a_back_end_that_lacks_something_is_refused() {
    for (features, protocol, queues) in [
        (VERSION_1, MQ_AND_ACK, 2),
        (PROTOCOL, MQ_AND_ACK, 2),
        (VERSION_1 | PROTOCOL, 1, 2),
        (VERSION_1 | PROTOCOL, MQ_AND_ACK, 1),
    ] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (_log, _thread) = play(theirs, features, protocol, queues);
        assert!(matches!(VhostUserFs::new("share", ours), Err(FsError::Lacks(_))));
    }
    for tag in ["", "a tag that is longer than thirty-six bytes"] {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(matches!(VhostUserFs::new(tag, ours), Err(FsError::Tag(_))));
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    assert!(matches!(VhostUserFs::new("share", ours), Err(FsError::VhostUser { .. })));
}

#[test]
fn its_end_is_reported_once_and_reset_does_not_hang() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let end = theirs.try_clone().unwrap();
    let (_log, thread) = play(theirs, VERSION_1 | PROTOCOL, MQ_AND_ACK, 2);
    let mut fs = VhostUserFs::new("share", ours).unwrap();
    let mem = file_backed();
    let drivers = [Driver::new(&mem, GuestAddress(0), 64), Driver::new(&mem, GuestAddress(0x8000), 64)];
    let interrupt = Arc::new(CountingInterrupt::default());
    let mut events = EventManager::<Handler>::new().unwrap();
    for handler in fs.activate(context(&mem, &drivers, &interrupt)).unwrap() {
        events.add_subscriber(handler);
    }
    assert_eq!(events.run_with_timeout(0).unwrap(), 0);
    end.shutdown(std::net::Shutdown::Both).unwrap();
    drop(end);
    thread.join().unwrap();
    assert_eq!(events.run_with_timeout(10_000).unwrap(), 1);
    assert_eq!(events.run_with_timeout(0).unwrap(), 0);
    assert_eq!(interrupt.reset.load(Ordering::SeqCst), 1);
    fs.reset();
    assert!(matches!(fs.activate(context(&mem, &drivers, &interrupt)), Err(ActivateError::VhostUser { .. })));
}

#[test]
fn memory_that_cannot_be_shared_and_missing_queues_are_errors() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (_log, _thread) = play(theirs, VERSION_1 | PROTOCOL, MQ_AND_ACK, 2);
    let mut fs = VhostUserFs::new("share", ours).unwrap();
    let mem = memory();
    let drivers = [Driver::new(&mem, GuestAddress(0), 64), Driver::new(&mem, GuestAddress(0x8000), 64)];
    let interrupt = Arc::new(CountingInterrupt::default());
    let one = context(&mem, &drivers[..1], &interrupt);
    assert!(matches!(fs.activate(one), Err(ActivateError::MissingQueue(1))));
    let both = context(&mem, &drivers, &interrupt);
    assert!(matches!(fs.activate(both), Err(ActivateError::VhostUser { .. })));
}
