//! The part of the OCI runtime specification that the agent honours, and its bounds.
//!
//! Unknown fields are ignored, as the specification demands; what is known is checked here, once.

use serde::{Deserialize, Serialize};

use crate::error::AgentError;

/// Most arguments, environment entries, mounts and the like in one specification.
pub(crate) const MAX_ENTRIES: usize = 4096;
/// Longest path in a specification, bytes (`PATH_MAX`).
pub(crate) const MAX_PATH_BYTES: usize = 4096;

/// A container.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Spec {
    pub process: ProcessSpec,
    pub root: RootSpec,
    pub hostname: String,
    pub domainname: String,
    pub mounts: Vec<MountSpec>,
    pub annotations: std::collections::BTreeMap<String, String>,
    pub linux: LinuxSpec,
}

/// A process.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ProcessSpec {
    pub user: UserSpec,
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: String,
    pub capabilities: Option<CapabilitySpec>,
    pub rlimits: Option<Vec<RlimitSpec>>,
    pub no_new_privileges: Option<bool>,
    pub oom_score_adj: Option<i32>,
}

/// A user by number.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct UserSpec {
    pub uid: u32,
    pub gid: u32,
    pub umask: Option<u32>,
    pub additional_gids: Vec<u32>,
}

/// The five sets, by name.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct CapabilitySpec {
    pub bounding: Vec<String>,
    pub effective: Vec<String>,
    pub permitted: Vec<String>,
    pub inheritable: Vec<String>,
    pub ambient: Vec<String>,
}

/// One resource limit.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RlimitSpec {
    /// Such as `RLIMIT_NOFILE`.
    #[serde(rename = "type")]
    pub kind: String,
    pub soft: u64,
    pub hard: u64,
}

/// The root's attributes; its path is not used.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RootSpec {
    pub readonly: bool,
}

/// A mount of a kernel file system.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct MountSpec {
    pub destination: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub source: String,
    pub options: Vec<String>,
}

/// The Linux part.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct LinuxSpec {
    pub sysctl: std::collections::BTreeMap<String, String>,
    pub resources: ResourceSpec,
    pub devices: Vec<DeviceSpec>,
    pub seccomp: Option<SeccompSpec>,
    pub masked_paths: Vec<String>,
    pub readonly_paths: Vec<String>,
}

/// A device node to make.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct DeviceSpec {
    pub path: String,
    /// `c`, `b`, `u` or `p`.
    #[serde(rename = "type")]
    pub kind: String,
    pub major: i64,
    pub minor: i64,
    pub file_mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

/// Limits.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ResourceSpec {
    pub devices: Option<Vec<DeviceRule>>,
    pub memory: MemorySpec,
    pub cpu: CpuSpec,
    pub pids: PidsSpec,
    #[serde(rename = "blockIO")]
    pub block_io: BlockIoSpec,
    pub hugepage_limits: Vec<HugepageSpec>,
    pub unified: std::collections::BTreeMap<String, String>,
}

/// One line of the device list; the last one that matches decides.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct DeviceRule {
    pub allow: bool,
    /// `a`, `b`, `c` or empty for all.
    #[serde(rename = "type")]
    pub kind: String,
    /// `None` or negative: any.
    pub major: Option<i64>,
    pub minor: Option<i64>,
    /// Some of `rwm`; empty: all.
    pub access: String,
}

/// Memory, bytes; -1 is unlimited.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct MemorySpec {
    pub limit: Option<i64>,
    pub reservation: Option<i64>,
    /// Memory and swap together, as in cgroup v1.
    pub swap: Option<i64>,
}

/// Processor time.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct CpuSpec {
    /// 2 to 262144, as in cgroup v1.
    pub shares: Option<u64>,
    /// Microseconds in a period; negative is unlimited.
    pub quota: Option<i64>,
    pub period: Option<u64>,
    pub cpus: String,
    pub mems: String,
    pub idle: Option<i64>,
}

/// Number of tasks.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct PidsSpec {
    /// 0 and below: unlimited.
    pub limit: Option<i64>,
}

/// Block I/O.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct BlockIoSpec {
    /// 10 to 1000, as in cgroup v1.
    pub weight: Option<u16>,
    pub throttle_read_bps_device: Vec<ThrottleSpec>,
    pub throttle_write_bps_device: Vec<ThrottleSpec>,
    #[serde(rename = "throttleReadIOPSDevice")]
    pub throttle_read_iops_device: Vec<ThrottleSpec>,
    #[serde(rename = "throttleWriteIOPSDevice")]
    pub throttle_write_iops_device: Vec<ThrottleSpec>,
}

/// A rate on one device.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ThrottleSpec {
    pub major: i64,
    pub minor: i64,
    pub rate: u64,
}

/// A limit on huge pages.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct HugepageSpec {
    /// Such as `2MB`.
    pub page_size: String,
    pub limit: u64,
}

/// A seccomp profile.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct SeccompSpec {
    pub default_action: String,
    pub default_errno_ret: Option<u32>,
    pub architectures: Vec<String>,
    pub flags: Vec<String>,
    pub syscalls: Vec<SyscallSpec>,
}

/// One rule of a seccomp profile.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct SyscallSpec {
    pub names: Vec<String>,
    pub action: String,
    pub errno_ret: Option<u32>,
    pub args: Vec<SyscallArgSpec>,
}

/// One condition on an argument.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct SyscallArgSpec {
    pub index: u32,
    pub value: u64,
    pub value_two: u64,
    pub op: String,
}

