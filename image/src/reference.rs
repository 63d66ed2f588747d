//! Image references, normalised by Docker's rules: `nginx` is `docker.io/library/nginx:latest`.
//!
//! ```text
//! reference  = [domain "/"] path [":" tag] ["@" digest]
//! domain     = host [":" port]          told from a path by a dot, a colon, capitals or the word localhost
//! path       = component *("/" component), lower case
//! component  = alnum *(separator alnum),  separator = "." / "_" / "__" / 1*"-"
//! tag        = (alnum / "_") *127(alnum / "_" / "." / "-")
//! ```

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use crate::digest::Digest;
use crate::error::{ImageError, Result, clean};

/// The domain of references that name none.
const DEFAULT_DOMAIN: &str = "docker.io";
/// The name that the default domain had once.
const LEGACY_DEFAULT_DOMAIN: &str = "index.docker.io";
/// Where the default domain's registry really answers.
const DEFAULT_ENDPOINT: &str = "registry-1.docker.io";
/// Prefix of the default domain's official images.
const OFFICIAL: &str = "library/";
/// Tag of references that have neither tag nor digest.
const DEFAULT_TAG: &str = "latest";
/// Longest domain and path together, as in Docker's grammar.
const MAX_NAME: usize = 255;
/// Longest tag, as in Docker's grammar.
const MAX_TAG: usize = 128;
/// Longest text looked at: name, tag and digest with their separators.
const MAX_REFERENCE: usize = MAX_NAME + 1 + MAX_TAG + 1 + 71;

/// A normalised image reference; `Display` gives the familiar short form, [`Reference::full`] the long one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Parses and normalises; a reference without tag and digest gets the tag `latest`.
    ///
    /// # Errors
    /// [`ImageError::InvalidReference`] with the rule that is broken.
    pub fn parse(text: &str) -> Result<Self> {
        parse(text).map_err(|why| ImageError::InvalidReference { text: clean(text), why })
    }

    /// Host and port of the registry as written in references: `docker.io`, `localhost:5000`.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The repository inside the registry: `library/nginx`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The tag, if there is one.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if there is one; it wins over the tag when pulling.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Domain and path without tag and digest: `docker.io/library/nginx`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// The name as people write it, without tag and digest: `nginx`, `localhost:5000/a/b`.
    pub fn familiar_name(&self) -> String {
        if self.domain != DEFAULT_DOMAIN {
            return self.repository();
        }
        match self.path.strip_prefix(OFFICIAL) {
            Some(short) if !short.contains('/') => short.to_owned(),
            // `docker.io/localhost/a` shortened would name another registry.
            _ if split_domain(&self.path).0.is_some() => self.repository(),
            _ => self.path.clone(),
        }
    }

    /// The long form with everything: `docker.io/library/nginx:latest`.
    pub fn full(&self) -> String {
        format!("{}{}", self.repository(), self.suffix())
    }

    /// The same repository, named by digest instead of tag.
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { tag: None, digest: Some(digest), ..self.clone() }
    }

    /// Host and port to connect to: `registry-1.docker.io` for `docker.io`.
    pub fn endpoint(&self) -> &str {
        if self.domain == DEFAULT_DOMAIN { DEFAULT_ENDPOINT } else { &self.domain }
    }

    /// Whether the registry is this machine (`localhost`, 127.0.0.0/8, `::1`) and so spoken to without TLS.
    pub fn is_loopback(&self) -> bool {
        let host = split_port(&self.domain).map_or(self.domain.as_str(), |(host, _)| host);
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }

    /// What the registry is asked for: the digest, else the tag.
    pub(crate) fn wanted(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => DEFAULT_TAG.to_owned(),
        }
    }

    /// `[:tag][@digest]`.
    fn suffix(&self) -> String {
        let tag = self.tag.as_ref().map(|tag| format!(":{tag}")).unwrap_or_default();
        let digest = self.digest.as_ref().map(|digest| format!("@{digest}")).unwrap_or_default();
        format!("{tag}{digest}")
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.familiar_name(), self.suffix())
    }
}

