//! The fence: every raw system call of the agent that no safe crate offers, each behind a safe function.
//!
// UNSAFETY: the agent is PID 1 and needs port I/O, fork, execve with an exact environment, seccomp, BPF and a few ioctls, for
// which rustix has no safe form.
#![expect(unsafe_code, reason = "raw system calls, one per function, each with its preconditions answered")]

use std::collections::BTreeSet;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use rustix::process::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What [`fork`] returns.
#[derive(Debug)]
pub(crate) enum Fork {
    /// In the parent: the child's pid in the caller's pid namespace.
    Parent(Pid),
    /// In the child.
    Child,
}

/// One instruction of a classic BPF program, as the kernel reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct SockFilter {
    /// Operation.
    pub code: u16,
    /// Jump if true, in instructions.
    pub jt: u8,
    /// Jump if false, in instructions.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// One instruction of an eBPF program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct BpfInsn {
    /// Operation.
    pub code: u8,
    /// Destination register in the low half, source in the high half.
    pub regs: u8,
    /// Offset of a jump or of a memory access.
    pub off: i16,
    /// Immediate operand.
    pub imm: i32,
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Writes one byte to an I/O port.
///
/// # Errors
/// What `ioperm` answers: no privilege, or a kernel without it.
pub(crate) fn write_port(port: u16, value: u8) -> io::Result<()> {
    // SAFETY: changes only the permission of this thread for one port.
    check(libc::c_long::from(unsafe { libc::ioperm(port.into(), 1, 1) }))?;
    // SAFETY: the port is permitted; `out` reads and writes no memory and leaves the flags alone.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags));
    }
    // SAFETY: as above; permissions must not outlive this call, children would have them too.
    check(libc::c_long::from(unsafe { libc::ioperm(port.into(), 1, 0) }))?;
    Ok(())
}

/// Takes ownership of a descriptor that this process was started with. Each number can be taken once.
///
/// # Errors
/// The descriptor is not open, is a standard one, or was taken.
pub(crate) fn take_inherited_fd(number: RawFd) -> io::Result<OwnedFd> {
    static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());
    let mut taken = TAKEN.lock().map_err(|_| io::Error::from(io::ErrorKind::Deadlock))?;
    if number <= 2 || taken.contains(&number) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: fcntl with F_SETFD on a number that is not open fails with EBADF and does nothing else.
    check(libc::c_long::from(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) }))?;
    taken.insert(number);
    // SAFETY: the number is open, came from our parent, and the table above gives it out once; nothing in this program opened it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Sends a signal by number, real-time ones too.
///
/// # Errors
/// What `kill` answers.
pub(crate) fn kill(pid: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: touches no memory of ours.
    check(libc::c_long::from(unsafe { libc::kill(pid.as_raw_nonzero().get(), signal) }))?;
    Ok(())
}

/// Forks. Only for programs of one thread: the child goes on in Rust code, with the allocator in use.
///
/// # Errors
/// What `fork` answers, such as too many processes, and a refusal when there is more than one thread.
pub(crate) fn fork() -> io::Result<Fork> {
    if std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() > 1) {
        return Err(io::Error::other("fork in a program of several threads"));
    }
    // SAFETY: one thread, so no lock can be held by a thread that does not exist in the child.
    let pid = check(libc::c_long::from(unsafe { libc::fork() }))?;
    Ok(i32::try_from(pid).ok().and_then(Pid::from_raw).map_or(Fork::Child, Fork::Parent))
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|s| s.as_ptr()).chain(std::iter::once(std::ptr::null())).collect()
}

