//! DNS messages (RFC 1035, 4.1): one question in, one answer out. What arrives is a guest's, so every index is checked.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Bytes of a header.
const HEADER_BYTES: usize = 12;
/// Most bytes of a name as text (RFC 1035, 2.3.4).
const MAX_NAME_BYTES: usize = 253;
/// Seconds for which an answer of ours may be kept: containers come and go.
const TTL_S: u32 = 5;
/// Pointer to the name of the question (4.1.4).
const NAME_POINTER: [u8; 2] = [0xc0, 0x0c];
const CLASS_IN: u16 = 1;
/// Response codes (RFC 1035, 4.1.1): nobody could be asked; there is no such name.
pub(super) const SERVFAIL: u8 = 2;
pub(super) const NXDOMAIN: u8 = 3;
/// Most addresses that are read out of one answer.
const MAX_ADDRESSES: usize = 64;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// IPv4 addresses.
    A,
    /// IPv6 addresses.
    Aaaa,
    /// The name of an address.
    Ptr,
    /// Something that we have not.
    Other,
}

/// A question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Question {
    /// The name, lower case, without the last dot.
    pub(super) name: String,
    pub(super) kind: Kind,
    /// Where in the message the question ends.
    pub(super) end: usize,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// Addresses; none: the name exists, but has none of that kind.
    Addresses(Vec<IpAddr>),
    /// A name.
    Name(String),
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// Whether this is a query at all: it has a header, and is no answer.
pub(super) fn is_query(message: &[u8]) -> bool {
    message.len() >= HEADER_BYTES && message.get(2).is_some_and(|flags| flags & 0x80 == 0)
}

impl Question {
    /// The one question of a standard query of class IN; `None` for everything else, which is forwarded unread.
    pub(super) fn parse(message: &[u8]) -> Option<Self> {
        let opcode = message.get(2)? >> 3 & 0x0f;
        if opcode != 0 || be16(message, 4)? != 1 {
            return None;
        }
        let mut name = String::new();
        let mut at = HEADER_BYTES;
        loop {
            let len = usize::from(*message.get(at)?);
            at += 1;
            if len == 0 {
                break;
            }
            // 63 is the longest label; above are pointers, which make no sense in the first name.
            if len > 63 || name.len() + len > MAX_NAME_BYTES {
                return None;
            }
            let label = message.get(at..at + len)?;
            if !label.iter().all(u8::is_ascii_graphic) {
                return None;
            }
            if !name.is_empty() {
                name.push('.');
            }
            name.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
            at += len;
        }
        let kind = match be16(message, at)? {
            1 => Kind::A,
            28 => Kind::Aaaa,
            12 => Kind::Ptr,
            _ => Kind::Other,
        };
        if be16(message, at + 2)? != CLASS_IN {
            return None;
        }
        Some(Self { name, kind, end: at + 4 })
    }

    /// The query that this question came from, with nothing but it.
    pub(super) fn bare(&self, query: &[u8]) -> Option<Vec<u8>> {
        let mut out = query.get(..self.end)?.to_vec();
        // Recursion as desired; one question, no other sections.
        let head = [query.get(2)? & 0x01, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        out.get_mut(2..HEADER_BYTES)?.copy_from_slice(&head);
        Some(out)
    }

    /// The whole answer to the query that this question came from.
    pub(super) fn reply(&self, query: &[u8], answer: &Answer) -> Vec<u8> {
        let records: Vec<(u16, Vec<u8>)> = match answer {
            Answer::Addresses(addresses) => addresses.iter().map(|ip| address_record(*ip)).collect(),
            Answer::Name(name) => vec![(12, encode_name(name))],
        };
        let mut out = query.get(..self.end).unwrap_or_default().to_vec();
        let desired = query.get(2).copied().unwrap_or_default() & 0x01;
        let count = u16::try_from(records.len()).unwrap_or(u16::MAX);
        // Answer, authoritative, recursion as desired and available; one question, no other sections.
        let head = [0x84 | desired, 0x80, 0, 1, count.to_be_bytes()[0], count.to_be_bytes()[1], 0, 0, 0, 0];
        if let Some(place) = out.get_mut(2..HEADER_BYTES) {
            place.copy_from_slice(&head);
        }
        for (kind, data) in records.iter().take(usize::from(count)) {
            out.extend(NAME_POINTER);
            out.extend(kind.to_be_bytes());
            out.extend(CLASS_IN.to_be_bytes());
            out.extend(TTL_S.to_be_bytes());
            out.extend(u16::try_from(data.len()).unwrap_or_default().to_be_bytes());
            out.extend(data);
        }
        out
    }
}

fn address_record(ip: IpAddr) -> (u16, Vec<u8>) {
    match ip {
        IpAddr::V4(ip) => (1, ip.octets().to_vec()),
        IpAddr::V6(ip) => (28, ip.octets().to_vec()),
    }
}

fn encode_name(name: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for label in name.split('.').filter(|label| !label.is_empty()) {
        let label = label.as_bytes().get(..63).unwrap_or(label.as_bytes());
        out.push(u8::try_from(label.len()).unwrap_or_default());
        out.extend(label);
    }
    out.push(0);
    out
}

/// Behind a name, which may end in a pointer (4.1.4).
fn behind_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        let len = usize::from(*message.get(at)?);
        match len {
            0 => return Some(at + 1),
            1..=63 => at += 1 + len,
            0xc0.. => return Some(at + 2),
            _ => return None,
        }
    }
}

