//! The jail of hyper-vmm.
//!
//! What it has left: /dev/kvm and the machine on it, its control socket, a pipe for its log, and the descriptors that its owner hands over:
//! disks, TAPs, sockets. Files: `calls` has the tables of system calls, one for each kind of thread.

mod calls;

use rustix::process::{Resource, umask};
use rustix::thread::CapabilitySet;

pub use self::calls::{DISK, EVENTS, PROBES, VCPU};
use crate::filter::{Call, Filter, Otherwise};
use crate::ids::{self, Standing};
use crate::{JailError, UnshareFlags, limits, privileges, root, step};

/// Descriptors that a machine may need at most: vsock connections, queue and timer events, disks, with room to spare.
pub const OPEN_FILES: u64 = 4096;
/// Tasks of one VMM: 32 vCPUs, 19 workers, the event thread, and what the kernel makes for KVM.
pub const TASKS: u64 = 128;
/// Bytes of private memory beside the guest's: 31 MiB of vsock buffers, 19 disk buffers, 64 stacks of 2 MiB, with room to spare.
pub const OWN_BYTES: u64 = 512 << 20;

/// Limits that are the same for every VMM, under the names that `/proc/PID/limits` has for them.
pub const LIMITS: [(&str, u64); 4] = [
    ("Max open files", OPEN_FILES),
    ("Max core file size", 0),
    ("Max locked memory", 0),
    ("Max msgqueue size", 0),
];

const RESOURCES: [Resource; LIMITS.len()] =
    [Resource::Nofile, Resource::Core, Resource::Memlock, Resource::Msgqueue];

/// Kinds of threads, each with a table of its own. A thread is bound by the tables of those that made it, too, so each has what those below
/// it have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The main thread: control socket, device handlers.
    Events,
    /// A virtual processor: `KVM_RUN`, device registers, activation of devices.
    Vcpu,
    /// The worker of a disk.
    Disk,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Events, Self::Vcpu, Self::Disk];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Events => "events",
            Self::Vcpu => "vcpu",
            Self::Disk => "disk",
        }
    }

    fn tables(self) -> &'static [&'static [Call]] {
        match self {
            Self::Events => &[DISK, VCPU, EVENTS],
            Self::Vcpu => &[DISK, VCPU],
            Self::Disk => &[DISK],
        }
    }

    /// Its filter.
    ///
    /// # Errors
    /// See [`Filter::new`].
    pub fn filter(self) -> Result<Filter, JailError> {
        Filter::new(self.tables(), PROBES, Otherwise::End)
    }
}

/// The network that a VMM sees, though its filters let it use none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// A namespace of its own with nothing in it.
    None,
    /// That of its pod, which it was started in: engines find a pod's network by its process.
    Pods,
}

/// The argument of hyper-vmm for [`Network::Pods`].
pub const POD_NETWORK: &str = "--pod-network";

/// Closes the jail, but for the filters. The process must have one thread; what it has open stays open, and no path leads anywhere any more.
///
/// # Errors
/// The step that failed. The process is of no use then: it is neither in nor out.
pub fn close(network: Network) -> Result<(), JailError> {
    let standing = Standing::current()?;
    let mut own = UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWCGROUP;
    if network == Network::None {
        own |= UnshareFlags::NEWNET;
    }
    let user = if standing == Standing::User { UnshareFlags::NEWUSER } else { UnshareFlags::empty() };
    crate::namespaces(own | user).map_err(step("make namespaces"))?;
    root::make_private().map_err(step("make mounts private"))?;
    let empty = root::empty().map_err(step("make an empty root"))?;
    root::gain_foothold(&empty).map_err(step("mount the empty root"))?;
    root::enter(&empty).map_err(step("change the root"))?;
    drop(empty);
    crate::sys::leave_session_keyring().map_err(step("leave the session's keyring"))?;
    for ((_, most), resource) in LIMITS.into_iter().zip(RESOURCES) {
        limits::set(resource, most)?;
    }
    // Counted by user: of this one there will be no other, or it is counted anew in its user namespace (since Linux 5.14).
    limits::set(Resource::Nproc, TASKS)?;
    if let Standing::Root(id) = standing {
        ids::become_user(id)?;
        // Where there are no user namespaces there is none to be made below this process either.
        let _unmapped = ids::enter_unmapped_namespace()?;
    }
    privileges::keep_capabilities(CapabilitySet::empty())?;
    privileges::no_new_privileges()?;
    privileges::no_dumps()?;
    umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    // Last: a change of ids undoes it.
    privileges::die_with_parent()
}

/// Limits that depend on the machine, once it is built: `private_bytes` of its memory are this process's own, and no file that is handed
/// over is to grow beyond `file_bytes`; `None` where longer ones may be handed over later.
///
/// # Errors
/// What the kernel answers.
pub fn bound(private_bytes: u64, file_bytes: Option<u64>) -> Result<(), JailError> {
    limits::set(Resource::Data, private_bytes.saturating_add(OWN_BYTES))?;
    file_bytes.map_or(Ok(()), |bytes| limits::set(Resource::Fsize, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn every_call_has_one_line_with_its_reason() {
        let mut seen = HashMap::new();
        for call in [DISK, VCPU, EVENTS].into_iter().flatten() {
            assert!(call.why().len() > 3 && !call.why().contains('\n'), "{call:?}");
            let before = seen.insert(call.number(), call.why());
            assert!(
                before.is_none() || [libc::SYS_ioctl, libc::SYS_fcntl].contains(&call.number()),
                "{call:?}"
            );
        }
        for (number, error, who) in PROBES {
            assert!(!seen.contains_key(number) && *error > 0 && !who.is_empty(), "{who}");
        }
    }

    #[test]
    fn what_would_leave_the_jail_is_in_no_table() {
        let never = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_mount,
            libc::SYS_move_mount,
            libc::SYS_open_tree,
            libc::SYS_open_by_handle_at,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_pidfd_open,
            libc::SYS_pidfd_getfd,
            libc::SYS_kill,
            libc::SYS_chroot,
            libc::SYS_pivot_root,
            libc::SYS_setns,
            libc::SYS_unshare,
            libc::SYS_bpf,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
            libc::SYS_perf_event_open,
            libc::SYS_keyctl,
            libc::SYS_memfd_create,
            libc::SYS_rt_sigaction,
            libc::SYS_setrlimit,
        ];
        for kind in Kind::ALL {
            for number in never {
                let found = kind.tables().iter().copied().flatten().find(|call| call.number() == number);
                assert!(found.is_none(), "{kind:?}: {found:?}");
            }
            kind.filter().unwrap();
        }
    }
}
