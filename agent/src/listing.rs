//! The processes of a container, as `ps` would show them.

use std::collections::HashMap;
use std::path::PathBuf;

use hyper_protocol::rpc::agent::ProcessInfo;
use rustix::process::Pid;

use crate::child::path::read_in;
use crate::child::user::{Databases, MAX_DATABASE_BYTES};
use crate::container::Container;
use crate::error::AgentError;

/// Longest command line that is shown, bytes.
const MAX_COMMAND_BYTES: usize = 4096;
/// Clock ticks a second (`USER_HZ`), fixed on x86.
const TICKS_PER_SECOND: u64 = 100;

/// What /proc says of one process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Facts {
    ppid: u32,
    tty: u32,
    cpu_ticks: u64,
    start_ticks: u64,
    name: String,
}

/// All processes of a container.
///
/// # Errors
/// Its cgroup is gone.
pub(crate) fn list(container: &Container) -> Result<Vec<ProcessInfo>, AgentError> {
    use std::os::fd::AsFd;
    let pids = container.cgroup().processes()?;
    let passwd = read_in(container.root().as_fd(), "/etc/passwd", MAX_DATABASE_BYTES).unwrap_or_default();
    let databases = Databases { passwd, group: Vec::new() };
    let boot = boot_unix_ns(&std::fs::read_to_string("/proc/stat").unwrap_or_default());
    let mut inside = HashMap::new();
    let mut found = Vec::new();
    for pid in pids {
        let pid = pid.as_raw_nonzero().get().unsigned_abs();
        let read = |file: &str| std::fs::read(PathBuf::from(format!("/proc/{pid}/{file}")));
        // One that has ended meanwhile is not listed.
        let (Ok(stat), Ok(status)) = (read("stat"), read("status")) else { continue };
        let Some(facts) = parse_stat(&String::from_utf8_lossy(&stat)) else { continue };
        let status = String::from_utf8_lossy(&status).into_owned();
        let number = pid_inside(&status).unwrap_or(pid);
        inside.insert(pid, number);
        let command = command_line(&read("cmdline").unwrap_or_default(), &facts.name);
        let uid = uid_of(&status);
        found.push((pid, facts, number, uid, command));
    }
    let infos = found.into_iter().map(|(_, facts, number, uid, command)| ProcessInfo {
        pid: number,
        ppid: inside.get(&facts.ppid).copied().unwrap_or_default(),
        uid,
        user: databases.user_name(uid).map_or_else(|| uid.to_string(), str::to_owned),
        cpu_ms: facts.cpu_ticks.saturating_mul(1000 / TICKS_PER_SECOND),
        started_unix_ns: started(boot, facts.start_ticks),
        tty: tty_name(facts.tty),
        command,
        ..ProcessInfo::default()
    });
    Ok(infos.collect())
}

/// Processes of a container, and what they have started, and so on.
///
/// # Errors
/// Its cgroup is gone.
pub(crate) fn with_descendants(container: &Container, first: &[Pid]) -> Result<Vec<Pid>, AgentError> {
    let parent_of = |pid: Pid| {
        let stat = std::fs::read(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
        Some((pid, parse_stat(&String::from_utf8_lossy(&stat))?.ppid))
    };
    let parents: Vec<(Pid, u32)> =
        container.cgroup().processes()?.into_iter().filter_map(parent_of).collect();
    Ok(descendants(first, &parents))
}

/// `first`, and whoever of `parents` (each with its parent) comes from them.
fn descendants(first: &[Pid], parents: &[(Pid, u32)]) -> Vec<Pid> {
    let mut found = first.to_vec();
    let mut at = 0;
    while let Some(parent) = found.get(at).map(|pid| pid.as_raw_nonzero().get().unsigned_abs()) {
        let children = parents.iter().filter(|(_, ppid)| *ppid == parent).map(|(pid, _)| *pid);
        let new: Vec<Pid> = children.filter(|pid| !found.contains(pid)).collect();
        found.extend(new);
        at = at.saturating_add(1);
    }
    found
}

/// Reads /proc/pid/stat. The name is in parentheses and may hold any of them.
fn parse_stat(stat: &str) -> Option<Facts> {
    let (before, after) = stat.rsplit_once(')')?;
    let name = before.split_once('(')?.1.to_owned();
    // After the name: state is field 3 of the manual, ppid 4, tty 7, times 14 and 15, start 22.
    let fields: Vec<&str> = after.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number.checked_sub(3)?).copied();
    let number = |n: usize| field(n)?.parse::<u64>().ok();
    Some(Facts {
        ppid: field(4)?.parse().ok()?,
        tty: field(7)?.parse::<i32>().ok()?.cast_unsigned(),
        cpu_ticks: number(14)?.saturating_add(number(15)?),
        start_ticks: number(22)?,
        name,
    })
}

