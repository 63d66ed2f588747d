//! Taking so much of the host that others have none.

use std::io;
use std::os::fd::AsRawFd;

use hyper_jail::vmm::{OPEN_FILES, OWN_BYTES, TASKS};

use super::{Attempt, any, held, works};
use crate::sys::{address, call};
use crate::world::World;

/// More than a file of the test is long.
const LONG: usize = 1 << 40;
const PRIVATE: usize = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as usize;
const SHARED: usize = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as usize;
const READ_WRITE: usize = (libc::PROT_READ | libc::PROT_WRITE) as usize;

pub(super) const ALL: &[Attempt] = &[
    held("fill memory", |_| {
        let bytes = usize::try_from(OWN_BYTES).unwrap_or(usize::MAX) + (64 << 20);
        works(libc::SYS_mmap, &[0, bytes, READ_WRITE, PRIVATE, usize::MAX, 0])
    }),
    held("fill memory bit by bit", |_| {
        let part = 16_usize << 20;
        let parts = usize::try_from(OWN_BYTES).unwrap_or(usize::MAX) / part + 4;
        (0..parts).try_for_each(|_| works(libc::SYS_mmap, &[0, part, READ_WRITE, PRIVATE, usize::MAX, 0]))
    }),
    held("fill memory by what is shared", |_| {
        works(libc::SYS_mmap, &[0, 64 << 20, READ_WRITE, SHARED, usize::MAX, 0])
    })
    .only_filter(),
    held("fill memory by the heap", |_| {
        let end = call(libc::SYS_brk, &[0])?;
        let wanted = end + i64::try_from(OWN_BYTES).unwrap_or(i64::MAX);
        let got = call(libc::SYS_brk, &[usize::try_from(wanted).unwrap_or(usize::MAX)])?;
        if got == wanted { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENOMEM)) }
    })
    .inside_only(),
    held("keep memory from being swapped", |_| {
        let at = call(libc::SYS_mmap, &[0, 1 << 20, READ_WRITE, PRIVATE, usize::MAX, 0])?;
        works(libc::SYS_mlock, &[usize::try_from(at).unwrap_or(0), 1 << 20])
    }),
    held("have a file in memory", |_| works(libc::SYS_memfd_create, &[c"more".as_ptr() as usize, 0]))
        .only_filter(),
    held("have shared memory", |_| works(libc::SYS_shmget, &[0, 1 << 20, 0o600])).only_filter(),
    held("have a message queue", |_| {
        let flags = (libc::O_CREAT | libc::O_RDWR) as usize;
        works(libc::SYS_mq_open, &[c"stand-in".as_ptr() as usize, flags, 0o600, 0])?;
        works(libc::SYS_mq_unlink, &[c"stand-in".as_ptr() as usize])
    }),
    held("fill the table of processes", |_| {
        let mut children = Vec::new();
        let made = (0..=TASKS).try_for_each(|_| {
            let child = call(libc::SYS_clone, &[libc::SIGCHLD as usize, 0, 0, 0, 0])?;
            if child == 0 {
                call(libc::SYS_pause, &[])?;
            }
            children.push(child);
            Ok(())
        });
        for child in children {
            works(libc::SYS_kill, &[usize::try_from(child).unwrap_or(0), libc::SIGKILL as usize])?;
            works(libc::SYS_wait4, &[usize::try_from(child).unwrap_or(0), 0, 0, 0])?;
        }
        made
    }),
    held("fill the table of descriptors", |_| {
        (0..=OPEN_FILES).try_for_each(|_| works(libc::SYS_fcntl, &[2, libc::F_DUPFD_CLOEXEC as usize, 0]))
    })
    .inside_only(),
    held("make a disk longer than it was", |world| {
        disks(world, |fd| works(libc::SYS_ftruncate, &[fd, LONG]))
    })
    .inside_only(),
    held("write beyond the end of a disk", |world| {
        disks(world, |fd| works(libc::SYS_pwrite64, &[fd, address(&[1_u8; 512]), 512, LONG]))
    })
    .inside_only(),
    held("reserve room beyond the end of a disk", |world| {
        disks(world, |fd| works(libc::SYS_fallocate, &[fd, 0, 0, LONG]))
    })
    .inside_only(),
];

/// A run without a writable disk proves nothing, so it counts as having got out.
fn disks(world: &World, attempt: impl Fn(usize) -> io::Result<()>) -> io::Result<()> {
    let files = world.writable_files();
    if files.is_empty() {
        return Ok(());
    }
    any(files.into_iter().map(|fd| attempt(fd.as_raw_fd().unsigned_abs() as usize)))
}
