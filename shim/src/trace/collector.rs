//! An HTTP client that is enough for a collector: one connection a request, no TLS, a deadline for the whole of it.
//!
//! It stands still while it waits, which is right where it is used: on the exporter's own thread.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};

/// How long a request may take, with its answer.
const LIMIT: Duration = Duration::from_secs(3);
/// Longest status line, bytes.
const MAX_LINE_BYTES: usize = 512;
/// Port when the address has none.
const DEFAULT_PORT: u16 = 80;

/// The client.
#[derive(Debug)]
pub(super) struct Collector;

#[async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let status = exchange(&request, LIMIT)?;
        // What else it says is of no use.
        Ok(Response::builder().status(status).body(Bytes::new())?)
    }
}

/// Sends a request; the status of the answer.
fn exchange(request: &Request<Bytes>, limit: Duration) -> io::Result<u16> {
    let deadline = Instant::now().checked_add(limit).ok_or(ErrorKind::InvalidInput)?;
    let authority = request.uri().authority().ok_or(ErrorKind::InvalidInput)?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let mut last = io::Error::from(ErrorKind::NotFound);
    // The name service has deadlines of its own, and the shim does not wait for this thread.
    for address in (host, authority.port_u16().unwrap_or(DEFAULT_PORT)).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, left(deadline)?) {
            Ok(stream) => return converse(stream, request, deadline),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left) }
}

fn converse(mut stream: TcpStream, request: &Request<Bytes>, deadline: Instant) -> io::Result<u16> {
    let target = request.uri().path_and_query().map_or("/", |path| path.as_str());
    let host = request.uri().authority().map_or("", |authority| authority.as_str());
    let mut head = format!(
        "POST {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {}\r\n",
        request.body().len()
    )
    .into_bytes();
    for (name, value) in request.headers() {
        head.extend_from_slice(name.as_str().as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(value.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    head.extend_from_slice(b"\r\n");
    for mut part in [head.as_slice(), request.body()] {
        while !part.is_empty() {
            stream.set_write_timeout(Some(left(deadline)?))?;
            let written = stream.write(part)?;
            if written == 0 {
                return Err(ErrorKind::WriteZero.into());
            }
            part = part.get(written..).unwrap_or_default();
        }
    }
    status(&line(&mut stream, deadline)?)
}

/// The first line of the answer.
fn line(stream: &mut TcpStream, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut bytes = [0; MAX_LINE_BYTES];
    loop {
        if let Some(end) = line.iter().position(|byte| *byte == b'\n') {
            line.truncate(end);
            return Ok(line);
        }
        if line.len() >= MAX_LINE_BYTES {
            return Err(ErrorKind::InvalidData.into());
        }
        stream.set_read_timeout(Some(left(deadline)?))?;
        let count = stream.read(&mut bytes)?;
        if count == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        line.extend_from_slice(bytes.get(..count).unwrap_or_default());
    }
}

fn status(line: &[u8]) -> io::Result<u16> {
    let text = std::str::from_utf8(line).unwrap_or_default();
    let mut words = text.split_ascii_whitespace();
    let is_http = words.next().is_some_and(|version| version.starts_with("HTTP/1."));
    let code = words.next().and_then(|code| code.parse().ok());
    code.filter(|_| is_http).ok_or_else(|| ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// What comes of a request to somebody who answers like this and then stays; what was asked.
    fn ask(answer: &'static [u8]) -> (io::Result<u16>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1/traces", listener.local_addr().unwrap());
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            let mut bytes = [0; 256];
            while !asked.ends_with(b"body") {
                let count = stream.read(&mut bytes).unwrap();
                asked.extend_from_slice(&bytes[..count]);
            }
            stream.write_all(answer).unwrap();
            // Until the client has gone.
            drop(stream.read(&mut bytes));
            String::from_utf8(asked).unwrap()
        });
        let request = Request::post(url).header("x-own", "1").body(Bytes::from_static(b"body")).unwrap();
        let status = exchange(&request, Duration::from_millis(300));
        (status, server.join().unwrap())
    }

    #[test]
    fn spans_are_posted() {
        let (status, asked) = ask(b"HTTP/1.1 200 OK\r\n\r\n");
        assert_eq!(status.unwrap(), 200);
        assert!(asked.starts_with("POST /v1/traces HTTP/1.1\r\nHost: 127.0.0.1:"), "{asked}");
        assert!(
            asked.contains("\r\nContent-Length: 4\r\n") && asked.ends_with("x-own: 1\r\n\r\nbody"),
            "{asked}"
        );
        assert_eq!(ask(b"HTTP/1.0 503\n").0.unwrap(), 503);
    }

    #[test]
    fn collectors_that_make_no_sense_or_hang_are_given_up() {
        assert_eq!(ask(b"").0.unwrap_err().kind(), ErrorKind::WouldBlock);
        assert_eq!(ask(b"220 smtp\r\n").0.unwrap_err().kind(), ErrorKind::InvalidData);
        assert_eq!(ask(&[b'x'; 4096]).0.unwrap_err().kind(), ErrorKind::InvalidData);
        let nobody = Request::post("http://127.0.0.1:1/").body(Bytes::new()).unwrap();
        assert!(exchange(&nobody, LIMIT).is_err());
    }
}
