//! The doorbell: the one line with which an agent says that it serves, and in which protocol.

use crate::PROTOCOL_VERSION;

/// Longest doorbell line with its newline, bytes: a hostile guest must not make the host buffer more.
pub const DOORBELL_MAX_BYTES: usize = 128;

/// A doorbell that was understood and speaks our version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doorbell {
    /// Build of the agent, as it names itself; printable ASCII.
    pub build: String,
}

/// Why a doorbell was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DoorbellError {
    /// Not a doorbell line.
    #[error("the guest's first line is not a doorbell")]
    Malformed,
    /// Another protocol version.
    #[error(
        "the agent speaks protocol version {theirs}, this host speaks {PROTOCOL_VERSION}: use a matching initramfs"
    )]
    Version {
        /// What the agent speaks.
        theirs: u32,
    },
}

impl Doorbell {
    /// The line that an agent writes.
    #[must_use]
    pub fn line(build: &str) -> String {
        format!("hyper-agent {PROTOCOL_VERSION} {build}\n")
    }

    /// Reads a line, with or without its newline.
    ///
    /// # Errors
    /// [`DoorbellError::Malformed`] for anything else, [`DoorbellError::Version`] for another version.
    pub fn parse(line: &[u8]) -> Result<Self, DoorbellError> {
        if line.len() > DOORBELL_MAX_BYTES {
            return Err(DoorbellError::Malformed);
        }
        let text = std::str::from_utf8(line).map_err(|_| DoorbellError::Malformed)?;
        let mut words = text.trim_end_matches('\n').split(' ');
        let (Some("hyper-agent"), Some(version), Some(build), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(DoorbellError::Malformed);
        };
        if build.is_empty() || !build.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(DoorbellError::Malformed);
        }
        let theirs: u32 = version.parse().map_err(|_| DoorbellError::Malformed)?;
        if theirs != PROTOCOL_VERSION {
            return Err(DoorbellError::Version { theirs });
        }
        Ok(Self { build: build.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_is_understood() {
        let bell = Doorbell::parse(Doorbell::line("0.1.0").as_bytes()).unwrap();
        assert_eq!(bell.build, "0.1.0");
    }

    #[test]
    fn other_version_is_named() {
        assert_eq!(Doorbell::parse(b"hyper-agent 99 x\n"), Err(DoorbellError::Version { theirs: 99 }));
    }

    #[test]
    fn anything_else_is_refused() {
        let long = [b'a'; DOORBELL_MAX_BYTES + 1];
        let bad: [&[u8]; 6] =
            [b"", b"\n", b"hyper-agent 1\n", b"hyper-agent x y\n", b"hyper-agent 1 a b\n", &long];
        for line in bad {
            assert_eq!(Doorbell::parse(line), Err(DoorbellError::Malformed));
        }
        assert_eq!(Doorbell::parse(b"hyper-agent 1 \x1b[2J\n"), Err(DoorbellError::Malformed));
    }
}
