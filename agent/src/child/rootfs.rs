//! The root file system: a read-only image disk under a writable layer.
//!
//! Everything is mounted in the container's own mount namespace, so that all of it goes when the container goes: there is nothing
//! to undo.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::mount::{MountFlags, mount};

use super::fs;
use crate::disk;
use crate::error::{AgentError, Tried};

/// Where the parts are put while the root is built; made at boot, hidden by the change of root.
pub(crate) const IMAGE_DIR: &str = "/run/hyper/image";
/// The writable layer's disk.
pub(crate) const DISK_DIR: &str = "/run/hyper/disk";
/// The root itself.
pub(crate) const ROOT_DIR: &str = "/run/hyper/root";
/// Shares.
pub(crate) const SHARE_DIR: &str = "/run/hyper/share";
/// Injected files.
pub(crate) const FILES_DIR: &str = "/run/hyper/files";
/// Memory that containers have in common.
pub(crate) const MEMORY_DIR: &str = "/run/hyper/memory";
/// Where sockets of the host have their listeners.
pub(crate) const SOCKET_DIR: &str = "/run/hyper/socket";
/// All of them.
pub(crate) const DIRS: [&str; 7] =
    [IMAGE_DIR, DISK_DIR, ROOT_DIR, SHARE_DIR, FILES_DIR, MEMORY_DIR, SOCKET_DIR];

/// Mounts the root at [`ROOT_DIR`]. Returns its descriptor.
///
/// # Errors
/// A disk that does not appear within [`disk::APPEAR_TIMEOUT`], or a mount that fails.
pub(crate) fn build(image_disk: &str, writable_disk: &str) -> Result<OwnedFd, AgentError> {
    let deadline = Instant::now().checked_add(disk::APPEAR_TIMEOUT);
    let wanted: Vec<&str> = [image_disk, writable_disk].into_iter().filter(|s| !s.is_empty()).collect();
    let found = disk::wait_for(&wanted, deadline)?;
    let mut found = found.iter();
    if let Some(image) = found.next() {
        mount(image.as_path(), IMAGE_DIR, "erofs", MountFlags::RDONLY | MountFlags::NOATIME, None)
            .tried(|| format!("mount image disk {image_disk} ({}) as erofs", image.display()))?;
    }
    match found.next() {
        Some(writable) => {
            mount(writable.as_path(), DISK_DIR, "ext4", MountFlags::NOATIME, None)
                .tried(|| format!("mount writable disk {writable_disk} ({}) as ext4", writable.display()))?;
        }
        None => {
            mount("tmpfs", DISK_DIR, "tmpfs", MountFlags::NOATIME, Some(c"mode=0755"))
                .tried(|| "mount the writable layer's tmpfs".to_owned())?;
        }
    }
    overlay()
}

/// Makes a folder of a share the root, mounted at [`ROOT_DIR`]. Returns its descriptor.
///
/// # Errors
/// What the kernel answers.
pub(crate) fn bind(folder: BorrowedFd<'_>) -> Result<OwnedFd, AgentError> {
    let place = open_root()?;
    let mount = fs::clone_of(folder, false).tried(|| "take a mount of the root's share".to_owned())?;
    fs::attach(mount.as_fd(), place.as_fd()).tried(|| "mount the root's share".to_owned())?;
    drop(place);
    open_root()
}

/// Mounts the shares that are wanted and not there, and walks through the folders that lead to what is wanted in them. Returns the tags
/// that are new. Works on the agent's own mounts.
///
/// # Errors
/// What the kernel answers.
pub(crate) fn mount_shares(
    have: &BTreeSet<String>,
    wanted: &[(String, String)],
) -> Result<BTreeSet<String>, AgentError> {
    let mut new = BTreeSet::new();
    for (tag, path) in wanted {
        let place = format!("{SHARE_DIR}/{tag}");
        if !have.contains(tag) && !new.contains(tag) {
            make_dir(&place)?;
            mount(tag.as_str(), place.as_str(), "virtiofs", MountFlags::NODEV, None)
                .tried(|| format!("mount virtio-fs share {tag}"))?;
            new.insert(tag.clone());
        }
        if let Some((folder, _)) = path.trim_start_matches('/').rsplit_once('/') {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            // What is not there is for the container's own program to say.
            let _ = rustix::fs::open(format!("{place}/{folder}/."), flags, Mode::empty());
        }
    }
    Ok(new)
}

