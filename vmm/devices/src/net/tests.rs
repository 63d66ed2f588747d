//! The interface against a driver that is played here; a pair of datagram sockets stands for the TAP.

use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::handler::NetHandler;
use super::request::HEADER_BYTES;
use super::{Net, NetError};
use crate::device::{ActivateContext, GuestMem, VirtioDevice};
use crate::mock::{CountingInterrupt, Driver, memory};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const BUFFERS: u64 = 0x20_0000;

struct Machine<'m> {
    net: Net,
    handler: NetHandler,
    wire: UnixDatagram,
    mem: &'m GuestMemoryMmap,
    rx: Driver<'m>,
    tx: Driver<'m>,
    rx_kick: EventFd,
    tx_kick: EventFd,
    interrupt: Arc<CountingInterrupt>,
}

impl<'m> Machine<'m> {
    fn new(mem: &'m GuestMem, without: u64) -> Self {
        let (tap, wire) = UnixDatagram::pair().unwrap();
        wire.set_nonblocking(true).unwrap();
        let net = Net::new(tap.into(), MAC, 1500).unwrap();
        let rx = Driver::new(mem, GuestAddress(0), 256);
        let tx = Driver::new(mem, GuestAddress(0x1_0000), 256);
        let (rx_queue, rx_kick) = rx.active(0, true);
        let (tx_queue, tx_kick) = tx.active(1, true);
        let interrupt = Arc::new(CountingInterrupt::default());
        let context = ActivateContext {
            mem: Arc::clone(mem),
            interrupt: interrupt.clone(),
            features: net.features() & !without,
            queues: vec![rx_queue, tx_queue],
        };
        let tap = net.tap.try_clone().unwrap();
        let handler = NetHandler::new(tap, MAC, context, Arc::clone(&net.counters)).unwrap();
        Self { net, handler, wire, mem, rx, tx, rx_kick, tx_kick, interrupt }
    }

    fn run(&mut self) {
        for _ in 0..10 {
            self.handler.run();
            if !self.handler.has_events() {
                return;
            }
        }
        panic!("the event set never rests");
    }

    fn offer(&mut self, count: u64, len: u32) {
        for i in 0..count {
            self.rx.offer(&[(BUFFERS + i * 0x1_1000, len, true)]);
        }
        self.rx_kick.write(1).unwrap();
    }

    fn read(&self, slot: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.mem.read_slice(&mut bytes, GuestAddress(BUFFERS + slot * 0x1_1000)).unwrap();
        bytes
    }

    fn received(&self) -> Option<Vec<u8>> {
        let mut buf = vec![0; 70_000];
        match self.wire.recv(&mut buf) {
            Ok(count) => Some(buf[..count].to_vec()),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                None
            }
        }
    }

    fn counter(&self, name: &str) -> u64 {
        self.net.counters().into_iter().find(|(n, _)| *n == name).unwrap().1
    }
}

/// A frame from `mac` with an empty header and `len` bytes of Ethernet.
fn frame(mac: [u8; 6], len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend((0..len - 12).map(|i| (i * 7) as u8));
    frame
}

#[test]
fn frames_of_the_guest_reach_the_wire_from_any_pieces() {
    let mem = memory();
    let mut vm = Machine::new(&mem, 0);
    for len in [14, 60, 1514, 65_550] {
        let sent = frame(MAC, len);
        mem.write_slice(&sent, GuestAddress(BUFFERS)).unwrap();
        let cut = HEADER_BYTES as u64 + 3;
        vm.tx
            .offer(&[(BUFFERS, cut as u32, false), (BUFFERS + cut, (sent.len() as u64 - cut) as u32, false)]);
        vm.tx_kick.write(1).unwrap();
        vm.run();
        assert!(vm.tx.used().is_some());
        assert!(vm.received().unwrap() == sent, "{len}");
    }
    assert_eq!((vm.counter("tx_frames"), vm.counter("tx_bytes")), (4, 14 + 60 + 1514 + 65_550));
}

#[test]
fn spoofed_malformed_and_oversized_frames_are_dropped_and_given_back() {
    let mem = memory();
    let mut vm = Machine::new(&mem, 0);
    let mut bad_header = frame(MAC, 60);
    bad_header[1] = 3;
    for sent in [frame([2, 0, 0, 0, 0, 2], 60), bad_header, frame(MAC, 65_551)] {
        mem.write_slice(&sent, GuestAddress(BUFFERS)).unwrap();
        vm.tx.offer(&[(BUFFERS, sent.len() as u32, false)]);
        vm.tx_kick.write(1).unwrap();
        vm.run();
        assert!(vm.tx.used().is_some());
    }
    vm.tx.offer(&[(BUFFERS, 100, true)]);
    vm.tx_kick.write(1).unwrap();
    vm.run();
    assert!(vm.tx.used().is_some());
    assert_eq!(vm.received(), None);
    assert_eq!((vm.counter("tx_spoofed"), vm.counter("tx_malformed"), vm.counter("tx_frames")), (1, 3, 0));
}

