//! User and group ids that nobody else on the host has: those of nobody, and of no other VMM.
//!
//! A process that has its own id in the host's process table has a number that is unique as long as it lives, so the id of its user needs
//! no table, no lock and no clean-up: it is that number above a base that no distribution gives to users, services or containers.

use std::io;

use rustix::fs::{CWD, readlinkat};
use rustix::process::{Gid, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::{JailError, UnshareFlags, step};

/// The first id: above what containers are given (up to 0x6fff_ffff by systemd's plan of ids) and below that of foreign images (0x7ffe_0000).
pub const FIRST: u32 = 0x7000_0000;
/// How many there are: Linux numbers at most 2²² processes.
pub const COUNT: u32 = 1 << 22;
/// What changing ids takes.
const NEEDED: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETPCAP);

/// How a process may give up its ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It has root's power, and becomes this user and group of the host.
    Root(u32),
    /// It has none, or has it in a namespace of a user's who has no ids to give, and stays its user in a user namespace that knows no ids.
    User,
}

impl Standing {
    /// That of this process. To be called while `/proc` is the host's.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn current() -> Result<Self, JailError> {
        let held = rustix::thread::capabilities(None).map_err(step("ask for capabilities"))?;
        if !held.effective.contains(NEEDED) || !has_ids()? {
            return Ok(Self::User);
        }
        let own = readlinkat(CWD, "/proc/self", Vec::new()).map_err(step("ask for the host's process id"))?;
        let number = own.to_str().ok().and_then(|text| text.parse::<u32>().ok()).filter(|pid| *pid < COUNT);
        let number = number.ok_or(io::ErrorKind::InvalidData);
        Ok(Self::Root(FIRST + number.map_err(|kind| step("understand /proc/self")(io::Error::from(kind)))?))
    }
}

/// Whether this user namespace knows one id only: that of a user who is not root, as which everything is done.
///
/// # Errors
/// What the kernel answers.
pub fn is_alone() -> Result<bool, JailError> {
    Ok(matches!(map()?.as_slice(), [(_, 1)]))
}

/// Whether the ids of nobody are known in this user namespace: they are on the host, and not in the namespace of a user who has but one.
fn has_ids() -> Result<bool, JailError> {
    Ok(map()?.iter().any(|(first, count)| *first <= FIRST && first.saturating_add(*count) >= FIRST + COUNT))
}

/// Which ids there are in this user namespace: first ones and how many.
fn map() -> Result<Vec<(u32, u32)>, JailError> {
    let text = std::fs::read_to_string("/proc/self/uid_map").map_err(step("ask which ids there are"))?;
    Ok(parse_map(&text))
}

/// A line is the first id inside, the first outside, and how many.
fn parse_map(text: &str) -> Vec<(u32, u32)> {
    let range = |line: &str| {
        let mut numbers = line.split_whitespace().map(|word| word.parse::<u32>().ok());
        let (first, _, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
        Some((first, count))
    };
    text.lines().filter_map(range).collect()
}

/// Becomes a user of the host, with no other groups, and keeps the capabilities for the steps that follow.
pub(crate) fn become_user(id: u32) -> Result<(), JailError> {
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    rustix::thread::set_thread_groups(&[]).map_err(step("leave all groups"))?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(step("change the group"))?;
    rustix::thread::set_keep_capabilities(true).map_err(step("keep capabilities for a moment"))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(step("change the user"))?;
    let sets = CapabilitySets { effective: NEEDED, permitted: NEEDED, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).map_err(step("use the capabilities that are left"))
}

/// Enters a user namespace into which no id of the host is mapped. In it nobody can become anybody, no set-id program works, and no user
/// namespace can be made below it: the kernel wants the maker's ids to be mapped. Returns false on a host whose administrator allows no
/// user namespaces at all (`user.max_user_namespaces`), where none can be made below either.
pub(crate) fn enter_unmapped_namespace() -> Result<bool, JailError> {
    match crate::namespaces(UnshareFlags::NEWUSER) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => Ok(false),
        Err(error) => Err(step("make a user namespace")(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_read() {
        assert_eq!(parse_map("         0          0 4294967295\n"), [(0, u32::MAX)]);
        assert_eq!(parse_map("0 1000 1\n1 100000 65536\n"), [(0, 1), (1, 65536)]);
        assert_eq!(parse_map("0 0\nx 0 1\n\n"), []);
    }

    #[test]
    fn the_host_has_ids_for_nobody() {
        // Or these tests run in a container that has few.
        assert!(has_ids().unwrap() || map().unwrap().iter().all(|(_, count)| *count < u32::MAX));
    }
}
