//! The system calls that serving files takes. All others answer `ENOSYS`: a library that tries a newer call falls back, and code
//! that should not run here gets nothing done.

use hyper_jail::JailError;
use hyper_jail::filter::{Call, Filter, Is, Otherwise, Probe, call};

/// What the calls are for.
const FILES: &str = "what the guest asks of its shares";
const USERS: &str = "acting for the guest's users";
const QUEUES: &str = "the connection to the VMM, and the queues";
const RUNTIME: &str = "memory, threads, time";

/// Flag of `clone` that makes a thread, not a process.
const THREAD: u32 = libc::CLONE_THREAD.cast_unsigned();
/// The one thing to have for oneself: working directory and umask per thread.
const OWN_DIRECTORY: u32 = libc::CLONE_FS.cast_unsigned();

/// Calls that are allowed.
const CALLS: &[Call] = &[
    call(libc::SYS_close, FILES),
    call(libc::SYS_copy_file_range, FILES),
    call(libc::SYS_dup, FILES),
    call(libc::SYS_fallocate, FILES),
    call(libc::SYS_fchdir, FILES),
    call(libc::SYS_fchmod, FILES),
    call(libc::SYS_fchmodat, FILES),
    call(libc::SYS_fchownat, FILES),
    call(libc::SYS_fcntl, FILES),
    call(libc::SYS_fdatasync, FILES),
    call(libc::SYS_fgetxattr, FILES),
    call(libc::SYS_flistxattr, FILES),
    call(libc::SYS_flock, FILES),
    call(libc::SYS_fremovexattr, FILES),
    call(libc::SYS_fsetxattr, FILES),
    call(libc::SYS_fstat, FILES),
    call(libc::SYS_fstatfs, FILES),
    call(libc::SYS_fsync, FILES),
    call(libc::SYS_ftruncate, FILES),
    call(libc::SYS_getdents64, FILES),
    call(libc::SYS_getxattr, FILES),
    call(libc::SYS_linkat, FILES),
    call(libc::SYS_listxattr, FILES),
    call(libc::SYS_lseek, FILES),
    call(libc::SYS_mkdirat, FILES),
    call(libc::SYS_mknodat, FILES),
    call(libc::SYS_newfstatat, FILES),
    call(libc::SYS_openat, FILES),
    call(libc::SYS_openat2, FILES),
    call(libc::SYS_pread64, FILES),
    call(libc::SYS_preadv, FILES),
    call(libc::SYS_preadv2, FILES),
    call(libc::SYS_pwrite64, FILES),
    call(libc::SYS_pwritev, FILES),
    call(libc::SYS_pwritev2, FILES),
    call(libc::SYS_read, FILES),
    call(libc::SYS_readlinkat, FILES),
    call(libc::SYS_readv, FILES),
    call(libc::SYS_removexattr, FILES),
    call(libc::SYS_renameat, FILES),
    call(libc::SYS_renameat2, FILES),
    call(libc::SYS_setxattr, FILES),
    call(libc::SYS_statx, FILES),
    call(libc::SYS_symlinkat, FILES),
    call(libc::SYS_syncfs, FILES),
    call(libc::SYS_umask, FILES),
    call(libc::SYS_unlinkat, FILES),
    call(libc::SYS_utimensat, FILES),
    call(libc::SYS_write, FILES),
    call(libc::SYS_writev, FILES),
    call(libc::SYS_capget, USERS),
    call(libc::SYS_capset, USERS),
    call(libc::SYS_getegid, USERS),
    call(libc::SYS_geteuid, USERS),
    call(libc::SYS_setgroups, USERS),
    call(libc::SYS_setresgid, USERS),
    call(libc::SYS_setresuid, USERS),
    call(libc::SYS_accept4, QUEUES),
    call(libc::SYS_epoll_create1, QUEUES),
    call(libc::SYS_epoll_ctl, QUEUES),
    call(libc::SYS_epoll_pwait, QUEUES),
    call(libc::SYS_epoll_wait, QUEUES),
    call(libc::SYS_eventfd2, QUEUES),
    call(libc::SYS_recvmsg, QUEUES),
    call(libc::SYS_sendmsg, QUEUES),
    call(libc::SYS_brk, RUNTIME),
    call(libc::SYS_clock_gettime, RUNTIME),
    call(libc::SYS_exit, RUNTIME),
    call(libc::SYS_exit_group, RUNTIME),
    call(libc::SYS_futex, RUNTIME),
    call(libc::SYS_getpid, RUNTIME),
    call(libc::SYS_getrandom, RUNTIME),
    call(libc::SYS_gettid, RUNTIME),
    call(libc::SYS_madvise, RUNTIME),
    call(libc::SYS_membarrier, RUNTIME),
    call(libc::SYS_mmap, RUNTIME),
    call(libc::SYS_mprotect, RUNTIME),
    call(libc::SYS_mremap, RUNTIME),
    call(libc::SYS_munmap, RUNTIME),
    call(libc::SYS_prctl, RUNTIME),
    call(libc::SYS_restart_syscall, RUNTIME),
    call(libc::SYS_rseq, RUNTIME),
    call(libc::SYS_rt_sigaction, RUNTIME),
    call(libc::SYS_rt_sigprocmask, RUNTIME),
    call(libc::SYS_rt_sigreturn, RUNTIME),
    call(libc::SYS_sched_getaffinity, RUNTIME),
    call(libc::SYS_sched_yield, RUNTIME),
    call(libc::SYS_set_robust_list, RUNTIME),
    call(libc::SYS_sigaltstack, RUNTIME),
    call(libc::SYS_clone, "threads, no processes").only(&[&[(0, Is::With(THREAD))]]),
    call(libc::SYS_unshare, "a working directory and umask per thread, no namespaces")
        .only(&[&[(0, Is::Equal(OWN_DIRECTORY))]]),
];

