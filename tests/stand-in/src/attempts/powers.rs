//! Becoming somebody else: ids, capabilities, namespaces, mounts.

use std::io;

use super::{Attempt, held, works};
use crate::sys::{address, call};

const HERE: usize = libc::AT_FDCWD as usize;
const ROOT: &std::ffi::CStr = c"/";
/// Flags of `clone3` and `unshare`.
const NEW_TIME: i32 = 0x80;

pub(super) const ALL: &[Attempt] = &[
    held("become root", |_| works(libc::SYS_setuid, &[0])),
    held("become root by all ids", |_| works(libc::SYS_setresuid, &[0, 0, 0])),
    held("become another user", |_| works(libc::SYS_setresuid, &[1000, 1000, 1000])),
    held("become group root", |_| works(libc::SYS_setresgid, &[0, 0, 0])),
    held("join groups", |_| works(libc::SYS_setgroups, &[1, address(&0_u32)])),
    held("use root's files", |_| {
        call(libc::SYS_setfsuid, &[0])?;
        if call(libc::SYS_setfsuid, &[usize::MAX])? == 0 {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::EPERM))
        }
    }),
    held("take all capabilities", |_| {
        // _LINUX_CAPABILITY_VERSION_3, of this process; effective, permitted, inheritable twice.
        let (header, sets) = ([0x2008_0522_u32, 0], [u32::MAX, u32::MAX, 0, 0x1ff, 0x1ff, 0]);
        works(libc::SYS_capset, &[address(&header), address(&sets)])
    }),
    held("keep a capability over a change of ids", |_| {
        works(libc::SYS_prctl, &[libc::PR_SET_SECUREBITS as usize, 0x10])
    }),
    held("undo the promise of no new privileges", |_| {
        works(libc::SYS_prctl, &[libc::PR_SET_NO_NEW_PRIVS as usize, 0, 0, 0, 0])
    })
    .inside_only(),
    held("be dumped", |_| works(libc::SYS_prctl, &[libc::PR_SET_DUMPABLE as usize, 1])).only_filter(),
    held("have a user namespace", |_| unshare(libc::CLONE_NEWUSER)),
    held("have a mount namespace", |_| unshare(libc::CLONE_NEWNS)),
    held("have a network namespace", |_| unshare(libc::CLONE_NEWNET)),
    held("have a process namespace", |_| unshare(libc::CLONE_NEWPID)),
    held("have an IPC namespace", |_| unshare(libc::CLONE_NEWIPC)),
    held("have a host name namespace", |_| unshare(libc::CLONE_NEWUTS)),
    held("have a control group namespace", |_| unshare(libc::CLONE_NEWCGROUP)),
    held("have a time namespace", |_| unshare(NEW_TIME)),
    held("make a process in a user namespace", |_| {
        child(call(
            libc::SYS_clone,
            &[(libc::CLONE_NEWUSER | libc::SIGCHLD).unsigned_abs() as usize, 0, 0, 0, 0],
        )?)
    }),
    held("make a process in a user namespace by clone3", |_| {
        let arguments = [libc::CLONE_NEWUSER as u64, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0];
        child(call(libc::SYS_clone3, &[address(&arguments), size_of_val(&arguments)])?)
    }),
    held("enter the namespaces of process 1", |_| {
        let first = call(libc::SYS_pidfd_open, &[1, 0])?;
        let all = libc::CLONE_NEWNS | libc::CLONE_NEWNET;
        works(libc::SYS_setns, &[usize::try_from(first).unwrap_or(0), all.unsigned_abs() as usize])
    }),
    held("enter a namespace of the host by its path", |_| {
        let host = std::fs::File::open("/proc/1/ns/net")?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&host).unsigned_abs() as usize;
        works(libc::SYS_setns, &[fd, 0])
    }),
    held("mount a tmpfs", |_| {
        alone()?;
        mount(c"tmpfs", c"tmpfs", 0)
    })
    .inside_only(),
    held("mount proc", |_| mount(c"proc", c"proc", 0)).inside_only(),
    held("mount over the root for writing", |_| mount(c"", c"", (libc::MS_REMOUNT | libc::MS_BIND) as usize))
        .inside_only(),
    held("unmount the root", |_| {
        works(libc::SYS_umount2, &[ROOT.as_ptr() as usize, libc::MNT_DETACH as usize])
    })
    .inside_only(),
    held("change the root by pivot_root", |_| {
        works(libc::SYS_pivot_root, &[c".".as_ptr() as usize, c".".as_ptr() as usize])
    })
    .inside_only(),
    held("change the root by chroot", |_| works(libc::SYS_chroot, &[ROOT.as_ptr() as usize])),
    held("open a file system", |_| works(libc::SYS_fsopen, &[c"tmpfs".as_ptr() as usize, 0])),
    held("copy a mount", |_| {
        let flags = libc::OPEN_TREE_CLONE as usize;
        works(libc::SYS_open_tree, &[HERE, ROOT.as_ptr() as usize, flags])
    }),
    held("move a mount", |_| {
        works(libc::SYS_move_mount, &[HERE, ROOT.as_ptr() as usize, HERE, ROOT.as_ptr() as usize, 0])
    })
    .inside_only(),
    held("make the root writable by its attributes", |_| {
        let attributes = [0_u64, libc::MOUNT_ATTR_RDONLY, 0, 0];
        works(
            libc::SYS_mount_setattr,
            &[HERE, ROOT.as_ptr() as usize, 0, address(&attributes), size_of_val(&attributes)],
        )
    })
    .inside_only(),
    held("name the host", |_| works(libc::SYS_sethostname, &[c"out".as_ptr() as usize, 3])).inside_only(),
    held("raise the limit of descriptors", |_| {
        let limit = [1_u64 << 20; 2];
        works(libc::SYS_setrlimit, &[libc::RLIMIT_NOFILE as usize, address(&limit)])
    })
    .inside_only(),
    held("allow core dumps", |_| {
        let limit = [u64::MAX; 2];
        works(libc::SYS_setrlimit, &[libc::RLIMIT_CORE as usize, address(&limit)])
    }),
];

fn unshare(flags: i32) -> io::Result<()> {
    works(libc::SYS_unshare, &[flags.unsigned_abs() as usize])
}

fn alone() -> io::Result<()> {
    // Where that is not allowed, mounting is tried all the same.
    let _mounts = unshare(libc::CLONE_NEWNS);
    Ok(())
}

fn mount(what: &std::ffi::CStr, kind: &std::ffi::CStr, flags: usize) -> io::Result<()> {
    let words = [what.as_ptr() as usize, ROOT.as_ptr() as usize, kind.as_ptr() as usize, flags, 0];
    works(libc::SYS_mount, &words)
}

/// The child ends at once.
fn child(pid: i64) -> io::Result<()> {
    if pid == 0 {
        call(libc::SYS_exit_group, &[0])?;
    }
    Ok(())
}
