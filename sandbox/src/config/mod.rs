//! What a container is to be ([`ContainerConfig`]): the user's wish, persisted as `containers/<id>/config.json`.
//!
//! Files: `parse` (Docker's notations for ports, mounts, limits), `egress` (where it may connect to), `check` (what cannot be honoured,
//! one error each).

mod check;
mod egress;
mod parse;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use check::ConfigError;
pub(crate) use check::{check_name, check_snapshot_name, check_volume_name};
pub use egress::{EgressRule, EgressTarget};
pub(crate) use egress::{MAX_EGRESS, mask};

/// Memory of a container without `-m`, MiB.
pub const DEFAULT_MEM_MIB: u32 = 512;
/// Least `-m`, MiB: kernel, agent and a small process fit.
pub const LEAST_MEM_MIB: u32 = 32;
/// `/dev/shm` without `--shm-size`, bytes (Docker's).
pub const DEFAULT_SHM_BYTES: u64 = 64 << 20;
/// Seconds between the stop signal and SIGKILL (Docker's).
pub const DEFAULT_STOP_TIMEOUT_S: u32 = 10;

/// Everything that a user can wish of a container. Unknown fields of a newer version are ignored, missing ones get defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerConfig {
    /// Name, `[a-zA-Z0-9][a-zA-Z0-9_.-]+`; empty: one is made up at creation.
    pub name: String,
    /// The image.
    pub image: ImageConfig,
    /// The first process.
    pub process: ProcessConfig,
    /// Host name; empty: the first 12 characters of the id.
    pub hostname: String,
    /// Domain name; may be empty.
    pub domainname: String,
    /// Limits.
    pub resources: ResourceConfig,
    /// How it is connected.
    pub network: NetworkMode,
    /// Where it may connect to; `None`: [`EgressTarget::Any`]. Only with [`NetworkMode::Bridge`].
    pub egress: Option<Vec<EgressRule>>,
    /// Published ports; only with [`NetworkMode::Bridge`].
    pub ports: Vec<PortConfig>,
    /// Name servers to forward to; empty: the host's.
    pub dns: Vec<IpAddr>,
    /// Search domains; empty: the host's; a lone "." : none.
    pub dns_search: Vec<String>,
    /// Resolver options.
    pub dns_options: Vec<String>,
    /// Lines added to `/etc/hosts`.
    pub extra_hosts: Vec<ExtraHost>,
    /// What is mounted into it, in order.
    pub mounts: Vec<MountConfig>,
    /// Mount the root read-only.
    pub read_only_rootfs: bool,
    /// Capabilities, privilege, system calls.
    pub security: SecurityConfig,
    /// Namespaced kernel parameters.
    pub sysctls: BTreeMap<String, String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Run an init of ours as PID 1 that reaps and forwards signals.
    pub init: bool,
    /// What happens when the process ends.
    pub restart: RestartPolicy,
    /// Signal that `stop` sends, such as 15.
    pub stop_signal: u32,
    /// Seconds that `stop` waits before SIGKILL.
    pub stop_timeout_s: u32,
    /// Remove the container, with its anonymous volumes, when it has ended.
    pub auto_remove: bool,
    /// Size of the writable layer, bytes; 0: `HYPER_RW_SIZE` or 10 GiB. Sparse.
    pub rw_size_bytes: u64,
    /// Extra kernel command line words, for debugging.
    pub kernel_args: Vec<String>,
}

impl Default for ContainerConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            image: ImageConfig::default(),
            process: ProcessConfig::default(),
            hostname: String::new(),
            domainname: String::new(),
            resources: ResourceConfig::default(),
            network: NetworkMode::Bridge,
            egress: None,
            ports: Vec::new(),
            dns: Vec::new(),
            dns_search: Vec::new(),
            dns_options: Vec::new(),
            extra_hosts: Vec::new(),
            mounts: Vec::new(),
            read_only_rootfs: false,
            security: SecurityConfig::default(),
            sysctls: BTreeMap::new(),
            labels: BTreeMap::new(),
            init: false,
            restart: RestartPolicy::No,
            stop_signal: 15,
            stop_timeout_s: DEFAULT_STOP_TIMEOUT_S,
            auto_remove: false,
            rw_size_bytes: 0,
            kernel_args: Vec::new(),
        }
    }
}