/// IPv4 addresses in the answer section of a message, each with the seconds for which it holds; those before the first broken record.
pub(super) fn addresses(message: &[u8]) -> Vec<(Ipv4Addr, u32)> {
    let mut found = Vec::new();
    let mut next = || {
        let mut at = HEADER_BYTES;
        for _ in 0..be16(message, 4)? {
            at = behind_name(message, at)? + 4;
        }
        for _ in 0..be16(message, 6)? {
            at = behind_name(message, at)?;
            let (kind, class, len) = (be16(message, at)?, be16(message, at + 2)?, be16(message, at + 8)?);
            let seconds = u32::from_be_bytes(message.get(at + 4..at + 8)?.try_into().ok()?);
            let data = message.get(at + 10..at + 10 + usize::from(len))?;
            if let (1, CLASS_IN, Ok(octets)) = (kind, class, <[u8; 4]>::try_from(data))
                && found.len() < MAX_ADDRESSES
            {
                found.push((Ipv4Addr::from(octets), seconds));
            }
            at += 10 + usize::from(len);
        }
        Some(())
    };
    let _whole = next();
    found
}

/// An answer that says why there is none.
pub(super) fn failure(query: &[u8], why: u8) -> Option<Vec<u8>> {
    let mut out = match Question::parse(query) {
        Some(question) => query.get(..question.end)?.to_vec(),
        None => query.get(..HEADER_BYTES)?.to_vec(),
    };
    let questions = u8::from(out.len() > HEADER_BYTES);
    let flags = out.get(2).copied()? & 0x79 | 0x80;
    let head = [flags, 0x80 | why, 0, questions, 0, 0, 0, 0, 0, 0];
    out.get_mut(2..HEADER_BYTES)?.copy_from_slice(&head);
    Some(out)
}

