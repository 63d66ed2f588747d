//! The device against a guest that is played here, over real Unix sockets.

mod conversations;
mod reset;

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::callers;
use super::connection::WINDOW_BYTES;
use super::handler::{MAX_PAYLOAD_BYTES, Queues, VsockHandler};
use super::request::{HEADER_BYTES, Header, Key, NO_MORE, NO_SEND, Op, TYPE_STREAM};
use super::table::{ANSWER_TIMEOUT, HostSide, MAX_CONNECTIONS};
use super::{Callers, Vsock};
use crate::device::{ActiveQueue, GuestMem, VirtioDevice};
use crate::mock::{CountingInterrupt, Driver, memory};

const CID: u64 = 3;
/// State of a device that has had no connections.
const FRESH: &[u8] = &[0, 0, 0, 0, 0x40];
const RX_BUFFERS: u64 = 0x10_0000;
const RX_BUFFER_BYTES: u32 = 3000;
const TX_BUFFERS: u64 = 0x40_0000;
const TX_BUFFER_BYTES: u64 = 0x1_1000;
const TX_SLOTS: u64 = 32;

/// A machine: the device with its handler, and the guest's half of the queues.
struct Machine<'m> {
    device: Vsock,
    handler: VsockHandler,
    mem: &'m GuestMemoryMmap,
    rx: Driver<'m>,
    tx: Driver<'m>,
    rx_kick: EventFd,
    tx_kick: EventFd,
    rx_buffers: HashMap<u16, u64>,
    rx_free: Vec<u64>,
    tx_buffers: HashMap<u16, u64>,
    tx_free: Vec<u64>,
    interrupt: Arc<CountingInterrupt>,
    dir: tempfile::TempDir,
    /// The other end of host port 52's socket.
    service: OwnedFd,
}

impl<'m> Machine<'m> {
    fn new(mem: &'m GuestMem) -> Self {
        Self::going_on(mem, FRESH, None)
    }

    /// From the device's state, with an event queue if there is to be one.
    fn going_on(mem: &'m GuestMem, state: &[u8], events: Option<ActiveQueue>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("v")).unwrap();
        let (service, far) = callers::tests::pair();
        let mut device = Vsock::new(CID as u32, listener, Callers::new([(52, service)])).unwrap();
        device.restore(state).unwrap();
        let rx = Driver::new(mem, GuestAddress(0), 256);
        let tx = Driver::new(mem, GuestAddress(0x1_0000), 256);
        let (rx_queue, rx_kick) = rx.active(0, true);
        let (tx_queue, tx_kick) = tx.active(1, true);
        let interrupt = Arc::new(CountingInterrupt::default());
        let listener = device.listener.try_clone().unwrap();
        let side =
            HostSide::new(listener, Arc::clone(&device.callers), Arc::clone(&device.counters)).unwrap();
        let queues = Queues::take([rx_queue, tx_queue].into_iter().chain(events).collect()).unwrap();
        let handler = VsockHandler::new(CID, Arc::clone(mem), interrupt.clone(), queues, side).unwrap();
        Self {
            device,
            handler,
            mem,
            rx,
            tx,
            rx_kick,
            tx_kick,
            rx_buffers: HashMap::new(),
            rx_free: (0..256).map(|i| RX_BUFFERS + i * 0x1000).collect(),
            tx_buffers: HashMap::new(),
            tx_free: (0..TX_SLOTS).map(|i| TX_BUFFERS + i * TX_BUFFER_BYTES).collect(),
            interrupt,
            dir,
            service: far,
        }
    }

    fn offer_rx(&mut self, count: usize) {
        for _ in 0..count.min(self.rx_free.len()) {
            let addr = self.rx_free.pop().unwrap();
            let head = self.rx.offer(&[(addr, RX_BUFFER_BYTES, true)]);
            self.rx_buffers.insert(head, addr);
        }
        self.rx_kick.write(1).unwrap();
    }

