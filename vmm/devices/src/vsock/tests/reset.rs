//! Machines that were saved, and go on with another device.

use super::*;

const EVENT_RINGS: GuestAddress = GuestAddress(0x2_0000);
const EVENT_BUFFERS: u64 = 0x8_0000;

/// Of a machine with a connection.
fn saved(mem: &GuestMem) -> Vec<u8> {
    let mut vm = Machine::new(mem);
    assert_eq!(vm.device.save().unwrap(), FRESH);
    let _open = vm.open();
    vm.device.save().unwrap()
}

#[test]
fn whoever_goes_on_hears_that_its_connections_are_gone_before_there_are_new_ones() {
    let mem = memory();
    let state = saved(&mem);
    let mut events = Driver::new(&mem, EVENT_RINGS, 16);
    let (queue, kick) = events.active(2, true);
    let mut vm = Machine::going_on(&mem, &state, Some(queue));
    let mut host = vm.dial();
    host.write_all(b"CONNECT 7\n").unwrap();
    vm.offer_rx(8);
    assert!(vm.run().is_empty(), "no buffer for the event yet");

    for number in 0..2 {
        events.offer(&[(EVENT_BUFFERS + number * 8, 4, true)]);
    }
    mem.write_obj(0xffff_ffff_u32, GuestAddress(EVENT_BUFFERS)).unwrap();
    kick.write(1).unwrap();
    assert!(vm.run().is_empty());
    assert_eq!(events.used().map(|(_, len)| len), Some(4));
    assert_eq!(
        mem.read_obj::<u32>(GuestAddress(EVENT_BUFFERS)).unwrap(),
        0,
        "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET"
    );
    assert_eq!(vm.interrupt.used.load(std::sync::atomic::Ordering::SeqCst), 1);
    assert_eq!(vm.device.save().unwrap(), state, "the driver may not have looked yet");

    // What the driver still sends on old connections, and new ones of its own, have no answer: they end with all others.
    let old = Key { guest_port: 1024, host_port: 1 << 30 };
    vm.send(packet(old, Op::Data), b"stale", 99);
    vm.send(packet(Key { guest_port: 5000, host_port: 52 }, Op::Request), &[], 1);
    assert!(vm.run().is_empty());

    // It has looked: it gives the buffer back.
    events.offer(&[(EVENT_BUFFERS, 4, true)]);
    kick.write(1).unwrap();
    let asked: Vec<_> = vm.run().into_iter().map(|(header, _)| (header.op, header.src_port)).collect();
    // The driver may keep the closed connection of the port before for a while.
    assert_eq!(asked, [(Op::Request, (1 << 30) + 1)], "who waited is connected, by a port that is new");
    assert_eq!(vm.device.save().unwrap(), [1, 2, 0, 0, 0x40], "a connection");
    assert!(!vm.handler.has_events());
}

#[test]
fn a_driver_that_wants_no_events_is_connected_at_once() {
    let mem = memory();
    let state = saved(&mem);
    let mut vm = Machine::going_on(&mem, &state, None);
    vm.open();
    let mut fresh =
        Machine::going_on(&mem, FRESH, Some(Driver::new(&mem, EVENT_RINGS, 16).active(2, true).0));
    fresh.open();
    for odd in [&[][..], &[2, 0, 0, 0, 0x40], &[1], &[0, 0, 0, 0, 0x40, 0], &[0, 0xff, 0xff, 0xff, 0x3f]] {
        assert!(vm.device.restore(odd).is_err(), "{odd:?}");
    }
}
