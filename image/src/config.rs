//! The image configuration: what to run and how, bounded and free of NUL bytes.
//!
//! Own types rather than oci-spec's: Docker writes `null` where the specification wants an object, and the
//! health check is Docker's alone.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;

use crate::digest::Digest;
use crate::error::{ImageError, Result, clean};
use crate::platform::Platform;

/// Largest configuration document. Real ones are below 64 KiB.
pub const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Most entries of any list (environment, arguments, labels, ports, volumes).
const MAX_ENTRIES: usize = 8192;
/// Longest single string; what Linux accepts for one argument (`MAX_ARG_STRLEN`).
const MAX_STRING: usize = 128 << 10;
/// Longest path, Linux' `PATH_MAX`.
const MAX_PATH: usize = 4096;

/// What an image says about the process to run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// `NAME=value` pairs in order.
    pub env: Vec<String>,
    /// Default arguments.
    pub cmd: Vec<String>,
    /// Program and leading arguments; empty if there is none.
    pub entrypoint: Vec<String>,
    /// Working directory inside the container; empty means `/`.
    pub working_dir: String,
    /// `user[:group]`, names or numbers; empty means root.
    pub user: String,
    /// Ports that the image listens on.
    pub exposed_ports: Vec<ExposedPort>,
    /// Absolute paths that want an anonymous volume.
    pub volumes: Vec<String>,
    /// Labels by name.
    pub labels: BTreeMap<String, String>,
    /// Signal that asks the process to end (`SIGQUIT`, `3`); `None` means `SIGTERM`.
    pub stop_signal: Option<String>,
    /// How to tell whether the container is well.
    pub healthcheck: Option<Healthcheck>,
}

/// One `EXPOSE` of an image: a range of ports, mostly of length one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExposedPort {
    /// First port.
    pub first: u16,
    /// Last port, not below `first`.
    pub last: u16,
    /// Transport.
    pub protocol: Protocol,
}

/// Transport of an exposed port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP, the default.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl fmt::Display for ExposedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        };
        if self.first == self.last {
            write!(f, "{}/{protocol}", self.first)
        } else {
            write!(f, "{}-{}/{protocol}", self.first, self.last)
        }
    }
}

/// Docker's `HEALTHCHECK`. Zero durations and retries mean Docker's defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Healthcheck {
    /// `["NONE"]`, `["CMD", argv...]` or `["CMD-SHELL", line]`.
    pub test: Vec<String>,
    /// Nanoseconds between checks.
    pub interval_ns: u64,
    /// Nanoseconds one check may take.
    pub timeout_ns: u64,
    /// Nanoseconds after the start in which failures do not count.
    pub start_period_ns: u64,
    /// Nanoseconds between checks during the start period.
    pub start_interval_ns: u64,
    /// Failures in a row that make it unhealthy.
    pub retries: u32,
}

