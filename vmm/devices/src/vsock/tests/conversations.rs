//! Many conversations at random: nothing is lost and nothing is changed.

use super::*;

/// One end of a random conversation.
struct Talk {
    host: UnixStream,
    key: Key,
    to_guest: Vec<u8>,
    to_host: Vec<u8>,
    written: usize,
    sent: usize,
    guest_got: Vec<u8>,
    host_got: Vec<u8>,
    host_forwarded: u32,
    guest_window: u32,
    guest_ended: bool,
    host_ended: bool,
    host_half_closed: bool,
    guest_half_closed: bool,
}

struct Random(u64);
impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

#[test]
fn many_random_conversations_lose_and_change_nothing() {
    for seed in 1..=3_u64 {
        converse(&mut Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    }
}

fn converse(random: &mut Random) {
    let mem = memory();
    let mut vm = Machine::new(&mem);
    let bytes = |random: &mut Random| {
        let len = [0, 1, 5000, 700_000][random.below(4)];
        (0..random.below(len + 1)).map(|i| (i * 31 + random.below(7)) as u8).collect::<Vec<u8>>()
    };
    let mut talks: Vec<Talk> = (0..40)
        .map(|_| {
            let (key, host) = vm.open();
            host.set_nonblocking(true).unwrap();
            Talk {
                host,
                key,
                to_guest: bytes(random),
                to_host: bytes(random),
                written: 0,
                sent: 0,
                guest_got: Vec::new(),
                host_got: Vec::new(),
                host_forwarded: 0,
                guest_window: WINDOW_BYTES,
                guest_ended: false,
                host_ended: false,
                host_half_closed: false,
                guest_half_closed: false,
            }
        })
        .collect();
    let deadline = Instant::now() + Duration::from_secs(60);
    while talks.iter().any(|t| !(t.guest_ended && t.host_ended)) {
        assert!(Instant::now() < deadline, "the conversations do not end");
        for _ in 0..20 {
            let pick = random.below(talks.len());
            step(&mut vm, &mut talks[pick], random);
        }
        let offers = random.below(300);
        vm.offer_rx(offers);
        for (header, payload) in vm.run() {
            let talk = talks.iter_mut().find(|t| t.key.host_port == header.src_port).unwrap();
            talk.host_forwarded = header.fwd_cnt;
            talk.guest_window = header.buf_alloc;
            match header.op {
                Op::Data => talk.guest_got.extend(payload),
                Op::Shutdown => talk.guest_ended = header.flags & NO_SEND != 0,
                Op::CreditUpdate | Op::CreditRequest => {}
                // Both ends had closed, and a credit update crossed with that.
                Op::Reset if talk.guest_ended && talk.guest_half_closed => {}
                other => panic!("the guest received {other:?}"),
            }
        }
    }
    for talk in talks {
        assert!(talk.guest_got == talk.to_guest, "{} bytes of {}", talk.guest_got.len(), talk.to_guest.len());
        assert!(talk.host_got == talk.to_host, "{} bytes of {}", talk.host_got.len(), talk.to_host.len());
    }
}

/// One random move of one end.
fn step(vm: &mut Machine<'_>, talk: &mut Talk, random: &mut Random) {
    match random.below(4) {
        0 if talk.written < talk.to_guest.len() => {
            let end = talk.to_guest.len().min(talk.written + 1 + random.below(100_000));
            match talk.host.write(&talk.to_guest[talk.written..end]) {
                Ok(count) => talk.written += count,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
        0 if !talk.host_half_closed => {
            talk.host_half_closed = true;
            talk.host.shutdown(Shutdown::Write).unwrap();
        }
        1 => {
            let mut buf = vec![0; 1 + random.below(150_000)];
            match talk.host.read(&mut buf) {
                Ok(0) => talk.host_ended = true,
                Ok(count) => talk.host_got.extend_from_slice(&buf[..count]),
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
        2 if talk.sent < talk.to_host.len() => {
            let credit = talk.guest_window - (talk.sent as u32 - talk.host_forwarded);
            let most = (talk.to_host.len() - talk.sent).min(credit as usize).min(MAX_PAYLOAD_BYTES as usize);
            let part = &talk.to_host[talk.sent..talk.sent + random.below(most + 1)];
            let header = Header {
                buf_alloc: 30_000,
                fwd_cnt: talk.guest_got.len() as u32,
                ..packet(talk.key, Op::Data)
            };
            if !part.is_empty() && vm.send(header, part, 1 + random.below(9000)) {
                talk.sent += part.len();
            }
        }
        2 if !talk.guest_half_closed => {
            let header = Header {
                flags: NO_SEND,
                fwd_cnt: talk.guest_got.len() as u32,
                buf_alloc: 30_000,
                ..packet(talk.key, Op::Shutdown)
            };
            talk.guest_half_closed = vm.send(header, &[], 1);
        }
        _ => {
            let header = Header {
                buf_alloc: 30_000,
                fwd_cnt: talk.guest_got.len() as u32,
                ..packet(talk.key, Op::CreditUpdate)
            };
            vm.send(header, &[], 1);
        }
    }
}
