//! pax extended headers: `length key=value\n` records that override or extend the header that follows.

use super::Timestamp;
use super::sparse::{self, Segment, SparseMap};
use crate::error::ArchiveError;

/// The records that matter for a root file system. An empty value means that the record does not count.
#[derive(Debug, Default)]
pub(super) struct Records {
    pub(super) path: Option<Vec<u8>>,
    pub(super) linkpath: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<i64>,
    pub(super) gid: Option<i64>,
    pub(super) mtime: Option<Timestamp>,
    /// In order, repeated names and all: later ones win.
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: SparseRecords,
}

/// The records of GNU's sparse formats 0.0, 0.1 and 1.0.
#[derive(Debug, Default)]
pub(super) struct SparseRecords {
    pub(super) name: Option<Vec<u8>>,
    size: Option<u64>,
    major: Option<u64>,
    minor: Option<u64>,
    /// Offsets and lengths in turn.
    map: Option<Vec<u64>>,
}

const MALFORMED: ArchiveError = ArchiveError::ExtendedHeader("record is malformed");

impl Records {
    /// Parses the content of one extended header. Later records win over earlier ones.
    pub(super) fn parse(payload: &[u8]) -> Result<Self, ArchiveError> {
        let mut records = Self::default();
        let mut rest = payload;
        while !rest.is_empty() {
            let Record { key, value, after } = split_record(rest)?;
            records.set(key, value)?;
            rest = after;
        }
        Ok(records)
    }

    /// Takes from a global header what may apply to many entries. Go ignores all of it; names and sizes for all
    /// entries to come make no sense and would let two readers see two different archives.
    pub(super) fn update_times_and_owners(&mut self, global: Self) {
        self.uid = global.uid.or(self.uid);
        self.gid = global.gid.or(self.gid);
        self.mtime = global.mtime.or(self.mtime);
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), ArchiveError> {
        match key {
            b"path" => self.path = name(value)?,
            b"linkpath" => self.linkpath = name(value)?,
            b"size" => self.size = decimal(value, "size")?,
            b"uid" => self.uid = signed(value, "uid")?,
            b"gid" => self.gid = signed(value, "gid")?,
            b"mtime" => self.mtime = time(value)?,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                } else if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.set(key, value)?;
                }
            }
        }
        Ok(())
    }

    /// The map of a file in sparse format 0.0 or 0.1, which the records hold in full.
    pub(super) fn sparse_map(&self) -> Result<Option<SparseMap>, ArchiveError> {
        let (Some(numbers), false) = (&self.sparse.map, self.sparse.is_in_content()) else { return Ok(None) };
        let (pairs, odd) = numbers.as_chunks::<2>();
        if !odd.is_empty() {
            return Err(ArchiveError::SparseMap("offset without a length"));
        }
        let segments = pairs.iter().map(|[offset, len]| Segment { offset: *offset, len: *len }).collect();
        Ok(Some(SparseMap { segments, size: self.sparse.required_size()? }))
    }

    /// The apparent size of a file in sparse format 1.0, whose map precedes its content.
    pub(super) fn sparse_in_content(&self) -> Result<Option<u64>, ArchiveError> {
        if self.sparse.is_in_content() { Ok(Some(self.sparse.required_size()?)) } else { Ok(None) }
    }
}

impl SparseRecords {
    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), ArchiveError> {
        match key {
            b"name" => self.name = name(value)?,
            b"major" => self.major = decimal(value, "GNU.sparse.major")?,
            b"minor" => self.minor = decimal(value, "GNU.sparse.minor")?,
            b"size" | b"realsize" => self.size = decimal(value, "GNU.sparse.size")?,
            b"map" => {
                let numbers = value.split(|byte| *byte == b',').map(sparse::number);
                self.map = Some(numbers.collect::<Result<_, _>>()?);
            }
            b"numblocks" => {
                self.map.get_or_insert_default();
            }
            b"offset" | b"numbytes" => {
                let map = self.map.get_or_insert_default();
                if (key == b"offset") != map.len().is_multiple_of(2) {
                    return Err(ArchiveError::SparseMap("offsets and lengths do not alternate"));
                }
                map.push(sparse::number(value)?);
            }
            _ => {}
        }
        Ok(())
    }

    fn is_in_content(&self) -> bool {
        self.major == Some(1) && self.minor.unwrap_or(0) == 0
    }

    fn required_size(&self) -> Result<u64, ArchiveError> {
        self.size.ok_or(ArchiveError::SparseMap("file has no size"))
    }
}

/// One record and what follows it.
struct Record<'a> {
    key: &'a [u8],
    value: &'a [u8],
    after: &'a [u8],
}

/// Splits the first record off.
fn split_record(rest: &[u8]) -> Result<Record<'_>, ArchiveError> {
    let space = rest.iter().position(|byte| *byte == b' ').ok_or(MALFORMED)?;
    let len = rest.get(..space).and_then(digits).ok_or(MALFORMED)?;
    let len = usize::try_from(len).map_err(|_| MALFORMED)?;
    let (record, after) = rest.split_at_checked(len).ok_or(MALFORMED)?;
    let body = record.get(space + 1..).and_then(|body| body.strip_suffix(b"\n")).ok_or(MALFORMED)?;
    let equals = body.iter().position(|byte| *byte == b'=').ok_or(MALFORMED)?;
    let (key, value) = body.split_at_checked(equals).ok_or(MALFORMED)?;
    if key.is_empty() || key.contains(&0) {
        return Err(MALFORMED);
    }
    Ok(Record { key, value: value.get(1..).unwrap_or_default(), after })
}

