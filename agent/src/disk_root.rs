//! A root of disks on the wire, checked.

use hyper_protocol::rpc::agent as wire;

use hyper_protocol::MAX_DISK_PARTS;

use crate::disk::check_serial;
use crate::error::AgentError;
use crate::plan::{DiskFolder, DiskMount, DiskName, DiskPath, DiskRoot, RootOfDisks};

/// File systems that disks are mounted as.
const KINDS: [&str; 2] = ["erofs", "ext4"];

/// Checks a root.
///
/// # Errors
/// Anything in it that cannot be right.
pub(crate) fn check(root: wire::DiskRoot) -> Result<DiskRoot, AgentError> {
    for count in [root.mounts.len(), root.folders.len()] {
        bound(count)?;
    }
    let mounts: Vec<_> = root.mounts.into_iter().map(mount).collect::<Result<_, _>>()?;
    let path = |at: wire::DiskPath| path(at, mounts.len());
    let folder = |folder: wire::DiskFolder| {
        Ok(DiskFolder { at: path(folder.at.unwrap_or_default())?, mode: folder.mode })
    };
    let folders = root.folders.into_iter().map(folder).collect::<Result<_, AgentError>>()?;
    let root = match root.root {
        Some(wire::disk_root::Root::Folder(folder)) => RootOfDisks::Folder(path(folder)?),
        Some(wire::disk_root::Root::Overlay(overlay)) => {
            bound(overlay.lower.len())?;
            let lower: Vec<_> = overlay.lower.into_iter().map(path).collect::<Result<_, _>>()?;
            let writable = match (overlay.upper.into_option(), overlay.work.into_option()) {
                (Some(upper), Some(work)) => Some((path(upper)?, path(work)?)),
                (None, None) if lower.len() > 1 => None,
                _ => return Err(AgentError::invalid("an overlay of one layer, or without a work folder")),
            };
            RootOfDisks::Overlay { lower, writable }
        }
        Some(_) | None => return Err(AgentError::invalid("a root of disks without a root")),
    };
    Ok(DiskRoot { mounts, folders, root })
}

fn bound(count: usize) -> Result<(), AgentError> {
    if count > MAX_DISK_PARTS {
        Err(AgentError::limit("parts of a root of disks", MAX_DISK_PARTS))
    } else {
        Ok(())
    }
}

fn mount(one: wire::DiskMount) -> Result<DiskMount, AgentError> {
    bound(one.devices.len())?;
    if !KINDS.contains(&one.kind.as_str()) {
        return Err(AgentError::invalid(format!("a disk of kind {:?}", one.kind)));
    }
    let disk = name(one.disk.unwrap_or_default())?;
    let devices = one.devices.into_iter().map(name).collect::<Result<_, _>>()?;
    Ok(DiskMount { disk, kind: one.kind, read_only: one.read_only, devices })
}

fn name(one: wire::DiskName) -> Result<DiskName, AgentError> {
    check_serial(&one.serial)?;
    if usize::try_from(one.part).is_ok_and(|part| part <= MAX_DISK_PARTS) {
        Ok(DiskName { serial: one.serial, part: one.part })
    } else {
        Err(AgentError::invalid(format!("there is no part {} of disk {}", one.part, one.serial)))
    }
}

/// It becomes part of a mount option.
fn path(at: wire::DiskPath, mounts: usize) -> Result<DiskPath, AgentError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/');
    let steps = at.path.split('/').all(|step| !matches!(step, "" | "." | ".."));
    if !(at.path.is_empty() || steps && at.path.bytes().all(plain)) {
        return Err(AgentError::invalid(format!("folder {:?} of a disk", at.path)));
    }
    if usize::try_from(at.mount).is_ok_and(|mount| mount < mounts) {
        Ok(DiskPath { mount: at.mount, path: at.path })
    } else {
        Err(AgentError::invalid(format!("there is no disk {} in this root", at.mount)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(mount: u32, path: &str) -> wire::DiskPath {
        wire::DiskPath { mount, path: path.to_owned(), ..Default::default() }
    }

    fn disk(kind: &str) -> wire::DiskMount {
        let name = wire::DiskName { serial: "bay0-0".to_owned(), part: 3, ..Default::default() };
        wire::DiskMount { disk: Some(name).into(), kind: kind.to_owned(), ..Default::default() }
    }

    fn root(mounts: Vec<wire::DiskMount>, root: wire::disk_root::Root) -> wire::DiskRoot {
        wire::DiskRoot { mounts, root: Some(root), ..Default::default() }
    }

    #[test]
    fn roots_are_checked() {
        use wire::disk_root::Root::{Folder, Overlay};
        assert!(check(root(vec![disk("erofs")], Folder(at(0, "upper/fs")))).is_ok());
        for bad in [at(1, ""), at(0, "/"), at(0, "../x"), at(0, "a,b"), at(0, "a:b")] {
            assert!(check(root(vec![disk("erofs")], Folder(bad))).is_err());
        }
        assert!(check(root(vec![disk("vfat")], Folder(at(0, "")))).is_err());
        assert!(check(root(vec![disk("ext4"); MAX_DISK_PARTS], Folder(at(0, "")))).is_ok());
        assert!(check(root(vec![disk("ext4"); MAX_DISK_PARTS + 1], Folder(at(0, "")))).is_err());
        let mut beyond = disk("ext4");
        beyond.disk.mut_or_insert_default().part = 161;
        assert!(check(root(vec![beyond], Folder(at(0, "")))).is_err());
        assert!(check(root(vec![wire::DiskMount::default()], Folder(at(0, "")))).is_err());
        assert!(check(wire::DiskRoot::default()).is_err());
        let overlay = |lower: &[u32], upper: bool, work: bool| {
            let mut overlay = wire::DiskOverlay::new();
            overlay.lower = lower.iter().map(|mount| at(*mount, "")).collect();
            overlay.upper = upper.then(|| at(0, "upper")).into();
            overlay.work = work.then(|| at(0, "work")).into();
            check(root(vec![disk("ext4"), disk("erofs")], Overlay(overlay)))
        };
        assert!(overlay(&[1], true, true).is_ok());
        assert!(overlay(&[0, 1], false, false).is_ok());
        assert!(overlay(&[1], false, false).is_err());
        assert!(overlay(&[1], true, false).is_err());
        assert!(overlay(&[2], true, true).is_err());
    }
}