/// Which image a container is made of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// As the user named it, such as `busybox:latest`.
    pub reference: String,
    /// Image id, `sha256:…`.
    pub id: String,
    /// The unpacked image: a read-only EROFS file.
    pub disk: PathBuf,
}

/// The first process of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessConfig {
    /// What is put before `cmd`; may be empty.
    pub entrypoint: Vec<String>,
    /// The command or the entrypoint's arguments; may be empty.
    pub cmd: Vec<String>,
    /// `NAME=value`, image's first, then the user's; of two with one name the later wins.
    pub env: Vec<String>,
    /// Working directory; empty: `/`. Made when it is missing.
    pub working_dir: String,
    /// `uid|name[:gid|group]`; empty: root. Resolved in the image.
    pub user: String,
    /// More groups, by number or name.
    pub additional_groups: Vec<String>,
    /// Give it a terminal (`-t`).
    pub terminal: bool,
    /// Keep standard input open (`-i`); else it is /dev/null.
    pub open_stdin: bool,
    /// Close standard input when the first client that was attached to it goes (Docker's StdinOnce, set by a foreground `run -i`).
    pub stdin_once: bool,
}

impl ProcessConfig {
    /// Entrypoint and command, one after the other.
    #[must_use]
    pub fn args(&self) -> Vec<String> {
        self.entrypoint.iter().chain(&self.cmd).cloned().collect()
    }
}

/// Limits of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ResourceConfig {
    /// Memory, MiB: the VM's and the cgroup's.
    pub mem_mib: u32,
    /// Soft limit, MiB; 0: none.
    pub mem_reservation_mib: u32,
    /// Processors in thousandths; the VM gets the next whole number of vCPUs.
    pub cpus_milli: u32,
    /// Relative weight (Docker's --cpu-shares, 2 to 262144); 0: none.
    pub cpu_shares: u32,
    /// Most processes; 0: no limit.
    pub pids_limit: u32,
    /// Limits per process.
    pub ulimits: Vec<UlimitConfig>,
    /// Size of /dev/shm, bytes.
    pub shm_size_bytes: u64,
    /// How willingly the guest's kernel kills it, -1000 to 1000.
    pub oom_score_adj: i32,
}

impl Default for ResourceConfig {
    fn default() -> Self {
        Self {
            mem_mib: DEFAULT_MEM_MIB,
            mem_reservation_mib: 0,
            cpus_milli: 1000,
            cpu_shares: 0,
            pids_limit: 0,
            ulimits: Vec::new(),
            shm_size_bytes: DEFAULT_SHM_BYTES,
            oom_score_adj: 0,
        }
    }
}

impl ResourceConfig {
    /// vCPUs of the VM: `cpus_milli` rounded up.
    #[must_use]
    pub fn vcpus(&self) -> u8 {
        u8::try_from(self.cpus_milli.div_ceil(1000).max(1)).unwrap_or(u8::MAX)
    }
}

/// What `update` changes; `None` leaves as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ResourceUpdate {
    /// Memory limit, MiB; on a running container not above what its VM has.
    pub mem_mib: Option<u32>,
    /// Soft limit, MiB.
    pub mem_reservation_mib: Option<u32>,
    /// Processors in thousandths; on a running container not above its vCPUs.
    pub cpus_milli: Option<u32>,
    /// Relative weight.
    pub cpu_shares: Option<u32>,
    /// Most processes; 0: no limit.
    pub pids_limit: Option<u32>,
    /// Restart policy.
    pub restart: Option<RestartPolicy>,
}

