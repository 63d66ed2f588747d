//! What a process loses before it runs: capabilities, identity, limits, system calls.

use rustix::process::{Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::user::Identity;
use crate::error::{AgentError, Tried};
use crate::seccomp::Program;
use crate::spec::{CapabilitySpec, RlimitSpec};

/// Names in the order of their numbers, without `CAP_`.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The five sets as bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Capabilities {
    pub bounding: u64,
    pub effective: u64,
    pub permitted: u64,
    pub inheritable: u64,
    pub ambient: u64,
    /// All that this kernel has.
    pub known: u64,
}

impl Capabilities {
    /// Reads names; `last` is the kernel's highest number.
    ///
    /// # Errors
    /// A name that this kernel does not have.
    pub(crate) fn parse(spec: &CapabilitySpec, last: u32) -> Result<Self, AgentError> {
        let known = if last >= 63 { u64::MAX } else { (1_u64 << last.saturating_add(1)).wrapping_sub(1) };
        let set = |names: &[String]| {
            names.iter().try_fold(0, |bits, name| {
                let short = name.strip_prefix("CAP_").unwrap_or(name);
                let position = NAMES.iter().position(|n| *n == short);
                let bit = position.and_then(|p| u32::try_from(p).ok()).filter(|p| *p <= last);
                let bit = bit.and_then(|p| 1_u64.checked_shl(p));
                bit.map(|bit| bits | bit)
                    .ok_or_else(|| AgentError::invalid(format!("this kernel has no capability {name:?}")))
            })
        };
        Ok(Self {
            bounding: set(&spec.bounding)?,
            effective: set(&spec.effective)?,
            permitted: set(&spec.permitted)?,
            inheritable: set(&spec.inheritable)?,
            ambient: set(&spec.ambient)?,
            known,
        })
    }

    fn drop_bounding(&self) -> Result<(), rustix::io::Errno> {
        for bit in bits(self.known & !self.bounding) {
            rustix::thread::remove_capability_from_bounding_set(bit)?;
        }
        Ok(())
    }

    fn apply(&self) -> Result<(), rustix::io::Errno> {
        rustix::thread::set_capabilities(
            None,
            CapabilitySets {
                effective: CapabilitySet::from_bits_retain(self.effective),
                permitted: CapabilitySet::from_bits_retain(self.permitted),
                inheritable: CapabilitySet::from_bits_retain(self.inheritable),
            },
        )?;
        rustix::thread::clear_ambient_capability_set()?;
        for bit in bits(self.ambient & self.permitted & self.inheritable) {
            rustix::thread::configure_capability_in_ambient_set(bit, true)?;
        }
        Ok(())
    }
}

fn bits(set: u64) -> impl Iterator<Item = CapabilitySet> {
    (0..64).map(|n| 1_u64 << n).filter(move |bit| set & bit != 0).map(CapabilitySet::from_bits_retain)
}

/// The kernel's highest capability number. Needs the agent's own /proc.
///
/// # Errors
/// It cannot be read.
pub(crate) fn last_capability() -> Result<u32, AgentError> {
    let path = "/proc/sys/kernel/cap_last_cap";
    let text = std::fs::read_to_string(path).tried(|| format!("read {path}"))?;
    text.trim().parse().map_err(|_| AgentError::invalid(format!("{path} holds {text:?}")))
}

/// Sets resource limits.
///
/// # Errors
/// A kind that does not exist, or what the kernel answers.
pub(crate) fn set_rlimits(limits: &[RlimitSpec]) -> Result<(), AgentError> {
    for limit in limits {
        let resource = resource(&limit.kind)?;
        let value = |v: u64| if v == u64::MAX { None } else { Some(v) };
        rustix::process::setrlimit(
            resource,
            Rlimit { current: value(limit.soft), maximum: value(limit.hard) },
        )
        .tried(|| format!("set {} to {}:{}", limit.kind, limit.soft, limit.hard))?;
    }
    Ok(())
}

fn resource(kind: &str) -> Result<Resource, AgentError> {
    Ok(match kind {
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_STACK" => Resource::Stack,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        other => return Err(AgentError::invalid(format!("there is no resource limit {other:?}"))),
    })
}

/// Becomes the user with these capabilities, and installs the filter.
///
/// A filter needs privilege or `no_new_privs`: without the latter it goes in first, and has to allow what follows, as everywhere.
///
/// # Errors
/// The step that failed.
pub(crate) fn become_user(
    identity: &Identity,
    capabilities: &Capabilities,
    no_new_privileges: bool,
    seccomp: Option<&Program>,
) -> Result<(), AgentError> {
    if let Some(program) = seccomp.filter(|_| !no_new_privileges) {
        program.install().tried(|| "install the seccomp filter".to_owned())?;
    }
    capabilities.drop_bounding().tried(|| "drop bounding capabilities".to_owned())?;
    rustix::thread::set_keep_capabilities(true).tried(|| "keep capabilities".to_owned())?;
    let groups: Vec<_> = identity.groups.iter().map(|g| rustix::fs::Gid::from_raw(*g)).collect();
    rustix::thread::set_thread_groups(&groups).tried(|| "set supplementary groups".to_owned())?;
    let gid = rustix::fs::Gid::from_raw(identity.gid);
    rustix::thread::set_thread_res_gid(gid, gid, gid).tried(|| format!("set group {}", identity.gid))?;
    let uid = rustix::fs::Uid::from_raw(identity.uid);
    rustix::thread::set_thread_res_uid(uid, uid, uid).tried(|| format!("set user {}", identity.uid))?;
    rustix::thread::set_keep_capabilities(false).tried(|| "stop keeping capabilities".to_owned())?;
    capabilities.apply().tried(|| "set capabilities".to_owned())?;
    if no_new_privileges {
        rustix::thread::set_no_new_privs(true).tried(|| "set no_new_privs".to_owned())?;
        if let Some(program) = seccomp {
            program.install().tried(|| "install the seccomp filter".to_owned())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(names: &[&str]) -> CapabilitySpec {
        CapabilitySpec {
            bounding: names.iter().map(|n| (*n).to_owned()).collect(),
            ..CapabilitySpec::default()
        }
    }

    #[test]
    fn names_are_the_kernels_numbers() {
        let parsed =
            Capabilities::parse(&spec(&["CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE"]), 40)
                .unwrap();
        assert_eq!(parsed.bounding, 1 | 1 << 21 | 1 << 40);
        assert_eq!(parsed.known, (1 << 41) - 1);
        assert_eq!(parsed.effective, 0);
        assert_eq!(CapabilitySet::SYSLOG.bits(), 1 << NAMES.iter().position(|n| *n == "SYSLOG").unwrap());
        assert_eq!(
            CapabilitySet::AUDIT_READ.bits(),
            1 << NAMES.iter().position(|n| *n == "AUDIT_READ").unwrap()
        );
    }

    #[test]
    fn unknown_ones_are_refused() {
        assert!(Capabilities::parse(&spec(&["CAP_FLY"]), 40).is_err());
        assert!(Capabilities::parse(&spec(&["CAP_CHECKPOINT_RESTORE"]), 39).is_err());
        assert!(resource("RLIMIT_NOFILE").is_ok());
        assert!(resource("RLIMIT_X").is_err());
    }
}
