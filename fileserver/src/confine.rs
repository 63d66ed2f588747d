//! Taking everything away but the shares.
//!
//! ```text
//! more open files -> own namespaces -> clone the shares' mounts -> empty tmpfs as root, shares in it -> pivot
//!   -> few capabilities -> no new privileges, no dumps -> die with the parent -> few system calls
//! ```
//! The layers are those of every jail (`hyper_jail`); the order is its own, and it has no user namespace and stays root: files of the shares
//! belong to the ids that the guest's users have. A user who is not root starts it in a user namespace, in which that user is root, and has
//! no other ids: then all that is made belongs to that user. The shares are cloned before the root changes, so any path can be shared. Read-only is an attribute of the cloned mount: no request
//! of the guest, whatever it believes about the mount, can write through it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use hyper_jail::{JailError, UnshareFlags, ids, limits, privileges, root};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::mount::OpenTreeFlags;
use rustix::process::{Resource, Rlimit};

use crate::filter;
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
    #[error(transparent)]
    Jail(#[from] JailError),
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
    let alone = ids::is_alone()?;
    let guest_files = raise_open_files()?;
    let own = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    hyper_jail::namespaces(own).map_err(step("make namespaces"))?;
    // In a mount namespace of this user's, in which mounts can be cloned; it still follows what the host mounts.
    let trees: Result<Vec<_>, _> = spec.shares().iter().map(clone_share).collect();
    let trees = trees?;
    root::make_private().map_err(step("make mounts private"))?;
    let proc_self_fd =
        open("/proc/self/fd", OFlags::PATH | OFlags::DIRECTORY).map_err(step("open /proc/self/fd"))?;
    let mountinfo =
        open("/proc/self/mountinfo", OFlags::RDONLY).map_err(step("open /proc/self/mountinfo"))?;
    change_root(spec, trees)?;
    if !alone {
        // Who has a map of one group cannot: the kernel takes groups for limits, too.
        rustix::thread::set_thread_groups(&[]).map_err(io::Error::from).map_err(step("leave all groups"))?;
    }
    limits::set(Resource::Core, 0)?;
    privileges::keep_capabilities(privileges::FILE_SERVER)?;
    privileges::no_new_privileges()?;
    privileges::no_dumps()?;
    rustix::process::umask(Mode::empty());
    privileges::die_with_parent()?;
    filter::apply(alone)?;
    Ok(View { proc_self_fd: proc_self_fd.into(), mountinfo: mountinfo.into(), guest_files })
}

fn open(path: &str, flags: OFlags) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())?)
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
    let root = root::empty().map_err(step("make an empty root"))?;
    // The shares were cloned before.
    root::gain_foothold(&root).map_err(step("mount the empty root"))?;
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
        root::attach(&tree, &root, &share.name).map_err(failed("it cannot be mounted"))?;
    }
    root::enter(&root).map_err(step("change the root"))
}