/// One `--ulimit`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UlimitConfig {
    /// Docker's name, such as `nofile`.
    pub name: String,
    /// Soft limit; -1: none.
    pub soft: i64,
    /// Hard limit; -1: none.
    pub hard: i64,
}

/// How a container is connected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkMode {
    /// Loopback only.
    None,
    /// An address on the host's bridge, with NAT.
    #[default]
    Bridge,
}

/// Transport protocol of a published port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// One published port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortConfig {
    /// Address to listen on; `None`: all, IPv4 and IPv6.
    pub host_ip: Option<IpAddr>,
    /// Port to listen on; 0: any free one.
    pub host_port: u16,
    /// Port in the container, 1 to 65535.
    pub container_port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

/// One line of `/etc/hosts`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtraHost {
    /// The name.
    pub name: String,
    /// Its address; `None`: `host-gateway`, the host as the container sees it.
    pub address: Option<IpAddr>,
}

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum MountConfig {
    /// A directory or file of the host.
    Bind {
        /// Absolute path on the host; made as a directory when missing and `create` is set.
        source: PathBuf,
        /// Absolute path in the container.
        target: String,
        /// Refuse writes.
        read_only: bool,
        /// Make a missing source (`-v` does, `--mount` does not).
        create: bool,
    },
    /// A named volume.
    Volume {
        /// Name; empty: an anonymous one is made at creation of the container.
        name: String,
        /// Goes with the container.
        anonymous: bool,
        /// Absolute path in the container.
        target: String,
        /// Refuse writes.
        read_only: bool,
    },
    /// Memory.
    Tmpfs {
        /// Absolute path in the container.
        target: String,
        /// Bytes; 0: half of memory.
        size_bytes: u64,
        /// Permissions; 0: 01777.
        mode: u32,
        /// Refuse execution; Docker's --tmpfs does.
        noexec: bool,
    },
}

impl MountConfig {
    /// Where it appears in the container.
    #[must_use]
    pub fn target(&self) -> &str {
        match self {
            Self::Bind { target, .. } | Self::Volume { target, .. } | Self::Tmpfs { target, .. } => target,
        }
    }
}

/// Capabilities, privilege, system calls.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SecurityConfig {
    /// Capabilities to add, with or without `CAP_`, or `ALL`.
    pub cap_add: Vec<String>,
    /// Capabilities to drop, or `ALL`.
    pub cap_drop: Vec<String>,
    /// Everything, within the VM.
    pub privileged: bool,
    /// No default system call filter.
    pub seccomp_unconfined: bool,
    /// Set-user-id programs gain nothing.
    pub no_new_privileges: bool,
}

/// What happens when the process has ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Nothing.
    #[default]
    No,
    /// Start again unless it ended with 0.
    OnFailure {
        /// At most so often; 0: without end.
        max_retries: u32,
    },
    /// Start again always, unless stopped by the user.
    Always,
    /// As `always`; differs only in whether a stopped container comes back after a reboot.
    UnlessStopped,
}

impl ContainerConfig {
    pub(crate) fn apply(&mut self, update: &ResourceUpdate) {
        let limits = &mut self.resources;
        limits.mem_mib = update.mem_mib.unwrap_or(limits.mem_mib);
        limits.mem_reservation_mib = update.mem_reservation_mib.unwrap_or(limits.mem_reservation_mib);
        limits.cpus_milli = update.cpus_milli.unwrap_or(limits.cpus_milli);
        limits.cpu_shares = update.cpu_shares.unwrap_or(limits.cpu_shares);
        limits.pids_limit = update.pids_limit.unwrap_or(limits.pids_limit);
        self.restart = update.restart.unwrap_or(self.restart);
    }

    /// Host name for a container of this id.
    pub(crate) fn hostname_for<'a>(&'a self, id: &'a str) -> &'a str {
        if self.hostname.is_empty() { id.get(..12).unwrap_or(id) } else { &self.hostname }
    }
}
