//! What cannot be honoured, found before anything is made: one error for each broken rule, in one line.

use std::collections::HashSet;
use std::path::PathBuf;

use hyper_vmm_spec::{MAX_MEM_MIB, MAX_VCPUS};

use super::{ContainerConfig, LEAST_MEM_MIB, MAX_EGRESS, MountConfig, NetworkMode, RestartPolicy};
use crate::oci;
use crate::storage::RW_BYTES;

/// Longest name of a container or volume.
const MAX_NAME_BYTES: usize = 128;
/// Most mounts of host directories: one share entry each.
const MAX_MOUNTS: usize = 256;
/// Most published ports: one listener each.
const MAX_PORTS: usize = 1024;
/// Longest host name (`HOST_NAME_MAX`).
const MAX_HOSTNAME_BYTES: usize = 63;

/// Which rule a [`ContainerConfig`] breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Bad container or volume name.
    #[error(
        "invalid {what} name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed, 2 to {MAX_NAME_BYTES} characters"
    )]
    Name {
        /// `container` or `volume`.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// Neither entrypoint nor command.
    #[error("no command specified")]
    NoCommand,
    /// A string that goes to the kernel holds a NUL byte.
    #[error("{what} holds a NUL byte")]
    Nul {
        /// Which.
        what: &'static str,
    },
    /// `NAME=value` without a name.
    #[error("invalid environment variable: {0}")]
    Env(String),
    /// Too little memory.
    #[error("{0} MiB of memory is too little: give at least {LEAST_MEM_MIB} MiB")]
    MemoryTooSmall(u32),
    /// Too much memory.
    #[error("{0} MiB of memory is too much: give at most {MAX_MEM_MIB} MiB")]
    MemoryTooLarge(u32),
    /// A writable layer that cannot be made.
    #[error("a writable layer of {0} bytes cannot be: give 16 MiB to 8 TiB")]
    RwSize(u64),
    /// Soft limit above the hard one.
    #[error("the memory reservation of {reservation} MiB is above the limit of {limit} MiB")]
    Reservation {
        /// Soft limit.
        reservation: u32,
        /// Hard limit.
        limit: u32,
    },
    /// Processors out of range.
    #[error("{milli} thousandths of a CPU asked for: give 0.01 to {MAX_VCPUS}")]
    Cpus {
        /// What was asked for.
        milli: u32,
    },
    /// Bad host name.
    #[error("invalid hostname: {0:?}")]
    Hostname(String),
    /// Bad port notation.
    #[error("invalid publish opt {text:?}: {why}")]
    Port {
        /// As given.
        text: String,
        /// The reason.
        why: &'static str,
    },
    /// Ports need a network.
    #[error("ports cannot be published with --network none")]
    PortsWithoutNetwork,
    /// Bad rule of `egress=`.
    #[error("invalid egress rule {text:?}: {why}")]
    Egress {
        /// As given.
        text: String,
        /// The reason.
        why: &'static str,
    },
    /// Rules need a network.
    #[error("egress rules make no sense with --network none: nothing is reached")]
    EgressWithoutNetwork,
    /// Two wishes for one port.
    #[error("port {0} is published twice")]
    DuplicatePort(String),
    /// Bad mount notation.
    #[error("invalid volume specification {text:?}: {why}")]
    Mount {
        /// As given.
        text: String,
        /// The reason.
        why: &'static str,
    },
    /// Mount target is not absolute, or is the root.
    #[error("invalid mount target {0:?}: it must be an absolute path below /")]
    MountTarget(String),
    /// Two mounts on one target.
    #[error("duplicate mount point: {0}")]
    DuplicateMount(String),
    /// Bind source is not absolute.
    #[error("invalid bind source {0}: it must be an absolute path")]
    BindSource(PathBuf),
    /// Bind source does not exist.
    #[error("bind source path does not exist: {0}")]
    BindMissing(PathBuf),
    /// Too many of something.
    #[error("too many {what}: at most {limit}")]
    TooMany {
        /// What.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
    /// Unknown capability.
    #[error("unknown capability: {0:?}")]
    Capability(String),
    /// Bad ulimit.
    #[error("invalid ulimit {text:?}: {why}")]
    Ulimit {
        /// As given.
        text: String,
        /// The reason.
        why: &'static str,
    },
    /// Bad restart policy.
    #[error("invalid restart policy {0:?}: give no, on-failure[:n], always or unless-stopped")]
    RestartPolicy(String),
    /// `--rm` with a restart policy.
    #[error("conflicting options: cannot specify both --restart and --rm")]
    RestartWithRemove,
    /// Bad `--add-host`.
    #[error("bad format for add-host: {0:?}")]
    ExtraHost(String),
    /// Signal out of range.
    #[error("invalid signal: {0}")]
    Signal(u32),
}

/// Docker's rule for names of containers.
pub(crate) fn check_name(name: &str) -> Result<(), ConfigError> {
    named("container", name)
}

/// The same rule for volumes.
pub(crate) fn check_volume_name(name: &str) -> Result<(), ConfigError> {
    named("volume", name)
}

/// The same rule for snapshots.
pub(crate) fn check_snapshot_name(name: &str) -> Result<(), ConfigError> {
    named("snapshot", name)
}

fn named(what: &'static str, name: &str) -> Result<(), ConfigError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if first && (2..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    Err(ConfigError::Name { what, name: name.chars().take(MAX_NAME_BYTES).collect() })
}

impl ContainerConfig {
    /// Checks every rule; nothing is opened or made.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !self.name.is_empty() {
            check_name(&self.name)?;
        }
        self.check_process()?;
        self.check_resources()?;
        self.check_hostname()?;
        self.check_ports()?;
        self.check_egress()?;
        self.check_mounts()?;
        for name in self.security.cap_add.iter().chain(&self.security.cap_drop) {
            oci::capability(name).ok_or_else(|| ConfigError::Capability(name.clone()))?;
        }
        if self.auto_remove && self.restart != RestartPolicy::No {
            return Err(ConfigError::RestartWithRemove);
        }
        if self.stop_signal == 0 || self.stop_signal > 64 {
            return Err(ConfigError::Signal(self.stop_signal));
        }
        Ok(())
    }

    fn check_process(&self) -> Result<(), ConfigError> {
        let args = self.process.args();
        if args.is_empty() {
            return Err(ConfigError::NoCommand);
        }
        let nul = |texts: &[String]| texts.iter().any(|text| text.contains('\0'));
        if nul(&args) {
            return Err(ConfigError::Nul { what: "an argument" });
        }
        if nul(&self.process.env) {
            return Err(ConfigError::Nul { what: "an environment variable" });
        }
        if self.process.working_dir.contains('\0') {
            return Err(ConfigError::Nul { what: "the working directory" });
        }
        if let Some(bad) = self.process.env.iter().find(|env| env.starts_with('=') || env.is_empty()) {
            return Err(ConfigError::Env(bad.clone()));
        }
        Ok(())
    }

    fn check_resources(&self) -> Result<(), ConfigError> {
        let wish = &self.resources;
        if self.rw_size_bytes != 0 && !RW_BYTES.contains(&self.rw_size_bytes) {
            return Err(ConfigError::RwSize(self.rw_size_bytes));
        }
        if wish.mem_mib < LEAST_MEM_MIB {
            return Err(ConfigError::MemoryTooSmall(wish.mem_mib));
        }
        // The VM gets about 2 % more than the container, see `launch::memory`.
        if wish.mem_mib > MAX_MEM_MIB / 16 * 15 {
            return Err(ConfigError::MemoryTooLarge(wish.mem_mib));
        }
        if wish.mem_reservation_mib > wish.mem_mib {
            return Err(ConfigError::Reservation {
                reservation: wish.mem_reservation_mib,
                limit: wish.mem_mib,
            });
        }
        if wish.cpus_milli < 10 || wish.cpus_milli > u32::from(MAX_VCPUS) * 1000 {
            return Err(ConfigError::Cpus { milli: wish.cpus_milli });
        }
        for limit in &wish.ulimits {
            let text = || format!("{}={}:{}", limit.name, limit.soft, limit.hard);
            oci::rlimit(&limit.name)
                .ok_or_else(|| ConfigError::Ulimit { text: text(), why: "no such limit" })?;
        }
        Ok(())
    }

    fn check_hostname(&self) -> Result<(), ConfigError> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
        for name in [&self.hostname, &self.domainname] {
            if name.len() > MAX_HOSTNAME_BYTES || !name.bytes().all(plain) {
                return Err(ConfigError::Hostname(name.clone()));
            }
        }
        Ok(())
    }

    fn check_ports(&self) -> Result<(), ConfigError> {
        if self.ports.len() > MAX_PORTS {
            return Err(ConfigError::TooMany { what: "published ports", limit: MAX_PORTS });
        }
        if !self.ports.is_empty() && self.network == NetworkMode::None {
            return Err(ConfigError::PortsWithoutNetwork);
        }
        let mut seen = HashSet::new();
        for port in self.ports.iter().filter(|port| port.host_port != 0) {
            if !seen.insert((port.host_ip, port.host_port, port.protocol)) {
                return Err(ConfigError::DuplicatePort(format!("{}/{}", port.host_port, port.protocol)));
            }
        }
        Ok(())
    }

    fn check_egress(&self) -> Result<(), ConfigError> {
        let Some(rules) = &self.egress else { return Ok(()) };
        if self.network == NetworkMode::None {
            return Err(ConfigError::EgressWithoutNetwork);
        }
        if rules.len() > MAX_EGRESS {
            return Err(ConfigError::TooMany { what: "egress rules", limit: MAX_EGRESS });
        }
        Ok(())
    }

    fn check_mounts(&self) -> Result<(), ConfigError> {
        if self.mounts.len() > MAX_MOUNTS {
            return Err(ConfigError::TooMany { what: "mounts", limit: MAX_MOUNTS });
        }
        let mut seen = HashSet::new();
        for mount in &self.mounts {
            let target = mount.target();
            let trimmed = target.trim_end_matches('/');
            let climbs = trimmed.split('/').any(|part| part == "..");
            if !target.starts_with('/') || trimmed.is_empty() || target.contains('\0') || climbs {
                return Err(ConfigError::MountTarget(target.to_owned()));
            }
            if !seen.insert(trimmed.to_owned()) {
                return Err(ConfigError::DuplicateMount(target.to_owned()));
            }
            match mount {
                MountConfig::Bind { source, .. } if !source.is_absolute() => {
                    return Err(ConfigError::BindSource(source.clone()));
                }
                MountConfig::Volume { name, .. } if !name.is_empty() => check_volume_name(name)?,
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{PortConfig, Protocol, UlimitConfig};
    use super::*;

    fn good() -> ContainerConfig {
        let mut config = ContainerConfig::default();
        config.process.cmd = vec!["true".into()];
        config
    }

    fn broken(change: impl FnOnce(&mut ContainerConfig)) -> ConfigError {
        let mut config = good();
        change(&mut config);
        config.check().unwrap_err()
    }

    #[test]
    fn defaults_with_a_command_are_good() {
        assert_eq!(good().check(), Ok(()));
    }

    #[test]
    fn survives_its_file_and_lacks_nothing_old() {
        let text = serde_json::to_string(&good()).unwrap();
        assert_eq!(serde_json::from_str::<ContainerConfig>(&text).unwrap(), good());
        assert_eq!(serde_json::from_str::<ContainerConfig>("{}").unwrap(), ContainerConfig::default());
    }

    #[test]
    fn names() {
        for name in ["ab", "a.b_c-1", "0x"] {
            assert_eq!(check_name(name), Ok(()));
        }
        let long = "a".repeat(MAX_NAME_BYTES + 1);
        for name in ["", "a", "-ab", "a/b", "a b", "é1", "../x", &long] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn each_rule_has_its_error() {
        assert_eq!(broken(|c| c.process.cmd.clear()), ConfigError::NoCommand);
        assert_eq!(broken(|c| c.process.cmd.push("a\0".into())), ConfigError::Nul { what: "an argument" });
        assert_eq!(broken(|c| c.process.env.push("=x".into())), ConfigError::Env("=x".into()));
        assert_eq!(broken(|c| c.resources.mem_mib = 4), ConfigError::MemoryTooSmall(4));
        let small = broken(|c| c.rw_size_bytes = 4096);
        assert_eq!(small, ConfigError::RwSize(4096));
        assert_eq!(small.to_string(), "a writable layer of 4096 bytes cannot be: give 16 MiB to 8 TiB");
        assert_eq!(broken(|c| c.resources.mem_mib = u32::MAX), ConfigError::MemoryTooLarge(u32::MAX));
        assert_eq!(broken(|c| c.resources.cpus_milli = 0), ConfigError::Cpus { milli: 0 });
        assert_eq!(broken(|c| c.resources.cpus_milli = 32_001), ConfigError::Cpus { milli: 32_001 });
        assert_eq!(broken(|c| c.hostname = "a b".into()), ConfigError::Hostname("a b".into()));
        assert_eq!(
            broken(|c| c.security.cap_add = vec!["FLY".into()]),
            ConfigError::Capability("FLY".into())
        );
        assert_eq!(broken(|c| c.stop_signal = 65), ConfigError::Signal(65));
        let both = |c: &mut ContainerConfig| {
            c.auto_remove = true;
            c.restart = RestartPolicy::Always;
        };
        assert_eq!(broken(both), ConfigError::RestartWithRemove);
        let limit = UlimitConfig { name: "files".into(), soft: 1, hard: 1 };
        assert!(matches!(broken(|c| c.resources.ulimits = vec![limit]), ConfigError::Ulimit { .. }));
    }

    #[test]
    fn mounts_and_ports() {
        let tmpfs =
            |target: &str| MountConfig::Tmpfs { target: target.into(), size_bytes: 0, mode: 0, noexec: true };
        for bad in ["relative", "/", "//", "/a/../b", ""] {
            let error = broken(|c| c.mounts = vec![tmpfs(bad)]);
            assert!(matches!(error, ConfigError::MountTarget(_)), "{bad}");
        }
        let twice = broken(|c| c.mounts = vec![tmpfs("/a"), tmpfs("/a/")]);
        assert_eq!(twice, ConfigError::DuplicateMount("/a/".into()));
        let port = PortConfig { host_ip: None, host_port: 80, container_port: 80, protocol: Protocol::Tcp };
        let twice = broken(|c| c.ports = vec![port.clone(), port.clone()]);
        assert_eq!(twice, ConfigError::DuplicatePort("80/tcp".into()));
        let none = |c: &mut ContainerConfig| {
            c.ports = vec![port];
            c.network = NetworkMode::None;
        };
        assert_eq!(broken(none), ConfigError::PortsWithoutNetwork);
    }
}
