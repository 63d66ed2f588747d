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
    /// It has none, and stays its user in a user namespace that knows no ids.
    User,
}

impl Standing {
    /// That of this process. To be called while `/proc` is the host's.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn current() -> Result<Self, JailError> {
        let held = rustix::thread::capabilities(None).map_err(step("ask for capabilities"))?;
        if !held.effective.contains(NEEDED) {
            return Ok(Self::User);
        }
        let own = readlinkat(CWD, "/proc/self", Vec::new()).map_err(step("ask for the host's process id"))?;
        let number = own.to_str().ok().and_then(|text| text.parse::<u32>().ok()).filter(|pid| *pid < COUNT);
        let number = number.ok_or(io::ErrorKind::InvalidData);
        Ok(Self::Root(FIRST + number.map_err(|kind| step("understand /proc/self")(io::Error::from(kind)))?))
    }
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
