//! `docker cp`: tars out of and into a container's root, and what a path is.
//!
//! The program joins the container's mount namespace first, which makes the container's root its own: no link in the container or
//! in an archive leads anywhere else. Files are only ever made new, never opened for writing where something is.

mod extract;
mod pack;

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::error::{AgentError, Tried};
use crate::plan::{ArchivePlan, Report};
use crate::sys;

/// Size of the buffer between files and the stream, bytes.
const BUFFER_BYTES: usize = 256 * 1024;
/// Most hard links of one archive that are kept as such; beyond, they become copies.
const MAX_LINKS: usize = 100_000;
/// Prefix of extended attributes in pax headers.
const XATTR_PREFIX: &str = "SCHILY.xattr.";

/// Writes a tar of a path to standard output.
///
/// # Errors
/// The path is not there, or reading or writing failed.
pub(crate) fn read(plan: &ArchivePlan) -> Result<Report, AgentError> {
    enter(plan)?;
    let out = rustix::stdio::stdout().try_clone_to_owned().tried(|| "use the stream".to_owned())?;
    let counted = Counted { inner: std::fs::File::from(out), bytes: 0 };
    let mut counted = pack::pack(plan, counted)?;
    counted.flush().tried(|| "write the archive".to_owned())?;
    // The stream may be something else than a socket; then its close ends it.
    let _ = rustix::net::shutdown(&counted.inner, rustix::net::Shutdown::Write);
    Ok(Report::Archived { bytes: counted.bytes })
}

/// Unpacks a tar from standard input into a folder.
///
/// # Errors
/// The folder is not there, the archive is broken or leads out, or writing failed.
pub(crate) fn write(plan: &ArchivePlan) -> Result<Report, AgentError> {
    enter(plan)?;
    let input = rustix::stdio::stdin().try_clone_to_owned().tried(|| "use the stream".to_owned())?;
    let mut counted = Counted { inner: std::fs::File::from(input), bytes: 0 };
    extract::extract(plan, &mut counted)?;
    // What follows the archive's end is padding; the sender must be able to finish.
    let mut rest = [0; 16 * 1024];
    while counted.read(&mut rest).tried(|| "read the archive".to_owned())? != 0 {}
    Ok(Report::Archived { bytes: counted.bytes })
}

/// Says what a path is, without following a link at its end.
///
/// # Errors
/// The path is not there.
pub(crate) fn stat(plan: &ArchivePlan) -> Result<Report, AgentError> {
    // The kernel names an open file through our own /proc, which is out of sight once we are inside.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let names = rustix::fs::open("/proc/self/fd", flags, Mode::empty()).tried(|| "open /proc".to_owned())?;
    enter(plan)?;
    let end = open_end(&plan.path, false)?;
    let stat = rustix::fs::fstat(&end).tried(|| format!("look at {}", plan.path))?;
    let link_target = if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
        target_of(&names, &plan.path, &end)?
    } else {
        String::new()
    };
    let seconds = stat.st_mtime.saturating_mul(1_000_000_000);
    Ok(Report::Stat {
        name: base_name(&plan.path).to_owned(),
        size: u64::try_from(stat.st_size).unwrap_or_default(),
        mode: stat.st_mode,
        mtime_unix_ns: seconds.saturating_add(i64::try_from(stat.st_mtime_nsec).unwrap_or_default()),
        link_target,
    })
}

/// Where a link leads: the path of what is there, or what it says when nothing is.
fn target_of(names: &OwnedFd, path: &str, link: &OwnedFd) -> Result<String, AgentError> {
    let text = |c: std::ffi::CString| c.to_string_lossy().into_owned();
    match open_end(path, true) {
        Ok(target) => rustix::fs::readlinkat(names, target.as_raw_fd().to_string(), Vec::new()),
        Err(_) => rustix::fs::readlinkat(link.as_fd(), c"", Vec::new()),
    }
    .map(text)
    .tried(|| format!("read link {path}"))
}

fn enter(plan: &ArchivePlan) -> Result<(), AgentError> {
    rustix::process::umask(Mode::empty());
    let namespace =
        sys::take_inherited_fd(plan.mount_namespace).tried(|| "take the mount namespace".to_owned())?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))
        .tried(|| "join the container's mount namespace".to_owned())
}

fn open_end(path: &str, follow: bool) -> Result<OwnedFd, AgentError> {
    let mut flags = OFlags::PATH | OFlags::CLOEXEC;
    if !follow {
        flags |= OFlags::NOFOLLOW;
    }
    rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| missing(path, errno))
}

fn missing(path: &str, errno: Errno) -> AgentError {
    match errno {
        Errno::NOENT | Errno::NOTDIR => {
            AgentError::not_found(format!("could not find the file {path} in the container"))
        }
        other => AgentError::System { tried: format!("open {path}"), source: other.into() },
    }
}

/// The last component of a path, `.` when it has none or ends in one.
fn base_name(path: &str) -> &str {
    if path.ends_with("/.") {
        return ".";
    }
    path.trim_end_matches('/').rsplit('/').next().filter(|n| !n.is_empty()).unwrap_or(".")
}

/// Counts what goes through.
#[derive(Debug)]
struct Counted<T> {
    inner: T,
    bytes: u64,
}

