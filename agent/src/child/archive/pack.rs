//! Files to tar.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io::{BufWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use tar::{Builder, EntryType, Header};

use super::{BUFFER_BYTES, Counted, MAX_LINKS, XATTR_PREFIX, base_name, missing};
use crate::error::{AgentError, Tried};
use crate::plan::ArchivePlan;

/// Deepest folder; each level holds a descriptor.
const MAX_DEPTH: usize = 1024;
/// Largest extended attribute that is kept, bytes.
const MAX_XATTR_BYTES: usize = 65_536;

struct Packer<W: Write> {
    builder: Builder<BufWriter<W>>,
    /// Inode to the name of its first entry.
    links: HashMap<(u64, u64), PathBuf>,
}

/// Writes the tar of `plan.path`; its entries start with the path's last component.
pub(super) fn pack<W: Write>(plan: &ArchivePlan, out: Counted<W>) -> Result<Counted<W>, AgentError> {
    let base = base_name(&plan.path).to_owned();
    let mut packer =
        Packer { builder: Builder::new(BufWriter::with_capacity(BUFFER_BYTES, out)), links: HashMap::new() };
    // The parent and the name in it, so that a link at the end is seen as one.
    let (parent, name) = if plan.follow_symlink || base == "." {
        let end = std::fs::canonicalize(&plan.path).map_err(|e| {
            missing(&plan.path, rustix::io::Errno::from_io_error(&e).unwrap_or(rustix::io::Errno::IO))
        })?;
        (end.parent().map_or_else(|| end.clone(), Path::to_path_buf), end.file_name().map(ToOwned::to_owned))
    } else {
        let path = Path::new(plan.path.trim_end_matches('/'));
        (path.parent().unwrap_or(Path::new("/")).to_path_buf(), path.file_name().map(ToOwned::to_owned))
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent =
        rustix::fs::open(&parent, flags, Mode::empty()).map_err(|errno| missing(&plan.path, errno))?;
    let name = name.map_or_else(|| b".".to_vec(), |n| n.as_bytes().to_vec());
    let name = std::ffi::CString::new(name).map_err(|_| AgentError::invalid("the path holds a NUL byte"))?;
    packer.entry(&parent, &name, Path::new(&base), 0).map_err(|error| match error {
        AgentError::System { source, tried } if source.kind() == std::io::ErrorKind::NotFound => {
            AgentError::not_found(format!("{tried}: {source}"))
        }
        other => other,
    })?;
    let buffer = packer.builder.into_inner().tried(|| "end the archive".to_owned())?;
    buffer.into_inner().map_err(std::io::IntoInnerError::into_error).tried(|| "end the archive".to_owned())
}

impl<W: Write> Packer<W> {
    fn entry(&mut self, parent: &OwnedFd, name: &CStr, path: &Path, depth: usize) -> Result<(), AgentError> {
        let shown = || path.display().to_string();
        let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
            .tried(|| format!("look at {}", shown()))?;
        let mut header = header_of(&stat);
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => return self.folder(parent, name, path, header, depth),
            FileType::RegularFile => return self.file(parent, name, path, header, &stat),
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(parent, name, Vec::new())
                    .tried(|| format!("read link {}", shown()))?;
                header.set_entry_type(EntryType::Symlink);
                let target = std::ffi::OsStr::from_bytes(target.as_bytes());
                self.builder.append_link(&mut header, path, target)
            }
            kind @ (FileType::CharacterDevice | FileType::BlockDevice | FileType::Fifo) => {
                header.set_entry_type(match kind {
                    FileType::CharacterDevice => EntryType::Char,
                    FileType::BlockDevice => EntryType::Block,
                    _ => EntryType::Fifo,
                });
                header
                    .set_device_major(rustix::fs::major(stat.st_rdev))
                    .and_then(|()| header.set_device_minor(rustix::fs::minor(stat.st_rdev)))
                    .and_then(|()| self.builder.append_data(&mut header, path, std::io::empty()))
            }
            // A socket is of no use without its program.
            _ => Ok(()),
        }
        .tried(|| format!("write {}", shown()))
    }

    fn folder(
        &mut self,
        parent: &OwnedFd,
        name: &CStr,
        path: &Path,
        mut header: Header,
        depth: usize,
    ) -> Result<(), AgentError> {
        let tried = || format!("read folder {}", path.display());
        if depth > MAX_DEPTH {
            return Err(AgentError::limit("depth of folders", MAX_DEPTH));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(parent, name, flags, Mode::empty()).tried(tried)?;
        self.xattrs(&folder)?;
        header.set_entry_type(EntryType::Directory);
        let mut shown = path.as_os_str().to_owned();
        shown.push("/");
        self.builder.append_data(&mut header, Path::new(&shown), std::io::empty()).tried(tried)?;
        for entry in Dir::read_from(&folder).tried(tried)? {
            let entry = entry.tried(tried)?;
            let name = entry.file_name();
            if !matches!(name.to_bytes(), b"." | b"..") {
                let path = path.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
                self.entry(&folder, name, &path, depth.saturating_add(1))?;
            }
        }
        Ok(())
    }

    fn file(
        &mut self,
        parent: &OwnedFd,
        name: &CStr,
        path: &Path,
        mut header: Header,
        stat: &Stat,
    ) -> Result<(), AgentError> {
        let tried = || format!("read {}", path.display());
        let inode = (stat.st_dev, stat.st_ino);
        if let Some(first) = self.links.get(&inode) {
            header.set_entry_type(EntryType::Link);
            return self.builder.append_link(&mut header, path, first).tried(tried);
        }
        if stat.st_nlink > 1 && self.links.len() < MAX_LINKS {
            self.links.insert(inode, path.to_path_buf());
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::openat(parent, name, flags, Mode::empty()).tried(tried)?;
        self.xattrs(&file)?;
        header.set_entry_type(EntryType::Regular);
        let size = u64::try_from(stat.st_size).unwrap_or_default();
        header.set_size(size);
        // The header promised a size: a file that grows is cut, one that shrinks is filled up.
        let content = std::fs::File::from(file).chain(std::io::repeat(0)).take(size);
        self.builder.append_data(&mut header, path, content).tried(tried)
    }

    /// Puts file capabilities and users' own attributes before the entry that they belong to.
    fn xattrs(&mut self, file: &OwnedFd) -> Result<(), AgentError> {
        let mut names = vec![0; MAX_XATTR_BYTES];
        let Ok(len) = rustix::fs::flistxattr(file.as_fd(), names.as_mut_slice()) else { return Ok(()) };
        let mut found = Vec::new();
        for name in names.get(..len).unwrap_or_default().split(|b| *b == 0) {
            let Ok(text) = std::str::from_utf8(name) else { continue };
            if text != "security.capability" && !text.starts_with("user.") {
                continue;
            }
            let mut value = vec![0; MAX_XATTR_BYTES];
            let Ok(n) = rustix::fs::fgetxattr(file.as_fd(), name, value.as_mut_slice()) else { continue };
            value.truncate(n);
            found.push((format!("{XATTR_PREFIX}{text}"), value));
        }
        if found.is_empty() {
            return Ok(());
        }
        let records = found.iter().map(|(name, value)| (name.as_str(), value.as_slice()));
        self.builder.append_pax_extensions(records).tried(|| "write extended attributes".to_owned())
    }
}

fn header_of(stat: &Stat) -> Header {
    let mut header = Header::new_gnu();
    header.set_mode(stat.st_mode & 0o7777);
    header.set_uid(stat.st_uid.into());
    header.set_gid(stat.st_gid.into());
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or_default());
    header.set_size(0);
    header
}
