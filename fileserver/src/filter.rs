//! The system calls that serving files takes. All others answer `ENOSYS`: a library that tries a newer call falls back, and code
//! that should not run here gets nothing done.

use hyper_jail::JailError;
use hyper_jail::filter::{Call, Filter, Is, Otherwise, call};

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

/// Restricts this thread and those that it makes from now on.
pub(crate) fn apply() -> Result<(), JailError> {
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
            apply().unwrap();
            assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7);
            let socket = std::os::unix::net::UnixStream::pair();
            assert_eq!(socket.unwrap_err().raw_os_error(), Some(libc::ENOSYS));
            let child = std::process::Command::new("/bin/true").status();
            assert!(child.is_err());
        })
        .join()
        .unwrap();
    }
}