    /// Sends a packet whose payload lies in pieces of `piece` bytes; false when no buffer is free.
    fn send(&mut self, mut header: Header, payload: &[u8], piece: usize) -> bool {
        let pieces = payload.len().div_ceil(piece);
        if self.tx_free.is_empty() || self.tx.free() < pieces + 1 {
            return false;
        }
        let addr = self.tx_free.pop().unwrap();
        header.len = payload.len() as u32;
        self.mem.write_slice(&header.encode(), GuestAddress(addr)).unwrap();
        let mut buffers = vec![(addr, HEADER_BYTES as u32, false)];
        let mut at = addr + HEADER_BYTES as u64;
        for part in payload.chunks(piece) {
            self.mem.write_slice(part, GuestAddress(at)).unwrap();
            buffers.push((at, part.len() as u32, false));
            at += part.len() as u64;
        }
        let head = self.tx.offer(&buffers);
        self.tx_buffers.insert(head, addr);
        self.tx_kick.write(1).unwrap();
        true
    }

    /// Runs the device; returns the packets that the guest received.
    fn run(&mut self) -> Vec<(Header, Vec<u8>)> {
        for _ in 0..50 {
            self.handler.run();
            if !self.handler.has_events() {
                break;
            }
        }
        while let Some((head, len)) = self.tx.used() {
            assert_eq!(len, 0);
            self.tx_free.push(self.tx_buffers.remove(&head).unwrap());
        }
        let mut packets = Vec::new();
        while let Some((head, len)) = self.rx.used() {
            let addr = self.rx_buffers.remove(&head).unwrap();
            self.rx_free.push(addr);
            let mut bytes = vec![0; len as usize];
            self.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
            let header = Header::decode(bytes[..HEADER_BYTES].try_into().unwrap());
            assert_eq!((header.src_cid, header.dst_cid, header.kind), (2, CID, TYPE_STREAM));
            assert_eq!(header.len as usize, bytes.len() - HEADER_BYTES);
            packets.push((header, bytes[HEADER_BYTES..].to_vec()));
        }
        packets
    }

    /// Runs until the guest has received a packet.
    fn next(&mut self) -> (Header, Vec<u8>) {
        for _ in 0..10 {
            if self.rx_buffers.is_empty() {
                self.offer_rx(1);
            }
            let mut packets = self.run();
            assert!(packets.len() <= 1);
            if let Some(packet) = packets.pop() {
                return packet;
            }
        }
        panic!("the guest received nothing");
    }

    /// A connection from the host to guest port 1024, accepted.
    fn open(&mut self) -> (Key, UnixStream) {
        let mut host = self.dial();
        host.write_all(b"CONNECT 1024\n").unwrap();
        let (request, _) = self.next();
        assert_eq!((request.op, request.dst_port), (Op::Request, 1024));
        let key = Key { guest_port: 1024, host_port: request.src_port };
        assert!(self.send(packet(key, Op::Response), &[], 1));
        self.run();
        let mut line = vec![0; format!("OK {}\n", key.host_port).len()];
        host.read_exact(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", key.host_port).as_bytes());
        (key, host)
    }

    fn dial(&self) -> UnixStream {
        let host = UnixStream::connect(self.dir.path().join("v")).unwrap();
        host.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        host
    }

    fn counter(&self, name: &str) -> u64 {
        self.device.counters().into_iter().find(|(n, _)| *n == name).unwrap().1
    }
}

/// A packet of the guest with plenty of credit.
fn packet(key: Key, op: Op) -> Header {
    Header {
        src_cid: CID,
        dst_cid: 2,
        src_port: key.guest_port,
        dst_port: key.host_port,
        len: 0,
        kind: TYPE_STREAM,
        op,
        flags: 0,
        buf_alloc: 1 << 20,
        fwd_cnt: 0,
    }
}

#[test]
fn host_connects_and_bytes_go_both_ways() {
    let mem = memory();
    let mut vm = Machine::new(&mem);
    let (key, mut host) = vm.open();
    host.write_all(b"ping").unwrap();
    let (data, payload) = vm.next();
    assert_eq!((data.op, payload.as_slice()), (Op::Data, &b"ping"[..]));
    assert_eq!(data.buf_alloc, WINDOW_BYTES);
    assert!(vm.send(packet(key, Op::Data), b"pong pong", 2));
    vm.run();
    let mut buf = [0; 9];
    host.read_exact(&mut buf).unwrap();
    assert_eq!(&buf, b"pong pong");
    assert!(vm.interrupt.used.load(std::sync::atomic::Ordering::SeqCst) > 0);
    assert_eq!((vm.counter("bytes_to_guest"), vm.counter("bytes_from_guest")), (4, 9));
}

#[test]
fn bytes_sent_right_after_the_line_are_kept() {
    let mem = memory();
    let mut vm = Machine::new(&mem);
    let mut host = vm.dial();
    host.write_all(b"CONNECT 7\nearly").unwrap();
    let (request, _) = vm.next();
    let key = Key { guest_port: 7, host_port: request.src_port };
    vm.send(packet(key, Op::Response), &[], 1);
    assert_eq!(vm.next().1, b"early");
}

#[test]
fn guest_connects_to_a_served_port_or_is_refused() {
    let mem = memory();
    let mut vm = Machine::new(&mem);
    vm.send(packet(Key { guest_port: 5000, host_port: 53 }, Op::Request), &[], 1);
    assert_eq!(vm.next().0.op, Op::Reset, "nobody serves that port");
    let key = Key { guest_port: 5000, host_port: 52 };
    vm.send(packet(key, Op::Request), &[], 1);
    assert_eq!(vm.next().0.op, Op::Response);
    let mut host = callers::tests::answer(&vm.service);
    host.set_nonblocking(false).unwrap();
    vm.send(packet(key, Op::Data), b"hello", 99);
    vm.send(Header { flags: NO_MORE, ..packet(key, Op::Shutdown) }, &[], 1);
    assert_eq!(vm.next().0.op, Op::Reset);
    let mut text = String::new();
    host.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
    assert_eq!(vm.handler.connections(), 0);
}

#[test]
fn a_refused_or_cancelled_request_leaves_nothing() {
    let mem = memory();
    let mut vm = Machine::new(&mem);
    let mut host = vm.dial();
    host.write_all(b"CONNECT 9\n").unwrap();
    let (request, _) = vm.next();
    vm.send(packet(Key { guest_port: 9, host_port: request.src_port }, Op::Reset), &[], 1);
    vm.run();
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);