impl Spec {
    /// Reads and checks a specification.
    ///
    /// # Errors
    /// Not JSON, too large, or out of bounds.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, AgentError> {
        let spec: Self = from_json(json, "oci_spec")?;
        spec.process.check()?;
        bound("mounts", spec.mounts.len())?;
        bound("linux.sysctl", spec.linux.sysctl.len())?;
        bound("linux.devices", spec.linux.devices.len())?;
        bound("linux.maskedPaths", spec.linux.masked_paths.len())?;
        bound("linux.readonlyPaths", spec.linux.readonly_paths.len())?;
        spec.linux.resources.check()?;
        for path in spec.linux.masked_paths.iter().chain(&spec.linux.readonly_paths) {
            absolute("masked or read-only path", path)?;
        }
        for mount in &spec.mounts {
            absolute("mount destination", &mount.destination)?;
            bound("mount options", mount.options.len())?;
        }
        for device in &spec.linux.devices {
            absolute("device path", &device.path)?;
        }
        no_nul("hostname", &spec.hostname)?;
        Ok(spec)
    }
}

impl ProcessSpec {
    /// Reads and checks a process object.
    ///
    /// # Errors
    /// Not JSON, too large, or out of bounds.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, AgentError> {
        let process: Self = from_json(json, "oci_process")?;
        process.check()?;
        Ok(process)
    }

    fn check(&self) -> Result<(), AgentError> {
        if self.args.is_empty() {
            return Err(AgentError::invalid("process.args is empty: no command"));
        }
        bound("process.args", self.args.len())?;
        bound("process.env", self.env.len())?;
        bound("process.rlimits", self.rlimits.as_ref().map_or(0, Vec::len))?;
        bound("process.user.additionalGids", self.user.additional_gids.len())?;
        for text in self.args.iter().chain(&self.env) {
            no_nul("process", text)?;
        }
        if !self.cwd.is_empty() {
            absolute("process.cwd", &self.cwd)?;
        }
        Ok(())
    }
}

impl ResourceSpec {
    /// Reads and checks a resources object.
    ///
    /// # Errors
    /// Not JSON, too large, or out of bounds.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, AgentError> {
        let resources: Self = from_json(json, "oci_resources")?;
        resources.check()?;
        Ok(resources)
    }

    fn check(&self) -> Result<(), AgentError> {
        bound("linux.resources.devices", self.devices.as_ref().map_or(0, Vec::len))?;
        bound("linux.resources.unified", self.unified.len())?;
        bound("linux.resources.hugepageLimits", self.hugepage_limits.len())
    }
}

fn from_json<'a, T: Deserialize<'a>>(json: &'a [u8], what: &str) -> Result<T, AgentError> {
    if json.len() > hyper_protocol::MAX_OCI_SPEC_BYTES {
        return Err(AgentError::limit(&format!("{what} bytes"), hyper_protocol::MAX_OCI_SPEC_BYTES));
    }
    serde_json::from_slice(json).map_err(|e| AgentError::invalid(format!("{what}: {e}")))
}

fn bound(what: &str, len: usize) -> Result<(), AgentError> {
    if len > MAX_ENTRIES { Err(AgentError::limit(what, MAX_ENTRIES)) } else { Ok(()) }
}

fn no_nul(what: &str, text: &str) -> Result<(), AgentError> {
    if text.contains('\0') { Err(AgentError::invalid(format!("{what} holds a NUL byte"))) } else { Ok(()) }
}

/// Checks that a path is absolute, without NUL, and not too long.
///
/// # Errors
/// It is not; `what` names it.
pub(crate) fn absolute(what: &str, path: &str) -> Result<(), AgentError> {
    no_nul(what, path)?;
    if !path.starts_with('/') {
        return Err(AgentError::invalid(format!("{what} {path:?} is not absolute")));
    }
    if path.len() >= MAX_PATH_BYTES {
        return Err(AgentError::limit(&format!("{what}: bytes of a path"), MAX_PATH_BYTES));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docker_shape_is_read() {
        let json = br#"{"ociVersion":"1.2.0","process":{"terminal":true,"user":{"uid":5,"gid":6,"additionalGids":[7]},
            "args":["sh"],"env":["A=b"],"cwd":"/","capabilities":{"bounding":["CAP_CHOWN"]},"noNewPrivileges":true,
            "rlimits":[{"type":"RLIMIT_NOFILE","soft":1,"hard":2}]},"root":{"path":"x","readonly":true},
            "mounts":[{"destination":"/proc","type":"proc","source":"proc","options":["nosuid"]}],
            "linux":{"resources":{"cpu":{"quota":150000,"period":100000},"memory":{"limit":64},"pids":{"limit":10},
            "devices":[{"allow":false,"access":"rwm"}],"blockIO":{"weight":100}},
            "seccomp":{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW",
            "args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"}]}]},"maskedPaths":["/proc/kcore"]}}"#;
        let spec = Spec::parse(json).unwrap();
        assert_eq!(spec.process.user.additional_gids, [7]);
        assert!(spec.root.readonly);
        assert_eq!(spec.linux.resources.cpu.quota, Some(150_000));
        assert_eq!(spec.linux.resources.block_io.weight, Some(100));
        assert_eq!(spec.linux.seccomp.unwrap().syscalls[0].args[0].op, "SCMP_CMP_EQ");
        assert_eq!(spec.process.no_new_privileges, Some(true));
    }

    #[test]
    fn bad_shapes_are_refused() {
        for bad in [
            &br#"{"process":{"args":[]}}"#[..],
            br#"{"process":{"args":["a\u0000b"]}}"#,
            br#"{"process":{"args":["a"],"cwd":"relative"}}"#,
            br#"{"process":{"args":["a"]},"mounts":[{"destination":"x"}]}"#,
            b"[]",
            b"",
        ] {
            assert!(Spec::parse(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
        let large = vec![b' '; hyper_protocol::MAX_OCI_SPEC_BYTES + 1];
        assert!(Spec::parse(&large).is_err());
    }
}
