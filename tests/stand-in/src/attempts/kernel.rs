//! The kernel itself: parts of it that a VMM has no use for, and power over the whole machine.

use std::io;

use super::{Attempt, held, works};
use crate::sys::{Word, address, call};

/// Two pages.
const BYTES: usize = 8192;
const ANONYMOUS: usize = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;

pub(super) const ALL: &[Attempt] = &[
    held("load a BPF program", |_| bpf(5, &program())),
    held("make a BPF map", |_| bpf(0, &[1 | 4 << 32, 4 | 1 << 32, 0, 0, 0, 0, 0, 0, 0])).inside_only(),
    held("use io_uring", |_| {
        let parameters = [0_u32; 30];
        works(libc::SYS_io_uring_setup, &[8, address(&parameters)])
    })
    .only_filter(),
    held("watch a processor with perf", |_| {
        // PERF_TYPE_SOFTWARE, size, PERF_COUNT_SW_CPU_CLOCK; all processes on processor 0.
        let mut attributes = [0_u64; 16];
        attributes[0] = 1 | 128 << 32;
        works(libc::SYS_perf_event_open, &[address(&attributes), usize::MAX, 0, usize::MAX, 0])
    }),
    held("handle the kernel's page faults", |_| works(libc::SYS_userfaultfd, &[0])),
    held("handle one's own page faults", |_| works(libc::SYS_userfaultfd, &[1])).only_filter(),
    held("add a key", |_| {
        let (kind, name) = (c"user".as_ptr() as usize, c"stand-in".as_ptr() as usize);
        works(libc::SYS_add_key, &[kind, name, name, 8, (-1_isize).cast_unsigned()])
    })
    .only_filter(),
    held("ask for a key", |_| {
        let (kind, name) = (c"user".as_ptr() as usize, c"of-the-host".as_ptr() as usize);
        works(libc::SYS_request_key, &[kind, name, 0, 0])
    })
    .inside_only(),
    held("read the keyring of the user that started it", |_| {
        const DESCRIBE: usize = 6;
        const USER_SESSION: isize = -5;
        let text = [0_u8; 256];
        works(libc::SYS_keyctl, &[DESCRIBE, USER_SESSION.cast_unsigned(), address(&text), text.len()])
    })
    .only_filter(),
    held("load a module", |_| works(libc::SYS_init_module, &[0x1000, 16, c"".as_ptr() as usize]))
        .inside_only(),
    held("load a module from a descriptor", |_| {
        works(libc::SYS_finit_module, &[0, c"".as_ptr() as usize, 0])
    })
    .inside_only(),
    held("remove a module", |_| works(libc::SYS_delete_module, &[c"kvm".as_ptr() as usize, 0])).inside_only(),
    held("load another kernel", |_| works(libc::SYS_kexec_load, &[0, 0, 0, 0])).inside_only(),
    held("load another kernel from a file", |_| works(libc::SYS_kexec_file_load, &[0, 0, 0, 0, 0]))
        .inside_only(),
    held("restart the host", |_| works(libc::SYS_reboot, &[0xfee1_dead, 672_274_793, 0x0123_4567, 0]))
        .inside_only(),
    held("use a file for swapping", |_| works(libc::SYS_swapon, &[c"/swap".as_ptr() as usize, 0]))
        .inside_only(),
    held("stop swapping", |_| works(libc::SYS_swapoff, &[c"/swap".as_ptr() as usize])).inside_only(),
    held("keep accounts of processes", |_| works(libc::SYS_acct, &[0])).inside_only(),
    held("clear the kernel's log", |_| works(libc::SYS_syslog, &[5, 0, 0])).inside_only(),
    held("set the time", |_| {
        let now = [1_700_000_000_i64, 0];
        works(libc::SYS_clock_settime, &[libc::CLOCK_REALTIME as usize, address(&now)])
    })
    .inside_only(),
    held("use the machine's ports", |_| works(libc::SYS_ioperm, &[0x80, 1, 1])),
    held("use all of the machine's ports", |_| works(libc::SYS_iopl, &[3])),
    held("set quotas", |_| works(libc::SYS_quotactl, &[0x80_0001, 0, 0, 0])).inside_only(),
    held("hang up the terminal", |_| works(libc::SYS_vhangup, &[])).inside_only(),
    held("type at a terminal", |_| {
        let key = b'x';
        super::any((0..3).map(|fd| works(libc::SYS_ioctl, &[fd, libc::TIOCSTI as usize, address(&key)])))
    })
    .inside_only(),
    held("change how programs are laid out", |_| works(libc::SYS_personality, &[0x004_0000])).only_filter(),
    held("have segments of one's own", |_| works(libc::SYS_modify_ldt, &[0, 0, 0])).only_filter(),
    held("make a second machine", |world| works(libc::SYS_ioctl, &[world.kvm(), 0xae01, 0])).only_filter(),
    held("map memory that can be run", |_| map(libc::PROT_READ | libc::PROT_EXEC)).only_filter(),
    held("make memory runnable", |_| {
        let at = call(libc::SYS_mmap, &[0, BYTES, 3, ANONYMOUS, usize::MAX, 0])?;
        let protection = (libc::PROT_READ | libc::PROT_EXEC) as usize;
        works(libc::SYS_mprotect, &[usize::try_from(at).unwrap_or(0), BYTES, protection])
    })
    .only_filter(),
    held("handle a signal anew", |_| {
        let action = [0_usize; 4];
        works(libc::SYS_rt_sigaction, &[libc::SIGSYS as usize, address(&action), 0, 8])
    })
    .only_filter(),
];

fn map(protection: i32) -> io::Result<()> {
    works(libc::SYS_mmap, &[0, BYTES, protection.unsigned_abs() as usize, ANONYMOUS, usize::MAX, 0])
}

/// `r0 = 0; exit`.
const INSTRUCTIONS: [u64; 2] = [0xb7, 0x95];

/// `union bpf_attr` of BPF_PROG_LOAD: a kprobe's program, which root alone may load.
fn program() -> [u64; 9] {
    [2 | 2 << 32, address(&INSTRUCTIONS) as u64, c"GPL".as_ptr() as u64, 0, 0, 0, 0, 0, 0]
}

fn bpf(command: Word, attributes: &[u64; 9]) -> io::Result<()> {
    works(libc::SYS_bpf, &[command, address(attributes), 48])
}