/// Replaces the program. Returns only with the error.
pub(crate) fn execve(path: &CString, argv: &[CString], env: &[CString]) -> io::Error {
    let (argv, env) = (pointers(argv), pointers(env));
    // SAFETY: all three are NUL-terminated and the arrays end with a null pointer; they live until the call returns.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// As [`execve`], with the program named by a descriptor.
pub(crate) fn fexecve(program: BorrowedFd<'_>, argv: &[CString], env: &[CString]) -> io::Error {
    let (argv, env) = (pointers(argv), pointers(env));
    // SAFETY: the path is an empty C string (AT_EMPTY_PATH), the arrays end with a null pointer and live until the call returns.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            env.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}

/// Sets every signal to its default action and unblocks all of them, as a new program expects.
pub(crate) fn reset_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        // SAFETY: SIG_DFL installs no code; numbers that the C library keeps for itself are refused with an error.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    set_signal_mask(libc::SIG_UNBLOCK);
}

/// Blocks all signals, so that [`wait_signal`] sees them.
pub(crate) fn block_signals() {
    set_signal_mask(libc::SIG_BLOCK);
}

fn full_set() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigfillset writes the whole set.
    unsafe { libc::sigfillset(set.as_mut_ptr()) };
    // SAFETY: it was just written.
    unsafe { set.assume_init() }
}

fn set_signal_mask(how: libc::c_int) {
    let set = full_set();
    // SAFETY: the set is initialised; the old mask is not asked for.
    unsafe { libc::sigprocmask(how, &raw const set, std::ptr::null_mut()) };
}

/// Waits for any signal and takes it. All must be blocked.
///
/// # Errors
/// `EINTR` when stopped and continued.
pub(crate) fn wait_signal() -> io::Result<i32> {
    let set = full_set();
    // SAFETY: the set is initialised; no information block is asked for.
    let signal =
        check(libc::c_long::from(unsafe { libc::sigwaitinfo(&raw const set, std::ptr::null_mut()) }))?;
    i32::try_from(signal).map_err(io::Error::other)
}

/// Marks all descriptors from `first` on close-on-exec.
///
/// # Errors
/// What `close_range` answers.
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: sets a flag on descriptors; closes nothing now.
    check(unsafe {
        libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    })?;
    Ok(())
}

/// Sets and clears attributes (`MOUNT_ATTR_*`) of the mount that `tree` names, with those below it when `recursive`.
///
/// # Errors
/// What `mount_setattr` answers.
pub(crate) fn mount_setattr(tree: BorrowedFd<'_>, set: u64, clear: u64, recursive: bool) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: set, attr_clr: clear, propagation: 0, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string; the structure and its size belong together.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    })?;
    Ok(())
}

/// Largest amount of entropy taken at once, bytes.
pub(crate) const MAX_ENTROPY_BYTES: usize = 512;

/// Mixes bytes into the kernel's random number generator and counts them as full entropy.
///
/// # Errors
/// Too many bytes, or what the ioctl answers.
pub(crate) fn add_entropy(device: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    #[repr(C)]
    struct RandPoolInfo {
        entropy_count: libc::c_int,
        buf_size: libc::c_int,
        buf: [u8; MAX_ENTROPY_BYTES],
    }
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    let mut info = RandPoolInfo { entropy_count: 0, buf_size: 0, buf: [0; MAX_ENTROPY_BYTES] };
    let Some(target) = info.buf.get_mut(..bytes.len()) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    target.copy_from_slice(bytes);
    info.buf_size = i32::try_from(bytes.len()).map_err(io::Error::other)?;
    info.entropy_count = info.buf_size * 8;
    // SAFETY: the kernel reads `buf_size` bytes behind the two counters; they are there, bounded above.
    check(libc::c_long::from(unsafe {
        libc::ioctl(device.as_raw_fd(), RNDADDENTROPY as libc::Ioctl, &raw const info)
    }))?;
    Ok(())
}

/// Has the kernel's generator begin anew from its pool at once; without it, what was mixed in counts only with the next reseeding, up to a
/// minute later.
///
/// # Errors
/// What the ioctl answers.
pub(crate) fn reseed(device: BorrowedFd<'_>) -> io::Result<()> {
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    // SAFETY: the request has no argument.
    check(libc::c_long::from(unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG as libc::Ioctl) }))?;
    Ok(())
}

