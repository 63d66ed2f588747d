//! Copies the content of a folder into another: what an image has at the place of a new, empty volume.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

use crate::error::{AgentError, Tried};

/// Deepest folder that is copied; each level holds two descriptors.
const MAX_DEPTH: usize = 200;
/// Most hard links that are kept as such, a descriptor each; beyond, they become copies.
const MAX_LINKS: usize = 4096;
/// Largest extended attribute, bytes (`XATTR_SIZE_MAX`).
const MAX_XATTR_BYTES: usize = 65_536;

/// Whether a folder holds nothing.
///
/// # Errors
/// It cannot be read.
pub(crate) fn is_empty(folder: BorrowedFd<'_>) -> Result<bool, Errno> {
    let folder = open_dir(folder, c".")?;
    for entry in Dir::read_from(&folder)? {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Copies everything in `from` into `to`, with owners, modes, times and extended attributes, those of the folder itself too.
///
/// # Errors
/// The first thing that could not be copied.
pub(crate) fn copy_tree(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), AgentError> {
    let tried = || "copy the image's content into the volume".to_owned();
    let from = open_dir(from, c".").tried(tried)?;
    let to = open_dir(to, c".").tried(tried)?;
    let mut copy = Copy { links: HashMap::new() };
    copy.folder(&from, &to, 0).map_err(|(name, errno)| AgentError::System {
        tried: format!("copy {} into the volume", name.to_string_lossy()),
        source: errno.into(),
    })
}

fn open_dir(folder: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(
        folder,
        name,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

type Failed = (CString, Errno);

struct Copy {
    /// Inode of the source to the folder and name of its first copy.
    links: HashMap<(u64, u64), (OwnedFd, CString)>,
}

impl Copy {
    fn folder(&mut self, from: &OwnedFd, to: &OwnedFd, depth: usize) -> Result<(), Failed> {
        let at = |name: &CStr| {
            let name = name.to_owned();
            move |errno| (name, errno)
        };
        if depth > MAX_DEPTH {
            return Err((c"a folder".to_owned(), Errno::NAMETOOLONG));
        }
        for entry in Dir::read_from(from).map_err(at(c"."))? {
            let entry = entry.map_err(at(c"."))?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW).map_err(at(name))?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                let source = open_dir(from.as_fd(), name).map_err(at(name))?;
                match rustix::fs::mkdirat(to, name, Mode::from_raw_mode(0o700)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err((name.to_owned(), errno)),
                }
                let target = open_dir(to.as_fd(), name).map_err(at(name))?;
                self.folder(&source, &target, depth.saturating_add(1))?;
            } else {
                self.file(from, to, name, &stat).map_err(at(name))?;
            }
        }
        let stat = rustix::fs::fstat(from).map_err(at(c"."))?;
        copy_attributes(from, to, &stat).map_err(at(c"."))
    }

    fn file(&mut self, from: &OwnedFd, to: &OwnedFd, name: &CStr, stat: &Stat) -> Result<(), Errno> {
        let inode = (stat.st_dev, stat.st_ino);
        if let Some((folder, first)) = self.links.get(&inode) {
            return rustix::fs::linkat(folder, first.as_c_str(), to, name, AtFlags::empty());
        }
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => copy_content(from, to, name, stat)?,
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(from, name, Vec::new())?;
                rustix::fs::symlinkat(target.as_c_str(), to, name)?;
                own(to, name, stat)?;
            }
            kind => {
                rustix::fs::mknodat(to, name, kind, mode_of(stat), stat.st_rdev)?;
                own(to, name, stat)?;
                rustix::fs::chmodat(to, name, mode_of(stat), AtFlags::empty())?;
            }
        }
        if stat.st_nlink > 1 && self.links.len() < MAX_LINKS {
            let folder = to.try_clone().map_err(|_| Errno::MFILE)?;
            self.links.insert(inode, (folder, name.to_owned()));
        }
        Ok(())
    }
}

fn mode_of(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode & 0o7777)
}