/// A whole configuration document, checked.
#[derive(Clone, Debug)]
pub(crate) struct ConfigDocument {
    pub(crate) config: ImageConfig,
    pub(crate) platform: Platform,
    pub(crate) created: Option<String>,
    pub(crate) diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
struct RawDocument {
    #[serde(default)]
    architecture: Option<String>,
    #[serde(default)]
    os: Option<String>,
    #[serde(default)]
    variant: Option<String>,
    #[serde(default)]
    created: Option<String>,
    #[serde(default)]
    config: Option<RawConfig>,
    rootfs: RawRootFs,
}

#[derive(Deserialize)]
struct RawRootFs {
    #[serde(default)]
    diff_ids: Option<Vec<Digest>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RawConfig {
    user: Option<String>,
    exposed_ports: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    volumes: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    working_dir: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    stop_signal: Option<String>,
    healthcheck: Option<RawHealthcheck>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RawHealthcheck {
    test: Option<Vec<String>>,
    interval: Option<u64>,
    timeout: Option<u64>,
    start_period: Option<u64>,
    start_interval: Option<u64>,
    retries: Option<u32>,
}

/// Parses and checks a configuration document; `what` names it in errors.
pub(crate) fn parse_config(bytes: &[u8], what: &str) -> Result<ConfigDocument> {
    let malformed = |why: String| ImageError::Malformed { what: format!("configuration of {what}"), why };
    if bytes.len() as u64 > MAX_CONFIG_BYTES {
        return Err(ImageError::TooLarge {
            what: format!("configuration of {what}"),
            found: bytes.len() as u64,
            limit: MAX_CONFIG_BYTES,
        });
    }
    let raw: RawDocument =
        serde_json::from_slice(bytes).map_err(|error| malformed(clean(&error.to_string())))?;
    let platform = Platform::of(
        raw.os.as_deref().unwrap_or("linux"),
        raw.architecture.as_deref().unwrap_or_default(),
        raw.variant.as_deref().unwrap_or_default(),
    );
    Ok(ConfigDocument {
        config: check_config(raw.config.unwrap_or_default()).map_err(malformed)?,
        platform,
        created: raw.created.filter(|text| text.len() <= 64 && text.is_ascii()),
        diff_ids: raw.rootfs.diff_ids.unwrap_or_default(),
    })
}

/// Applies the bounds; errors say which field breaks one.
fn check_config(raw: RawConfig) -> std::result::Result<ImageConfig, String> {
    let mut exposed_ports = Vec::new();
    for text in bounded_keys("ExposedPorts", raw.exposed_ports)? {
        exposed_ports.push(parse_port(&text).ok_or_else(|| format!("exposed port \"{}\"", clean(&text)))?);
    }
    exposed_ports.sort_unstable();
    let volumes = bounded_keys("Volumes", raw.volumes)?;
    if let Some(bad) = volumes.iter().find(|path| !path.starts_with('/') || path.len() > MAX_PATH) {
        return Err(format!("volume \"{}\" is no absolute path", clean(bad)));
    }
    let labels = raw.labels.unwrap_or_default();
    if labels.len() > MAX_ENTRIES {
        return Err(format!("Labels has more than {MAX_ENTRIES} entries"));
    }
    for (name, value) in &labels {
        bounded("Labels", name.clone(), MAX_STRING)?;
        bounded("Labels", value.clone(), MAX_STRING)?;
    }
    let optional = |field, text: Option<String>, max| match text {
        Some(text) => bounded(field, text, max),
        None => Ok(String::new()),
    };
    Ok(ImageConfig {
        env: bounded_list("Env", raw.env)?,
        cmd: bounded_list("Cmd", raw.cmd)?,
        entrypoint: bounded_list("Entrypoint", raw.entrypoint)?,
        working_dir: optional("WorkingDir", raw.working_dir, MAX_PATH)?,
        user: optional("User", raw.user, MAX_PATH)?,
        exposed_ports,
        volumes,
        labels,
        stop_signal: Some(optional("StopSignal", raw.stop_signal, 64)?).filter(|signal| !signal.is_empty()),
        healthcheck: raw.healthcheck.map(check_healthcheck).transpose()?,
    })
}

/// Applies the bounds to a health check.
fn check_healthcheck(raw: RawHealthcheck) -> std::result::Result<Healthcheck, String> {
    Ok(Healthcheck {
        test: bounded_list("Healthcheck", raw.test)?,
        interval_ns: raw.interval.unwrap_or_default(),
        timeout_ns: raw.timeout.unwrap_or_default(),
        start_period_ns: raw.start_period.unwrap_or_default(),
        start_interval_ns: raw.start_interval.unwrap_or_default(),
        retries: raw.retries.unwrap_or_default(),
    })
}

/// One string within its bound and without NUL bytes.
fn bounded(field: &str, text: String, max: usize) -> std::result::Result<String, String> {
    if text.len() > max {
        return Err(format!("{field} has a string of {} bytes, the limit is {max}", text.len()));
    }
    if text.contains('\0') {
        return Err(format!("{field} contains a NUL byte"));
    }
    Ok(text)
}

/// A list within its bounds.
fn bounded_list(field: &str, list: Option<Vec<String>>) -> std::result::Result<Vec<String>, String> {
    let list = list.unwrap_or_default();
    if list.len() > MAX_ENTRIES {
        return Err(format!("{field} has more than {MAX_ENTRIES} entries"));
    }
    list.into_iter().map(|text| bounded(field, text, MAX_STRING)).collect()
}

/// The keys of one of Go's sets (`{"80/tcp": {}}`) within their bounds.
fn bounded_keys(
    field: &str,
    set: Option<BTreeMap<String, serde::de::IgnoredAny>>,
) -> std::result::Result<Vec<String>, String> {
    bounded_list(field, Some(set.unwrap_or_default().into_keys().collect()))
}

/// Parses `80`, `80/udp` or `8000-8010/tcp`.
fn parse_port(text: &str) -> Option<ExposedPort> {
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol.to_ascii_lowercase().as_str() {
        "tcp" | "" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        _ => return None,
    };
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (first > 0 && first <= last).then_some(ExposedPort { first, last, protocol })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_real_configuration() {
        let json = br#"{"architecture":"amd64","os":"linux","created":"2024-05-01T10:00:00.5Z","container":"x",
            "config":{"Hostname":"","User":"redis:redis","ExposedPorts":{"6379/tcp":{},"53/udp":null,"8000-8010":{}},
            "Env":["PATH=/bin","A=b=c"],"Cmd":["redis-server"],"Entrypoint":["docker-entrypoint.sh"],
            "Volumes":{"/data":{}},"WorkingDir":"/data","Labels":null,"StopSignal":"SIGQUIT","OnBuild":null,
            "Healthcheck":{"Test":["CMD-SHELL","true"],"Interval":1000000000,"Retries":3}},
            "rootfs":{"type":"layers","diff_ids":[
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]},"history":null}"#;
        let document = parse_config(json, "x").unwrap();
        assert_eq!(document.platform, Platform::default());
        assert_eq!(document.diff_ids.len(), 1);
        let config = document.config;
        let ports: Vec<String> = config.exposed_ports.iter().map(ToString::to_string).collect();
        assert_eq!(ports, ["53/udp", "6379/tcp", "8000-8010/tcp"]);
        assert_eq!(config.volumes, ["/data"]);
        assert_eq!(config.user, "redis:redis");
        assert_eq!(config.stop_signal.as_deref(), Some("SIGQUIT"));
        assert_eq!(config.healthcheck.unwrap().interval_ns, 1_000_000_000);
    }

    #[test]
    fn nulls_everywhere_are_fine() {
        let json = br#"{"config":{"User":null,"ExposedPorts":null,"Env":null,"Cmd":null,"Entrypoint":null,
            "Volumes":null,"WorkingDir":null,"Labels":null,"StopSignal":null,"Healthcheck":null},"rootfs":{"diff_ids":null}}"#;
        assert_eq!(parse_config(json, "x").unwrap().config, ImageConfig::default());
        assert!(parse_config(br#"{"config":null,"rootfs":{}}"#, "x").is_ok());
    }

    #[test]
    fn bounds_hold() {
        let wrap = |field: &str, value: &str| format!(r#"{{"rootfs":{{}},"config":{{"{field}":{value}}}}}"#);
        let many = format!("[{}\"\"]", "\"\",".repeat(MAX_ENTRIES));
        let long = format!("[\"{}\"]", "x".repeat(MAX_STRING + 1));
        for (field, value) in [
            ("Env", many.as_str()),
            ("Cmd", long.as_str()),
            ("Env", r#"["a\u0000b"]"#),
            ("User", r#""\u0000""#),
            ("ExposedPorts", r#"{"70000/tcp":{}}"#),
            ("ExposedPorts", r#"{"0/tcp":{}}"#),
            ("ExposedPorts", r#"{"9-8/tcp":{}}"#),
            ("ExposedPorts", r#"{"80/icmp":{}}"#),
            ("Volumes", r#"{"data":{}}"#),
            ("Healthcheck", r#"{"Interval":-1}"#),
            ("Env", r#""A=b""#),
        ] {
            let error = parse_config(wrap(field, value).as_bytes(), "x").expect_err(field).one_line();
            assert!(error.starts_with("configuration of x is malformed: ") && error.len() < 400, "{error}");
        }
        let big = vec![b' '; usize::try_from(MAX_CONFIG_BYTES).unwrap() + 1];
        assert!(matches!(parse_config(&big, "x"), Err(ImageError::TooLarge { .. })));
        assert!(parse_config(br#"{"rootfs":{"diff_ids":["sha256:../../x"]}}"#, "x").is_err());
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(parse_config(deep.as_bytes(), "x").is_err());
    }
}