#[test]
fn frames_of_the_wire_are_spread_over_buffers_at_once() {
    let mem = memory();
    let mut vm = Machine::new(&mem, 0);
    let sent = frame(MAC, 4000);
    vm.offer(4, 1536);
    vm.wire.send(&sent).unwrap();
    vm.run();
    let used: Vec<_> = std::iter::from_fn(|| vm.rx.used()).map(|(_, len)| len).collect();
    assert_eq!(used, [1536, 1536, 4012 - 2 * 1536]);
    let mut got: Vec<u8> = (0..3).flat_map(|i| vm.read(i, used[i as usize])).collect();
    assert_eq!(got[10..12], [3, 0]);
    got[10] = 0;
    assert!(got == sent);
    assert_eq!(vm.interrupt.used.load(Ordering::SeqCst), 1);
    // The fourth buffer serves the next frame.
    vm.wire.send(&frame(MAC, 60)).unwrap();
    vm.run();
    assert_eq!(vm.rx.used().unwrap().1, 72);
    assert_eq!(vm.read(3, 12)[10..], [1, 0]);
}

#[test]
fn without_buffers_the_tap_waits_and_nothing_spins_or_is_lost() {
    let mem = memory();
    let mut vm = Machine::new(&mem, 0);
    vm.wire.send(&frame(MAC, 4000)).unwrap();
    vm.wire.send(&frame(MAC, 61)).unwrap();
    vm.run();
    assert!(!vm.handler.has_events());
    // Two are too few for the first frame.
    vm.offer(2, 1536);
    vm.run();
    assert_eq!(vm.rx.used(), None);
    vm.rx.offer(&[(BUFFERS + 0x4_0000, 1536, true)]);
    vm.rx.offer(&[(BUFFERS + 0x5_0000, 1536, true)]);
    vm.rx_kick.write(1).unwrap();
    vm.run();
    let used: Vec<_> = std::iter::from_fn(|| vm.rx.used()).map(|(_, len)| len).collect();
    assert_eq!(used, [1536, 1536, 940, 73]);
}

#[test]
fn without_merging_a_frame_takes_one_buffer_or_is_dropped() {
    let mem = memory();
    let mut vm = Machine::new(&mem, 1 << VIRTIO_NET_F_MRG_RXBUF);
    vm.offer(2, 1600);
    vm.wire.send(&frame(MAC, 2000)).unwrap();
    vm.wire.send(&frame(MAC, 1500)).unwrap();
    vm.run();
    let used: Vec<_> = std::iter::from_fn(|| vm.rx.used()).map(|(_, len)| len).collect();
    assert_eq!(used, [0, 1512]);
    assert_eq!((vm.counter("rx_dropped"), vm.counter("rx_frames")), (1, 1));
}

#[test]
fn a_broken_rx_chain_costs_a_frame_and_no_more() {
    let mem = memory();
    let mut vm = Machine::new(&mem, 0);
    // Sixty-four buffers that hold nothing, then a good one.
    for _ in 0..64 {
        vm.rx.offer(&[(BUFFERS, 100, false)]);
    }
    vm.offer(1, 1536);
    vm.wire.send(&frame(MAC, 60)).unwrap();
    vm.wire.send(&frame(MAC, 60)).unwrap();
    vm.run();
    let used: Vec<_> = std::iter::from_fn(|| vm.rx.used()).map(|(_, len)| len).collect();
    assert_eq!(used.len(), 65);
    assert_eq!(used.last(), Some(&72));
}

#[test]
fn an_impossible_ring_index_does_not_hang_the_device() {
    let mem = memory();
    let mut vm = Machine::new(&mem, 0);
    for ring in [0_u64, 0x1_0000] {
        mem.write_obj(60_000_u16, GuestAddress(ring + 256 * 16 + 2)).unwrap();
    }
    vm.wire.send(&frame(MAC, 60)).unwrap();
    vm.tx_kick.write(1).unwrap();
    vm.rx_kick.write(1).unwrap();
    vm.run();
}

#[test]
fn addresses_and_mtu_are_checked_and_told() {
    let tap = || UnixDatagram::pair().unwrap().0.into();
    assert!(matches!(Net::new(tap(), [1, 0, 0, 0, 0, 1], 1500), Err(NetError::Mac(_))));
    assert!(matches!(Net::new(tap(), [0; 6], 1500), Err(NetError::Mac(_))));
    assert!(matches!(Net::new(tap(), MAC, 67), Err(NetError::Mtu(67))));
    let net = Net::new(tap(), MAC, 1400).unwrap();
    let mut space = [0xff; 14];
    net.read_config(0, &mut space);
    assert_eq!(space, [2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0x78, 0x05, 0, 0]);
}

#[test]
fn a_head_that_there_is_not_needs_a_reset_once() {
    let mem = memory();
    for receives in [true, false] {
        let mut vm = Machine::new(&mem, 0);
        if receives {
            vm.rx.offer_again(u16::MAX);
            vm.wire.send(&frame(MAC, 60)).unwrap();
        } else {
            vm.tx.offer_again(256);
            vm.tx_kick.write(1).unwrap();
        }
        vm.handler.run();
        assert_eq!(vm.interrupt.reset.load(Ordering::SeqCst), 1);
    }
}
