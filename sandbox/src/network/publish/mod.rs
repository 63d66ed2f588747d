//! Published ports: listeners of the supervisor, whose connections and datagrams go on to the container.
//!
//! The listeners are opened before anything else is started, so that a port that is taken costs nothing and is a clear error; nothing is
//! accepted before the container's process runs.

mod udp;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use rustix::net::sockopt::{set_ipv6_v6only, set_socket_reuseaddr};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::{NetworkError, Place};
use crate::config::{PortConfig, Protocol};
use crate::launch::scaled_ms;
use crate::state::ResolvedPort;

/// Most TCP connections through one published port at a time; more wait in the backlog.
const MAX_CONNECTIONS: usize = 4096;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 512;
/// How long a connection to the container may take to come about.
const CONNECT_MS: u64 = 10_000;
/// How often a free port for two addresses is looked for.
const PORT_ATTEMPTS: u32 = 16;

/// Opened listeners; they are closed when this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Listeners {
    open: Vec<(ResolvedPort, Listener)>,
}

#[derive(Debug)]
enum Listener {
    Tcp(std::net::TcpListener),
    Udp(std::net::UdpSocket),
}

/// Running proxies; they end, with their connections, when this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Proxies {
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Proxies {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Listeners {
    /// Opens a listener for each port; without an address on IPv4 and, where the host has it, IPv6.
    pub(crate) fn open(ports: &[PortConfig]) -> Result<Self, NetworkError> {
        let mut open = Vec::new();
        for wish in ports {
            open.extend(open_port(wish)?);
        }
        Ok(Self { open })
    }

    /// What was opened.
    pub(crate) fn resolved(&self) -> Vec<ResolvedPort> {
        self.open.iter().map(|(port, _)| port.clone()).collect()
    }

    /// Goes on to the container at `target`, which is in `place`.
    pub(crate) fn serve(self, target: IpAddr, place: &Place) -> Result<Proxies, NetworkError> {
        let mut proxies = Proxies::default();
        for (port, listener) in self.open {
            let address = SocketAddr::new(target, port.wish.container_port);
            let fail = |source| NetworkError::Listen { address: describe(&port), source };
            let place = place.clone();
            let task = match listener {
                Listener::Tcp(listener) => {
                    let listener = TcpListener::from_std(listener).map_err(fail)?;
                    tokio::spawn(async move { serve_tcp(&listener, address, &place).await })
                }
                Listener::Udp(socket) => {
                    let socket = UdpSocket::from_std(socket).map_err(fail)?;
                    tokio::spawn(async move { udp::serve(Arc::new(socket), address, &place).await })
                }
            };
            proxies.tasks.push(task);
        }
        Ok(proxies)
    }
}

fn describe(port: &ResolvedPort) -> String {
    format!("{}/{}", SocketAddr::new(port.bound_ip, port.bound_port), port.wish.protocol)
}

fn open_port(wish: &PortConfig) -> Result<Vec<(ResolvedPort, Listener)>, NetworkError> {
    let fail = |ip: IpAddr, port: u16, source: io::Error| {
        let address = format!("{}/{}", SocketAddr::new(ip, port), wish.protocol);
        match source.kind() {
            io::ErrorKind::AddrInUse => NetworkError::PortInUse { address },
            io::ErrorKind::PermissionDenied => NetworkError::LowPort { address },
            _ => NetworkError::Listen { address, source },
        }
    };
    let pair = |ip: IpAddr, listener: (u16, Listener)| {
        (ResolvedPort { wish: wish.clone(), bound_ip: ip, bound_port: listener.0 }, listener.1)
    };
    if let Some(ip) = wish.host_ip {
        let one =
            open_one(ip, wish.host_port, wish.protocol).map_err(|error| fail(ip, wish.host_port, error))?;
        return Ok(vec![pair(ip, one)]);
    }
    let (v4, v6) = (IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED));
    let mut attempt = 0;
    loop {
        let first =
            open_one(v4, wish.host_port, wish.protocol).map_err(|error| fail(v4, wish.host_port, error))?;
        let port = first.0;
        match open_one(v6, port, wish.protocol) {
            Ok(second) => return Ok(vec![pair(v4, first), pair(v6, second)]),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                attempt += 1;
                if wish.host_port != 0 || attempt >= PORT_ATTEMPTS {
                    return Err(fail(v6, port, error));
                }
            }
            // No IPv6 on this host.
            Err(error) => {
                tracing::debug!(%error, "no IPv6 listener");
                return Ok(vec![pair(v4, first)]);
            }
        }
    }
}

