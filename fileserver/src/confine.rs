//! Taking everything away but the shares.
//!
//! ```text
//! die with the parent -> clone the shares' mounts -> own namespaces -> empty tmpfs as root, shares in it -> pivot
//!   -> more open files -> few capabilities -> no new privileges -> few system calls
//! ```
//! The shares are cloned before the root changes, so any path can be shared. Read-only is an attribute of the cloned mount: no request
//! of the guest, whatever it believes about the mount, can write through it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};
use rustix::process::{Resource, Rlimit, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::filter::{self, FilterError};
use crate::spec::{FileServerSpec, ShareSpec};
use crate::sys;

/// Descriptors to have: the server holds one per file that the guest's kernel knows.
const OPEN_FILES: u64 = 1_000_000;
/// Descriptors kept from the guest for the server's own use.
const RESERVED_FILES: u64 = 64;
/// Least number of descriptors that makes sense.
const MIN_OPEN_FILES: u64 = 1024;
/// What every share is mounted with: neither devices nor programs of the shares work for this process.
const HARMLESS: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
/// What acting for the guest's users takes. Not among them: `DAC_READ_SEARCH`, which opens files by handle around any mount.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);
/// Capability numbers that a bounding set can hold.
const CAPABILITY_NUMBERS: u32 = 64;

/// What could not be done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfineError {
    #[error("cannot {what}")]
    Step {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot share {source_path:?}: {what}")]
    Share {
        source_path: PathBuf,
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot share {0:?}: neither a directory nor a file")]
    Kind(PathBuf),
    #[error("only {0} files may be open, less than {MIN_OPEN_FILES}")]
    OpenFiles(u64),
    #[error("cannot restrict system calls")]
    Filter(#[from] FilterError),
}

fn step(what: &'static str) -> impl Fn(io::Error) -> ConfineError {
    move |source| ConfineError::Step { what, source }
}

/// What the server needs from outside its root.
#[derive(Debug)]
pub(crate) struct View {
    /// `/proc/self/fd`.
    pub(crate) proc_self_fd: File,
    /// `/proc/self/mountinfo`.
    pub(crate) mountinfo: File,
    /// Descriptors that may be held for the guest.
    pub(crate) guest_files: u64,
}

/// Confines this process, which must have one thread. What it had open stays open.
pub(crate) fn enter(spec: &FileServerSpec) -> Result<View, ConfineError> {
    die_with_parent()?;
    let guest_files = raise_open_files()?;
    let trees: Result<Vec<_>, _> = spec.shares().iter().map(clone_share).collect();
    let trees = trees?;
    sys::unshare_namespaces().map_err(step("make namespaces"))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private)
        .map_err(io::Error::from)
        .map_err(step("make mounts private"))?;
    let proc_self_fd =
        open("/proc/self/fd", OFlags::PATH | OFlags::DIRECTORY).map_err(step("open /proc/self/fd"))?;
    let mountinfo =
        open("/proc/self/mountinfo", OFlags::RDONLY).map_err(step("open /proc/self/mountinfo"))?;
    change_root(spec, trees)?;
    rustix::thread::set_thread_groups(&[]).map_err(io::Error::from).map_err(step("leave all groups"))?;
    keep_capabilities().map_err(step("drop capabilities"))?;
    rustix::thread::set_no_new_privs(true)
        .map_err(io::Error::from)
        .map_err(step("give up new privileges"))?;
    rustix::process::umask(Mode::empty());
    filter::apply()?;
    Ok(View { proc_self_fd: proc_self_fd.into(), mountinfo: mountinfo.into(), guest_files })
}

fn open(path: &str, flags: OFlags) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())?)
}

/// Should the parent have died before this, the connection's end is the end of this process: the VMM dies with its owner.
fn die_with_parent() -> Result<(), ConfineError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(io::Error::from)
        .map_err(step("ask to die with the parent"))
}