/// Makes part `number` of a disk: `count` sectors from `first` on.
///
/// # Errors
/// What the ioctl answers: such a part is there already, or lies outside the disk.
pub(crate) fn add_part(disk: BorrowedFd<'_>, number: i32, first: u64, count: u64) -> io::Result<()> {
    const BLKPG: libc::c_ulong = 0x1269;
    const BLKPG_ADD_PARTITION: libc::c_int = 1;
    const NAME_BYTES: usize = 64;
    #[repr(C)]
    struct Partition {
        start: libc::c_longlong,
        length: libc::c_longlong,
        number: libc::c_int,
        names: [[u8; NAME_BYTES]; 2],
    }
    #[repr(C)]
    struct Argument {
        operation: libc::c_int,
        flags: libc::c_int,
        length: libc::c_int,
        data: *mut Partition,
    }
    let bytes = |sectors: u64| {
        let bytes = sectors.checked_mul(512).and_then(|bytes| i64::try_from(bytes).ok());
        bytes.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
    };
    let names = [[0; NAME_BYTES]; 2];
    let mut part = Partition { start: bytes(first)?, length: bytes(count)?, number, names };
    let length = size_of::<Partition>() as libc::c_int;
    let argument = Argument { operation: BLKPG_ADD_PARTITION, flags: 0, length, data: &raw mut part };
    // SAFETY: the kernel reads the argument and the partition that it points to; both outlive the call.
    check(libc::c_long::from(unsafe {
        libc::ioctl(disk.as_raw_fd(), BLKPG as libc::Ioctl, &raw const argument)
    }))?;
    Ok(())
}

/// Installs a seccomp filter on this thread.
///
/// # Errors
/// A program that the kernel refuses, or missing privilege (`CAP_SYS_ADMIN` or `no_new_privs`).
pub(crate) fn install_seccomp(program: &[SockFilter], flags: u64) -> io::Result<()> {
    #[repr(C)]
    struct SockFprog {
        len: u16,
        filter: *const SockFilter,
    }
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    let prog = SockFprog { len, filter: program.as_ptr() };
    const SECCOMP_SET_MODE_FILTER: libc::c_ulong = 1;
    // SAFETY: `filter` points at `len` instructions that live until the call returns; the kernel checks the program.
    check(unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &raw const prog) })?;
    Ok(())
}

/// Registers a file whose changes the kernel signals as priority events, as files of cgroups do.
///
/// # Errors
/// It is not such a file, or there is no runtime.
pub(crate) fn watch_priority(file: std::fs::File) -> io::Result<AsyncFd<std::fs::File>> {
    // SAFETY: a File owns its descriptor, always gives the same number and keeps it open until it is dropped.
    unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }.map_err(Into::into)
}

/// Loads an eBPF program that decides on device access and attaches it to a cgroup.
///
/// # Errors
/// The verifier refuses it, or the kernel has no `CONFIG_CGROUP_BPF`.
pub(crate) fn attach_device_filter(cgroup: BorrowedFd<'_>, program: &[BpfInsn]) -> io::Result<()> {
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log: [u64; 2],
        rest: [u64; 8],
    }
    #[repr(C)]
    struct Attach {
        target_fd: u32,
        attach_bpf_fd: u32,
        attach_type: u32,
        attach_flags: u32,
        rest: [u64; 8],
    }
    const BPF_PROG_LOAD: libc::c_long = 5;
    const BPF_PROG_ATTACH: libc::c_long = 8;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    const BPF_CGROUP_DEVICE: u32 = 6;
    let license = c"Apache-2.0";
    let load = Load {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(program.len()).map_err(io::Error::other)?,
        insns: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        ..Load::default()
    };
    // SAFETY: pointers and counts describe live memory; all fields that are not used are zero, as the kernel demands.
    let fd =
        check(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>()) })?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just returned it to us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let attach = Attach {
        target_fd: u32::try_from(cgroup.as_raw_fd()).map_err(io::Error::other)?,
        attach_bpf_fd: u32::try_from(fd.as_raw_fd()).map_err(io::Error::other)?,
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: 0,
        rest: [0; 8],
    };
    // SAFETY: both descriptors are open and the structure is as long as said.
    check(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<Attach>()) })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inherited_descriptors_are_given_out_once() {
        assert!(take_inherited_fd(1).is_err());
        assert!(take_inherited_fd(-1).is_err());
        assert!(take_inherited_fd(9999).is_err());
    }

    #[test]
    fn too_much_entropy_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let error = add_entropy(std::os::fd::AsFd::as_fd(&null), &[0; MAX_ENTROPY_BYTES + 1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn fork_is_refused_with_threads() {
        // The test harness runs tests in threads of their own.
        assert!(fork().is_err());
    }
}
