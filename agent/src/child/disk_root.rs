//! A root that is put together from disks: each is mounted at a place of its own, then one folder of them, or an overlay, is the root.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::fs::{Gid, Mode, Uid};
use rustix::mount::{MountFlags, mount};

use super::rootfs::{self, DISK_DIR, ROOT_DIR, make_dir, open_root};
use crate::disk;
use crate::error::{AgentError, Tried};
use crate::plan::{DiskMount, DiskPath, DiskRoot, RootOfDisks};

/// Mounts the root at [`ROOT_DIR`]. Returns its descriptor.
///
/// # Errors
/// A disk that is not there, or a mount that fails.
pub(crate) fn build(root: &DiskRoot) -> Result<OwnedFd, AgentError> {
    // Places for the mounts, and for a work folder that is none.
    mount("tmpfs", DISK_DIR, "tmpfs", MountFlags::NOATIME, Some(c"mode=0755,size=64k"))
        .tried(|| "mount the places of disks".to_owned())?;
    for (index, one) in root.mounts.iter().enumerate() {
        let place = format!("{DISK_DIR}/{index}");
        make_dir(&place)?;
        mount_disk(one, &place)?;
    }
    for folder in &root.folders {
        make_folder(&folder.at, folder.mode)?;
    }
    match &root.root {
        RootOfDisks::Folder(folder) => {
            let place = place(folder);
            let folder = rootfs::open_folder(&place)?;
            rootfs::bind(folder.as_fd())
        }
        RootOfDisks::Overlay { lower, writable } => overlay(lower, writable.as_ref()),
    }
}

fn mount_disk(one: &DiskMount, place: &str) -> Result<(), AgentError> {
    let deadline = Instant::now().checked_add(disk::APPEAR_TIMEOUT);
    let nodes: Vec<_> = disk::wait_for_names(std::iter::once(&one.disk).chain(&one.devices), deadline)?;
    let mut flags = MountFlags::NOATIME;
    if one.read_only {
        flags |= MountFlags::RDONLY;
    }
    let mut nodes = nodes.iter().map(|node| node.display().to_string());
    let node = nodes.next().unwrap_or_default();
    let mut options: Vec<String> = nodes.map(|node| format!("device={node}")).collect();
    if one.kind == "ext4" && one.read_only {
        // Its journal cannot be replayed on a disk that cannot be written to.
        options.push("noload".to_owned());
    }
    let options = c_string(options.join(","))?;
    mount(node.as_str(), place, one.kind.as_str(), flags, Some(options.as_c_str()))
        .tried(|| format!("mount disk {} ({node}) as {}", one.disk.serial, one.kind))
}

/// Where a folder of a disk is, now that the disk is mounted.
fn place(path: &DiskPath) -> String {
    format!("{DISK_DIR}/{}", relative(path))
}

/// The same, in [`DISK_DIR`].
fn relative(path: &DiskPath) -> String {
    let DiskPath { mount, path } = path;
    if path.is_empty() { mount.to_string() } else { format!("{mount}/{path}") }
}

fn make_folder(at: &DiskPath, mode: u32) -> Result<(), AgentError> {
    let place = place(at);
    if make_dir(&place)? {
        rustix::fs::chmod(place.as_str(), Mode::from_raw_mode(mode & 0o7777))
            .tried(|| format!("change mode of {place}"))?;
    }
    Ok(())
}

fn overlay(lower: &[DiskPath], writable: Option<&(DiskPath, DiskPath)>) -> Result<OwnedFd, AgentError> {
    // The places are named from where they are: the options are one page at most.
    rustix::process::chdir(DISK_DIR).tried(|| format!("change to {DISK_DIR}"))?;
    let layers: Vec<String> = lower.iter().map(relative).collect();
    let mut options = format!("lowerdir={}", layers.join(":"));
    let mut flags = MountFlags::RDONLY;
    if let Some((upper, work)) = writable {
        let (upper, work) = (place(upper), place(work));
        if let Some(top) = lower.first() {
            inherit(&place(top), &upper)?;
        }
        // As for images of our own: what names places in the layers is the same at every mount.
        options.push_str(&format!(",upperdir={upper},workdir={work},redirect_dir=on,index=off,metacopy=off"));
        flags = MountFlags::empty();
    }
    let options = c_string(options)?;
    mount("overlay", ROOT_DIR, "overlay", flags, Some(options.as_c_str()))
        .tried(|| "mount the root's overlay".to_owned())?;
    open_root()
}

/// The merged root shows the upper layer's attributes: they are those of the layer below it as long as nothing was written.
fn inherit(top: &str, upper: &str) -> Result<(), AgentError> {
    let fresh = std::fs::read_dir(upper).tried(|| format!("list {upper}"))?.next().is_none();
    if !fresh {
        return Ok(());
    }
    let from = rustix::fs::stat(top).tried(|| format!("look at {top}"))?;
    rustix::fs::chown(upper, Some(Uid::from_raw(from.st_uid)), Some(Gid::from_raw(from.st_gid)))
        .tried(|| format!("change owner of {upper}"))?;
    rustix::fs::chmod(upper, Mode::from_raw_mode(from.st_mode & 0o7777))
        .tried(|| format!("change mode of {upper}"))
}

fn c_string(text: String) -> Result<CString, AgentError> {
    CString::new(text).map_err(|_| AgentError::invalid("a path holds a NUL byte"))
}
