//! A line of the log, and what chains it to the one before.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::clock::Timestamp;

/// Longest text of a field, bytes: what somebody else chose must not fill the log.
const MAX_TEXT: usize = 512;
/// What the first record follows from.
pub(super) const NOTHING: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// Between what is hashed and the hash, in each line.
const SEAL: &str = ",\"hash\":\"";

/// Who did what to what, when, and how it ended. In the file each is a line of JSON, of which the last field is the SHA-256, in hexadecimal,
/// of all that is before `,"hash"`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRecord {
    /// From 1, without gaps.
    pub seq: u64,
    /// When it had been done.
    pub at: Timestamp,
    /// The user that the program ran as.
    pub uid: u32,
    /// The user that logged in, whoever he became since; none where the kernel does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub login: Option<u32>,
    /// Process id of the program.
    pub pid: u32,
    /// What was done, such as `container start`.
    pub action: String,
    /// Id of the container or image, or name of the volume.
    pub subject: String,
    /// What a person calls it, or what was done with it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// Why it failed; empty if it did not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub error: String,
    /// Hash of the record before, of 64 zeroes for the first.
    pub previous: String,
}

/// Why a line is no record of this chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Broken {
    Unreadable,
    Altered,
}

impl AuditRecord {
    /// The line, without its end, and its hash.
    pub(super) fn seal(&self) -> Result<(String, String), serde_json::Error> {
        let mut line = serde_json::to_string(self)?;
        // The brace at the end comes after the hash.
        line.pop();
        let hash = hash(line.as_bytes());
        line.push_str(SEAL);
        line.push_str(&hash);
        line.push_str("\"}");
        Ok((line, hash))
    }

    /// Reads a line; the record and its hash.
    pub(super) fn open(line: &str) -> Result<(Self, String), Broken> {
        let (body, rest) = line.rsplit_once(SEAL).ok_or(Broken::Unreadable)?;
        let sealed = rest.strip_suffix("\"}").ok_or(Broken::Unreadable)?;
        if hash(body.as_bytes()) != sealed {
            return Err(Broken::Altered);
        }
        let record = serde_json::from_str(&format!("{body}}}")).map_err(|_| Broken::Unreadable)?;
        Ok((record, sealed.to_owned()))
    }
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unreadable => "it is no record",
            Self::Altered => "its hash is not that of its content",
        })
    }
}

/// SHA-256 in hexadecimal.
pub(super) fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A text of bounded length.
pub(super) fn bounded(text: &str) -> String {
    let end = (0..=MAX_TEXT.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    text.get(..end.unwrap_or(0)).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_back_and_no_byte_of_it_can_be_another() {
        let record = AuditRecord {
            seq: 7,
            at: Timestamp::from_unix_ns(5),
            uid: 0,
            login: Some(1000),
            pid: 12,
            action: "container start".into(),
            subject: "ab".into(),
            detail: "a \"name\",\"hash\":\"of sorts".into(),
            error: String::new(),
            previous: NOTHING.into(),
        };
        let (line, hash) = record.seal().unwrap();
        assert_eq!(AuditRecord::open(&line), Ok((record, hash)));
        for at in 0..line.len() {
            let mut bytes = line.clone().into_bytes();
            bytes[at] ^= 1;
            if let Ok(text) = String::from_utf8(bytes) {
                assert!(AuditRecord::open(&text).is_err(), "{text}");
            }
            assert!(AuditRecord::open(&line[..at]).is_err());
        }
    }

    #[test]
    fn texts_are_bounded() {
        assert_eq!(bounded("short"), "short");
        assert_eq!(bounded(&"ä".repeat(600)).len(), MAX_TEXT);
        assert_eq!(bounded(&format!("x{}", "ä".repeat(600))).len(), MAX_TEXT - 1);
    }
}