/// The address in a name under in-addr.arpa or ip6.arpa.
pub(super) fn reverse_address(name: &str) -> Option<IpAddr> {
    if let Some(digits) = name.strip_suffix(".in-addr.arpa") {
        let mut parts: Vec<&str> = digits.split('.').collect();
        parts.reverse();
        return parts.join(".").parse::<Ipv4Addr>().ok().map(IpAddr::V4);
    }
    let nibbles = name.strip_suffix(".ip6.arpa")?;
    let mut bits: u128 = 0;
    let mut count = 0;
    for nibble in nibbles.split('.').rev() {
        bits = bits << 4 | u128::from(u8::from_str_radix(nibble, 16).ok().filter(|n| *n < 16)?);
        count += 1;
    }
    (count == 32).then(|| IpAddr::V6(Ipv6Addr::from(bits)))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A query with one question.
    pub(crate) fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut out = vec![0xab, 0xcd, 0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, 0];
        out.extend(encode_name(name));
        out.extend(kind.to_be_bytes());
        out.extend([0, 1]);
        out
    }

    /// The message with one byte after the other replaced by such as matter.
    fn every_wrong_byte(message: &[u8]) -> impl Iterator<Item = Vec<u8>> {
        let places = (0..message.len()).flat_map(|at| [0, 1, 63, 64, 0xc0, 0xff].map(|byte| (at, byte)));
        places.map(|(at, byte)| {
            let mut broken = message.to_vec();
            broken[at] = byte;
            broken
        })
    }

    #[test]
    fn question_and_answer() {
        let message = query("Db.Example", 1);
        let question = Question::parse(&message).unwrap();
        assert_eq!(
            (question.name.as_str(), question.kind, question.end),
            ("db.example", Kind::A, message.len())
        );
        let answer = question.reply(&message, &Answer::Addresses(vec!["10.0.0.7".parse().unwrap()]));
        assert_eq!(answer[..4], [0xab, 0xcd, 0x85, 0x80]);
        assert_eq!(answer[4..12], [0, 1, 0, 1, 0, 0, 0, 0]);
        assert_eq!(answer[message.len()..], [0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 10, 0, 0, 7]);
        let none = question.reply(&message, &Answer::Addresses(vec![]));
        assert_eq!(none.len(), message.len());
        assert_eq!(none[3] & 0x0f, 0, "no error");
    }

    #[test]
    fn additional_records_of_the_query_are_not_repeated() {
        let mut message = query("db", 1);
        let end = message.len();
        message[11] = 1;
        message.extend([0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
        let question = Question::parse(&message).unwrap();
        assert_eq!(question.reply(&message, &Answer::Addresses(vec![])).len(), end);
    }

    #[test]
    fn every_cut_and_every_wrong_byte_is_survived() {
        let message = query("some.name.example", 28);
        for len in 0..message.len() {
            assert_eq!(Question::parse(&message[..len]), None, "{len}");
            let _ = failure(&message[..len], SERVFAIL);
        }
        for broken in every_wrong_byte(&message) {
            if let Some(question) = Question::parse(&broken) {
                assert!(question.end <= broken.len());
                question.reply(&broken, &Answer::Name("x".into()));
            }
            let _ = failure(&broken, SERVFAIL);
        }
        assert!(!is_query(&[0; 11]));
        let mut answer = message;
        answer[2] |= 0x80;
        assert!(!is_query(&answer));
    }

    /// An answer to [`query`] with an alias and two addresses.
    pub(crate) fn answer_with(query: &[u8], addresses: &[[u8; 4]]) -> Vec<u8> {
        let mut out = query.to_vec();
        out[2] |= 0x80;
        out[7] = u8::try_from(addresses.len() + 1).unwrap();
        out.extend([0xc0, 0x0c, 0, 5, 0, 1, 0, 0, 0, 60, 0, 4, 1, b'x', 0xc0, 0x0c]);
        for address in addresses {
            out.extend([1, b'x', 0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 1, 44, 0, 4]);
            out.extend(address);
        }
        out
    }

    #[test]
    fn addresses_of_an_answer() {
        let answer = answer_with(&query("example.org", 1), &[[192, 0, 2, 1], [192, 0, 2, 2]]);
        let both = [(Ipv4Addr::new(192, 0, 2, 1), 300), (Ipv4Addr::new(192, 0, 2, 2), 300)];
        assert_eq!(addresses(&answer), both);
        for len in 0..answer.len() {
            assert!(both.starts_with(&addresses(&answer[..len])), "{len}");
        }
        for broken in every_wrong_byte(&answer) {
            assert!(addresses(&broken).len() <= 3);
        }
    }

    #[test]
    fn nothing_but_the_question_is_left() {
        let mut message = query("example.org", 1);
        let plain = message.clone();
        message[11] = 1;
        message.extend([0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Question::parse(&message).unwrap().bare(&message).unwrap(), plain);
    }

    #[test]
    fn failures_keep_the_question() {
        let message = query("example.org", 1);
        let answer = failure(&message, SERVFAIL).unwrap();
        assert_eq!(answer.len(), message.len());
        assert_eq!((answer[2] & 0x80, answer[3] & 0x0f), (0x80, SERVFAIL));
    }

    #[test]
    fn reverse_names() {
        assert_eq!(reverse_address("7.0.120.10.in-addr.arpa"), Some("10.120.0.7".parse().unwrap()));
        let six = format!("{}.ip6.arpa", ["1"; 32].join("."));
        assert_eq!(reverse_address(&six), Some("1111:1111:1111:1111:1111:1111:1111:1111".parse().unwrap()));
        for bad in
            ["in-addr.arpa", "1.2.3.in-addr.arpa", "300.1.1.1.in-addr.arpa", "1.ip6.arpa", "example.org"]
        {
            assert_eq!(reverse_address(bad), None, "{bad}");
        }
    }
}
