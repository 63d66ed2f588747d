//! Somewhere else: a network behind the host, in a namespace of its own, and a name server for it.

use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::host;
use crate::user::acting;

/// A host of others, at 192.0.2.1, 192.0.2.2 and where clouds have their metadata. Ports are closed, so a connection that arrives is
/// refused, and one that a rule stops is not. For a user who is not root ports 80 to 82 are open, there and on the host's loopback: pasta of
/// Debian 12 does not pass on that a connection is refused. Gone when this is dropped.
#[derive(Debug)]
pub struct Far(());

/// Ports that are open for a user.
const OPEN: std::ops::RangeInclusive<u16> = 80..=82;

/// What `nc -w SECONDS ADDRESS PORT </dev/null 2>&1 && echo open` says when a connection has arrived.
#[must_use]
pub fn arrived() -> &'static str {
    if acting().is_some() { "open" } else { "Connection refused" }
}

impl Far {
    /// Makes it.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new() -> Self {
        host(
            "ip netns add far && ip link add far0 type veth peer name far1 netns far \
             && ip addr add 192.0.2.254/24 dev far0 && ip link set far0 up \
             && ip -n far addr add 192.0.2.1/24 dev far1 && ip -n far addr add 192.0.2.2/24 dev far1 \
             && ip -n far addr add 169.254.169.254/32 dev far1 && ip -n far link set far1 up \
             && ip -n far link set lo up && ip route add 169.254.169.254/32 via 192.0.2.1",
        )
        .ok();
        if acting().is_some() {
            listen(Ipv4Addr::LOCALHOST, None);
            listen(Ipv4Addr::UNSPECIFIED, Some("/run/netns/far"));
        }
        Self(())
    }
}

impl Default for Far {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        // Its end of the pair takes the host's with it.
        drop(host("ip netns del far; ip link del far0").done());
    }
}

/// Takes connections, and closes them, as long as the case runs.
fn listen(address: Ipv4Addr, netns: Option<&'static str>) {
    let thread = std::thread::spawn(move || -> std::io::Result<Vec<TcpListener>> {
        if let Some(netns) = netns {
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(std::fs::File::open(netns)?.as_fd(), kind)?;
        }
        OPEN.map(|port| TcpListener::bind((address, port))).collect()
    });
    let listeners = thread.join().map(Result::unwrap_or_default).unwrap_or_default();
    assert_eq!(listeners.len(), OPEN.count(), "nobody can listen at {address}");
    for listener in listeners {
        std::thread::spawn(move || listener.incoming().for_each(drop));
    }
}

/// A name server that gives every name the same address. Ends when this is dropped.
#[derive(Debug)]
pub struct NameServer {
    /// The server's own address.
    pub address: Ipv4Addr,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl NameServer {
    /// Serves at an address of the host's loopback.
    ///
    /// # Panics
    /// When something else serves there.
    #[must_use]
    pub fn new(has: Ipv4Addr) -> Self {
        let address = Ipv4Addr::new(127, 9, 9, 9);
        let socket = UdpSocket::bind((address, 53));
        assert!(socket.is_ok(), "no name server at {address}: {socket:?}");
        let over = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&over);
        let thread = socket.ok().map(|socket| std::thread::spawn(move || serve(&socket, has, &seen)));
        Self { address, over, thread }
    }
}

fn serve(socket: &UdpSocket, has: Ipv4Addr, over: &AtomicBool) {
    drop(socket.set_read_timeout(Some(Duration::from_millis(200))));
    let mut query = [0; 512];
    while !over.load(Ordering::Relaxed) {
        let Ok((len, from)) = socket.recv_from(&mut query) else { continue };
        let mut answer = query.get(..len).unwrap_or_default().to_vec();
        // The type comes behind the name: 1 asks for an IPv4 address.
        let asks_for_it = answer.get(len.saturating_sub(3)) == Some(&1);
        if let Some(flags) = answer.get_mut(2..8) {
            flags.copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(asks_for_it)]);
        }
        if asks_for_it {
            answer.extend([0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            answer.extend(has.octets());
        }
        drop(socket.send_to(&answer, from));
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}
