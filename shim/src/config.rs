//! The operator's configuration: a TOML file, the options of a runtime handler, and what a pod may change of it by annotations.
//!
//! ```text
//! /etc/hyper/containerd.toml, or ConfigPath of the handler's options   <- the handler's options   <- annotations that the file allows
//! ```
//! Nothing that names a path of the host can be set by an annotation: there is no such [`Setting`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use hyper_sandbox::{DEFAULT_MEM_MIB, LEAST_MEM_MIB};
use protobuf::CodedInputStream;
use serde::Deserialize;

/// Where the configuration is looked for when the handler's options name no file; it need not be there.
pub(crate) const DEFAULT_FILE: &str = "/etc/hyper/containerd.toml";
/// Annotations of ours begin with this.
pub(crate) const PREFIX: &str = "io.hyper.";
/// Largest configuration, bytes.
const MAX_BYTES: u64 = 256 * 1024;
/// Most vCPUs of a machine.
pub(crate) const MAX_VCPUS: u8 = 32;
/// Most memory of a machine, MiB (1 TiB less what the guest's kernel needs).
pub(crate) const MAX_MEM_MIB: u32 = 1_000_000;
/// Deadlines for a boot that make sense, ms.
const BOOT_MS: std::ops::RangeInclusive<u32> = 1_000..=600_000;
/// Levels of the log.
const LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];
/// Message of containerd for runtimes that are not runc.
const OPTIONS: &str = "runtimeoptions.v1.Options";

/// Why a configuration, or what a pod wants to change of it, cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("cannot read the configuration {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the configuration {path} is larger than {MAX_BYTES} bytes")]
    Size { path: PathBuf },
    #[error("{origin}: {message}")]
    Wrong { origin: String, message: String },
    #[error("the runtime's options cannot be decoded: {0}")]
    Options(#[from] protobuf::Error),
    #[error("annotation {PREFIX}{name}: {why}")]
    Annotation { name: String, why: String },
    #[error("{what}: at most {most} {unit}, by {key} of the runtime's configuration")]
    TooMuch { what: String, most: u32, unit: &'static str, key: &'static str },
}

/// What a pod can change, if it is allowed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Setting {
    Vcpus,
    MemoryMib,
    BootTimeoutMs,
    LogLevel,
}

impl Setting {
    const ALL: [(&'static str, Self); 4] = [
        ("vcpus", Self::Vcpus),
        ("memory_mib", Self::MemoryMib),
        ("boot_timeout_ms", Self::BootTimeoutMs),
        ("log_level", Self::LogLevel),
    ];
}

/// The configuration. Fields are as `deploy/containerd.toml` explains them; what is not given is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    vcpus: Option<u8>,
    memory_mib: Option<u32>,
    max_vcpus: Option<u8>,
    max_memory_mib: Option<u32>,
    pub(crate) boot_timeout_ms: Option<u32>,
    pub(crate) kernel: Option<PathBuf>,
    pub(crate) initramfs: Option<PathBuf>,
    pub(crate) log_level: Option<String>,
    /// Prometheus text on a socket.
    pub(crate) metrics: bool,
    /// Where spans go; counts more than the environment.
    pub(crate) otlp_endpoint: Option<String>,
    allowed_annotations: BTreeSet<Setting>,
    /// Set by an annotation, so that it counts more than what the pod's resources ask for.
    #[serde(skip)]
    own_vcpus: Option<u8>,
    #[serde(skip)]
    own_memory_mib: Option<u32>,
}

/// How large a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) vcpus: u8,
    pub(crate) mem_mib: u32,
}

/// What containerd says about the handler: the path of a file, and TOML of its own.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    path: String,
    body: Vec<u8>,
}

/// Whether these are options of a runtime that is not runc, as this one is given them.
pub(crate) fn is_ours(any: &Any) -> bool {
    any.type_url.rsplit('/').next() == Some(OPTIONS)
}

impl Options {
    /// Reads containerd's message; options of other runtimes say nothing to this one.
    fn decode(any: &Any) -> Result<Self, protobuf::Error> {
        let mut options = Self::default();
        if !is_ours(any) {
            return Ok(options);
        }
        let mut input = CodedInputStream::from_bytes(&any.value);
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            match tag {
                // config_path = 2, config_body = 3.
                0x12 => options.path = input.read_string()?,
                0x1a => options.body = input.read_bytes()?,
                other => protobuf::rt::skip_field_for_tag(other, &mut input)?,
            }
        }
        Ok(options)
    }
}

