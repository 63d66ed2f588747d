//! Platforms: `os/architecture[/variant]`, and which one of an index suits.

use std::fmt;

use crate::error::{ImageError, Result, clean};

/// Longest `os`, `architecture` or `variant`.
const MAX_PART: usize = 32;

/// What an image runs on. The default is `linux/amd64`, what the virtual machines are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// Go's name of it: `amd64`, `arm64`.
    pub architecture: String,
    /// `v8`, `v7`; empty if it does not matter.
    pub variant: String,
}

impl Default for Platform {
    fn default() -> Self {
        Self { os: "linux".into(), architecture: "amd64".into(), variant: String::new() }
    }
}

impl Platform {
    /// Parses `linux/amd64` or `linux/arm64/v8`; other spellings of the architecture are folded.
    ///
    /// # Errors
    /// [`ImageError::InvalidPlatform`].
    pub fn parse(text: &str) -> Result<Self> {
        let bad = || ImageError::InvalidPlatform { text: clean(text) };
        let mut parts = text.split('/');
        let (Some(os), Some(arch)) = (parts.next(), parts.next()) else { return Err(bad()) };
        let variant = parts.next().unwrap_or_default();
        let valid = |s: &str| {
            s.len() <= MAX_PART
                && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
        };
        if parts.next().is_some()
            || os.is_empty()
            || arch.is_empty()
            || ![os, arch, variant].into_iter().all(valid)
        {
            return Err(bad());
        }
        Ok(Self::of(os, arch, variant))
    }

    /// A platform from parts that a manifest gives, folded to the usual spelling and shortened.
    pub(crate) fn of(os: &str, architecture: &str, variant: &str) -> Self {
        let cut = |s: &str| clean(s).chars().take(MAX_PART).collect::<String>().to_ascii_lowercase();
        let architecture = match cut(architecture).as_str() {
            "x86_64" | "x86-64" => "amd64".to_owned(),
            "aarch64" => "arm64".to_owned(),
            other => other.to_owned(),
        };
        let variant = match (architecture.as_str(), cut(variant).as_str()) {
            ("arm64", "v8" | "8") => String::new(),
            (_, variant) => variant.to_owned(),
        };
        Self { os: cut(os), architecture, variant }
    }

    /// How well `offered` serves this platform: `None` not at all, otherwise lower is better.
    pub(crate) fn rank(&self, offered: &Self) -> Option<u32> {
        if self.os != offered.os || self.architecture != offered.architecture {
            return None;
        }
        if self.variant == offered.variant {
            return Some(0);
        }
        // A variant that was asked for is a demand; one that was not is a preference for the plain image.
        self.variant.is_empty().then_some(match offered.variant.as_str() {
            "v1" => 1,
            "v2" => 2,
            _ => 3,
        })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if !self.variant.is_empty() {
            write!(f, "/{}", self.variant)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_folds() {
        assert_eq!(Platform::parse("linux/x86_64").unwrap(), Platform::default());
        assert_eq!(Platform::parse("linux/arm64/v8").unwrap().to_string(), "linux/arm64");
        assert_eq!(Platform::parse("linux/arm/v7").unwrap().to_string(), "linux/arm/v7");
        for bad in ["", "linux", "/amd64", "linux/", "a/b/c/d", "linux/am d64", &"x".repeat(99)] {
            assert!(Platform::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ranks() {
        let plain = Platform::default();
        let v3 = Platform::of("linux", "amd64", "v3");
        assert_eq!(plain.rank(&plain), Some(0));
        assert_eq!(plain.rank(&v3), Some(3));
        assert_eq!(v3.rank(&plain), None);
        assert_eq!(plain.rank(&Platform::of("windows", "amd64", "")), None);
    }
}