/// Calls that are not made, and answer that all is well: of a user who has but one id nobody becomes anybody else, and what the guest's users
/// make belongs to that user.
const NOBODY_ELSE: &[Probe] = &[
    (libc::SYS_setresuid, 0, "virtiofsd, for the guest's users"),
    (libc::SYS_setresgid, 0, "virtiofsd, for the guest's groups"),
    (libc::SYS_setgroups, 0, "virtiofsd, for the guest's groups"),
];
/// The one id that there is, and what leaves an id as it is.
const OWN: u32 = 0;
const SAME: u32 = u32::MAX;
/// To whom no file can be given then. Linux would say that the number makes no sense.
const OTHERS: Call = call(libc::SYS_fchownat, "giving files away")
    .only(&[&[(2, Is::Not(OWN)), (2, Is::Not(SAME))], &[(3, Is::Not(OWN)), (3, Is::Not(SAME))]]);

/// Restricts this thread and those that it makes from now on. `alone`: there is but one user.
pub(crate) fn apply(alone: bool) -> Result<(), JailError> {
    if alone {
        Filter::refusing(&OTHERS, libc::EPERM)?.apply()?;
        return Filter::new(&[CALLS], NOBODY_ELSE, Otherwise::Missing)?.apply();
    }
    Filter::new(&[CALLS], &[], Otherwise::Missing)?.apply()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_leave_the_shares_is_not_allowed() {
        for call in [
            libc::SYS_execve,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_mount,
            libc::SYS_open_tree,
            libc::SYS_open_by_handle_at,
            libc::SYS_ptrace,
            libc::SYS_kill,
            libc::SYS_chroot,
            libc::SYS_setns,
            libc::SYS_bpf,
            libc::SYS_io_uring_setup,
            libc::SYS_clone3,
        ] {
            assert!(CALLS.iter().all(|allowed| allowed.number() != call), "{call}");
        }
    }

    #[test]
    fn a_filtered_thread_can_make_threads_but_no_sockets() {
        // The filter binds this thread only, which ends with the test.
        std::thread::spawn(|| {
            rustix::thread::set_no_new_privs(true).unwrap();
            apply(false).unwrap();
            assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7);
            let socket = std::os::unix::net::UnixStream::pair();
            assert_eq!(socket.unwrap_err().raw_os_error(), Some(libc::ENOSYS));
            let child = std::process::Command::new("/bin/true").status();
            assert!(child.is_err());
        })
        .join()
        .unwrap();
    }

    #[test]
    fn of_a_user_nobody_becomes_anybody_and_nothing_is_given_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "").unwrap();
        std::thread::spawn(move || {
            use rustix::fs::{AtFlags, CWD, Gid, Uid, chownat};
            rustix::thread::set_no_new_privs(true).unwrap();
            apply(true).unwrap();
            let before = rustix::process::geteuid();
            let other = Uid::from_raw(1234);
            rustix::thread::set_thread_res_uid(other, other, other).unwrap();
            assert_eq!(rustix::process::geteuid(), before);
            let give = |user, group| {
                chownat(CWD, &path, user, group, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| e.raw_os_error())
            };
            assert_eq!(give(Some(other), None), Err(libc::EPERM));
            assert_eq!(give(None, Some(Gid::from_raw(1234))), Err(libc::EPERM));
            give(None, None).unwrap();
        })
        .join()
        .unwrap();
    }
}