impl Config {
    /// The configuration of a handler with these options, and of a pod with these annotations.
    pub(crate) fn load(
        options: Option<&Any>,
        annotations: &BTreeMap<String, String>,
    ) -> Result<Self, ConfigError> {
        let options = options.map(Options::decode).transpose()?.unwrap_or_default();
        let (path, needed) = match options.path.as_str() {
            "" => (Path::new(DEFAULT_FILE), false),
            path => (Path::new(path), true),
        };
        let mut table = match read(path)? {
            Some(text) => parse(&path.display().to_string(), &text)?,
            None if needed => {
                return Err(ConfigError::Read { path: path.to_owned(), source: ErrorKind::NotFound.into() });
            }
            None => toml::Table::new(),
        };
        let mut origin = path.display().to_string();
        let mut own = parse(OWN, &String::from_utf8_lossy(&options.body))?;
        // containerd's own words for where the rest is.
        for key in ["ConfigPath", "TypeUrl", "ConfigBody"] {
            own.remove(key);
        }
        if !own.is_empty() {
            origin = format!("{origin} with {OWN}");
            table.extend(own);
        }
        Self::checked(&origin, table)?.with_annotations(annotations)
    }

    /// What `text` says, nothing else.
    #[cfg(test)]
    fn of(text: &str) -> Result<Self, ConfigError> {
        Self::checked("test", parse("test", text)?)
    }

    fn checked(origin: &str, table: toml::Table) -> Result<Self, ConfigError> {
        let wrong = |message: String| ConfigError::Wrong { origin: origin.to_owned(), message };
        let config: Self =
            table.try_into().map_err(|error: toml::de::Error| wrong(one_line(error.message())))?;
        if let Some(level) = &config.log_level
            && !LEVELS.contains(&level.as_str())
        {
            return Err(wrong(format!("log_level = {level:?}: one of {}", LEVELS.join(", "))));
        }
        let within = |key: &str, value: Option<u32>, range: std::ops::RangeInclusive<u32>| match value {
            Some(value) if !range.contains(&value) => {
                Err(wrong(format!("{key} = {value}: from {} to {}", range.start(), range.end())))
            }
            _ => Ok(()),
        };
        let most_vcpus = u32::from(config.max_vcpus.unwrap_or(MAX_VCPUS));
        let most_mib = config.max_memory_mib.unwrap_or(MAX_MEM_MIB);
        within("max_vcpus", config.max_vcpus.map(u32::from), 1..=u32::from(MAX_VCPUS))?;
        within("vcpus", config.vcpus.map(u32::from), 1..=most_vcpus)?;
        within("max_memory_mib", config.max_memory_mib, LEAST_MEM_MIB..=MAX_MEM_MIB)?;
        within("memory_mib", config.memory_mib, LEAST_MEM_MIB..=most_mib)?;
        within("boot_timeout_ms", config.boot_timeout_ms, BOOT_MS)?;
        if let Some(Err(why)) = config.otlp_endpoint.as_deref().map(crate::trace::check) {
            return Err(wrong(format!("otlp_endpoint = {why}")));
        }
        for (key, path) in [("kernel", &config.kernel), ("initramfs", &config.initramfs)] {
            if let Some(path) = path.as_ref().filter(|path| !path.is_absolute()) {
                return Err(wrong(format!("{key} = {:?}: an absolute path is needed", path.display())));
            }
        }
        Ok(config)
    }

    fn with_annotations(mut self, annotations: &BTreeMap<String, String>) -> Result<Self, ConfigError> {
        for (name, value) in annotations {
            let Some(name) = name.strip_prefix(PREFIX) else { continue };
            let fail = |why: String| ConfigError::Annotation { name: name.to_owned(), why };
            let Some((_, setting)) = Setting::ALL.iter().find(|(have, _)| *have == name) else {
                let known: Vec<_> = Setting::ALL.iter().map(|(name, _)| *name).collect();
                return Err(fail(format!("no such setting; there are {}", known.join(", "))));
            };
            if !self.allowed_annotations.contains(setting) {
                return Err(fail(
                    "pods may not set it: add it to allowed_annotations in the runtime's configuration"
                        .to_owned(),
                ));
            }
            let number = || value.parse::<u32>().map_err(|_| fail(format!("{value:?} is no number")));
            let mut wish = toml::Table::new();
            match setting {
                Setting::LogLevel => wish.insert(name.to_owned(), value.clone().into()),
                _ => wish.insert(name.to_owned(), i64::from(number()?).into()),
            };
            // The same limits hold as for the file.
            if let Some(most) = self.max_vcpus {
                wish.insert("max_vcpus".to_owned(), i64::from(most).into());
            }
            if let Some(most) = self.max_memory_mib {
                wish.insert("max_memory_mib".to_owned(), i64::from(most).into());
            }
            let wish = Self::checked("", wish).map_err(|error| match error {
                ConfigError::Wrong { message, .. } => fail(message),
                other => other,
            })?;
            self.own_vcpus = wish.vcpus.or(self.own_vcpus);
            self.own_memory_mib = wish.memory_mib.or(self.own_memory_mib);
            self.boot_timeout_ms = wish.boot_timeout_ms.or(self.boot_timeout_ms);
            self.log_level = wish.log_level.or(self.log_level);
        }
        Ok(self)
    }

