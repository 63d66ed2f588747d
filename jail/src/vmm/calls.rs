//! The system calls of hyper-vmm, each with its reason. Tables add up: see [`super::Kind`].

use crate::filter::{Call, Check, Is, Probe, call};

/// Bits of a mapping's protection that make it executable.
const EXECUTABLE: u32 = libc::PROT_EXEC as u32;
/// Flags of `clone` without which it makes a process, not a thread.
const THREAD: u32 =
    (libc::CLONE_THREAD | libc::CLONE_SIGHAND | libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_FS) as u32;
/// Flags of `clone` that no thread needs: namespaces, and being traced.
const STRANGE: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_PTRACE
    | libc::CLONE_PARENT
    | libc::CLONE_IO) as u32;

/// An argument that is this number.
const fn is(argument: u8, number: i32) -> Check {
    (argument, Is::Equal(number.cast_unsigned()))
}

/// Numbers of requests to KVM, as include/uapi/asm-generic/ioctl.h makes them: direction, bytes of the argument, number.
const fn kvm(direction: u32, bytes: u32, number: u32) -> Check {
    (1, Is::Equal(direction << 30 | bytes << 16 | 0xae << 8 | number))
}

const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;
const BOTH: u32 = 3;

/// Calls of a disk's worker, and of any thread's runtime.
pub const DISK: &[Call] = &[
    call(libc::SYS_read, "event descriptors"),
    call(libc::SYS_write, "event descriptors, the log"),
    call(libc::SYS_close, "descriptors that are done with"),
    call(libc::SYS_pread64, "reads of the guest's disk"),
    call(libc::SYS_pwrite64, "writes to the guest's disk"),
    call(libc::SYS_fdatasync, "flushes of the guest's disk"),
    call(libc::SYS_fallocate, "discards of the guest's disk; the balloon's pages"),
    call(libc::SYS_epoll_wait, "waiting for the guest's doorbell"),
    call(libc::SYS_epoll_pwait, "waiting, in newer C libraries"),
    call(libc::SYS_mmap, "heap and stacks; run pages of vCPUs").only(&[
        &[(2, Is::Without(EXECUTABLE)), (3, Is::With(libc::MAP_PRIVATE as u32))],
        &[(2, Is::Without(EXECUTABLE)), (3, Is::Without(libc::MAP_ANONYMOUS as u32))],
    ]),
    call(libc::SYS_mprotect, "heap and stacks").only(&[&[(2, Is::Without(EXECUTABLE))]]),
    call(libc::SYS_mremap, "heap"),
    call(libc::SYS_munmap, "heap and stacks"),
    call(libc::SYS_brk, "heap"),
    call(libc::SYS_madvise, "stacks of threads that ended; pages that the guest gives back"),
    call(libc::SYS_futex, "locks and conditions"),
    call(libc::SYS_sched_yield, "locks"),
    call(libc::SYS_clock_gettime, "time, where the vDSO has none"),
    call(libc::SYS_getrandom, "keys of hash tables; the guest's entropy"),
    call(libc::SYS_getpid, "signals to own threads"),
    call(libc::SYS_gettid, "signals to own threads"),
    call(libc::SYS_tgkill, "bringing vCPUs out of the guest; aborting").only(&[&[(0, Is::OwnProcess)]]),
    call(libc::SYS_rt_sigprocmask, "starting threads; aborting"),
    call(libc::SYS_rt_sigreturn, "after the signal that brings a vCPU out"),
    call(libc::SYS_sigaltstack, "starting and ending threads"),
    call(libc::SYS_set_robust_list, "starting threads"),
    call(libc::SYS_rseq, "starting threads"),
    call(libc::SYS_sched_getaffinity, "starting threads: size of the stack; count of arenas"),
    call(libc::SYS_prctl, "names of threads; what applying a filter begins with").only(&[
        &[is(0, libc::PR_SET_NAME)],
        &[is(0, libc::PR_GET_NAME)],
        &[is(0, libc::PR_SET_NO_NEW_PRIVS)],
    ]),
    call(libc::SYS_seccomp, "a thread's own filter, on top of its maker's"),
    call(libc::SYS_restart_syscall, "waits that a signal interrupted"),
    call(libc::SYS_exit, "end of a thread"),
    call(libc::SYS_exit_group, "end of the process"),
];

