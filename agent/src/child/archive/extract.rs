//! Tar to files.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType};

use super::{BUFFER_BYTES, Counted, XATTR_PREFIX, missing};
use crate::error::{AgentError, ErrorKind, Tried};
use crate::plan::ArchivePlan;

/// Longest name in an archive, bytes: the tar reader would hold more.
const MAX_NAME_BYTES: usize = 4096;

/// One entry's place and attributes.
struct Target {
    parent: OwnedFd,
    name: std::ffi::OsString,
    path: PathBuf,
    mode: Mode,
    owner: (Uid, Gid),
    mtime: i64,
}

pub(super) fn extract<R: Read>(plan: &ArchivePlan, input: &mut Counted<R>) -> Result<(), AgentError> {
    let folder = Path::new(&plan.path);
    let stat = rustix::fs::stat(folder).map_err(|errno| missing(&plan.path, errno))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(AgentError::invalid(format!("{} is not a directory", plan.path)));
    }
    let mut archive = Archive::new(input);
    let mut folders = Vec::new();
    for entry in archive.entries().tried(|| "read the archive".to_owned())? {
        let mut entry = entry.tried(|| "read the archive".to_owned())?;
        one(plan, folder, &mut entry, &mut folders)?;
    }
    // Times of folders change as they fill: set last, innermost first.
    for (path, mtime) in folders.into_iter().rev() {
        let times = times(mtime);
        let _ = rustix::fs::utimensat(rustix::fs::CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW);
    }
    Ok(())
}

fn one<R: Read>(
    plan: &ArchivePlan,
    folder: &Path,
    entry: &mut Entry<'_, R>,
    folders: &mut Vec<(PathBuf, i64)>,
) -> Result<(), AgentError> {
    let kind = entry.header().entry_type();
    if matches!(kind, EntryType::XGlobalHeader | EntryType::XHeader) {
        return Ok(());
    }
    let name = relative(&entry.path_bytes())?;
    if name.as_os_str().is_empty() {
        // The folder itself; it is there.
        return Ok(());
    }
    let target = target(plan, folder, &name, entry)?;
    let tried = || format!("unpack {}", name.display());
    if !make_way(&target, kind, plan.strict)? && kind != EntryType::Directory {
        return Err(AgentError::System { tried: tried(), source: Errno::EXIST.into() });
    }
    match kind {
        EntryType::Directory => {
            match rustix::fs::mkdirat(&target.parent, &target.name, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno).tried(tried),
            }
            folders.push((target.path.clone(), target.mtime));
        }
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => content(&target, entry)?,
        EntryType::Symlink => {
            let link = entry.link_name_bytes().unwrap_or_default();
            rustix::fs::symlinkat(&*link, &target.parent, &target.name).tried(tried)?;
        }
        EntryType::Link => {
            let link = relative(&entry.link_name_bytes().unwrap_or_default())?;
            let from = folder.join(link);
            rustix::fs::linkat(rustix::fs::CWD, &from, &target.parent, &target.name, AtFlags::empty())
                .tried(tried)?;
            return Ok(());
        }
        EntryType::Char | EntryType::Block | EntryType::Fifo => node(&target, kind, entry)?,
        other => return Err(AgentError::invalid(format!("archive entry of unknown type {other:?}"))),
    }
    attributes(&target, kind, entry)
}

fn target<R: Read>(
    plan: &ArchivePlan,
    folder: &Path,
    name: &Path,
    entry: &Entry<'_, R>,
) -> Result<Target, AgentError> {
    let tried = || format!("unpack {}", name.display());
    let path = folder.join(name);
    let parent = path.parent().unwrap_or(folder);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = || rustix::fs::open(parent, flags, Mode::empty());
    let parent_fd = match open() {
        Err(Errno::NOENT) => {
            std::fs::create_dir_all(parent).tried(tried)?;
            open()
        }
        other => other,
    }
    .tried(tried)?;
    let header = entry.header();
    let id = |value: std::io::Result<u64>| u32::try_from(value.unwrap_or_default()).unwrap_or_default();
    let owner = if plan.keep_owner { (id(header.uid()), id(header.gid())) } else { (0, 0) };
    Ok(Target {
        parent: parent_fd,
        name: path.file_name().unwrap_or_default().to_owned(),
        mode: Mode::from_raw_mode(header.mode().unwrap_or(0o644) & 0o7777),
        owner: (Uid::from_raw(owner.0), Gid::from_raw(owner.1)),
        mtime: header.mtime().ok().and_then(|t| i64::try_from(t).ok()).unwrap_or_default(),
        path,
    })
}

