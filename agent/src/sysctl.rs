//! Kernel parameters by name.

use crate::error::{AgentError, Tried};

/// Longest name, bytes.
const MAX_NAME_BYTES: usize = 256;

/// What containers expect of a fresh machine, beyond the kernel's own defaults.
pub(crate) const DEFAULTS: [(&str, &str); 6] = [
    // Docker's: ports below 1024 and ping need no capability inside a container.
    ("net/ipv4/ip_unprivileged_port_start", "0"),
    ("net/ipv4/ping_group_range", "0 2147483647"),
    // Distributions' since 2024; search engines and JVMs refuse the kernel's 65530.
    ("vm/max_map_count", "1048576"),
    ("fs/inotify/max_user_instances", "8192"),
    ("fs/inotify/max_user_watches", "524288"),
    // A path of the guest's root is no use to a container; dumps go nowhere.
    ("kernel/core_pattern", "core"),
];

/// The path of a parameter below /proc/sys: dots become slashes unless the name has slashes already.
///
/// # Errors
/// A name that could lead anywhere else.
pub(crate) fn path_of(name: &str) -> Result<String, AgentError> {
    let path = if name.contains('/') { name.to_owned() } else { name.replace('.', "/") };
    let fine = |part: &str| {
        !part.is_empty() && part != "." && part != ".." && part.bytes().all(|b| b.is_ascii_graphic())
    };
    if name.len() > MAX_NAME_BYTES || !path.split('/').all(fine) {
        return Err(AgentError::invalid(format!("{name:?} is no name of a sysctl")));
    }
    Ok(path)
}

/// Sets a parameter of the sandbox.
///
/// # Errors
/// A bad name, or what the kernel answers.
pub(crate) fn set(name: &str, value: &str) -> Result<(), AgentError> {
    let path = path_of(name)?;
    std::fs::write(format!("/proc/sys/{path}"), value).tried(|| format!("set sysctl {name} to {value:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_paths_and_stay_below() {
        assert_eq!(path_of("net.ipv4.ip_forward").unwrap(), "net/ipv4/ip_forward");
        assert_eq!(path_of("net/ipv4/conf/eth0.1/forwarding").unwrap(), "net/ipv4/conf/eth0.1/forwarding");
        for bad in ["", "..", "a/../b", "/a", "a..b", "a b", "a\0", &"a".repeat(300)] {
            assert!(path_of(bad).is_err(), "{bad:?}");
        }
        for (name, _) in DEFAULTS {
            assert_eq!(path_of(name).unwrap(), name);
        }
    }
}
