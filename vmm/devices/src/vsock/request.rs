//! What arrives: packet headers from the guest (virtio 1.3, 5.10.6) and the `CONNECT` line from the host.
//!
//! The header is parsed here rather than by a crate because Linux since 6.7 sends zero-copy packets whose payload lies in many
//! descriptors. It is copied out of guest memory once; later changes by the guest are not seen.

/// Length of a packet header, bytes.
pub(super) const HEADER_BYTES: usize = 44;
/// Context id of the host.
pub(super) const HOST_CID: u64 = 2;
/// Socket type of all packets: stream.
pub(super) const TYPE_STREAM: u16 = 1;
/// `SHUTDOWN` flag: the sender will receive no more.
pub(super) const NO_RECEIVE: u32 = 1;
/// `SHUTDOWN` flag: the sender will send no more.
pub(super) const NO_SEND: u32 = 2;
/// Both `SHUTDOWN` flags.
pub(super) const NO_MORE: u32 = NO_RECEIVE | NO_SEND;
/// Longest `CONNECT` line, bytes with its newline: "CONNECT 4294967295\r\n" is 20.
pub(super) const MAX_LINE_BYTES: usize = 32;

/// Operation of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
    /// Anything that the standard does not name.
    Unknown(u16),
}

impl From<u16> for Op {
    fn from(value: u16) -> Self {
        match value {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }
}

impl From<Op> for u16 {
    fn from(op: Op) -> Self {
        match op {
            Op::Request => 1,
            Op::Response => 2,
            Op::Reset => 3,
            Op::Shutdown => 4,
            Op::Data => 5,
            Op::CreditUpdate => 6,
            Op::CreditRequest => 7,
            Op::Unknown(other) => other,
        }
    }
}

/// The two ports that name a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
}

/// A packet header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: Op,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// A header from the host to `guest_cid` with no payload, flags or credit.
    pub(super) fn to_guest(guest_cid: u64, key: Key, op: Op) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// The connection that a packet of the guest belongs to.
    pub(super) fn guest_key(&self) -> Key {
        Key { guest_port: self.src_port, host_port: self.dst_port }
    }

    /// Reads the wire form: little endian, packed.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
            std::array::from_fn(|i| bytes.get(at + i).copied().unwrap_or_default())
        }
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            kind: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)).into(),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// Writes the wire form.
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            for (to, from) in bytes.iter_mut().skip(at).zip(field) {
                *to = *from;
            }
            at += field.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&u16::from(self.op).to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// What a host program's first bytes are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// No newline yet.
    Partial,
    /// `CONNECT <port>\n`; the stream's own bytes begin at `rest`.
    Connect { port: u32, rest: usize },
    /// Anything else.
    Bad,
}

/// Reads the line that opens a connection from the host.
pub(super) fn parse_line(bytes: &[u8]) -> Line {
    let window = bytes.get(..MAX_LINE_BYTES).unwrap_or(bytes);
    let Some(end) = window.iter().position(|b| *b == b'\n') else {
        return if bytes.len() < MAX_LINE_BYTES { Line::Partial } else { Line::Bad };
    };
    let port = window
        .get(..end)
        .and_then(|line| std::str::from_utf8(line).ok())
        .map(|line| line.strip_suffix('\r').unwrap_or(line))
        .and_then(|line| line.strip_prefix("CONNECT "))
        .filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))
        .and_then(|digits| digits.parse().ok());
    port.map_or(Line::Bad, |port| Line::Connect { port, rest: end + 1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_survives_the_wire() {
        let header = Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: 0x0102_0304,
            dst_port: u32::MAX,
            len: 77,
            kind: TYPE_STREAM,
            op: Op::Shutdown,
            flags: NO_MORE,
            buf_alloc: 1 << 18,
            fwd_cnt: 9,
        };
        let bytes = header.encode();
        assert_eq!(bytes[16..20], [4, 3, 2, 1]);
        assert_eq!(bytes[30], 4);
        assert_eq!(Header::decode(&bytes), header);
    }

    #[test]
    fn every_op_has_one_number() {
        for n in 0..9 {
            assert_eq!(u16::from(Op::from(n)), n);
        }
    }

    #[test]
    fn lines() {
        assert_eq!(parse_line(b"CONNECT 1024\nrest"), Line::Connect { port: 1024, rest: 13 });
        assert_eq!(parse_line(b"CONNECT 4294967295\r\n"), Line::Connect { port: u32::MAX, rest: 20 });
        assert_eq!(parse_line(b"CONN"), Line::Partial);
        assert_eq!(parse_line(b""), Line::Partial);
        for bad in
            [&b"CONNECT 4294967296\n"[..], b"CONNECT \n", b"connect 1\n", b"CONNECT +1\n", b"GET /\n", b"\n"]
        {
            assert_eq!(parse_line(bad), Line::Bad, "{bad:?}");
        }
        assert_eq!(parse_line(&[b'x'; MAX_LINE_BYTES]), Line::Bad);
        assert_eq!(parse_line(&[&[b' '; MAX_LINE_BYTES][..], b"\n"].concat()), Line::Bad);
    }
}