    let mut host = vm.dial();
    host.write_all(b"CONNECT 9\n").unwrap();
    assert_eq!(vm.next().0.op, Op::Request);
    drop(host);
    assert_eq!(vm.next().0.op, Op::Reset);

    let mut host = vm.dial();
    host.write_all(b"HELLO\n").unwrap();
    vm.run();
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(vm.handler.connections(), 0);
}

#[test]
fn half_close_of_the_host_reaches_the_guest_after_its_bytes() {
    let mem = memory();
    let mut vm = Machine::new(&mem);
    let (key, mut host) = vm.open();
    host.write_all(b"last words").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    vm.offer_rx(8);
    let mut got = vm.run();
    got.extend(vm.run());
    let ops: Vec<_> = got.iter().map(|(h, p)| (h.op, h.flags, p.as_slice())).collect();
    assert_eq!(ops, [(Op::Data, 0, &b"last words"[..]), (Op::Shutdown, NO_SEND, &[])]);
    // The other direction still works, and ends when the guest closes.
    vm.send(packet(key, Op::Data), b"answer", 99);
    vm.send(Header { flags: NO_MORE, ..packet(key, Op::Shutdown) }, &[], 1);
    assert_eq!(vm.next().0.op, Op::Reset);
    let mut text = String::new();
    host.read_to_string(&mut text).unwrap();
    assert_eq!(text, "answer");
}

#[test]
fn half_close_of_the_guest_reaches_the_host() {
    let mem = memory();
    let mut vm = Machine::new(&mem);
    let (key, mut host) = vm.open();
    vm.send(packet(key, Op::Data), b"out", 99);
    vm.send(Header { flags: NO_SEND, ..packet(key, Op::Shutdown) }, &[], 1);
    vm.run();
    let mut text = String::new();
    host.read_to_string(&mut text).unwrap();
    assert_eq!(text, "out");
    host.write_all(b"still here").unwrap();
    assert_eq!(vm.next().1, b"still here");
    drop(host);
    let mut flags = 0;
    while flags != NO_MORE {
        let (end, _) = vm.next();
        assert_eq!(end.op, Op::Shutdown);
        flags = end.flags;
    }
    assert_eq!(vm.handler.connections(), 0);
}

#[test]
fn a_closed_host_end_with_unread_bytes_still_delivers_what_it_sent() {
    let mem = memory();
    let mut vm = Machine::new(&mem);
    let (key, mut host) = vm.open();
    host.write_all(b"bye").unwrap();
    vm.send(packet(key, Op::Data), b"never read", 99);
    vm.run();
    drop(host);
    vm.offer_rx(8);
    let mut got = vm.run();
    got.extend(vm.run());
    let bytes: Vec<u8> = got.iter().flat_map(|(_, p)| p.clone()).collect();
    assert_eq!(bytes, b"bye");
    assert_eq!((got.last().unwrap().0.op, got.last().unwrap().0.flags), (Op::Shutdown, NO_MORE));
    vm.send(packet(key, Op::Data), b"late", 99);
    assert_eq!(vm.next().0.op, Op::Reset);
}

