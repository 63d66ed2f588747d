//! A root with nothing in it: a tmpfs of one's own, and the host's tree let go of.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    UnmountFlags,
};

/// Any directory that exists on every host does as a foothold for the new root.
const FOOTHOLD: &str = "/proc";

/// An empty file system that is mounted nowhere yet.
///
/// # Errors
/// What the kernel answers.
pub fn empty() -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "mode", "0755")?;
    // Mount points at most.
    rustix::mount::fsconfig_set_string(&context, "size", "1m")?;
    rustix::mount::fsconfig_create(&context)?;
    Ok(rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?)
}

/// Mounts what has no place yet.
///
/// # Errors
/// What the kernel answers.
pub fn attach(tree: &OwnedFd, at: impl AsFd, name: &str) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(rustix::mount::move_mount(tree, "", at, name, flags)?)
}

/// Keeps what happens to mounts here from the host, and the other way round. For a mount namespace of one's own.
///
/// # Errors
/// What the kernel answers.
pub fn make_private() -> io::Result<()> {
    Ok(rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?)
}

/// Puts the new root where the host's tree is still seen, so that it can be filled.
///
/// # Errors
/// What the kernel answers.
pub fn gain_foothold(root: &OwnedFd) -> io::Result<()> {
    attach(root, CWD, FOOTHOLD)
}

/// Makes it the root of this mount namespace, for reading only, and lets go of everything else. What is mounted in it keeps its own
/// attributes.
///
/// # Errors
/// What the kernel answers.
pub fn enter(root: &OwnedFd) -> io::Result<()> {
    rustix::process::fchdir(root)?;
    // Puts the old root on top of the new one, from where it is taken away.
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    let flags =
        MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(rustix::mount::mount_remount("/", flags, "")?)
}