impl<T> Counted<T> {
    fn count(&mut self, n: usize) -> usize {
        self.bytes = self.bytes.saturating_add(u64::try_from(n).unwrap_or_default());
        n
    }
}

impl<T: Read> Read for Counted<T> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        Ok(self.count(n))
    }
}

impl<T: Write> Write for Counted<T> {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        let n = self.inner.write(buffer)?;
        Ok(self.count(n))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::path::PathBuf;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("hyper-agent-archive-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(dir.join("from")).unwrap();
        std::fs::create_dir_all(dir.join("to")).unwrap();
        dir
    }

    fn plan(path: &std::path::Path, strict: bool) -> ArchivePlan {
        ArchivePlan {
            mount_namespace: -1,
            path: path.to_str().unwrap().to_owned(),
            strict,
            follow_symlink: false,
            keep_owner: false,
        }
    }

    fn packed(path: &std::path::Path) -> Vec<u8> {
        pack::pack(&plan(path, false), Counted { inner: Vec::new(), bytes: 0 }).unwrap().inner
    }

    fn unpack(path: &std::path::Path, tar: &[u8], strict: bool) -> Result<(), AgentError> {
        extract::extract(&plan(path, strict), &mut Counted { inner: tar, bytes: 0 })
    }

    #[test]
    fn a_tree_comes_back_the_same() {
        let dir = scratch("tree");
        let tree = dir.join("from/tree");
        let long = format!("{}/{}", "d".repeat(90), "f".repeat(120));
        std::fs::create_dir_all(tree.join("d".repeat(90))).unwrap();
        std::fs::write(tree.join(&long), "long").unwrap();
        std::fs::write(tree.join("file"), vec![3; 100_000]).unwrap();
        std::fs::set_permissions(tree.join("file"), std::fs::Permissions::from_mode(0o4711)).unwrap();
        std::fs::hard_link(tree.join("file"), tree.join("hard")).unwrap();
        symlink("/some/where", tree.join("soft")).unwrap();
        std::fs::set_permissions(&tree, std::fs::Permissions::from_mode(0o1777)).unwrap();
        let tar = packed(&tree);
        unpack(&dir.join("to"), &tar, true).unwrap();
        let back = dir.join("to/tree");
        assert_eq!(std::fs::read(back.join("file")).unwrap(), vec![3; 100_000]);
        assert_eq!(std::fs::read(back.join(&long)).unwrap(), b"long");
        assert_eq!(back.join("file").metadata().unwrap().mode() & 0o7777, 0o4711);
        assert_eq!(back.metadata().unwrap().mode() & 0o7777, 0o1777);
        assert_eq!(back.join("file").metadata().unwrap().ino(), back.join("hard").metadata().unwrap().ino());
        assert_eq!(std::fs::read_link(back.join("soft")).unwrap(), PathBuf::from("/some/where"));
        assert_eq!(
            tree.join("file").metadata().unwrap().mtime(),
            back.join("file").metadata().unwrap().mtime()
        );
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn entries_that_lead_out_are_refused() {
        let dir = scratch("out");
        for name in ["../evil", "a/../../evil"] {
            let mut header = tar::Header::new_gnu();
            header.set_size(1);
            header.set_mode(0o644);
            header.set_entry_type(tar::EntryType::Regular);
            header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            let mut builder = tar::Builder::new(Vec::new());
            builder.append(&header, &b"x"[..]).unwrap();
            let tar = builder.into_inner().unwrap();
            assert!(unpack(&dir.join("to"), &tar, false).is_err(), "{name}");
        }
        assert!(!dir.join("evil").exists());
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn strict_keeps_folders_and_files_apart() {
        let dir = scratch("strict");
        std::fs::write(dir.join("from/x"), "file").unwrap();
        std::fs::create_dir_all(dir.join("to/x/y")).unwrap();
        let tar = packed(&dir.join("from/x"));
        let error = unpack(&dir.join("to"), &tar, true).unwrap_err().to_string();
        assert!(error.contains("cannot overwrite directory"), "{error}");
        unpack(&dir.join("to"), &tar, false).unwrap();
        assert_eq!(std::fs::read(dir.join("to/x")).unwrap(), b"file");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn existing_files_are_replaced_not_written_through() {
        let dir = scratch("replace");
        std::fs::write(dir.join("from/x"), "new").unwrap();
        std::fs::write(dir.join("victim"), "old").unwrap();
        symlink(dir.join("victim"), dir.join("to/x")).unwrap();
        unpack(&dir.join("to"), &packed(&dir.join("from/x")), true).unwrap();
        assert_eq!(std::fs::read(dir.join("victim")).unwrap(), b"old");
        assert_eq!(std::fs::read(dir.join("to/x")).unwrap(), b"new");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn broken_archives_are_errors() {
        let dir = scratch("broken");
        std::fs::write(dir.join("from/x"), vec![1; 5000]).unwrap();
        let tar = packed(&dir.join("from/x"));
        assert!(unpack(&dir.join("to"), &tar[..2000], false).is_err());
        assert!(unpack(&dir.join("to"), &[7; 2048], false).is_err());
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn base_names() {
        assert_eq!(base_name("/a/b"), "b");
        assert_eq!(base_name("/a/b/"), "b");
        assert_eq!(base_name("/a/."), ".");
        assert_eq!(base_name("/"), ".");
    }
}