/// The path of an entry below the folder.
fn relative(name: &[u8]) -> Result<PathBuf, AgentError> {
    let path = Path::new(std::ffi::OsStr::from_bytes(name));
    if name.len() > MAX_NAME_BYTES {
        return Err(AgentError::limit("bytes of a name in the archive", MAX_NAME_BYTES));
    }
    let mut relative = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => relative.push(name),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(AgentError::invalid(format!(
                    "archive entry {:?} leads out of its folder",
                    path.display()
                )));
            }
        }
    }
    Ok(relative)
}

/// Removes what is at an entry's place. True when the place is free now, false when a folder stays to be filled.
fn make_way(target: &Target, kind: EntryType, strict: bool) -> Result<bool, AgentError> {
    let stat = match rustix::fs::statat(&target.parent, &target.name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(true),
        Err(errno) => return Err(errno).tried(|| format!("look at {}", target.path.display())),
    };
    let is_folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    let wants_folder = kind == EntryType::Directory;
    if is_folder && wants_folder {
        return Ok(false);
    }
    let place = target.path.display();
    if strict && is_folder {
        let message = format!("cannot overwrite directory {place} with non-directory");
        return Err(AgentError::refused(ErrorKind::Invalid, message));
    }
    if strict && wants_folder {
        let message = format!("cannot overwrite non-directory {place} with directory");
        return Err(AgentError::refused(ErrorKind::Invalid, message));
    }
    if is_folder {
        std::fs::remove_dir_all(&target.path).tried(|| format!("remove {place}"))?;
    } else {
        rustix::fs::unlinkat(&target.parent, &target.name, AtFlags::empty())
            .tried(|| format!("remove {place}"))?;
    }
    Ok(true)
}

fn content<R: Read>(target: &Target, entry: &mut Entry<'_, R>) -> Result<(), AgentError> {
    let tried = || format!("write {}", target.path.display());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file =
        rustix::fs::openat(&target.parent, &target.name, flags, Mode::from_raw_mode(0o600)).tried(tried)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let n = entry.read(&mut buffer).tried(tried)?;
        let Some(mut rest) = buffer.get(..n).filter(|r| !r.is_empty()) else { return Ok(()) };
        while !rest.is_empty() {
            let written = rustix::io::write(&file, rest).tried(tried)?;
            rest = rest.get(written..).unwrap_or_default();
        }
    }
}

fn node<R: Read>(target: &Target, kind: EntryType, entry: &Entry<'_, R>) -> Result<(), AgentError> {
    let number = |value: std::io::Result<Option<u32>>| value.ok().flatten().unwrap_or_default();
    let device =
        rustix::fs::makedev(number(entry.header().device_major()), number(entry.header().device_minor()));
    let kind = match kind {
        EntryType::Char => FileType::CharacterDevice,
        EntryType::Block => FileType::BlockDevice,
        _ => FileType::Fifo,
    };
    rustix::fs::mknodat(&target.parent, &target.name, kind, target.mode, device)
        .tried(|| format!("make {}", target.path.display()))
}

fn times(mtime: i64) -> Timestamps {
    let time = Timespec { tv_sec: mtime, tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}

fn attributes<R: Read>(target: &Target, kind: EntryType, entry: &mut Entry<'_, R>) -> Result<(), AgentError> {
    let tried = || format!("set attributes of {}", target.path.display());
    let (parent, name, nofollow) = (&target.parent, &target.name, AtFlags::SYMLINK_NOFOLLOW);
    rustix::fs::chownat(parent, name, Some(target.owner.0), Some(target.owner.1), nofollow).tried(tried)?;
    if kind == EntryType::Symlink {
        return rustix::fs::utimensat(parent, name, &times(target.mtime), nofollow).tried(tried);
    }
    rustix::fs::chmodat(parent, name, target.mode, AtFlags::empty()).tried(tried)?;
    if matches!(
        kind,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse | EntryType::Directory
    ) {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::openat(parent, name, flags, Mode::empty()).tried(tried)?;
        for record in entry.pax_extensions().ok().flatten().into_iter().flatten().flatten() {
            let Some(attribute) = record.key().ok().and_then(|k| k.strip_prefix(XATTR_PREFIX)) else {
                continue;
            };
            // A file system without attributes takes the file all the same.
            let _ = rustix::fs::fsetxattr(&file, attribute, record.value_bytes(), XattrFlags::empty());
        }
    }
    rustix::fs::utimensat(parent, name, &times(target.mtime), nofollow).tried(tried)
}
