//! The key sequence that detaches, found in a stream of typed bytes.

use crate::error::CliError;

/// Longest sequence, keys.
const MAX_KEYS: usize = 16;

/// Watches for the detach sequence. Bytes that begin it are held back until it is complete or broken.
#[derive(Debug, Clone)]
pub(crate) struct DetachKeys {
    sequence: Vec<u8>,
    matched: usize,
}

/// What some typed bytes mean.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Scan {
    /// Pass these on (possibly none).
    Pass(Vec<u8>),
    /// Pass these on, then detach.
    Detach(Vec<u8>),
}

impl DetachKeys {
    /// Parses `ctrl-p,ctrl-q`, `a,b`, `ctrl-@`; empty turns detaching off.
    ///
    /// # Errors
    /// Anything else.
    pub(crate) fn parse(text: &str) -> Result<Self, CliError> {
        let bad = || {
            CliError::usage(format!(
                "invalid detach keys {text:?}: give single characters or ctrl-<a-z, @, [, \\, ], ^, _>, separated by commas"
            ))
        };
        let mut sequence = Vec::new();
        for key in text.split(',').filter(|_| !text.is_empty()) {
            let byte = match (key.strip_prefix("ctrl-").map(str::as_bytes), key.as_bytes()) {
                (Some([c @ b'a'..=b'z']), _) => c - b'a' + 1,
                (Some(b"@"), _) => 0,
                (Some([c @ (b'[' | b'\\' | b']' | b'^' | b'_')]), _) => c - b'@',
                (None, [c]) if c.is_ascii_graphic() => *c,
                _ => return Err(bad()),
            };
            sequence.push(byte);
        }
        if sequence.len() > MAX_KEYS {
            return Err(bad());
        }
        Ok(Self { sequence, matched: 0 })
    }

    /// Takes typed bytes.
    pub(crate) fn scan(&mut self, typed: &[u8]) -> Scan {
        if self.sequence.is_empty() {
            return Scan::Pass(typed.to_vec());
        }
        let mut pass = Vec::with_capacity(typed.len() + self.matched);
        for &byte in typed {
            if self.sequence.get(self.matched) == Some(&byte) {
                self.matched += 1;
                if self.matched == self.sequence.len() {
                    return Scan::Detach(pass);
                }
                continue;
            }
            pass.extend_from_slice(self.sequence.get(..self.matched).unwrap_or_default());
            self.matched = usize::from(self.sequence.first() == Some(&byte));
            if self.matched == 0 {
                pass.push(byte);
            }
        }
        Scan::Pass(pass)
    }
}

impl Default for DetachKeys {
    /// Docker's `ctrl-p,ctrl-q`.
    fn default() -> Self {
        Self { sequence: vec![16, 17], matched: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequence_is_found_across_reads_and_held_back() {
        let mut keys = DetachKeys::default();
        assert_eq!(keys.scan(b"ab\x10"), Scan::Pass(b"ab".to_vec()));
        assert_eq!(keys.scan(b"c"), Scan::Pass(b"\x10c".to_vec()));
        assert_eq!(keys.scan(b"\x10\x10"), Scan::Pass(b"\x10".to_vec()));
        assert_eq!(keys.scan(b"\x11rest"), Scan::Detach(Vec::new()));
    }

    #[test]
    fn custom_keys() {
        let mut keys = DetachKeys::parse("ctrl-a,d").unwrap();
        assert_eq!(keys.scan(b"x\x01d"), Scan::Detach(b"x".to_vec()));
        assert_eq!(DetachKeys::parse("").unwrap().scan(b"\x10\x11"), Scan::Pass(b"\x10\x11".to_vec()));
        for text in ["ctrl-", "ctrl-1", "ab", ",", "ctrl-a,"] {
            assert!(DetachKeys::parse(text).is_err(), "{text}");
        }
    }
}
