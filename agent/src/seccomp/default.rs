//! The profile that a container gets unless it brings its own: what Docker's documentation of its default profile describes,
//! as an allow list, with what capabilities add.

use crate::spec::{SeccompSpec, SyscallArgSpec, SyscallSpec};

const ALLOW: &str = "SCMP_ACT_ALLOW";
/// `AF_VSOCK`: the way to the host's ports, which belongs to the agent.
const AF_VSOCK: u64 = 40;
/// All `CLONE_NEW*` flags of `clone`.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;

/// Calls that every program may make, by topic; both 64-bit and 32-bit names.
const ALWAYS: &[&str] = &[
    // Files.
    "access chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2 \
     fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 \
     fdatasync fgetxattr flistxattr flock fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate \
     ftruncate64 futimesat getcwd getdents getdents64 getxattr inotify_add_watch inotify_init inotify_init1 inotify_rm_watch \
     ioctl lchown lchown32 lgetxattr link linkat listxattr llistxattr _llseek lremovexattr lseek lsetxattr lstat lstat64 mkdir \
     mkdirat mknod mknodat name_to_handle_at newfstatat open openat openat2 pipe pipe2 pread64 preadv preadv2 pwrite64 pwritev \
     pwritev2 read readahead readlink readlinkat readv removexattr rename renameat renameat2 rmdir sendfile sendfile64 setxattr \
     splice stat stat64 statfs statfs64 statx symlink symlinkat sync sync_file_range syncfs tee truncate truncate64 umask unlink \
     unlinkat utime utimensat utimensat_time64 utimes vmsplice write writev",
    // Waiting for descriptors.
    "epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 \
     io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit _newselect poll ppoll ppoll_time64 \
     pselect6 pselect6_time64 select signalfd signalfd4 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime \
     timerfd_settime64",
    // Memory.
    "brk cachestat madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap mmap2 mprotect \
     mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_mrelease remap_file_pages",
    // Processes, threads and signals.
    "alarm arch_prctl capget capset execve execveat exit exit_group fork futex futex_requeue futex_time64 futex_wait \
     futex_waitv futex_wake get_robust_list get_thread_area getcpu getitimer getpgid getpgrp getpid getppid getpriority getrlimit \
     getrusage getsid gettid ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset landlock_restrict_self \
     modify_ldt pause pidfd_open pidfd_send_signal prctl prlimit64 process_vm_readv process_vm_writev ptrace restart_syscall rseq \
     rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 \
     rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam \
     sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam \
     sched_setscheduler sched_yield seccomp set_robust_list set_thread_area set_tid_address setitimer setpgid setpriority \
     setrlimit setsid sigaltstack sigprocmask sigreturn tgkill tkill ugetrlimit vfork wait4 waitid waitpid",
    // Users.
    "getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getresgid getresgid32 getresuid getresuid32 \
     getuid getuid32 setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setregid setregid32 setresgid \
     setresgid32 setresuid setresuid32 setreuid setreuid32 setuid setuid32",
    // Sockets and messages.
    "accept accept4 bind connect getpeername getsockname getsockopt ipc listen mq_getsetattr mq_notify mq_open mq_timedreceive \
     mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink msgctl msgget msgrcv msgsnd recv recvfrom recvmmsg \
     recvmmsg_time64 recvmsg semctl semget semop semtimedop semtimedop_time64 send sendmmsg sendmsg sendto setsockopt shmat \
     shmctl shmdt shmget shutdown socketcall socketpair",
    // Time and the machine. Setting the clock needs a capability as well.
    "adjtimex clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep \
     clock_nanosleep_time64 getrandom gettimeofday nanosleep sysinfo time timer_create timer_delete timer_getoverrun \
     timer_gettime timer_gettime64 timer_settime timer_settime64 times uname",
];

/// What capabilities add.
const WITH_CAPABILITY: &[(&str, &str)] = &[
    ("CAP_DAC_READ_SEARCH", "open_by_handle_at"),
    (
        "CAP_SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr move_mount \
         open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    ("CAP_SYS_BOOT", "reboot"),
    ("CAP_SYS_CHROOT", "chroot"),
    ("CAP_SYS_MODULE", "delete_module init_module finit_module"),
    ("CAP_SYS_PACCT", "acct"),
    ("CAP_SYS_PTRACE", "kcmp pidfd_getfd process_madvise"),
    ("CAP_SYS_RAWIO", "iopl ioperm"),
    ("CAP_SYS_TIME", "settimeofday stime clock_settime clock_settime64"),
    ("CAP_SYS_TTY_CONFIG", "vhangup"),
    ("CAP_SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("CAP_SYSLOG", "syslog"),
    ("CAP_BPF", "bpf"),
    ("CAP_PERFMON", "perf_event_open"),
];

fn rule(names: &[&str], action: &str) -> SyscallSpec {
    SyscallSpec {
        names: names.iter().flat_map(|n| n.split_ascii_whitespace()).map(str::to_owned).collect(),
        action: action.to_owned(),
        errno_ret: None,
        args: Vec::new(),
    }
}

fn conditional(name: &str, op: &str, value: u64) -> SyscallSpec {
    let arg = SyscallArgSpec { index: 0, value, value_two: 0, op: op.to_owned() };
    SyscallSpec { args: vec![arg], ..rule(&[name], ALLOW) }
}

/// The default profile for a process with these capabilities (`CAP_…`) in its bounding set.
pub(crate) fn default_profile(bounding: &[String]) -> SeccompSpec {
    let has = |name: &str| bounding.iter().any(|b| b == name);
    let mut syscalls = vec![rule(ALWAYS, ALLOW)];
    // Execution domains: Linux, UNAME26, no randomisation, and asking.
    for domain in [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff] {
        syscalls.push(conditional("personality", "SCMP_CMP_EQ", domain));
    }
    syscalls.push(conditional("socket", "SCMP_CMP_NE", AF_VSOCK));
    if !has("CAP_SYS_ADMIN") {
        syscalls.push(conditional("clone", "SCMP_CMP_MASKED_EQ", CLONE_NAMESPACES));
        // Its flags are behind a pointer; C libraries fall back to clone.
        syscalls.push(SyscallSpec { errno_ret: Some(38), ..rule(&["clone3"], "SCMP_ACT_ERRNO") });
    }
    for (capability, names) in WITH_CAPABILITY {
        if has(capability) {
            syscalls.push(rule(&[names], ALLOW));
        }
    }
    SeccompSpec {
        default_action: "SCMP_ACT_ERRNO".to_owned(),
        default_errno_ret: Some(1),
        architectures: vec!["SCMP_ARCH_X86_64".to_owned(), "SCMP_ARCH_X86".to_owned()],
        flags: Vec::new(),
        syscalls,
    }
}
