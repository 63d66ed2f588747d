//! What is shared: one JSON argument, checked.

use std::collections::HashSet;
use std::path::PathBuf;

use serde::Deserialize;

/// Most shares of one sandbox; each is a mount.
pub(crate) const MAX_SHARES: usize = 128;
/// Longest name of a share, bytes.
const MAX_NAME_BYTES: usize = 64;
/// Longest argument, bytes: what fits in one argument of a Linux process.
const MAX_SPEC_BYTES: usize = 128 * 1024;

/// One directory or file of the host.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ShareSpec {
    /// Its name in the root of the shared file system: 1 to 64 bytes of `[a-zA-Z0-9_-]`.
    pub(crate) name: String,
    /// Absolute path on the host; symbolic links in it are followed, those below it never leave the shares.
    pub(crate) source: PathBuf,
    /// Whether the host's kernel refuses writes.
    pub(crate) read_only: bool,
    /// What the host mounts below it later appears to the guest as well, with the attributes that the host gave that mount.
    #[serde(default)]
    pub(crate) live: bool,
}

/// The argument, as it travels. [`FileServerSpec`] is its checked form.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSpec {
    shares: Vec<ShareSpec>,
}

/// What to share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileServerSpec {
    shares: Vec<ShareSpec>,
}

/// What is wrong with the arguments.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    #[error("give --spec and one JSON object")]
    Usage,
    #[error("argument of {0} bytes: at most {MAX_SPEC_BYTES}")]
    Length(usize),
    #[error("cannot read the argument of --spec")]
    Json(#[source] serde_json::Error),
    #[error("{0} shares: give 1 to {MAX_SHARES}")]
    Count(usize),
    #[error("share name {0:?}: give 1 to {MAX_NAME_BYTES} characters of a-z, A-Z, 0-9, '_' and '-'")]
    Name(String),
    #[error("two shares are named {0:?}")]
    Twice(String),
    #[error("source {0:?} of a share: give an absolute path")]
    Source(PathBuf),
}

impl FileServerSpec {
    /// Reads the arguments after the program's name.
    pub(crate) fn from_args(mut args: impl Iterator<Item = String>) -> Result<Self, SpecError> {
        match (args.next().as_deref(), args.next(), args.next()) {
            (Some("--spec"), Some(json), None) => Self::parse(&json),
            _ => Err(SpecError::Usage),
        }
    }

    fn parse(json: &str) -> Result<Self, SpecError> {
        if json.len() > MAX_SPEC_BYTES {
            return Err(SpecError::Length(json.len()));
        }
        let RawSpec { shares } = serde_json::from_str(json).map_err(SpecError::Json)?;
        if shares.is_empty() || shares.len() > MAX_SHARES {
            return Err(SpecError::Count(shares.len()));
        }
        let mut names = HashSet::new();
        for share in &shares {
            let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
            if share.name.is_empty() || share.name.len() > MAX_NAME_BYTES || !share.name.bytes().all(plain) {
                return Err(SpecError::Name(share.name.clone()));
            }
            if !names.insert(share.name.as_str()) {
                return Err(SpecError::Twice(share.name.clone()));
            }
            let source = share.source.as_os_str().as_encoded_bytes();
            if !share.source.is_absolute() || source.contains(&0) {
                return Err(SpecError::Source(share.source.clone()));
            }
        }
        Ok(Self { shares })
    }

    /// The shares, at least one.
    pub(crate) fn shares(&self) -> &[ShareSpec] {
        &self.shares
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(args: &[&str]) -> Result<FileServerSpec, SpecError> {
        FileServerSpec::from_args(args.iter().map(|arg| (*arg).to_owned()))
    }

    fn share(name: &str, source: &str) -> String {
        let source = serde_json::to_string(source).unwrap();
        format!(r#"{{"shares":[{{"name":"{name}","source":{source},"read_only":true}}]}}"#)
    }

    #[test]
    fn shares_are_read() {
        let spec = args(&["--spec", &share("0", "/srv/data")]).unwrap();
        let expected =
            ShareSpec { name: "0".into(), source: "/srv/data".into(), read_only: true, live: false };
        assert_eq!(spec.shares(), [expected]);
    }

    #[test]
    fn anything_but_one_spec_is_bad_use() {
        let good = share("0", "/");
        for bad in [&[][..], &["--spec"], &["-s", &good], &["--spec", &good, "more"]] {
            assert!(matches!(args(bad), Err(SpecError::Usage)), "{bad:?}");
        }
    }

    #[test]
    fn names_cannot_leave_the_root() {
        for bad in ["", ".", "..", "a/b", "a b", "é", &"x".repeat(65)] {
            assert!(matches!(args(&["--spec", &share(bad, "/")]), Err(SpecError::Name(_))), "{bad}");
        }
    }

    #[test]
    fn sources_are_absolute() {
        for bad in ["", "data", "./data", "/a\0b"] {
            assert!(matches!(args(&["--spec", &share("0", bad)]), Err(SpecError::Source(_))), "{bad}");
        }
    }

    #[test]
    fn counts_and_doubles() {
        assert!(matches!(args(&["--spec", r#"{"shares":[]}"#]), Err(SpecError::Count(0))));
        let one = |name: usize| format!(r#"{{"name":"{name}","source":"/","read_only":false}}"#);
        let list = |names: Vec<usize>| {
            format!(r#"{{"shares":[{}]}}"#, names.into_iter().map(one).collect::<Vec<_>>().join(","))
        };
        assert!(args(&["--spec", &list((0..MAX_SHARES).collect())]).is_ok());
        assert!(matches!(args(&["--spec", &list((0..=MAX_SHARES).collect())]), Err(SpecError::Count(_))));
        assert!(matches!(args(&["--spec", &list(vec![1, 1])]), Err(SpecError::Twice(_))));
        let unknown = share("0", "/").replace("read_only", "readonly");
        assert!(matches!(args(&["--spec", &unknown]), Err(SpecError::Json(_))));
        let long = share("0", &format!("/{}", "x".repeat(MAX_SPEC_BYTES)));
        assert!(matches!(args(&["--spec", &long]), Err(SpecError::Length(_))));
    }
}