    /// The size of a machine that must hold so many bytes beside what the guest itself needs (`guest_mib`), with a processor quota and
    /// its period; what is not asked for has the default. Too much is refused where the operator set a maximum.
    pub(crate) fn size(
        &self,
        memory: Option<i64>,
        quota: Option<(i64, i64)>,
        guest_mib: u64,
    ) -> Result<Size, ConfigError> {
        let memory = memory.and_then(|bytes| u64::try_from(bytes).ok()).filter(|bytes| *bytes > 0);
        let mem_mib = match (self.own_memory_mib, memory) {
            (Some(own), _) => own.into(),
            (None, Some(bytes)) => bytes.div_ceil(1 << 20).saturating_add(guest_mib),
            (None, None) => self.memory_mib.unwrap_or(DEFAULT_MEM_MIB).into(),
        };
        let quota =
            quota.and_then(|(quota, period)| u64::try_from(quota).ok().zip(u64::try_from(period).ok()));
        let vcpus = match (self.own_vcpus, quota.filter(|(quota, period)| *quota > 0 && *period > 0)) {
            (Some(own), _) => own.into(),
            (None, Some((quota, period))) => quota.div_ceil(period),
            (None, None) => self.vcpus.unwrap_or(1).into(),
        };
        if let Some(most) = self.max_vcpus.filter(|most| vcpus > (*most).into()) {
            let what = format!("a machine of {vcpus} vCPUs");
            return Err(ConfigError::TooMuch { what, most: most.into(), unit: "vCPUs", key: "max_vcpus" });
        }
        if let Some(most) = self.max_memory_mib.filter(|most| mem_mib > (*most).into()) {
            let what = format!("a machine of {mem_mib} MiB");
            return Err(ConfigError::TooMuch { what, most, unit: "MiB", key: "max_memory_mib" });
        }
        Ok(Size {
            vcpus: u8::try_from(vcpus.clamp(1, MAX_VCPUS.into())).unwrap_or(MAX_VCPUS),
            mem_mib: u32::try_from(mem_mib.clamp(LEAST_MEM_MIB.into(), MAX_MEM_MIB.into()))
                .unwrap_or(MAX_MEM_MIB),
        })
    }
}

/// How the options of a handler are called in messages.
const OWN: &str = "the options of the runtime handler";

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn read(path: &Path) -> Result<Option<String>, ConfigError> {
    let fail = |source| ConfigError::Read { path: path.to_owned(), source };
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        file => file.map_err(fail)?,
    };
    let mut text = String::new();
    let length = file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(fail)?;
    if u64::try_from(length).unwrap_or(u64::MAX) > MAX_BYTES {
        return Err(ConfigError::Size { path: path.to_owned() });
    }
    Ok(Some(text))
}

