//! The resolver at 127.0.0.11: every query goes to the host over a connection of its own and comes back as it is.
//!
//! The agent looks at two things only: the limit that a client of UDP can take, and the question, to answer SERVFAIL when the host
//! does not.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hyper_protocol::{DNS_PORT, MAX_DNS_MESSAGE_BYTES};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_vsock::{VsockAddr, VsockStream};

use crate::error::{AgentError, Tried};
use crate::log;
use crate::streams::HOST_CID;

/// Where it listens: Docker's address, which resolv.conf of images' software knows.
const ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(127, 0, 0, 11)), 53);
/// Most queries under way, each a connection to the host.
const MAX_QUERIES: usize = 64;
/// Most TCP clients.
const MAX_CLIENTS: usize = 64;
/// How long the host may take; resolvers give up after 5 s and ask again.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a TCP client may be silent (RFC 7766, 6.2.3: a few seconds).
const CLIENT_IDLE: Duration = Duration::from_secs(20);
/// Length of a header.
const HEADER_BYTES: usize = 12;
/// Largest UDP answer without EDNS (RFC 1035, 4.2.1).
const UDP_BYTES: usize = 512;

/// Starts the resolver.
///
/// # Errors
/// Its address is in use.
pub(crate) async fn start() -> Result<(), AgentError> {
    let udp = UdpSocket::bind(ADDRESS).await.tried(|| format!("listen on udp {ADDRESS}"))?;
    let tcp = TcpListener::bind(ADDRESS).await.tried(|| format!("listen on tcp {ADDRESS}"))?;
    let queries = Arc::new(Semaphore::new(MAX_QUERIES));
    tokio::spawn(serve_udp(Arc::new(udp), Arc::clone(&queries)));
    tokio::spawn(serve_tcp(tcp, queries));
    Ok(())
}

async fn serve_udp(socket: Arc<UdpSocket>, queries: Arc<Semaphore>) {
    let mut buffer = vec![0; MAX_DNS_MESSAGE_BYTES];
    loop {
        let Ok((n, client)) = socket.recv_from(&mut buffer).await else { continue };
        let query = buffer.get(..n).unwrap_or_default().to_vec();
        if query.len() < HEADER_BYTES {
            continue;
        }
        let (socket, queries) = (Arc::clone(&socket), Arc::clone(&queries));
        // Full: dropped, as any overloaded resolver does; the client asks again.
        let Ok(permit) = queries.try_acquire_owned() else { continue };
        tokio::spawn(async move {
            let answer = ask(&query).await;
            let answer = fit(answer, udp_limit(&query), &query);
            // The client may be gone.
            let _ = socket.send_to(&answer, client).await;
            drop(permit);
        });
    }
}

async fn serve_tcp(listener: TcpListener, queries: Arc<Semaphore>) {
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        let Ok(permit) = Arc::clone(&clients).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                let queries = Arc::clone(&queries);
                tokio::spawn(async move {
                    // A client that breaks off has its answer.
                    let _ = serve_client(client, &queries).await;
                    drop(permit);
                });
            }
            Err(error) => {
                log::error(format!("accept a DNS client: {error}"));
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_client(mut client: TcpStream, queries: &Semaphore) -> std::io::Result<()> {
    loop {
        let query = timeout(CLIENT_IDLE, read_message(&mut client)).await??;
        let permit = queries.acquire().await.map_err(std::io::Error::other)?;
        let answer = ask(&query).await;
        drop(permit);
        timeout(CLIENT_IDLE, write_message(&mut client, &answer)).await??;
    }
}

/// Asks the host; SERVFAIL when it does not answer.
async fn ask(query: &[u8]) -> Vec<u8> {
    let exchange = async {
        let mut host = VsockStream::connect(VsockAddr::new(HOST_CID, DNS_PORT)).await?;
        write_message(&mut host, query).await?;
        read_message(&mut host).await
    };
    match timeout(QUERY_TIMEOUT, exchange).await {
        Ok(Ok(answer)) => answer,
        _ => failure(query),
    }
}

async fn read_message<R: AsyncRead + Unpin>(from: &mut R) -> std::io::Result<Vec<u8>> {
    let length = usize::from(from.read_u16().await?);
    if length < HEADER_BYTES {
        return Err(std::io::ErrorKind::InvalidData.into());
    }
    let mut message = vec![0; length];
    from.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message<W: AsyncWrite + Unpin>(to: &mut W, message: &[u8]) -> std::io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| std::io::ErrorKind::InvalidInput)?;
    let mut framed = Vec::with_capacity(message.len().saturating_add(2));
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    to.write_all(&framed).await
}

