//! Calls that rustix does not offer safely.
// UNSAFETY: `mount_setattr` has no safe wrapper.
#![expect(unsafe_code, reason = "a system call without a safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Attributes of a mount (`struct mount_attr`, Linux 5.12).
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Sets attributes on the mount that `mount` refers to and on all mounts below it. A live one follows what its original has mounted
/// and unmounted.
pub(crate) fn set_mount_attributes(mount: BorrowedFd<'_>, attributes: u64, live: bool) -> io::Result<()> {
    let propagation = if live { libc::MS_SLAVE } else { libc::MS_PRIVATE };
    let attr = MountAttr { attr_set: attributes, attr_clr: 0, propagation, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: the path is a C string and `attr` a `struct mount_attr` of the size given; both outlive the call, which writes
    // to neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
