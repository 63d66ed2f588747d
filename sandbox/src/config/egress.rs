//! Where a container may connect to: `egress=` of `--network`.
//!
//! ```text
//!  rule := target [":" port ["-" port]] ["/" ("tcp" | "udp")]
//!  target := "any" | "host" | IPv4 address | IPv4 network "/" length | name | "*." name
//! ```

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{ConfigError, Protocol};

/// Most rules of a container.
pub(crate) const MAX_EGRESS: usize = 64;
/// Longest name (RFC 1035, 2.3.4).
const MAX_NAME_BYTES: usize = 253;

/// What a rule is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EgressTarget {
    /// Every address but the host's own and those of cloud metadata.
    Any,
    /// The host itself, at all its addresses.
    Host,
    /// A network: its address, without host bits, and the length of its prefix, 0 to 32.
    Net(Ipv4Addr, u8),
    /// The addresses that a name has, lower case; with `*.` those of all names below it.
    Name(String),
}

/// One rule: what it names may be connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EgressRule {
    /// Where to.
    pub target: EgressTarget,
    /// First and last port, 1 to 65535; `None`: all, and protocols without ports.
    pub ports: Option<(u16, u16)>,
    /// `None`: TCP and UDP where there are ports, else everything.
    pub protocol: Option<Protocol>,
}

impl EgressRule {
    /// The rule that has no limits but those of its target.
    #[must_use]
    pub fn all_of(target: EgressTarget) -> Self {
        Self { target, ports: None, protocol: None }
    }

    /// Whether a name is one of this rule's.
    pub(crate) fn names(&self, name: &str) -> bool {
        let EgressTarget::Name(own) = &self.target else { return false };
        match own.strip_prefix('*') {
            Some(tail) => name.len() > tail.len() && name.ends_with(tail),
            None => name == own,
        }
    }
}

/// The bits of an address that a prefix of this length covers.
pub(crate) fn mask(prefix_len: u8) -> u32 {
    u32::MAX.checked_shl(32_u32.saturating_sub(prefix_len.into())).unwrap_or(0)
}

impl FromStr for EgressRule {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = |why| ConfigError::Egress { text: text.chars().take(MAX_NAME_BYTES).collect(), why };
        let (rest, protocol) = match text.rsplit_once('/') {
            Some((rest, "tcp")) => (rest, Some(Protocol::Tcp)),
            Some((rest, "udp")) => (rest, Some(Protocol::Udp)),
            _ => (text, None),
        };
        let (target, ports) = match rest.split_once(':') {
            Some((target, ports)) => (target, Some(ports)),
            None => (rest, None),
        };
        let number = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0);
        let ports = match ports {
            None => None,
            Some(text) => {
                let (first, last) = text.split_once('-').unwrap_or((text, text));
                let range = number(first).zip(number(last)).filter(|(first, last)| first <= last);
                Some(range.ok_or_else(|| bad("ports are 1 to 65535, one or first-last"))?)
            }
        };
        let target = target_of(target).map_err(bad)?;
        Ok(Self { target, ports, protocol })
    }
}

fn target_of(text: &str) -> Result<EgressTarget, &'static str> {
    match text {
        "any" => return Ok(EgressTarget::Any),
        "host" => return Ok(EgressTarget::Host),
        _ => {}
    }
    let (address, prefix_len) = match text.split_once('/') {
        None => (text, Some(32)),
        Some((address, len)) => (address, len.parse::<u8>().ok().filter(|len| *len <= 32)),
    };
    if let Ok(address) = address.parse::<Ipv4Addr>() {
        let prefix_len = prefix_len.ok_or("a network's length is 0 to 32")?;
        if u32::from(address) & !mask(prefix_len) != 0 {
            return Err("the network has bits beyond its length");
        }
        return Ok(EgressTarget::Net(address, prefix_len));
    }
    let plain = |label: &str| {
        let known = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
        (1..=63).contains(&label.len()) && label.bytes().all(known)
    };
    let name = text.strip_prefix("*.").unwrap_or(text);
    let numeric = name.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()));
    if numeric || text.len() > MAX_NAME_BYTES || !name.split('.').all(plain) {
        return Err(
            "give any, host, an IPv4 address or network, or a name, and :PORT and /tcp or /udp if need be",
        );
    }
    Ok(EgressTarget::Name(text.to_ascii_lowercase()))
}

impl fmt::Display for EgressRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            EgressTarget::Any => f.write_str("any")?,
            EgressTarget::Host => f.write_str("host")?,
            EgressTarget::Net(address, 32) => write!(f, "{address}")?,
            EgressTarget::Net(address, len) => write!(f, "{address}/{len}")?,
            EgressTarget::Name(name) => f.write_str(name)?,
        }
        match self.ports {
            None => {}
            Some((first, last)) if first == last => write!(f, ":{first}")?,
            Some((first, last)) => write!(f, ":{first}-{last}")?,
        }
        match self.protocol {
            None => Ok(()),
            Some(protocol) => write!(f, "/{protocol}"),
        }
    }
}

impl TryFrom<String> for EgressRule {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl From<EgressRule> for String {
    fn from(rule: EgressRule) -> Self {
        rule.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_and_written() {
        for text in [
            "any",
            "host",
            "host:8080",
            "any/udp",
            "192.0.2.7",
            "192.0.2.0/24:443",
            "192.0.2.0/24/tcp",
            "0.0.0.0/0:53/udp",
            "example.org:80-90/tcp",
            "*.example.org:443",
        ] {
            assert_eq!(text.parse::<EgressRule>().unwrap().to_string(), text);
        }
        let rule: EgressRule = "192.0.2.0/24:443/tcp".parse().unwrap();
        assert_eq!(rule.target, EgressTarget::Net(Ipv4Addr::new(192, 0, 2, 0), 24));
        assert_eq!((rule.ports, rule.protocol), (Some((443, 443)), Some(Protocol::Tcp)));
        assert_eq!("192.0.2.7/32".parse::<EgressRule>().unwrap().to_string(), "192.0.2.7");
    }

    #[test]
    fn nonsense_is_refused_with_a_reason() {
        for bad in [
            "",
            ":80",
            "any:",
            "any:0",
            "any:9-8",
            "any:65536",
            "any:x",
            "192.0.2.7/24",
            "192.0.2.0/33",
            "1.2.3",
            "192.0.2.0/24:1:2",
            "a b",
            "a..b",
            "*",
            "*.",
            "a*.org",
            "::1",
            "name/sctp",
            "x;y",
            "a\"b",
            "-1-:1-",
        ] {
            let error = bad.parse::<EgressRule>().unwrap_err().to_string();
            assert!(error.starts_with("invalid egress") && !error.contains('\n'), "{bad}: {error}");
        }
    }

    #[test]
    fn names_below_and_names_beside() {
        let rule = |text: &str| text.parse::<EgressRule>().unwrap();
        assert!(rule("Example.org").names("example.org"));
        assert!(!rule("example.org").names("www.example.org"));
        assert!(rule("*.example.org").names("www.example.org"));
        assert!(rule("*.example.org").names("a.b.example.org"));
        for other in ["example.org", ".example.org", "badexample.org", "example.org.evil"] {
            assert!(!rule("*.example.org").names(other), "{other}");
        }
        assert!(!rule("any").names("any"));
    }

    #[test]
    fn masks() {
        assert_eq!([0, 1, 24, 32].map(mask), [0, 0x8000_0000, 0xffff_ff00, u32::MAX]);
    }
}