/// Raises the limit of open files; returns how many of them are for the guest.
fn raise_open_files() -> Result<u64, ConfineError> {
    let allowed = std::fs::read_to_string("/proc/sys/fs/nr_open")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(OPEN_FILES)
        .min(OPEN_FILES);
    let wanted = Rlimit { current: Some(allowed), maximum: Some(allowed) };
    let raised = rustix::process::setrlimit(Resource::Nofile, wanted).is_ok();
    let count = if raised {
        allowed
    } else {
        // Not allowed to raise it: as far as the hard limit goes.
        let limit = rustix::process::getrlimit(Resource::Nofile);
        let most = limit.maximum.unwrap_or(allowed);
        let wanted = Rlimit { current: Some(most), maximum: limit.maximum };
        rustix::process::setrlimit(Resource::Nofile, wanted)
            .map_err(io::Error::from)
            .map_err(step("raise the number of open files"))?;
        most
    };
    if count < MIN_OPEN_FILES { Err(ConfineError::OpenFiles(count)) } else { Ok(count - RESERVED_FILES) }
}

/// A detached copy of what is mounted at a share's source, with what is mounted below it.
fn clone_share(share: &ShareSpec) -> Result<OwnedFd, ConfineError> {
    let failed = |what| {
        move |source: io::Error| ConfineError::Share { source_path: share.source.clone(), what, source }
    };
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = rustix::mount::open_tree(CWD, &share.source, flags)
        .map_err(io::Error::from)
        .map_err(failed("no such mount can be made"))?;
    let read_only = if share.read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    sys::set_mount_attributes(tree.as_fd(), HARMLESS | read_only, share.live)
        .map_err(failed("its mount cannot be restricted"))?;
    Ok(tree)
}

/// Makes an empty tmpfs with the shares in it the root, and lets go of everything else.
fn change_root(spec: &FileServerSpec, trees: Vec<OwnedFd>) -> Result<(), ConfineError> {
    let root = make_root().map_err(step("make an empty root"))?;
    // Any directory that exists does as a foothold; the shares were cloned before.
    attach(&root, CWD, "/proc").map_err(step("mount the empty root"))?;
    for (share, tree) in spec.shares().iter().zip(trees) {
        let failed = |what| {
            move |source: io::Error| ConfineError::Share { source_path: share.source.clone(), what, source }
        };
        let stat = rustix::fs::statat(&tree, "", AtFlags::EMPTY_PATH)
            .map_err(io::Error::from)
            .map_err(failed("it cannot be looked at"))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => rustix::fs::mkdirat(&root, &share.name, Mode::RWXU),
            FileType::RegularFile => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::WRONLY;
                rustix::fs::openat(&root, &share.name, flags, Mode::RUSR).map(drop)
            }
            _ => return Err(ConfineError::Kind(share.source.clone())),
        }
        .map_err(io::Error::from)
        .map_err(failed("no mount point can be made"))?;
        attach(&tree, &root, &share.name).map_err(failed("it cannot be mounted"))?;
    }
    pivot(&root).map_err(step("change the root"))?;
    // The root itself takes no new names; the shares keep their own attributes.
    rustix::mount::mount_remount("/", root_flags(), "")
        .map_err(io::Error::from)
        .map_err(step("make the root read-only"))
}

fn root_flags() -> rustix::mount::MountFlags {
    use rustix::mount::MountFlags as Flags;
    Flags::BIND | Flags::RDONLY | Flags::NOSUID | Flags::NODEV | Flags::NOEXEC
}

fn make_root() -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "mode", "0755")?;
    // Mount points only.
    rustix::mount::fsconfig_set_string(&context, "size", "1m")?;
    rustix::mount::fsconfig_create(&context)?;
    Ok(rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?)
}

fn attach(tree: &OwnedFd, at: impl AsFd, name: &str) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(rustix::mount::move_mount(tree, "", at, name, flags)?)
}

fn pivot(root: &OwnedFd) -> io::Result<()> {
    rustix::process::fchdir(root)?;
    // Puts the old root on top of the new one, from where it is taken away.
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}

fn keep_capabilities() -> io::Result<()> {
    for number in 0..CAPABILITY_NUMBERS {
        let Some(capability) = CapabilitySet::from_bits(1 << number) else { continue };
        if !CAPABILITIES.contains(capability) {
            match rustix::thread::remove_capability_from_bounding_set(capability) {
                // A kernel that does not know it.
                Err(rustix::io::Errno::INVAL) => {}
                other => other?,
            }
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    let sets = CapabilitySets {
        effective: CAPABILITIES,
        permitted: CAPABILITIES,
        inheritable: CapabilitySet::empty(),
    };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}