/// Only digits, at least one, no sign and no blanks.
pub(super) fn digits(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0_u64, |value, byte| match byte {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    })
}

fn decimal(value: &[u8], field: &'static str) -> Result<Option<u64>, ArchiveError> {
    match value {
        [] => Ok(None),
        // Lengths are bounded to what both signed and unsigned readers can hold.
        _ => match digits(value).filter(|number| i64::try_from(*number).is_ok()) {
            Some(number) => Ok(Some(number)),
            None => Err(ArchiveError::Number(field)),
        },
    }
}

fn signed(value: &[u8], field: &'static str) -> Result<Option<i64>, ArchiveError> {
    let (negative, magnitude) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    if value.is_empty() {
        return Ok(None);
    }
    let number = digits(magnitude).and_then(|number| i64::try_from(number).ok());
    let number = number.ok_or(ArchiveError::Number(field))?;
    Ok(Some(if negative { -number } else { number }))
}

fn name(value: &[u8]) -> Result<Option<Vec<u8>>, ArchiveError> {
    if value.contains(&0) {
        return Err(ArchiveError::ExtendedHeader("name holds a NUL byte"));
    }
    Ok(if value.is_empty() { None } else { Some(value.to_vec()) })
}

/// Seconds with an optional fraction, which is cut after nine digits.
fn time(value: &[u8]) -> Result<Option<Timestamp>, ArchiveError> {
    if value.is_empty() {
        return Ok(None);
    }
    let bad = ArchiveError::Number("mtime");
    let (whole, fraction) = match value.iter().position(|byte| *byte == b'.') {
        Some(dot) => value.split_at_checked(dot).ok_or(MALFORMED)?,
        None => (value, [].as_slice()),
    };
    let Some(sec) = signed(whole, "mtime")? else { return Err(bad) };
    let fraction = fraction.get(1..).unwrap_or_default();
    if fraction.iter().any(|byte| !byte.is_ascii_digit()) {
        return Err(bad);
    }
    let padded = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nsec = padded.fold(0_u32, |value, byte| value * 10 + u32::from(byte - b'0'));
    if whole.starts_with(b"-") && nsec > 0 {
        return Ok(Some(Timestamp { sec: sec.saturating_sub(1), nsec: 1_000_000_000 - nsec }));
    }
    Ok(Some(Timestamp { sec, nsec }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
        let mut len = body.len() + 1;
        while len.to_string().len() + body.len() != len {
            len += 1;
        }
        [len.to_string().as_bytes(), &body].concat()
    }

    #[test]
    fn records_override_and_repeat() {
        let payload = [
            record("path", b"first"),
            record("path", "sécond/with=equals\nand newline".as_bytes()),
            record("uid", b"3000000000"),
            record("size", b""),
            record("comment", b"whatever"),
            record("SCHILY.xattr.user.a", b"1"),
            record("SCHILY.xattr.security.capability", &[1, 0, 0, 2, 0, b'\n', b'=']),
            record("SCHILY.xattr.user.a", b"2"),
        ];
        let records = Records::parse(&payload.concat()).unwrap();
        assert_eq!(records.path.unwrap(), "sécond/with=equals\nand newline".as_bytes());
        assert_eq!(records.uid, Some(3_000_000_000));
        assert_eq!(records.size, None);
        let capability = (b"security.capability".to_vec(), vec![1, 0, 0, 2, 0, b'\n', b'=']);
        let user = |value: &[u8]| (b"user.a".to_vec(), value.to_vec());
        assert_eq!(records.xattrs, [user(b"1"), capability, user(b"2")]);
    }

    #[test]
    fn malformed_records_are_refused() {
        for bad in [
            "5 a=b", "x a=b\n", "6 a=b\n", "7 a=b\n", "6 =bc\n", "99 a=b\n", "4 a\n", " a=b\n", "-1 a=b\n",
            "0 a=b\n",
        ] {
            let parsed = Records::parse(bad.as_bytes());
            assert!(parsed.is_err() || bad == "6 a=b\n", "{bad:?}");
        }
        assert!(Records::parse(&record("path", b"nul\0inside")).is_err());
        for size in ["-1", "+1", "0x10", "1e3", " 1", "9223372036854775808", "99999999999999999999999"] {
            assert!(Records::parse(&record("size", size.as_bytes())).is_err(), "{size}");
        }
    }

    #[test]
    fn times_have_fractions_and_signs() {
        let parse = |text: &str| time(text.as_bytes()).unwrap().unwrap();
        assert_eq!(parse("1350244992.023960108"), Timestamp { sec: 1_350_244_992, nsec: 23_960_108 });
        assert_eq!(parse("1.5"), Timestamp { sec: 1, nsec: 500_000_000 });
        assert_eq!(parse("1.1234567899"), Timestamp { sec: 1, nsec: 123_456_789 });
        assert_eq!(parse("-1.5"), Timestamp { sec: -2, nsec: 500_000_000 });
        assert_eq!(parse("-1"), Timestamp { sec: -1, nsec: 0 });
        assert!(time(b"1.x").is_err());
        assert!(time(b".5").is_err());
    }

    #[test]
    fn a_global_header_gives_times_and_owners_only() {
        let payload = [record("path", b"x"), record("size", b"9"), record("mtime", b"7")].concat();
        let mut globals = Records::default();
        globals.update_times_and_owners(Records::parse(&payload).unwrap());
        assert_eq!(globals.mtime, Some(Timestamp { sec: 7, nsec: 0 }));
        assert!(globals.path.is_none() && globals.size.is_none());
    }
}