impl FromStr for Reference {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

/// The parser proper; errors are the rule that is broken.
fn parse(text: &str) -> std::result::Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.len() > MAX_REFERENCE {
        return Err("it is too long");
    }
    if Digest::from_hex(text).is_some() {
        return Err("a name cannot be 64 hex digits, that is an image id");
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => {
            (rest, Some(Digest::parse(digest).map_err(|_| "the digest is not sha256: and 64 hex digits")?))
        }
        None => (text, None),
    };
    let (name, tag) = split_tag(rest);
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let (domain, path) = split_domain(name);
    if let Some(domain) = domain {
        check_domain(domain)?;
    }
    if path.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("the repository name must be lowercase");
    }
    if path.is_empty() || !path.split('/').all(is_component) {
        return Err("the repository name has an empty or malformed part");
    }
    let domain = match domain {
        None | Some(LEGACY_DEFAULT_DOMAIN) => DEFAULT_DOMAIN,
        Some(domain) => domain,
    };
    let official = domain == DEFAULT_DOMAIN && !path.contains('/');
    let path = if official { format!("{OFFICIAL}{path}") } else { path.to_owned() };
    if domain.len() + 1 + path.len() > MAX_NAME {
        return Err("the repository name is longer than 255 characters");
    }
    let tag = match (tag, &digest) {
        (None, None) => Some(DEFAULT_TAG.to_owned()),
        (tag, _) => tag.map(str::to_owned),
    };
    Ok(Reference { domain: domain.to_owned(), path, tag, digest })
}

/// Splits off a tag: what follows the last colon, unless a slash comes after it (then it is a port).
fn split_tag(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (text, None),
    }
}

/// Splits off a domain: the first component if it cannot be part of a path on Docker Hub.
fn split_domain(name: &str) -> (Option<&str>, &str) {
    match name.split_once('/') {
        Some((first, rest))
            if first == "localhost"
                || first.contains(['.', ':'])
                || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            (Some(first), rest)
        }
        _ => (None, name),
    }
}

/// Splits `host:port`; `None` without a port. The host of an IPv6 address keeps its brackets.
fn split_port(domain: &str) -> Option<(&str, &str)> {
    domain.rsplit_once(':').filter(|(_, port)| !port.contains(']'))
}

/// Checks `host[:port]`.
fn check_domain(domain: &str) -> std::result::Result<(), &'static str> {
    let host = match split_port(domain) {
        None => domain,
        Some((host, port)) => {
            let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
            if !digits || port.parse::<u16>().is_err() {
                return Err("the registry's port is not a number up to 65535");
            }
            host
        }
    };
    if let Some(inner) = host.strip_prefix('[') {
        let address = inner.strip_suffix(']').map(str::parse::<Ipv6Addr>);
        return if matches!(address, Some(Ok(_))) {
            Ok(())
        } else {
            Err("the registry's address is malformed")
        };
    }
    let label = |label: &str| {
        let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = label.as_bytes();
        edge(bytes.first())
            && edge(bytes.last())
            && bytes.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-')
    };
    if host.split('.').all(label) { Ok(()) } else { Err("the registry's host name is malformed") }
}

/// Checks a tag.
fn check_tag(tag: &str) -> std::result::Result<(), &'static str> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let mut bytes = tag.bytes();
    let valid = tag.len() <= MAX_TAG
        && bytes.next().is_some_and(word)
        && bytes.all(|b| word(b) || matches!(b, b'.' | b'-'));
    if valid { Ok(()) } else { Err("the tag is malformed") }
}