pub(super) fn open_root() -> Result<OwnedFd, AgentError> {
    open_folder(ROOT_DIR)
}

pub(super) fn open_folder(path: &str) -> Result<OwnedFd, AgentError> {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .tried(|| format!("open {path}"))
}

/// Mounts memory that containers have in common, world-writable as `/dev/shm` is. Works on the agent's own mounts.
///
/// # Errors
/// What the kernel answers.
pub(crate) fn mount_memory(name: &str, size_bytes: u64) -> Result<(), AgentError> {
    let place = format!("{MEMORY_DIR}/{name}");
    make_dir(&place)?;
    let size = if size_bytes == 0 { "50%".to_owned() } else { size_bytes.to_string() };
    let options = std::ffi::CString::new(format!("mode=1777,size={size}"))
        .map_err(|_| AgentError::invalid("NUL in an option"))?;
    let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("shm", place.as_str(), "tmpfs", flags, Some(options.as_c_str()))
        .tried(|| format!("mount shared memory {name} of {size} bytes"))
}

fn overlay() -> Result<OwnedFd, AgentError> {
    let (upper, work) = (format!("{DISK_DIR}/upper"), format!("{DISK_DIR}/work"));
    let image = rustix::fs::stat(IMAGE_DIR).tried(|| format!("look at {IMAGE_DIR}"))?;
    let fresh = make_dir(&upper)?;
    make_dir(&work)?;
    if fresh {
        // The merged root shows the upper layer's attributes.
        rustix::fs::chown(
            upper.as_str(),
            Some(Uid::from_raw(image.st_uid)),
            Some(Gid::from_raw(image.st_gid)),
        )
        .tried(|| format!("change owner of {upper}"))?;
        rustix::fs::chmod(upper.as_str(), Mode::from_raw_mode(image.st_mode & 0o7777))
            .tried(|| format!("change mode of {upper}"))?;
    }
    // redirect_dir: folders of the image can be renamed. It names places in the image, which is the same at every mount, so it
    // survives; index and metacopy would tie the layer to more than that.
    let options = format!(
        "lowerdir={IMAGE_DIR},upperdir={upper},workdir={work},redirect_dir=on,index=off,metacopy=off"
    );
    let options =
        std::ffi::CString::new(options).map_err(|_| AgentError::invalid("a path holds a NUL byte"))?;
    mount("overlay", ROOT_DIR, "overlay", MountFlags::empty(), Some(options.as_c_str()))
        .tried(|| "mount the root's overlay".to_owned())?;
    open_root()
}

pub(super) fn make_dir(path: &str) -> Result<bool, AgentError> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::EXIST) => Ok(false),
        Err(errno) => Err(errno).tried(|| format!("make {path}")),
    }
}

/// Makes the folder mounted at [`ROOT_DIR`] the root of this mount namespace, and lets go of the old one.
///
/// # Errors
/// What the kernel answers.
pub(crate) fn enter(root: &OwnedFd) -> Result<(), AgentError> {
    rustix::process::fchdir(root.as_fd()).tried(|| "enter the container's root".to_owned())?;
    rustix::process::pivot_root(".", ".").tried(|| "change to the container's root".to_owned())?;
    rustix::mount::unmount(".", rustix::mount::UnmountFlags::DETACH)
        .tried(|| "let go of the old root".to_owned())?;
    rustix::process::chdir("/").tried(|| "enter /".to_owned())
}
