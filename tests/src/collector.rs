//! An OpenTelemetry collector: takes traces by OTLP (protobuf over HTTP) and keeps them for a case.
//!
//! Of the messages (opentelemetry-proto, `trace/v1/trace.proto`) as much is read as the cases ask for.
#![expect(clippy::panic, reason = "assertions of the cases; a panic is how a case fails")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

use crate::wait_for;

/// Largest request, bytes.
const MAX_BYTES: usize = 16 << 20;

/// A span that was exported.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Span {
    /// Id of its trace, in hex.
    pub trace: String,
    /// Its own id.
    pub id: String,
    /// That of the span that it is part of; empty when there is none.
    pub parent: String,
    /// Its name.
    pub name: String,
    /// When it began, ns since 1970.
    pub start: u64,
    /// When it ended.
    pub end: u64,
    /// Whose it is: text among the attributes of its resource.
    pub resource: BTreeMap<String, String>,
}

impl Span {
    /// The name of the program that made it.
    #[must_use]
    pub fn service(&self) -> &str {
        self.resource.get("service.name").map_or("", String::as_str)
    }
}

/// A collector that listens as long as the case runs.
#[derive(Debug)]
pub struct Collector {
    /// Where, as `OTEL_EXPORTER_OTLP_ENDPOINT` has it.
    pub url: String,
    spans: Arc<Mutex<Vec<Span>>>,
}

fn listen() -> (TcpListener, String) {
    let bound = TcpListener::bind("127.0.0.1:0").and_then(|listener| {
        let address = listener.local_addr()?;
        Ok((listener, format!("http://{address}")))
    });
    bound.unwrap_or_else(|error| panic!("listening: {error}"))
}

/// The address of a collector that takes every connection and never answers.
#[must_use]
pub fn hanging_collector() -> String {
    let (listener, url) = listen();
    std::thread::spawn(move || {
        let clients: Vec<_> = listener.incoming().collect();
        drop(clients);
    });
    url
}

impl Collector {
    /// Starts one.
    #[must_use]
    pub fn start() -> Self {
        let (listener, url) = listen();
        let spans = Arc::<Mutex<Vec<Span>>>::default();
        let kept = Arc::clone(&spans);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let kept = Arc::clone(&kept);
                std::thread::spawn(move || serve(client, &kept));
            }
        });
        Self { url, spans }
    }

    /// What has arrived.
    #[must_use]
    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What has arrived of a pod, once there are spans of all these names.
    #[must_use]
    pub fn wait_for(&self, pod: &str, names: &[&str]) -> Vec<Span> {
        wait_for(&format!("spans {names:?} of {pod}"), || {
            let mut spans = self.spans();
            spans.retain(|span| span.resource.get("hyper.pod.id").is_some_and(|id| id == pod));
            let all = names.iter().all(|name| spans.iter().any(|span| span.name == *name));
            all.then_some(spans)
        })
    }
}

/// Answers requests until the client has enough.
fn serve(mut client: TcpStream, kept: &Mutex<Vec<Span>>) {
    // A client that breaks off has no answer.
    while let Some(body) = request(&mut client) {
        let spans = export(&body).unwrap_or_else(|| panic!("{} bytes are no traces", body.len()));
        kept.lock().unwrap_or_else(PoisonError::into_inner).extend(spans);
        if client.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").is_err() {
            return;
        }
    }
}

/// The body of the next request to the path of traces.
fn request(client: &mut TcpStream) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut part = [0; 4096];
    let head = loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
        let count = client.read(&mut part).ok().filter(|count| *count > 0)?;
        bytes.extend_from_slice(part.get(..count)?);
    };
    let text = String::from_utf8_lossy(bytes.get(..head)?).to_lowercase();
    assert!(text.starts_with("post /v1/traces http/1.1\r\n"), "{text}");
    let length = text.lines().find_map(|line| line.strip_prefix("content-length:"))?;
    let length: usize = length.trim().parse().ok().filter(|length| *length <= MAX_BYTES)?;
    let mut body = bytes.split_off(head);
    while body.len() < length {
        let count = client.read(&mut part).ok().filter(|count| *count > 0)?;
        body.extend_from_slice(part.get(..count)?);
    }
    Some(body)
}

/// A field of a message: its number, and its bytes or its number in them.
enum Value<'a> {
    Bytes(&'a [u8]),
    Number(u64),
}

/// The fields of a message, in their order; `None` when it is broken.
fn fields(mut bytes: &[u8]) -> Option<Vec<(u64, Value<'_>)>> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes)?;
        let value = match tag & 7 {
            0 => Value::Number(varint(&mut bytes)?),
            1 => {
                let (eight, rest) = bytes.split_first_chunk::<8>()?;
                bytes = rest;
                Value::Number(u64::from_le_bytes(*eight))
            }
            2 => {
                let length = usize::try_from(varint(&mut bytes)?).ok()?;
                let (own, rest) = bytes.split_at_checked(length)?;
                bytes = rest;
                Value::Bytes(own)
            }
            5 => {
                let (four, rest) = bytes.split_first_chunk::<4>()?;
                bytes = rest;
                Value::Number(u32::from_le_bytes(*four).into())
            }
            _ => return None,
        };
        fields.push((tag >> 3, value));
    }
    Some(fields)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// The messages in a field that is repeated.
fn messages(bytes: &[u8], number: u64) -> Option<Vec<&[u8]>> {
    let of = |(found, value)| match value {
        Value::Bytes(bytes) if found == number => Some(bytes),
        _ => None,
    };
    Some(fields(bytes)?.into_iter().filter_map(of).collect())
}

/// `ExportTraceServiceRequest`.
fn export(request: &[u8]) -> Option<Vec<Span>> {
    let mut spans = Vec::new();
    for group in messages(request, 1)? {
        let resource = match messages(group, 1)?.first() {
            Some(resource) => attributes(resource)?,
            None => BTreeMap::new(),
        };
        for scope in messages(group, 2)? {
            for one in messages(scope, 2)? {
                spans.push(span(one, &resource)?);
            }
        }
    }
    Some(spans)
}

/// The text among the attributes of a `Resource`.
fn attributes(resource: &[u8]) -> Option<BTreeMap<String, String>> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut all = BTreeMap::new();
    for pair in messages(resource, 1)? {
        let key = messages(pair, 1)?.first().map(|key| text(key))?;
        let value = messages(pair, 2)?.first().map(|value| messages(value, 1));
        if let Some(value) = value.flatten().and_then(|values| values.first().map(|value| text(value))) {
            all.insert(key, value);
        }
    }
    Some(all)
}

fn span(bytes: &[u8], resource: &BTreeMap<String, String>) -> Option<Span> {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let mut span = Span { resource: resource.clone(), ..Span::default() };
    for (number, value) in fields(bytes)? {
        match (number, value) {
            (1, Value::Bytes(id)) => span.trace = hex(id),
            (2, Value::Bytes(id)) => span.id = hex(id),
            (4, Value::Bytes(id)) => span.parent = hex(id),
            (5, Value::Bytes(name)) => span.name = String::from_utf8_lossy(name).into_owned(),
            (7, Value::Number(start)) => span.start = start,
            (8, Value::Number(end)) => span.end = end,
            _ => {}
        }
    }
    Some(span)
}
