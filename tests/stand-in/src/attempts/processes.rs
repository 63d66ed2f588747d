//! Other processes of the host: to see, stop, read and become them.

use std::io;

use super::{Attempt, any, held, works};
use crate::sys::{address, call};

/// Process ids that are tried, beside one's own and that of the stand-in itself, which is the first.
const FIRST: usize = 2;
const LAST: usize = 33_000;

pub(super) const ALL: &[Attempt] = &[
    held("list processes", |_| std::fs::read_dir("/proc")?.next().map_or(missing(), |_| Ok(()))),
    held("find a process to signal", |_| others(|pid| works(libc::SYS_kill, &[pid, 0]))),
    held("find a thread to signal", |_| others(|pid| works(libc::SYS_tgkill, &[pid, pid, 0]))),
    held("queue a signal for all", |_| works(libc::SYS_kill, &[usize::MAX, 0])),
    held("trace a process", |_| {
        const SEIZE: usize = 0x4206;
        others(|pid| works(libc::SYS_ptrace, &[SEIZE, pid, 0, 0]))
    }),
    held("read another process's memory", |_| {
        let buffer = [0_u8; 8];
        let ours = [address(&buffer), buffer.len()];
        // No address of another is known; one that is not mapped would be EFAULT, which is past the check.
        others(|pid| {
            let done = works(
                libc::SYS_process_vm_readv,
                &[pid, address(&ours), 1, address(&[0x1000_usize, 8]), 1, 0],
            );
            match done {
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Ok(()),
                other => other,
            }
        })
    }),
    held("open another process", |_| others(|pid| works(libc::SYS_pidfd_open, &[pid, 0]))),
    held("change another process's limits", |_| {
        let old = [0_u64; 2];
        others(|pid| works(libc::SYS_prlimit64, &[pid, libc::RLIMIT_NOFILE as usize, 0, address(&old)]))
    }),
    held("ask for another process's session", |_| others(|pid| works(libc::SYS_getsid, &[pid]))),
    held("compare with another process", |_| others(|pid| works(libc::SYS_kcmp, &[pid, pid, 2, 0, 0]))),
    held("give another process its processors", |_| {
        let all = [u64::MAX; 16];
        others(|pid| works(libc::SYS_sched_getaffinity, &[pid, size_of_val(&all), address(&all)]))
    }),
    held("run before all others", |_| works(libc::SYS_setpriority, &[0, 0, (-20_isize).cast_unsigned()])),
    held("run in real time", |_| {
        let priority = 50_i32;
        works(libc::SYS_sched_setscheduler, &[0, libc::SCHED_FIFO as usize, address(&priority)])
    }),
    held("see the parent outside", |_| if call(libc::SYS_getppid, &[])? > 1 { Ok(()) } else { missing() }),
    held("make a process", |_| {
        let child = call(libc::SYS_clone, &[libc::SIGCHLD as usize, 0, 0, 0, 0])?;
        if child == 0 {
            call(libc::SYS_exit_group, &[0])?;
        }
        Ok(())
    })
    .only_filter(),
    held("become another program", |_| execute(libc::SYS_execve)),
    held("become another program by a descriptor", |_| execute(libc::SYS_execveat)),
    held("become a program of one's own making", |_| {
        let program = call(libc::SYS_memfd_create, &[c"program".as_ptr() as usize, 0])?;
        let program = usize::try_from(program).unwrap_or(usize::MAX);
        call(libc::SYS_write, &[program, c"#!/bin/true\n".as_ptr() as usize, 12])?;
        let none = 0_usize;
        let empty = c"".as_ptr() as usize;
        let flags = libc::AT_EMPTY_PATH as usize;
        works(libc::SYS_execveat, &[program, empty, address(&none), address(&none), flags])
    })
    .inside_only(),
];

fn missing() -> io::Result<()> {
    Err(io::Error::from_raw_os_error(libc::ENOENT))
}

fn others(attempt: impl Fn(usize) -> io::Result<()>) -> io::Result<()> {
    let own = std::process::id() as usize;
    any((FIRST..LAST).filter(|pid| *pid != own).map(attempt))
}

/// Ends with another program, whose exit code then is that of what got out.
fn execute(number: i64) -> io::Result<()> {
    let program = c"/bin/sh".as_ptr() as usize;
    let words = [program, c"-c".as_ptr() as usize, c"exit 250".as_ptr() as usize, 0];
    let none = 0_usize;
    if number == libc::SYS_execveat {
        return works(number, &[libc::AT_FDCWD as usize, program, address(&words), address(&none), 0]);
    }
    works(number, &[program, address(&words), address(&none)])
}
