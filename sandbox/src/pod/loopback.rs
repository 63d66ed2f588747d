//! The loopback of the pod's network namespace, which is that of the guest: port-forward.
//!
//! ```text
//! containerd, in the namespace: connect 127.0.0.1:8080 --> our listener, whatever the port --vsock--> agent: connect 127.0.0.1:8080
//! ```
//! containerd's CRI plugin enters the pod's namespace and connects to a port of its loopback. There nobody listens: the pod's processes
//! are in the guest. A program of the kernel's socket lookup gives us every TCP connection to the loopback of this namespace; the port
//! that was meant is the connection's own address. Without such a kernel (Linux 5.9) there is no port-forward, and nothing else lacks.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use hyper_protocol::rpc::agent::ConnectPortRequest;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::PodError;
use crate::launch::{Agent, call, rpc_error};
use crate::sys_bpf;

/// Most connections at a time; more wait to be accepted.
const MAX_CONNECTIONS: usize = 128;
/// What is waited after a connection could not be accepted.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// A listener that the namespace's loopback leads to. It is made before there is an agent.
#[derive(Debug)]
pub(super) struct Loopback {
    listener: StdListener,
    /// While it is open the kernel asks our program.
    steering: OwnedFd,
}

/// A loopback that is served, until this is dropped.
#[derive(Debug)]
pub(super) struct Forwarding {
    serving: JoinHandle<()>,
    _steering: OwnedFd,
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Loopback {
    /// Takes the loopback of the namespace that this thread is in.
    pub(super) fn take() -> io::Result<Self> {
        // One socket for both families where there are two.
        let listener = StdListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)))
            .or_else(|_| StdListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))))?;
        listener.set_nonblocking(true)?;
        let map = sys_bpf::map_of_socket(listener.as_fd())?;
        let program = sys_bpf::load_sk_lookup(&program(map.as_fd()))?;
        let netns = std::fs::File::open("/proc/thread-self/ns/net")?;
        let steering = sys_bpf::attach_to_netns(program.as_fd(), netns.as_fd())?;
        Ok(Self { listener, steering })
    }

    /// Passes connections on to the guest.
    pub(super) fn serve(self, agent: &Arc<Agent>) -> io::Result<Forwarding> {
        let listener = TcpListener::from_std(self.listener)?;
        let serving = tokio::spawn(accept(listener, Arc::clone(agent)));
        Ok(Forwarding { serving, _steering: self.steering })
    }
}