fn own(folder: &OwnedFd, name: &CStr, stat: &Stat) -> Result<(), Errno> {
    let (uid, gid) = (rustix::fs::Uid::from_raw(stat.st_uid), rustix::fs::Gid::from_raw(stat.st_gid));
    rustix::fs::chownat(folder, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
}

fn copy_content(from: &OwnedFd, to: &OwnedFd, name: &CStr, stat: &Stat) -> Result<(), Errno> {
    let read = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let source = rustix::fs::openat(from, name, read, Mode::empty())?;
    let write = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let target = rustix::fs::openat(to, name, write, Mode::from_raw_mode(0o600))?;
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let n = rustix::io::read(&source, &mut buffer)?;
        let Some(mut rest) = buffer.get(..n).filter(|r| !r.is_empty()) else { break };
        while !rest.is_empty() {
            let written = rustix::io::write(&target, rest)?;
            rest = rest.get(written..).unwrap_or_default();
        }
    }
    copy_attributes(&source, &target, stat)
}

fn copy_attributes(from: &OwnedFd, to: &OwnedFd, stat: &Stat) -> Result<(), Errno> {
    let (uid, gid) = (rustix::fs::Uid::from_raw(stat.st_uid), rustix::fs::Gid::from_raw(stat.st_gid));
    rustix::fs::fchown(to, Some(uid), Some(gid))?;
    // After the owner: changing it clears set-user-id.
    rustix::fs::fchmod(to, mode_of(stat))?;
    copy_xattrs(from, to)?;
    let time =
        |sec: i64, nsec: u64| Timespec { tv_sec: sec, tv_nsec: i64::try_from(nsec).unwrap_or_default() };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    };
    rustix::fs::futimens(to, &times)
}

fn copy_xattrs(from: &OwnedFd, to: &OwnedFd) -> Result<(), Errno> {
    let mut names = vec![0; MAX_XATTR_BYTES];
    let len = match rustix::fs::flistxattr(from, names.as_mut_slice()) {
        Ok(len) => len,
        Err(Errno::NOTSUP) => return Ok(()),
        Err(errno) => return Err(errno),
    };
    let mut value = vec![0; MAX_XATTR_BYTES];
    for name in names.get(..len).unwrap_or_default().split(|b| *b == 0).filter(|n| !n.is_empty()) {
        // Overlay's own notes describe the layer, not the file.
        if name.starts_with(b"trusted.") {
            continue;
        }
        let n = rustix::fs::fgetxattr(from, name, value.as_mut_slice())?;
        match rustix::fs::fsetxattr(to, name, value.get(..n).unwrap_or_default(), XattrFlags::empty()) {
            Ok(()) | Err(Errno::NOTSUP | Errno::PERM) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[test]
    fn a_tree_is_copied_whole() {
        let dir = std::env::temp_dir().join(format!("hyper-agent-copy-{}", std::process::id()));
        let (from, to) = (dir.join("from"), dir.join("to"));
        std::fs::create_dir_all(from.join("a/b")).unwrap();
        std::fs::create_dir_all(&to).unwrap();
        std::fs::write(from.join("a/file"), vec![7; 300_000]).unwrap();
        std::fs::set_permissions(from.join("a/file"), std::fs::Permissions::from_mode(0o4751)).unwrap();
        std::fs::hard_link(from.join("a/file"), from.join("a/b/same")).unwrap();
        symlink("/nowhere", from.join("link")).unwrap();
        std::fs::set_permissions(&from, std::fs::Permissions::from_mode(0o1777)).unwrap();
        let (source, target) = (std::fs::File::open(&from).unwrap(), std::fs::File::open(&to).unwrap());
        assert!(is_empty(target.as_fd()).unwrap());
        copy_tree(source.as_fd(), target.as_fd()).unwrap();
        assert!(!is_empty(target.as_fd()).unwrap());
        assert_eq!(std::fs::read(to.join("a/file")).unwrap(), vec![7; 300_000]);
        let (file, same) = (to.join("a/file").metadata().unwrap(), to.join("a/b/same").metadata().unwrap());
        assert_eq!(file.mode() & 0o7777, 0o4751);
        assert_eq!(file.ino(), same.ino());
        assert_eq!(std::fs::read_link(to.join("link")).unwrap(), std::path::Path::new("/nowhere"));
        assert_eq!(to.metadata().unwrap().mode() & 0o7777, 0o1777);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
