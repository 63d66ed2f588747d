//! Names of capabilities and resource limits, and Docker's defaults.

/// All capabilities that Linux 6.12 has, without `CAP_`.
const ALL: [&str; 41] = [
    "AUDIT_CONTROL",
    "AUDIT_READ",
    "AUDIT_WRITE",
    "BLOCK_SUSPEND",
    "BPF",
    "CHECKPOINT_RESTORE",
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "IPC_OWNER",
    "KILL",
    "LEASE",
    "LINUX_IMMUTABLE",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
    "MKNOD",
    "NET_ADMIN",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_RAW",
    "PERFMON",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYSLOG",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_CHROOT",
    "SYS_MODULE",
    "SYS_NICE",
    "SYS_PACCT",
    "SYS_PTRACE",
    "SYS_RAWIO",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "WAKE_ALARM",
];

/// What Docker gives without flags.
const DEFAULT: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// Resource limits by Docker's names.
const LIMITS: [(&str, &str); 15] = [
    ("as", "RLIMIT_AS"),
    ("core", "RLIMIT_CORE"),
    ("cpu", "RLIMIT_CPU"),
    ("data", "RLIMIT_DATA"),
    ("fsize", "RLIMIT_FSIZE"),
    ("locks", "RLIMIT_LOCKS"),
    ("memlock", "RLIMIT_MEMLOCK"),
    ("msgqueue", "RLIMIT_MSGQUEUE"),
    ("nice", "RLIMIT_NICE"),
    ("nofile", "RLIMIT_NOFILE"),
    ("nproc", "RLIMIT_NPROC"),
    ("rss", "RLIMIT_RSS"),
    ("rtprio", "RLIMIT_RTPRIO"),
    ("sigpending", "RLIMIT_SIGPENDING"),
    ("stack", "RLIMIT_STACK"),
];

/// A capability as a user names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Capability {
    /// All of them.
    All,
    /// One, without `CAP_`.
    One(&'static str),
}

/// Reads `NET_ADMIN`, `cap_net_admin` or `ALL`; `None` for anything else.
pub(crate) fn capability(name: &str) -> Option<Capability> {
    let upper = name.to_ascii_uppercase();
    let plain = upper.strip_prefix("CAP_").unwrap_or(&upper);
    if plain == "ALL" {
        return Some(Capability::All);
    }
    ALL.iter().find(|known| **known == plain).map(|known| Capability::One(known))
}

/// The OCI name of a limit that Docker calls `name`.
pub(crate) fn rlimit(name: &str) -> Option<&'static str> {
    LIMITS.iter().find(|(docker, _)| *docker == name).map(|(_, oci)| *oci)
}

/// The capabilities of a container, with `CAP_`, sorted. Docker's rule: `ALL` dropped leaves what is added; `ALL` added leaves out
/// what is dropped; else the defaults without the dropped and with the added ones.
pub(crate) fn effective(privileged: bool, add: &[String], drop: &[String]) -> Vec<String> {
    let names =
        |list: &[String], wanted: Capability| list.iter().any(|name| capability(name) == Some(wanted));
    let (all_added, all_dropped) = (names(add, Capability::All), names(drop, Capability::All));
    let given = |name: &'static str| {
        let base = if all_dropped {
            all_added
        } else {
            (all_added || DEFAULT.contains(&name)) && !names(drop, Capability::One(name))
        };
        privileged || base || names(add, Capability::One(name))
    };
    ALL.iter().copied().filter(|name| given(name)).map(|name| format!("CAP_{name}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caps(add: &[&str], drop: &[&str]) -> Vec<String> {
        let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        effective(false, &own(add), &own(drop))
    }

    #[test]
    fn defaults_are_dockers() {
        assert_eq!(caps(&[], &[]).len(), DEFAULT.len());
        assert!(caps(&[], &[]).contains(&"CAP_CHOWN".to_owned()));
    }

    #[test]
    fn adds_and_drops() {
        let some = caps(&["net_admin", "CAP_SYS_TIME"], &["CHOWN"]);
        assert!(some.contains(&"CAP_NET_ADMIN".to_owned()) && some.contains(&"CAP_SYS_TIME".to_owned()));
        assert!(!some.contains(&"CAP_CHOWN".to_owned()));
        assert_eq!(caps(&["KILL"], &["ALL"]), ["CAP_KILL"]);
        assert_eq!(caps(&["ALL"], &[]).len(), ALL.len());
        assert_eq!(caps(&["ALL"], &["SYS_MODULE"]).len(), ALL.len() - 1);
        assert_eq!(effective(true, &[], &["ALL".to_owned()]).len(), ALL.len());
        assert_eq!(capability("FLY"), None);
    }
}