fn parse(origin: &str, text: &str) -> Result<toml::Table, ConfigError> {
    text.parse::<toml::Table>().map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        ConfigError::Wrong { origin: format!("{origin}, line {line}"), message: one_line(error.message()) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The file that is installed.
    const INSTALLED: &str = include_str!("../../deploy/containerd.toml");

    fn annotated(config: &str, name: &str, value: &str) -> Result<Config, ConfigError> {
        Config::of(config)?.with_annotations(&BTreeMap::from([(name.to_owned(), value.to_owned())]))
    }

    #[test]
    fn installed_file_says_what_holds_without_it() {
        assert_eq!(Config::of(INSTALLED).unwrap(), Config::default());
        // Its examples are the defaults.
        let spoken = INSTALLED.replace("\n#", "\n");
        let lines: Vec<_> =
            spoken.lines().filter(|line| !line.starts_with(' ') && line.contains(" = ")).collect();
        let config = Config::of(&lines.join("\n")).unwrap();
        assert_eq!(lines.len(), 11, "{lines:?}");
        let size = |config: &Config| config.size(None, None, 64).unwrap();
        assert_eq!(size(&config), size(&Config::default()));
        assert_eq!((config.max_vcpus, config.max_memory_mib), (Some(MAX_VCPUS), Some(MAX_MEM_MIB)));
    }

    #[test]
    fn mistakes_are_one_line() {
        for (text, words) in [
            ("cpus = 1", "unknown field `cpus`"),
            ("vcpus = 1\nvcpus = ", "line 2"),
            ("vcpus = 33", "vcpus = 33: from 1 to 32"),
            ("vcpus = 3\nmax_vcpus = 2", "vcpus = 3: from 1 to 2"),
            ("memory_mib = 1", "memory_mib = 1: from"),
            ("boot_timeout_ms = 1", "boot_timeout_ms = 1: from"),
            ("log_level = \"loud\"", "one of error, warn"),
            ("kernel = \"vmlinux\"", "absolute"),
            ("otlp_endpoint = \"https://x\"", "https is not spoken"),
            ("allowed_annotations = [\"kernel\"]", "unknown variant `kernel`"),
        ] {
            let error = Config::of(text).unwrap_err().to_string();
            assert!(error.contains(words) && error.starts_with("test") && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn pods_change_what_they_may() {
        let allowed = "allowed_annotations = [\"vcpus\", \"memory_mib\", \"log_level\"]\nmax_vcpus = 4";
        let config = annotated(allowed, "io.hyper.vcpus", "3").unwrap();
        assert_eq!(config.size(None, Some((100, 100)), 64).unwrap().vcpus, 3, "more than its resources say");
        assert_eq!(annotated(allowed, "io.hyper.log_level", "debug").unwrap().log_level.unwrap(), "debug");
        assert!(annotated("", "io.other.vcpus", "x").is_ok(), "not ours");
        for (name, value, words) in [
            ("io.hyper.vcpus", "5", "from 1 to 4"),
            ("io.hyper.vcpus", "many", "no number"),
            ("io.hyper.boot_timeout_ms", "5000", "may not set it"),
            ("io.hyper.kernel", "/x", "no such setting"),
            ("io.hyper.", "", "no such setting"),
        ] {
            let error = annotated(allowed, name, value).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains(name), "{error}");
        }
        assert!(annotated("", "io.hyper.vcpus", "1").is_err(), "nothing is allowed by default");
    }

    #[test]
    fn machines_are_as_large_as_what_runs_in_them() {
        let size = |config: &str, memory, quota| Config::of(config).unwrap().size(memory, quota, 64);
        let default = Size { vcpus: 1, mem_mib: DEFAULT_MEM_MIB };
        assert_eq!(size("", None, None).unwrap(), default);
        assert_eq!(size("", Some(-1), Some((-1, 100_000))).unwrap(), default);
        assert_eq!(size("vcpus = 2\nmemory_mib = 700", None, None).unwrap(), Size { vcpus: 2, mem_mib: 700 });
        let asked = size("vcpus = 2", Some(256 << 20), Some((250_000, 100_000))).unwrap();
        assert_eq!(asked, Size { vcpus: 3, mem_mib: 256 + 64 });
        let most = size("", Some(i64::MAX), Some((i64::MAX, 1))).unwrap();
        assert_eq!(most, Size { vcpus: MAX_VCPUS, mem_mib: MAX_MEM_MIB });
        let refused = size("max_memory_mib = 600", Some(1 << 30), None).unwrap_err().to_string();
        assert!(refused.contains("1088 MiB") && refused.contains("max_memory_mib"), "{refused}");
        assert!(size("max_vcpus = 1", None, Some((200, 100))).unwrap_err().to_string().contains("max_vcpus"));
    }

    #[test]
    fn handlers_have_options_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("own.toml");
        let mut value = vec![0x0a, 1, b'x', 0x12, u8::try_from(path.as_os_str().len()).unwrap()];
        value.extend(path.to_str().unwrap().bytes());
        let body = b"vcpus = 2\nTypeUrl = \"x\"\n";
        value.extend([0x1a, u8::try_from(body.len()).unwrap()]);
        value.extend(body);
        let any =
            |url: &str, value: &[u8]| Any { type_url: url.into(), value: value.into(), ..Any::default() };
        let none = BTreeMap::new();
        let missing = Config::load(Some(&any(OPTIONS, &value)), &none).unwrap_err().to_string();
        assert!(missing.contains("own.toml"), "{missing}");
        std::fs::write(&path, "vcpus = 1\nmemory_mib = 256").unwrap();
        let config =
            Config::load(Some(&any("type.googleapis.com/runtimeoptions.v1.Options", &value)), &none).unwrap();
        assert_eq!(config.size(None, None, 0).unwrap(), Size { vcpus: 2, mem_mib: 256 });
        assert!(matches!(
            Config::load(Some(&any(OPTIONS, &[0x12, 200])), &none),
            Err(ConfigError::Options(_))
        ));
        assert_eq!(Options::decode(&any("containerd.runc.v1.Options", &value)).unwrap(), Options::default());
        let large = dir.path().join("large");
        std::fs::write(&large, vec![b'#'; 256 * 1024 + 1]).unwrap();
        assert!(matches!(read(&large), Err(ConfigError::Size { .. })));
    }
}