fn open_one(ip: IpAddr, port: u16, protocol: Protocol) -> io::Result<(u16, Listener)> {
    let family = if ip.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let kind = match protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    if ip.is_ipv6() {
        set_ipv6_v6only(&socket, true)?;
    }
    match protocol {
        Protocol::Tcp => {
            // Only connections in TIME_WAIT are passed over by this, not another listener.
            set_socket_reuseaddr(&socket, true)?;
            bind(&socket, &SocketAddr::new(ip, port))?;
            listen(&socket, BACKLOG)?;
            let listener = std::net::TcpListener::from(socket);
            Ok((listener.local_addr()?.port(), Listener::Tcp(listener)))
        }
        Protocol::Udp => {
            bind(&socket, &SocketAddr::new(ip, port))?;
            let socket = std::net::UdpSocket::from(socket);
            Ok((socket.local_addr()?.port(), Listener::Udp(socket)))
        }
    }
}

async fn serve_tcp(listener: &TcpListener, target: SocketAddr, place: &Place) {
    let turns = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Dropped, and its tasks ended, with this future.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(turn) = Arc::clone(&turns).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                let socket = inner_socket(target, place);
                connections.spawn(async move {
                    let _turn = turn;
                    if let Err(error) = relay(client, socket, target).await {
                        tracing::debug!(%target, %error, "a connection ended");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

/// A socket where the container is.
fn inner_socket(target: SocketAddr, place: &Place) -> io::Result<TcpSocket> {
    place.within(|| if target.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() })?
}

async fn relay(mut client: TcpStream, socket: io::Result<TcpSocket>, target: SocketAddr) -> io::Result<()> {
    let connect = timeout(scaled_ms(CONNECT_MS), socket?.connect(target)).await;
    let mut server = connect.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    // Small answers must not wait for more.
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    tokio::io::copy_bidirectional_with_sizes(&mut client, &mut server, 32 * 1024, 32 * 1024).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn wish(ip: &str, host_port: u16, container_port: u16, protocol: Protocol) -> PortConfig {
        PortConfig { host_ip: Some(ip.parse().unwrap()), host_port, container_port, protocol }
    }

    #[tokio::test]
    async fn tcp_goes_through_with_half_closes() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = server.local_addr().unwrap().port();
        let listeners = Listeners::open(&[wish("127.0.0.1", 0, port, Protocol::Tcp)]).unwrap();
        let bound = listeners.resolved()[0].bound_port;
        let proxies = listeners.serve("127.0.0.1".parse().unwrap(), &Place::Host).unwrap();
        let mut client = TcpStream::connect(("127.0.0.1", bound)).await.unwrap();
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let (mut served, _) = server.accept().await.unwrap();
        let mut text = String::new();
        served.read_to_string(&mut text).await.unwrap();
        served.write_all(b"answer").await.unwrap();
        drop(served);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!((text.as_str(), answer.as_str()), ("question", "answer"));
        drop(proxies);
    }

    #[test]
    fn taken_ports_are_named() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = Listeners::open(&[wish("127.0.0.1", port, 80, Protocol::Tcp)]).unwrap_err();
        assert!(matches!(&error, NetworkError::PortInUse { .. }));
        assert_eq!(
            error.to_string(),
            format!("bind for 127.0.0.1:{port}/tcp failed: port is already allocated")
        );
        assert!(Listeners::open(&[wish("127.0.0.1", port, 80, Protocol::Udp)]).is_ok(), "UDP is apart");
        let foreign = Listeners::open(&[wish("203.0.113.7", 0, 80, Protocol::Tcp)]).unwrap_err();
        assert!(matches!(foreign, NetworkError::Listen { .. }));
    }

    #[test]
    fn any_address_and_any_port() {
        let any = PortConfig { host_ip: None, host_port: 0, container_port: 80, protocol: Protocol::Tcp };
        let resolved = Listeners::open(&[any]).unwrap().resolved();
        assert!(
            resolved.iter().all(|port| port.bound_port != 0 && port.bound_port == resolved[0].bound_port)
        );
    }
}