#[test]
fn a_slow_host_reader_holds_no_more_than_its_window() {
    let mem = memory();
    let mut vm = Machine::new(&mem);
    let (key, mut host) = vm.open();
    let (_, mut other) = vm.open();
    vm.offer_rx(64);
    let chunk = vec![7; MAX_PAYLOAD_BYTES as usize];
    let (mut sent, mut forwarded) = (0_u32, 0_u32);
    // Send as a driver would: never beyond the credit that was announced.
    for _ in 0..64 {
        if WINDOW_BYTES - (sent - forwarded) >= MAX_PAYLOAD_BYTES {
            assert!(vm.send(packet(key, Op::Data), &chunk, usize::MAX));
            sent += MAX_PAYLOAD_BYTES;
        }
        for (header, _) in vm.run() {
            assert_eq!(header.op, Op::CreditUpdate);
            forwarded = header.fwd_cnt;
        }
    }
    assert!(sent > WINDOW_BYTES && sent - forwarded <= WINDOW_BYTES);
    // Others are not held up.
    other.write_all(b"x").unwrap();
    assert_eq!(vm.next().1, b"x");
    // A guest that goes beyond its credit loses the connection.
    for _ in 0..=WINDOW_BYTES / MAX_PAYLOAD_BYTES {
        assert!(vm.send(packet(key, Op::Data), &chunk, usize::MAX));
        vm.handler.run();
    }
    assert!(vm.run().iter().any(|(header, _)| header.op == Op::Reset));
    let mut read = Vec::new();
    host.read_to_end(&mut read).unwrap();
    assert!(!read.is_empty() && read.iter().all(|b| *b == 7));
}

#[test]
fn the_guest_is_never_sent_more_than_its_credit() {
    let mem = memory();
    let mut vm = Machine::new(&mem);
    let (key, mut host) = vm.open();
    let small = Header { buf_alloc: 5000, ..packet(key, Op::CreditUpdate) };
    vm.send(small, &[], 1);
    host.write_all(&[1; 12_000]).unwrap();
    vm.offer_rx(32);
    let got: Vec<_> = (0..4).flat_map(|_| vm.run()).collect();
    assert_eq!(got.iter().map(|(_, p)| p.len()).sum::<usize>(), 5000);
    assert_eq!(got.iter().filter(|(h, _)| h.op == Op::CreditRequest).count(), 1);
    vm.send(Header { fwd_cnt: 4000, ..small }, &[], 1);
    let more: usize = (0..4).flat_map(|_| vm.run()).map(|(_, p)| p.len()).sum();
    assert_eq!(more, 4000);
}

#[test]
fn no_guest_buffers_means_no_spinning_and_no_loss() {
    let mem = memory();
    let mut vm = Machine::new(&mem);
    let (_, mut host) = vm.open();
    host.write_all(&[3; 10_000]).unwrap();
    drop(host);
    assert!(vm.run().is_empty());
    assert!(!vm.handler.has_events(), "a hung-up stream that cannot be read must not be watched");
    vm.offer_rx(64);
    let got: Vec<_> = (0..4).flat_map(|_| vm.run()).collect();
    assert_eq!(got.iter().map(|(_, p)| p.len()).sum::<usize>(), 10_000);
    assert_eq!(got.last().unwrap().0.flags, NO_MORE);
}

#[test]
fn connections_are_bounded_in_both_directions() {
    let mem = memory();
    let mut vm = Machine::new(&mem);
    let mut hosts = Vec::new();
    while vm.handler.connections() < MAX_CONNECTIONS {
        for _ in 0..16 {
            hosts.push(vm.dial());
        }
        vm.run();
    }
    // The next waits in the backlog and finds room as soon as another goes.
    hosts.push(vm.dial());
    vm.run();
    assert_eq!(vm.handler.connections(), MAX_CONNECTIONS);
    assert!(!vm.handler.has_events());
    vm.send(packet(Key { guest_port: 1, host_port: 52 }, Op::Request), &[], 1);
    assert_eq!(vm.next().0.op, Op::Reset);
    hosts.remove(0);
    vm.run();
    vm.run();
    assert_eq!(vm.handler.connections(), MAX_CONNECTIONS);
}

