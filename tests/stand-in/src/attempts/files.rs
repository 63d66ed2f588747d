//! The host's files, by every name and by none.

use std::fs::File;
use std::io;

use super::{Attempt, any, held, works};
use crate::sys::{address, call};
use crate::world::{HOST_FILE, World};

/// Descriptors that are looked at.
const DESCRIPTORS: usize = 1024;
const HERE: usize = libc::AT_FDCWD as usize;

pub(super) const ALL: &[Attempt] = &[
    held("open a host file by its absolute path", |_| File::open(HOST_FILE).map(drop)),
    held("open a host file through ..", |_| File::open(format!("../../../../..{HOST_FILE}")).map(drop)),
    held("open a host file through /proc/self/root", |_| {
        File::open(format!("/proc/self/root{HOST_FILE}")).map(drop)
    }),
    held("open a host file through /proc/1/root", |_| {
        File::open(format!("/proc/1/root{HOST_FILE}")).map(drop)
    }),
    held("open a host file through /proc/self/cwd", |_| {
        File::open(format!("/proc/self/cwd/../../..{HOST_FILE}")).map(drop)
    }),
    held("open /dev/kvm again", |_| File::open("/dev/kvm").map(drop)),
    held("open /dev/mem", |_| File::open("/dev/mem").map(drop)),
    held("open /dev/kmsg", |_| File::open("/dev/kmsg").map(drop)),
    held("open /sys", |_| File::open("/sys/kernel").map(drop)),
    held("find anything at all in the root", |_| {
        let found = std::fs::read_dir("/")?.count();
        if found > 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENOENT)) }
    }),
    held("open a host file by its handle", by_handle).inside_only(),
    held("open a host file through an inherited descriptor", |_| {
        any((0..DESCRIPTORS).map(|fd| works(libc::SYS_openat, &[fd, c"etc/passwd".as_ptr() as usize, 0])))
    })
    .inside_only(),
    held("leave through an inherited directory", |_| {
        any((0..DESCRIPTORS).map(|fd| works(libc::SYS_fchdir, &[fd])))
    })
    .inside_only(),
    held("create a file", |_| {
        File::create("/hyper-stand-in").and_then(|_| std::fs::remove_file("/hyper-stand-in"))
    }),
    held("create a directory", |_| {
        std::fs::create_dir("/hyper-stand-in-d").and_then(|()| std::fs::remove_dir("/hyper-stand-in-d"))
    }),
    held("make a device node of a disk", |_| device("/hyper-stand-in-b", libc::S_IFBLK, 8, 0)),
    held("make a device node of memory", |_| device("/hyper-stand-in-c", libc::S_IFCHR, 1, 1)),
    held("watch the host's files with fanotify", |_| works(libc::SYS_fanotify_init, &[0, 0])),
    held("list the host's mounts", |_| File::open("/proc/self/mountinfo").map(drop)),
    held("ask for a host file's status", |_| std::fs::metadata(HOST_FILE).map(drop)),
    held("read a link to the program", |_| std::fs::read_link("/proc/self/exe").map(drop)),
    held("make a link to a host file", |_| {
        std::fs::hard_link(HOST_FILE, "/hyper-stand-in-l")
            .and_then(|()| std::fs::remove_file("/hyper-stand-in-l"))
    })
    .inside_only(),
];

fn by_handle(world: &World) -> io::Result<()> {
    let mounts = (0..DESCRIPTORS).chain([HERE]);
    any(mounts.map(|fd| works(libc::SYS_open_by_handle_at, &[fd, address(&world.handle), 0])))
}

fn device(path: &str, kind: u32, major: u32, minor: u32) -> io::Result<()> {
    let name = std::ffi::CString::new(path)?;
    let mode = (kind | 0o600) as usize;
    let number = usize::try_from(libc::makedev(major, minor)).unwrap_or(0);
    call(libc::SYS_mknodat, &[HERE, name.as_ptr() as usize, mode, number])?;
    std::fs::remove_file(path)
}
