//! The system calls that serving files takes. All others answer `ENOSYS`: a library that tries a newer call falls back, and code
//! that should not run here gets nothing done.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// Calls that are allowed with any arguments.
const CALLS: &[i64] = &[
    // Files.
    libc::SYS_close,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_fallocate,
    libc::SYS_fchdir,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_flock,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_lseek,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_removexattr,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_setxattr,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_syncfs,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
    libc::SYS_write,
    libc::SYS_writev,
    // Acting for the guest's users.
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_setgroups,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    // The connection and the queues.
    libc::SYS_accept4,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    // Memory, threads, time.
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_prctl,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
];

/// Why calls cannot be restricted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FilterError {
    #[error("the filter cannot be built")]
    Build(#[source] seccompiler::BackendError),
    #[error("the kernel refuses the filter")]
    Apply(#[source] seccompiler::Error),
}

/// Restricts this thread and those that it makes from now on.
pub(crate) fn apply() -> Result<(), FilterError> {
    seccompiler::apply_filter(&build().map_err(FilterError::Build)?).map_err(FilterError::Apply)
}

fn build() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = CALLS.iter().map(|call| (*call, Vec::new())).collect();
    let first = |op, value| -> Result<SeccompRule, seccompiler::BackendError> {
        SeccompRule::new(vec![SeccompCondition::new(0, SeccompCmpArgLen::Qword, op, value)?])
    };
    // Threads, no processes. `clone3` cannot be looked into; the C library falls back to `clone` without it.
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, vec![first(SeccompCmpOp::MaskedEq(thread), thread)?]);
    // A working directory and umask per thread, no namespaces.
    rules.insert(libc::SYS_unshare, vec![first(SeccompCmpOp::Eq, libc::CLONE_FS as u64)?]);
    let missing = SeccompAction::Errno(libc::ENOSYS as u32);
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, missing, SeccompAction::Allow, arch)?.try_into()
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
            assert!(!CALLS.contains(&call), "{call}");
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
