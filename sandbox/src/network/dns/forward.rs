//! Questions about other people's names: over UDP, and over TCP when the answer is too long for it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use hyper_protocol::MAX_DNS_MESSAGE_BYTES;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::launch::scaled_ms;

/// How long one server may take to answer.
const SERVER_MS: u64 = 2500;
/// Bit of the third byte that says that the answer was cut off.
const TRUNCATED: u8 = 0x02;

/// Asks one server after the other, all of them twice; the first answer counts.
pub(super) async fn forward(query: &[u8], servers: &[SocketAddr]) -> Option<Vec<u8>> {
    let limit: Duration = scaled_ms(SERVER_MS);
    for server in servers.iter().chain(servers) {
        let answer = match timeout(limit, over_udp(query, *server)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => {
                tracing::debug!(%server, %error, "name server failed");
                continue;
            }
            Err(_) => continue,
        };
        if answer.get(2).is_some_and(|flags| flags & TRUNCATED != 0)
            && let Ok(Ok(whole)) = timeout(limit, over_tcp(query, *server)).await
        {
            return Some(whole);
        }
        return Some(answer);
    }
    None
}

/// A socket of its own for each question: its random port is what a forger would have to guess.
async fn over_udp(query: &[u8], server: SocketAddr) -> std::io::Result<Vec<u8>> {
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut answer = vec![0; MAX_DNS_MESSAGE_BYTES];
    loop {
        let len = socket.recv(&mut answer).await?;
        if answers(answer.get(..len).unwrap_or_default(), query) {
            answer.truncate(len);
            return Ok(answer);
        }
    }
}

async fn over_tcp(query: &[u8], server: SocketAddr) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let len = u16::try_from(query.len()).map_err(std::io::Error::other)?;
    stream.write_u16(len).await?;
    stream.write_all(query).await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    if answers(&answer, query) { Ok(answer) } else { Err(std::io::ErrorKind::InvalidData.into()) }
}

/// Whether `answer` is one, to this query.
fn answers(answer: &[u8], query: &[u8]) -> bool {
    answer.len() >= 12
        && answer.get(..2) == query.get(..2)
        && answer.get(2).is_some_and(|flags| flags & 0x80 != 0)
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::super::message::tests::query;
    use super::*;

    fn answer_to(query: &[u8], flags: u8, tail: &[u8]) -> Vec<u8> {
        let mut answer = query.to_vec();
        answer[2] |= 0x80 | flags;
        answer.extend(tail);
        answer
    }

    #[tokio::test]
    async fn strangers_are_not_believed_and_dead_servers_are_passed_over() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let dead = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let address = server.local_addr().unwrap();
        let asked = query("example.org", 1);
        let expected = answer_to(&asked, 0, b"real");
        let reply = expected.clone();
        let serve = tokio::spawn(async move {
            let mut buffer = [0; 512];
            let (len, from) = server.recv_from(&mut buffer).await.unwrap();
            let mut forged = answer_to(&buffer[..len], 0, b"forged");
            forged[0] ^= 0xff;
            server.send_to(&forged, from).await.unwrap();
            server.send_to(&buffer[..len], from).await.unwrap();
            server.send_to(&reply, from).await.unwrap();
        });
        assert_eq!(forward(&asked, &[dead, address]).await, Some(expected));
        serve.await.unwrap();
    }

    #[tokio::test]
    async fn long_answers_come_over_tcp() {
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        let udp = UdpSocket::bind(address).await.unwrap();
        let asked = query("example.org", 16);
        let (short, long) = (answer_to(&asked, TRUNCATED, b""), answer_to(&asked, 0, &[7; 4000]));
        let expected = long.clone();
        let serve = tokio::spawn(async move {
            let mut buffer = [0; 512];
            let (_, from) = udp.recv_from(&mut buffer).await.unwrap();
            udp.send_to(&short, from).await.unwrap();
            let (mut stream, _) = tcp.accept().await.unwrap();
            let mut question = vec![0; usize::from(stream.read_u16().await.unwrap())];
            stream.read_exact(&mut question).await.unwrap();
            stream.write_u16(u16::try_from(long.len()).unwrap()).await.unwrap();
            stream.write_all(&long).await.unwrap();
        });
        assert_eq!(forward(&asked, &[address]).await, Some(expected));
        serve.await.unwrap();
    }

    #[tokio::test]
    async fn nobody_to_ask() {
        assert_eq!(forward(&query("example.org", 1), &[]).await, None);
    }
}