/// The end of the first question: after a name of labels, a type and a class.
fn question_end(message: &[u8]) -> Option<usize> {
    let mut at = HEADER_BYTES;
    loop {
        let length = usize::from(*message.get(at)?);
        at = at.checked_add(length)?.checked_add(1)?;
        match length {
            0 => break,
            // Questions are not compressed.
            64.. => return None,
            _ => {}
        }
    }
    let end = at.checked_add(4)?;
    (end <= message.len()).then_some(end)
}

fn count(message: &[u8], at: usize) -> u16 {
    message.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_be_bytes(*b))
}

/// What the client can take by UDP: the size in the OPT record after the one question (RFC 6891, 6.1.2), else 512.
fn udp_limit(query: &[u8]) -> usize {
    let opt =
        question_end(query).filter(|_| count(query, 4) == 1 && count(query, 6) == 0 && count(query, 8) == 0);
    let Some([0, 0, 41, high, low, ..]) = opt.and_then(|end| query.get(end..)) else {
        return UDP_BYTES;
    };
    usize::from(u16::from_be_bytes([*high, *low])).max(UDP_BYTES)
}

/// An answer with the question and nothing else, and these bits set.
fn bare(query: &[u8], response_code: u8, truncated: bool) -> Vec<u8> {
    let end = question_end(query).filter(|_| count(query, 4) == 1);
    let mut answer = query.get(..end.unwrap_or(HEADER_BYTES)).unwrap_or_default().to_vec();
    if let Some([_, _, flags, more, counts @ ..]) = answer.first_chunk_mut::<HEADER_BYTES>() {
        // A response, recursion desired as asked, available.
        *flags = 0x80 | (*flags & 0x79) | if truncated { 2 } else { 0 };
        *more = 0x80 | response_code;
        *counts = [0, u8::from(end.is_some()), 0, 0, 0, 0, 0, 0];
    }
    answer
}

fn failure(query: &[u8]) -> Vec<u8> {
    bare(query, 2, false)
}

/// The answer, or when it is too long for UDP one that says "ask again by TCP".
fn fit(answer: Vec<u8>, limit: usize, query: &[u8]) -> Vec<u8> {
    if answer.len() <= limit { answer } else { bare(query, 0, true) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(opt: Option<u16>) -> Vec<u8> {
        let mut q = vec![0x12, 0x34, 0x01, 0x20, 0, 1, 0, 0, 0, 0, 0, u8::from(opt.is_some())];
        q.extend_from_slice(b"\x03www\x07example\x03com\x00\x00\x01\x00\x01");
        if let Some(size) = opt {
            q.extend_from_slice(&[0, 0, 41]);
            q.extend_from_slice(&size.to_be_bytes());
            q.extend_from_slice(&[0, 0, 0, 0, 0, 0]);
        }
        q
    }

    #[test]
    fn the_limit_is_the_clients() {
        assert_eq!(udp_limit(&query(None)), 512);
        assert_eq!(udp_limit(&query(Some(1232))), 1232);
        assert_eq!(udp_limit(&query(Some(100))), 512);
        assert_eq!(udp_limit(&[0; 12]), 512);
    }

    #[test]
    fn failures_keep_the_question() {
        let q = query(Some(1232));
        let answer = failure(&q);
        assert_eq!(answer[..2], [0x12, 0x34]);
        assert_eq!(answer[2..4], [0x81, 0x82]);
        assert_eq!(answer[4..12], [0, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(answer.len(), question_end(&q).unwrap());
    }

    #[test]
    fn long_answers_are_cut_with_notice() {
        let q = query(None);
        assert_eq!(fit(vec![7; 512], 512, &q), vec![7; 512]);
        let cut = fit(vec![7; 513], 512, &q);
        assert_eq!(cut[2] & 2, 2);
        assert_eq!(cut[3], 0x80);
    }

    #[test]
    fn hostile_questions_end() {
        for bytes in [&[0xff_u8; 40][..], &[0; 11], b""] {
            assert!(udp_limit(bytes) == 512);
            assert!(failure(bytes).len() <= bytes.len());
        }
        let mut pointer = query(None);
        pointer[12] = 0xc0;
        assert_eq!(question_end(&pointer), None);
        assert_eq!(failure(&pointer).len(), HEADER_BYTES);
    }

    #[tokio::test]
    async fn messages_are_framed() {
        let (mut a, mut b) = tokio::io::duplex(1024);
        write_message(&mut a, &query(None)).await.unwrap();
        assert_eq!(read_message(&mut b).await.unwrap(), query(None));
        a.write_all(&[0, 3, 1, 2, 3]).await.unwrap();
        assert!(read_message(&mut b).await.is_err());
    }
}