async fn accept(listener: TcpListener, agent: Arc<Agent>) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                let agent = Arc::clone(&agent);
                tokio::spawn(async move {
                    if let Err(error) = forward(client, &agent).await {
                        tracing::debug!(%error, "port-forward");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "port-forward: cannot accept");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn forward(mut client: TcpStream, agent: &Agent) -> Result<(), PodError> {
    let address = client.local_addr().map_err(|source| PodError::io("ask for the port of", "lo", source))?;
    let (stream, mut server) = agent.open_stream().await?;
    let request = ConnectPortRequest { stream, port: address.port().into(), ..Default::default() };
    agent.rpc.connect_port(call(), &request).await.map_err(rpc_error("ConnectPort"))?;
    // Whichever side breaks it off, both are closed after this.
    let _ = copy_bidirectional(&mut client, &mut server).await;
    Ok(())
}

/// Instructions by their codes (linux/bpf.h).
mod code {
    /// `dst = *(u32 *)(src + offset)`
    pub(super) const LOAD_WORD: u8 = 0x61;
    /// `*(u32 *)(dst + offset) = immediate`
    pub(super) const STORE_WORD: u8 = 0x62;
    /// `dst = src`, `dst = immediate`, `dst += immediate`, `dst &= immediate`
    pub(super) const MOVE: u8 = 0xbf;
    pub(super) const SET: u8 = 0xb7;
    pub(super) const ADD: u8 = 0x07;
    pub(super) const AND: u8 = 0x57;
    /// Jumps if `dst` is, or is not, `immediate`.
    pub(super) const IF_EQUAL: u8 = 0x15;
    pub(super) const IF_NOT_EQUAL: u8 = 0x55;
    pub(super) const GO: u8 = 0x05;
    /// `dst = immediate`, 64 bits in two instructions; with source 1 the map that a descriptor stands for.
    pub(super) const WIDE: u8 = 0x18;
    pub(super) const CALL: u8 = 0x85;
    pub(super) const EXIT: u8 = 0x95;
}

/// Functions of the kernel.
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;
/// Fields of `struct bpf_sk_lookup`, bytes; addresses are in the network's order.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;
/// Verdict: go on, with the socket that was assigned if there is one.
const SK_PASS: i32 = 1;
/// The frame pointer.
const FRAME: u8 = 10;

/// Where a jump leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    V4,
    Ours,
    Pass,
}

#[derive(Debug)]
enum Step {
    Do(u8, u8, u8, i16, i32),
    Jump(u8, u8, i32, Place),
    Here(Place),
}

/// TCP connections to 127.0.0.0/8 and ::1 are for the socket in the map.
fn program(map: BorrowedFd<'_>) -> Vec<u64> {
    use Step::{Do, Here, Jump};
    let mut steps = vec![
        Do(code::MOVE, 6, 1, 0, 0),
        Do(code::LOAD_WORD, 2, 6, PROTOCOL, 0),
        Jump(code::IF_NOT_EQUAL, 2, libc::IPPROTO_TCP, Place::Pass),
        Do(code::LOAD_WORD, 2, 6, FAMILY, 0),
        Jump(code::IF_EQUAL, 2, libc::AF_INET, Place::V4),
        Jump(code::IF_NOT_EQUAL, 2, libc::AF_INET6, Place::Pass),
    ];
    for (at, word) in (LOCAL_IP6..).step_by(4).zip([0, 0, 0, 1_i32]) {
        steps.push(Do(code::LOAD_WORD, 2, 6, at, 0));
        steps.push(Jump(code::IF_NOT_EQUAL, 2, word.to_be(), Place::Pass));
    }
    steps.extend([
        Jump(code::GO, 0, 0, Place::Ours),
        Here(Place::V4),
        Do(code::LOAD_WORD, 2, 6, LOCAL_IP4, 0),
        Do(code::AND, 2, 0, 0, i32::from_ne_bytes([255, 0, 0, 0])),
        Jump(code::IF_NOT_EQUAL, 2, i32::from_ne_bytes([127, 0, 0, 0]), Place::Pass),
        Here(Place::Ours),
        // r7 = lookup(map, &0)
        Do(code::STORE_WORD, FRAME, 0, -4, 0),
        Do(code::MOVE, 2, FRAME, 0, 0),
        Do(code::ADD, 2, 0, 0, -4),
        Do(code::WIDE, 1, 1, 0, map.as_raw_fd()),
        Do(0, 0, 0, 0, 0),
        Do(code::CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        Jump(code::IF_EQUAL, 0, 0, Place::Pass),
        Do(code::MOVE, 7, 0, 0, 0),
        // assign(context, r7, no flags); release(r7)
        Do(code::MOVE, 1, 6, 0, 0),
        Do(code::MOVE, 2, 7, 0, 0),
        Do(code::SET, 3, 0, 0, 0),
        Do(code::CALL, 0, 0, 0, SK_ASSIGN),
        Do(code::MOVE, 1, 7, 0, 0),
        Do(code::CALL, 0, 0, 0, SK_RELEASE),
        Here(Place::Pass),
        Do(code::SET, 0, 0, 0, SK_PASS),
        Do(code::EXIT, 0, 0, 0, 0),
    ]);
    assemble(&steps)
}

/// Instructions of 8 bytes, with jumps counted from the instruction after them.
fn assemble(steps: &[Step]) -> Vec<u64> {
    let (mut places, mut length) = (Vec::new(), 0_i16);
    for step in steps {
        match step {
            Step::Here(place) => places.push((*place, length)),
            Step::Do(..) | Step::Jump(..) => length += 1,
        }
    }
    let mut all = Vec::new();
    for step in steps {
        let at = i16::try_from(all.len()).unwrap_or(i16::MAX);
        match *step {
            Step::Here(_) => {}
            Step::Do(code, dst, src, offset, value) => all.push(instruction(code, dst, src, offset, value)),
            Step::Jump(code, dst, value, to) => {
                let to = places.iter().find(|(place, _)| *place == to).map_or(at, |(_, at)| *at);
                all.push(instruction(code, dst, 0, to - at - 1, value));
            }
        }
    }
    all
}

/// `struct bpf_insn`: code, registers (the target in the low bits), offset, immediate.
fn instruction(code: u8, dst: u8, src: u8, offset: i16, value: i32) -> u64 {
    let [o0, o1] = offset.to_ne_bytes();
    let [v0, v1, v2, v3] = value.to_ne_bytes();
    u64::from_ne_bytes([code, src << 4 | dst, o0, o1, v0, v1, v2, v3])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_lead_to_their_places() {
        let steps = [
            Step::Jump(code::GO, 0, 0, Place::Pass),
            Step::Do(code::SET, 0, 0, 0, 7),
            Step::Here(Place::Pass),
            Step::Do(code::EXIT, 0, 0, 0, 0),
        ];
        let words: Vec<_> = assemble(&steps).into_iter().map(u64::to_ne_bytes).collect();
        assert_eq!(
            words,
            [[5, 0, 1, 0, 0, 0, 0, 0], [0xb7, 0, 0, 0, 7, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]]
        );
    }

    #[test]
    fn registers_and_values_are_in_their_bytes() {
        let load = instruction(code::LOAD_WORD, 2, 6, LOCAL_IP4, 0).to_ne_bytes();
        assert_eq!(load, [0x61, 0x62, 40, 0, 0, 0, 0, 0]);
        assert_eq!(
            instruction(code::STORE_WORD, FRAME, 0, -4, -1).to_ne_bytes(),
            [0x62, 0x0a, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff]
        );
    }

    #[test]
    fn program_ends_with_a_verdict() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let program = program(file.as_fd());
        let [.., verdict, end] = program.as_slice() else { panic!("{program:?}") };
        assert_eq!(*verdict, instruction(code::SET, 0, 0, 0, SK_PASS));
        assert_eq!(*end, instruction(code::EXIT, 0, 0, 0, 0));
    }
}