/// Calls of a virtual processor, beside those.
pub const VCPU: &[Call] = &[
    call(libc::SYS_ioctl, "running the guest").only(&[
        // KVM_RUN, first because it is by far the most frequent.
        &[kvm(NONE, 0, 0x80)],
        // KVM_KVMCLOCK_CTRL, after a pause.
        &[kvm(NONE, 0, 0xad)],
    ]),
    call(libc::SYS_clone, "workers of devices that the guest starts; vCPUs that come later")
        .only(&[&[(0, Is::With(THREAD)), (0, Is::Without(STRANGE))]]),
    call(libc::SYS_ppoll, "room in the console's pipe"),
    call(libc::SYS_eventfd2, "devices that the guest starts"),
    call(libc::SYS_epoll_create1, "devices that the guest starts"),
    call(libc::SYS_epoll_ctl, "devices that the guest starts"),
    call(libc::SYS_timerfd_create, "the vsock device's deadlines"),
    call(libc::SYS_timerfd_settime, "the vsock device's deadlines"),
    call(libc::SYS_fcntl, "copies of descriptors, and how they are open").only(&[
        &[is(1, libc::F_DUPFD_CLOEXEC)],
        &[is(1, libc::F_GETFL)],
        &[is(1, libc::F_SETFL)],
        &[is(1, libc::F_GETFD)],
    ]),
    call(libc::SYS_sendmsg, "the file server, with descriptors"),
    call(libc::SYS_recvmsg, "the file server; the control socket"),
    call(libc::SYS_shutdown, "ending a file server's or a program's connection"),
];

/// Calls of the event thread, beside those.
pub const EVENTS: &[Call] = &[
    call(libc::SYS_ioctl, "machines that grow and are saved").only(&[
        &[kvm(NONE, 0, 0x80)],
        &[kvm(NONE, 0, 0xad)],
        // KVM_SET_USER_MEMORY_REGION: memory that comes and goes.
        &[kvm(WRITE, 32, 0x46)],
        // vCPUs that come: KVM_CREATE_VCPU, GET_TSC_KHZ, SET_CPUID2, SET_MSRS, SET_XCRS, GET_LAPIC, SET_LAPIC.
        &[kvm(NONE, 0, 0x41)],
        &[kvm(NONE, 0, 0xa3)],
        &[kvm(WRITE, 8, 0x90)],
        &[kvm(WRITE, 8, 0x89)],
        &[kvm(WRITE, 392, 0xa7)],
        &[kvm(READ, 1024, 0x8e)],
        &[kvm(WRITE, 1024, 0x8f)],
        // Saving: KVM_GET_MSR_INDEX_LIST, CHECK_EXTENSION, GET_IRQCHIP, GET_CLOCK, GET_REGS, GET_SREGS, GET_MSRS, GET_MP_STATE,
        // GET_VCPU_EVENTS, GET_DEBUGREGS, GET_XSAVE, GET_XCRS.
        &[kvm(BOTH, 4, 0x02)],
        &[kvm(NONE, 0, 0x03)],
        &[kvm(BOTH, 520, 0x62)],
        &[kvm(READ, 48, 0x7c)],
        &[kvm(READ, 144, 0x81)],
        &[kvm(READ, 312, 0x83)],
        &[kvm(BOTH, 8, 0x88)],
        &[kvm(READ, 4, 0x98)],
        &[kvm(READ, 64, 0x9f)],
        &[kvm(READ, 128, 0xa1)],
        &[kvm(READ, 4096, 0xa4)],
        &[kvm(READ, 392, 0xa6)],
        // FIONBIO: connections of programs do not make this thread wait.
        &[(1, Is::Equal(0x5421))],
    ]),
    call(libc::SYS_accept4, "programs that connect to the guest"),
    call(libc::SYS_recvfrom, "bytes of programs that are connected to the guest"),
    call(libc::SYS_sendto, "bytes to programs; the control socket").only(&[&[(4, Is::Null)]]),
    call(libc::SYS_writev, "bytes to programs"),
    call(libc::SYS_socketpair, "a connection of the guest to a program, one end of which is handed over")
        .only(&[&[
            is(0, libc::AF_UNIX),
            is(1, libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC),
            is(2, 0),
        ]]),
    call(libc::SYS_lseek, "size of a disk that is attached; parts of memory that are not empty, to be saved"),
    call(libc::SYS_fstat, "length of a file, where statx is missing"),
    call(libc::SYS_ftruncate, "the file that memory is saved in"),
];

/// Calls that libraries try and do without.
pub const PROBES: &[Probe] = &[
    (
        libc::SYS_clone3,
        libc::ENOSYS,
        "the C library: its argument cannot be looked into, and it falls back to clone",
    ),
    (libc::SYS_open, libc::ENOENT, "C libraries that count processors by a file"),
    (libc::SYS_openat, libc::ENOENT, "C libraries that count processors by a file"),
    (libc::SYS_readlink, libc::ENOENT, "C libraries that look for their program"),
    (libc::SYS_statx, libc::ENOSYS, "the standard library, which falls back to fstat"),
    (libc::SYS_membarrier, libc::ENOSYS, "libraries that can do with a slower way"),
];