fn status_field<'a>(status: &'a str, key: &str) -> Option<&'a str> {
    status.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))
}

/// The pid in the container's namespace: the second of `NSpid`, the first is ours.
fn pid_inside(status: &str) -> Option<u32> {
    status_field(status, "NSpid")?.split_ascii_whitespace().nth(1)?.parse().ok()
}

fn uid_of(status: &str) -> u32 {
    // Real, effective, saved, file system; ps shows the effective one.
    let uid = status_field(status, "Uid").and_then(|f| f.split_ascii_whitespace().nth(1));
    uid.and_then(|u| u.parse().ok()).unwrap_or_default()
}

fn command_line(bytes: &[u8], name: &str) -> String {
    let bytes = bytes.get(..bytes.len().min(MAX_COMMAND_BYTES)).unwrap_or_default();
    let text: String = String::from_utf8_lossy(bytes)
        .trim_end_matches('\0')
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.is_empty() { format!("[{name}]") } else { text }
}

/// `pts/0`, `ttyS0` and the like by device number; `?` for none.
fn tty_name(device: u32) -> String {
    let (major, minor) = ((device >> 8) & 0xfff, (device & 0xff) | ((device >> 12) & 0xfff00));
    match major {
        0 => "?".to_owned(),
        136..=143 => format!("pts/{}", (major - 136) * 256 + minor),
        4 if minor >= 64 => format!("ttyS{}", minor - 64),
        5 if minor == 1 => "console".to_owned(),
        _ => format!("{major}:{minor}"),
    }
}

fn boot_unix_ns(stat: &str) -> i64 {
    let seconds: i64 = stat
        .lines()
        .find_map(|l| l.strip_prefix("btime "))
        .and_then(|t| t.trim().parse().ok())
        .unwrap_or_default();
    seconds.saturating_mul(1_000_000_000)
}

fn started(boot_unix_ns: i64, ticks: u64) -> i64 {
    let ns = ticks.saturating_mul(1_000_000_000 / TICKS_PER_SECOND);
    boot_unix_ns.saturating_add(i64::try_from(ns).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_with_any_name_is_read() {
        let stat = "42 (a ) b(c) S 7 42 42 34816 42 4194304 1 2 3 4 150 50 0 0 20 0 1 0 1234 99 0";
        let facts = parse_stat(stat).unwrap();
        assert_eq!(
            facts,
            Facts { ppid: 7, tty: 34816, cpu_ticks: 200, start_ticks: 1234, name: "a ) b(c".to_owned() }
        );
        assert_eq!(tty_name(facts.tty), "pts/0");
        assert_eq!(parse_stat("broken"), None);
        assert!(parse_stat(&std::fs::read_to_string("/proc/self/stat").unwrap()).is_some());
    }

    #[test]
    fn numbers_are_the_containers() {
        let status = "Name:\tx\nUid:\t0\t5\t0\t0\nNSpid:\t900\t12\t3\n";
        assert_eq!(pid_inside(status), Some(12));
        assert_eq!(uid_of(status), 5);
        assert_eq!(pid_inside("NSpid:\t900\n"), None);
    }

    #[test]
    fn names_and_times() {
        assert_eq!(tty_name(0), "?");
        assert_eq!(tty_name(4 << 8 | 64), "ttyS0");
        assert_eq!(tty_name(136 << 8 | 3), "pts/3");
        assert_eq!(command_line(b"sh\0-c\0a\nb\0", "sh"), "sh -c a b");
        assert_eq!(command_line(b"", "kthread"), "[kthread]");
        assert_eq!(boot_unix_ns("cpu 1\nbtime 100\n"), 100_000_000_000);
        assert_eq!(started(100_000_000_000, 150), 101_500_000_000);
    }

    #[test]
    fn descendants_are_found_whatever_the_order() {
        let pid = |n| Pid::from_raw(n).unwrap();
        let parents = [(pid(9), 7), (pid(5), 1), (pid(7), 6), (pid(6), 1), (pid(8), 5)];
        assert_eq!(descendants(&[pid(6)], &parents), [pid(6), pid(7), pid(9)]);
        assert_eq!(descendants(&[pid(5), pid(6)], &parents).len(), 5);
        assert_eq!(descendants(&[], &parents), []);
        // A process that is its own parent ends all the same.
        assert_eq!(descendants(&[pid(2)], &[(pid(2), 2)]), [pid(2)]);
    }
}