/// Whether this is one component of a path: alphanumerics with single separators between them.
fn is_component(component: &str) -> bool {
    let alnum = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    if !bytes.first().is_some_and(alnum) || !bytes.last().is_some_and(alnum) {
        return false;
    }
    component
        .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        .all(|separator| matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|b| b == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn normalises_like_docker() {
        for (text, full, familiar) in [
            ("nginx", "docker.io/library/nginx:latest", "nginx:latest"),
            ("nginx:1.27", "docker.io/library/nginx:1.27", "nginx:1.27"),
            ("library/nginx", "docker.io/library/nginx:latest", "nginx:latest"),
            ("index.docker.io/nginx", "docker.io/library/nginx:latest", "nginx:latest"),
            ("docker.io/a/b", "docker.io/a/b:latest", "a/b:latest"),
            ("a/b:c", "docker.io/a/b:c", "a/b:c"),
            ("localhost/a", "localhost/a:latest", "localhost/a:latest"),
            ("localhost:5000/a", "localhost:5000/a:latest", "localhost:5000/a:latest"),
            ("localhost:5000", "docker.io/library/localhost:5000", "localhost:5000"),
            ("host.example:443/a/b/c:d", "host.example:443/a/b/c:d", "host.example:443/a/b/c:d"),
            ("Host/a", "Host/a:latest", "Host/a:latest"),
            ("[::1]:5000/a", "[::1]:5000/a:latest", "[::1]:5000/a:latest"),
            ("[fe80::1]/a:b", "[fe80::1]/a:b", "[fe80::1]/a:b"),
            ("a__b/c---d.e_f", "docker.io/a__b/c---d.e_f:latest", "a__b/c---d.e_f:latest"),
            ("127.0.0.1:5000/x:y", "127.0.0.1:5000/x:y", "127.0.0.1:5000/x:y"),
            ("docker.io/localhost/a", "docker.io/localhost/a:latest", "docker.io/localhost/a:latest"),
            ("docker.io/a.b/c", "docker.io/a.b/c:latest", "docker.io/a.b/c:latest"),
            ("docker.io/library/a/b", "docker.io/library/a/b:latest", "library/a/b:latest"),
        ] {
            let reference = Reference::parse(text).unwrap();
            assert_eq!(reference.full(), full, "{text}");
            assert_eq!(reference.to_string(), familiar, "{text}");
            assert_eq!(Reference::parse(full).unwrap(), reference, "{text}");
            assert_eq!(Reference::parse(familiar).unwrap(), reference, "{text}");
        }
    }

    #[test]
    fn digests_replace_or_accompany_the_tag() {
        let reference = Reference::parse(&format!("nginx@{DIGEST}")).unwrap();
        assert_eq!(reference.tag(), None);
        assert_eq!(reference.wanted(), DIGEST);
        let both = Reference::parse(&format!("nginx:1@{DIGEST}")).unwrap();
        assert_eq!(both.to_string(), format!("nginx:1@{DIGEST}"));
        assert_eq!(both.wanted(), DIGEST);
    }

    #[test]
    fn loopback_and_endpoint() {
        for (text, loopback, endpoint) in [
            ("nginx", false, "registry-1.docker.io"),
            ("localhost/a", true, "localhost"),
            ("localhost:1/a", true, "localhost:1"),
            ("127.9.9.9/a", true, "127.9.9.9"),
            ("127.0.0.1:5000/a", true, "127.0.0.1:5000"),
            ("[::1]:5000/a", true, "[::1]:5000"),
            ("[::1]/a", true, "[::1]"),
            ("128.0.0.1/a", false, "128.0.0.1"),
            ("localhost.example/a", false, "localhost.example"),
        ] {
            let reference = Reference::parse(text).unwrap();
            assert_eq!((reference.is_loopback(), reference.endpoint()), (loopback, endpoint), "{text}");
        }
    }

    #[test]
    fn refuses_what_docker_refuses() {
        let long = format!("{}/x", "a/".repeat(200));
        let tag = format!("a:{}", "t".repeat(129));
        for bad in [
            "",
            " ",
            "Nginx",
            "library/Nginx",
            "a b",
            "/a",
            "a/",
            "a//b",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "a._b",
            ".",
            "..",
            "../a",
            "a/../b",
            "a:",
            "a:b:c",
            ":a",
            "a@",
            "a@sha256:0",
            "a@md5:00",
            "@",
            "a:-b",
            "a:.b",
            "host.example:99999/a",
            "host.example:/a",
            "host..example/a",
            "-host.example/a",
            "[::1/a",
            "[zz]/a",
            "http://a/b",
            "a\nb",
            "a\0",
            "ä",
            "a:ä",
            "host.example/",
            "localhost/",
            &long,
            &tag,
            &DIGEST[7..],
            &format!("a@{DIGEST}@{DIGEST}"),
        ] {
            let error = Reference::parse(bad).expect_err(bad).one_line();
            assert!(error.starts_with("invalid reference format"), "{error}");
            assert!(!error.contains('\n') && error.len() < 400, "{error}");
        }
    }

    /// Any short text either fails or survives a round trip through both written forms.
    #[test]
    fn generated_texts_never_break_it() {
        let alphabet: Vec<char> = "ab0A.-_/:@[]é\n".chars().collect();
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut accepted = 0;
        for _ in 0..200_000 {
            let mut text = String::new();
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let mut bits = state;
            for _ in 0..(state % 12) {
                text.push(alphabet[usize::try_from(bits % 14).unwrap()]);
                bits /= 14;
            }
            if let Ok(reference) = Reference::parse(&text) {
                accepted += 1;
                assert_eq!(Reference::parse(&reference.full()).unwrap(), reference, "{text:?}");
                assert_eq!(Reference::parse(&reference.to_string()).unwrap(), reference, "{text:?}");
            }
        }
        assert!(accepted > 1000, "{accepted}");
    }
}