#[test]
fn deadlines_end_what_does_not_get_on() {
    let mem = memory();
    let mut vm = Machine::new(&mem);
    let mut silent = vm.dial();
    let mut asked = vm.dial();
    asked.write_all(b"CONNECT 1\n").unwrap();
    assert_eq!(vm.next().0.op, Op::Request);
    assert_eq!(vm.handler.connections(), 2);
    vm.handler.expire(Instant::now() + ANSWER_TIMEOUT);
    assert_eq!(vm.next().0.op, Op::Reset);
    assert_eq!((silent.read(&mut [0; 1]).unwrap(), asked.read(&mut [0; 1]).unwrap()), (0, 0));
    assert_eq!(vm.handler.connections(), 0);
}

#[test]
fn malformed_and_forged_packets_are_dropped() {
    let mem = memory();
    let mut vm = Machine::new(&mem);
    let key = Key { guest_port: 1, host_port: 2 };
    vm.offer_rx(8);
    // Another guest's name, a foreign destination, too short, a length that lies, a writable chain.
    vm.send(Header { src_cid: 4, ..packet(key, Op::Data) }, &[], 1);
    vm.send(Header { dst_cid: 9, ..packet(key, Op::Data) }, &[], 1);
    vm.tx.offer(&[(TX_BUFFERS, 20, false)]);
    let lie = Header { len: MAX_PAYLOAD_BYTES + 1, ..packet(key, Op::Data) };
    mem.write_slice(&lie.encode(), GuestAddress(TX_BUFFERS)).unwrap();
    vm.tx.offer(&[(TX_BUFFERS, 0x1_1000, false)]);
    vm.tx.offer(&[(TX_BUFFERS, 0x1_1000, true)]);
    vm.handler.run();
    assert_eq!(vm.counter("bad_packets"), 5);
    while vm.tx.used().is_some() {}
    // A type that is not offered and a packet for nobody are refused; a reset never is.
    vm.tx_free = vec![TX_BUFFERS];
    vm.tx_buffers.clear();
    for (header, replies) in [
        (Header { kind: 2, ..packet(key, Op::Request) }, 1),
        (packet(key, Op::Data), 1),
        (packet(key, Op::Unknown(77)), 1),
        (packet(key, Op::Reset), 0),
    ] {
        vm.send(header, &[], 1);
        let ops: Vec<_> = vm.run().iter().map(|(h, _)| h.op).collect();
        assert_eq!(ops, vec![Op::Reset; replies], "{header:?}");
    }
}

#[test]
fn an_impossible_ring_index_does_not_hang_the_device() {
    let mem = memory();
    let mut vm = Machine::new(&mem);
    let (_, mut host) = vm.open();
    host.write_all(b"x").unwrap();
    for ring in [0_u64, 0x1_0000] {
        mem.write_obj(60_000_u16, GuestAddress(ring + 256 * 16 + 2)).unwrap();
    }
    vm.tx_kick.write(1).unwrap();
    vm.handler.run();
}

#[test]
fn a_head_that_there_is_not_needs_a_reset() {
    let mem = memory();
    for receives in [true, false] {
        let mut vm = Machine::new(&mem);
        if receives {
            vm.rx.offer_again(256);
            assert!(vm.send(packet(Key { guest_port: 1, host_port: 53 }, Op::Request), &[], 1));
        } else {
            vm.tx.offer_again(u16::MAX);
            vm.tx_kick.write(1).unwrap();
        }
        vm.handler.run();
        assert_eq!(vm.interrupt.reset.load(std::sync::atomic::Ordering::SeqCst), 1);
    }
}

#[test]
fn useless_buffers_come_back_and_end() {
    let mem = memory();
    let mut vm = Machine::new(&mem);
    for n in 0..256 {
        vm.rx.offer(&[(RX_BUFFERS + n * 0x1000, HEADER_BYTES as u32, true)]);
    }
    assert!(vm.send(packet(Key { guest_port: 1, host_port: 53 }, Op::Request), &[], 1));
    vm.handler.run();
    let used = std::iter::from_fn(|| vm.rx.used()).filter(|(_, len)| *len == 0).count();
    assert_eq!(used, 256);
}
