//! Calls of containerd's Task API that `ctr` has no verb for, made at a shim's own socket.
//!
//! A request is a ttrpc frame (length, stream, type, flags; big-endian) around a protobuf message of service, method and payload.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use crate::Containerd;

const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
/// Largest answer, bytes.
const MAX_BYTES: u32 = 4 << 20;

/// A field of bytes, as protobuf has it.
#[must_use]
pub fn field(number: u8, bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    let mut out = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length >= 0x80 {
        out.push((length & 0x7f) as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend_from_slice(bytes);
    out
}

impl Containerd {
    /// Calls a method of the Task service of the shim that has this container, with a message made of these fields.
    ///
    /// # Panics
    /// When the shim refuses; its words are in the message.
    pub fn call(&self, id: &str, method: &str, fields: &[Vec<u8>]) {
        let bundle = self.bundle(id);
        let address = std::fs::read_to_string(format!("{bundle}/address"))
            .unwrap_or_else(|error| panic!("the address of {id}'s shim: {error}"));
        let path = address.trim().trim_start_matches("unix://");
        let mut socket =
            UnixStream::connect(path).unwrap_or_else(|error| panic!("cannot connect to {path}: {error}"));
        let payload = fields.concat();
        let request = [field(1, "containerd.task.v2.Task"), field(2, method), field(3, payload)].concat();
        let answer =
            exchange(&mut socket, &request).unwrap_or_else(|error| panic!("{method} of {id}: {error}"));
        // An answer that begins with its first field carries a status, and that is a refusal if it has a code.
        let refused = answer.first() == Some(&0x0a) && answer.get(1).is_some_and(|length| *length > 0);
        assert!(!refused, "{method} of {id}: {}", String::from_utf8_lossy(&answer));
    }

    /// Changes the limits of a container; `resources` is an OCI `linux.resources` object.
    pub fn update(&self, id: &str, resources: &str) {
        let any = [
            field(1, "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"),
            field(2, resources),
        ];
        self.call(id, "Update", &[field(1, id), field(2, any.concat())]);
    }

    /// Directory of a container's bundle.
    #[must_use]
    pub fn bundle(&self, id: &str) -> String {
        format!("{}/state/io.containerd.runtime.v2.task/default/{id}", self.scratch().path().display())
    }
}

fn exchange(socket: &mut UnixStream, request: &[u8]) -> std::io::Result<Vec<u8>> {
    socket.set_read_timeout(Some(crate::DEADLINE))?;
    let length = u32::try_from(request.len()).unwrap_or(u32::MAX).to_be_bytes();
    socket.write_all(&[&length[..], &1_u32.to_be_bytes(), &[REQUEST, 0], request].concat())?;
    let mut header = [0; 10];
    socket.read_exact(&mut header)?;
    let [a, b, c, d, _, _, _, _, kind, _] = header;
    let length = u32::from_be_bytes([a, b, c, d]);
    if kind != RESPONSE || length > MAX_BYTES {
        return Err(std::io::ErrorKind::InvalidData.into());
    }
    let mut answer = vec![0; length as usize];
    socket.read_exact(&mut answer)?;
    Ok(answer)
}
