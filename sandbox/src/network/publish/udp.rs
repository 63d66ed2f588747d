//! Datagrams of a published port: each client gets a socket of its own towards the container, so that answers find back.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use crate::network::Place;

/// Most clients at a time; datagrams of more are dropped, as datagrams may be.
const MAX_CLIENTS: usize = 1024;
/// How long a client is remembered after its last datagram in either direction.
const IDLE: Duration = Duration::from_secs(90);
/// Longest datagram, bytes.
const MAX_DATAGRAM_BYTES: usize = 65_535;

/// Serves until it is dropped.
pub(super) async fn serve(outer: Arc<UdpSocket>, target: SocketAddr, place: &Place) {
    let mut clients: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut replies: JoinSet<SocketAddr> = JoinSet::new();
    let mut buffer = vec![0; MAX_DATAGRAM_BYTES];
    loop {
        tokio::select! {
            Some(idle) = replies.join_next() => {
                if let Ok(client) = idle {
                    clients.remove(&client);
                }
            }
            received = outer.recv_from(&mut buffer) => {
                let Ok((len, client)) = received else {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                };
                let inner = match clients.get(&client) {
                    Some(inner) => Arc::clone(inner),
                    None if clients.len() >= MAX_CLIENTS => continue,
                    None => match connect(target, place) {
                        Ok(inner) => {
                            let inner = Arc::new(inner);
                            clients.insert(client, Arc::clone(&inner));
                            replies.spawn(reply(Arc::clone(&outer), Arc::clone(&inner), client));
                            inner
                        }
                        Err(error) => {
                            tracing::debug!(%target, %error, "datagram dropped");
                            continue;
                        }
                    },
                };
                if let Err(error) = inner.send(buffer.get(..len).unwrap_or_default()).await {
                    tracing::debug!(%target, %error, "datagram dropped");
                }
            }
        }
    }
}

fn connect(target: SocketAddr, place: &Place) -> std::io::Result<UdpSocket> {
    let any: IpAddr =
        if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = place.within(|| std::net::UdpSocket::bind((any, 0)))??;
    socket.connect(target)?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

/// Sends back what the container answers, until there was nothing for [`IDLE`]. Returns whose it was.
async fn reply(outer: Arc<UdpSocket>, inner: Arc<UdpSocket>, client: SocketAddr) -> SocketAddr {
    let mut buffer = vec![0; MAX_DATAGRAM_BYTES];
    let mut deadline = Instant::now() + IDLE;
    while let Ok(received) = timeout_at(deadline, inner.recv(&mut buffer)).await {
        match received {
            Ok(len) => {
                deadline = Instant::now() + IDLE;
                if outer.send_to(buffer.get(..len).unwrap_or_default(), client).await.is_err() {
                    break;
                }
            }
            // Nobody listens in the container (yet): the client is told nothing, as over a real network.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(_) => break,
        }
    }
    client
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn answers_find_back_to_each_client() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let outer = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let (public, target) = (outer.local_addr().unwrap(), server.local_addr().unwrap());
        let proxy = tokio::spawn(async move { serve(outer, target, &Place::Host).await });
        let echo = tokio::spawn(async move {
            let mut buffer = [0; 64];
            for _ in 0..4 {
                let (len, from) = server.recv_from(&mut buffer).await.unwrap();
                server.send_to(&buffer[..len], from).await.unwrap();
            }
        });
        let clients =
            [UdpSocket::bind("127.0.0.1:0").await.unwrap(), UdpSocket::bind("127.0.0.1:0").await.unwrap()];
        for round in 0..2_u8 {
            for (n, client) in (0_u8..).zip(&clients) {
                client.send_to(&[n, round], public).await.unwrap();
            }
            for (n, client) in (0_u8..).zip(&clients) {
                let mut buffer = [0; 64];
                let len = client.recv(&mut buffer).await.unwrap();
                assert_eq!(buffer[..len], [n, round]);
            }
        }
        echo.await.unwrap();
        proxy.abort();
    }
}
