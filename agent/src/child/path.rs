//! Paths inside a container's root, walked component by component on descriptors, so that no symbolic link leads out of it.
//!
//! The kernel's `RESOLVE_IN_ROOT` does the same for what exists; this walk also makes what is missing, behind dangling links too.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{AgentError, Tried};

/// Most symbolic links followed in one path (the kernel's `MAXSYMLINKS`).
const MAX_LINKS: usize = 40;
/// Most components of one path, links included: each costs a descriptor while walking.
const MAX_COMPONENTS: usize = 256;

/// What to make when the end of a path is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    /// A folder.
    Folder,
    /// An empty file.
    File,
}

/// Finds `path` in `root`, follows links inside it, makes missing folders (mode 0755) and at the end what `missing` says.
///
/// Returns an `O_PATH` descriptor.
///
/// # Errors
/// Too many links, a component that is not a folder, or a system call that fails.
pub(crate) fn resolve_or_make(
    root: BorrowedFd<'_>,
    path: &str,
    missing: Missing,
) -> Result<OwnedFd, AgentError> {
    let mut walk = Walk::new(root, path)?;
    while let Some(name) = walk.ahead.pop_front() {
        walk.step(&name, missing).tried(|| format!("resolve {path} in the container's root"))?;
    }
    walk.finish().tried(|| format!("resolve {path} in the container's root"))
}

struct Walk<'a> {
    root: BorrowedFd<'a>,
    /// Folders from the root to here.
    folders: Vec<OwnedFd>,
    ahead: VecDeque<OsString>,
    links: usize,
    components: usize,
}

impl<'a> Walk<'a> {
    fn new(root: BorrowedFd<'a>, path: &str) -> Result<Self, AgentError> {
        let mut walk = Self { root, folders: Vec::new(), ahead: VecDeque::new(), links: 0, components: 0 };
        walk.push(OsStr::new(path)).tried(|| format!("resolve {path} in the container's root"))?;
        Ok(walk)
    }

    fn here(&self) -> BorrowedFd<'_> {
        self.folders.last().map_or(self.root, AsFd::as_fd)
    }

    /// Puts the components of a path in front of what is ahead.
    fn push(&mut self, path: &OsStr) -> Result<(), Errno> {
        let names: Vec<_> = path
            .as_bytes()
            .split(|b| *b == b'/')
            .filter(|n| !n.is_empty() && *n != b".")
            .map(|n| OsString::from_vec(n.to_vec()))
            .collect();
        self.components = self.components.saturating_add(names.len());
        if self.components > MAX_COMPONENTS {
            return Err(Errno::NAMETOOLONG);
        }
        for name in names.into_iter().rev() {
            self.ahead.push_front(name);
        }
        Ok(())
    }

    fn step(&mut self, name: &OsStr, missing: Missing) -> Result<(), Errno> {
        if name == ".." {
            // At the root it stays there.
            self.folders.pop();
            return Ok(());
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let next = match rustix::fs::openat(self.here(), name, flags, Mode::empty()) {
            Ok(next) => next,
            Err(Errno::NOENT) => {
                self.make(name, missing)?;
                rustix::fs::openat(self.here(), name, flags, Mode::empty())?
            }
            Err(errno) => return Err(errno),
        };
        if FileType::from_raw_mode(rustix::fs::fstat(&next)?.st_mode) == FileType::Symlink {
            self.links = self.links.saturating_add(1);
            if self.links > MAX_LINKS {
                return Err(Errno::LOOP);
            }
            let target = rustix::fs::readlinkat(&next, c"", Vec::new())?;
            if target.as_bytes().first() == Some(&b'/') {
                self.folders.clear();
            }
            return self.push(OsStr::from_bytes(target.as_bytes()));
        }
        self.folders.push(next);
        Ok(())
    }

    fn make(&self, name: &OsStr, missing: Missing) -> Result<(), Errno> {
        if self.ahead.is_empty() && missing == Missing::File {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            rustix::fs::openat(self.here(), name, flags, Mode::from_raw_mode(0o644)).map(drop)
        } else {
            rustix::fs::mkdirat(self.here(), name, Mode::from_raw_mode(0o755))
        }
    }

    fn finish(mut self) -> Result<OwnedFd, Errno> {
        match self.folders.pop() {
            Some(last) => Ok(last),
            None => self.root.try_clone_to_owned().map_err(|_| Errno::MFILE),
        }
    }
}

/// Opens what exists at `path` in `root`; links are followed inside it, magic links never.
///
/// # Errors
/// What `openat2` answers.
pub(crate) fn open_in(root: BorrowedFd<'_>, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = if path.trim_start_matches('/').is_empty() { "/" } else { path };
    rustix::fs::openat2(
        root,
        path,
        flags | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
}

/// Reads a regular file in `root`, at most `max` bytes of it; nothing when it is not there or not a regular file.
///
/// # Errors
/// What reading answers, and `EFBIG` for a longer file.
pub(crate) fn read_in(root: BorrowedFd<'_>, path: &str, max: usize) -> Result<Vec<u8>, Errno> {
    // O_NONBLOCK: a FIFO at this place must not hold us.
    let file = match open_in(root, path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY) {
        Ok(file) => file,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(Vec::new()),
        Err(errno) => return Err(errno),
    };
    if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::RegularFile {
        return Ok(Vec::new());
    }
    let mut content = Vec::new();
    let mut buffer = [0; 16 * 1024];
    loop {
        let n = rustix::io::read(&file, &mut buffer)?;
        let Some(read) = buffer.get(..n).filter(|r| !r.is_empty()) else { return Ok(content) };
        if content.len().saturating_add(n) > max {
            return Err(Errno::FBIG);
        }
        content.extend_from_slice(read);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    pub(in crate::child) struct Scratch(std::path::PathBuf);

    impl Scratch {
        pub(in crate::child) fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("hyper-agent-path-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            std::fs::create_dir_all(path.join("root")).unwrap();
            Self(path)
        }
        pub(in crate::child) fn root(&self) -> std::path::PathBuf {
            self.0.join("root")
        }
        pub(in crate::child) fn open(&self) -> std::fs::File {
            std::fs::File::open(self.root()).unwrap()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn place(fd: &OwnedFd) -> std::path::PathBuf {
        use std::os::fd::AsRawFd;
        std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()
    }

    #[test]
    fn missing_parts_are_made() {
        let scratch = Scratch::new("make");
        let root = scratch.open();
        let fd = resolve_or_make(root.as_fd(), "/a/./b//c", Missing::Folder).unwrap();
        assert_eq!(place(&fd), scratch.root().join("a/b/c"));
        resolve_or_make(root.as_fd(), "/a/f", Missing::File).unwrap();
        assert!(scratch.root().join("a/f").is_file());
        assert_eq!(place(&resolve_or_make(root.as_fd(), "/", Missing::Folder).unwrap()), scratch.root());
    }

    #[test]
    fn links_stay_inside() {
        let scratch = Scratch::new("links");
        let root = scratch.open();
        std::fs::create_dir(scratch.root().join("etc")).unwrap();
        symlink("../../../../run/resolv.conf", scratch.root().join("etc/resolv.conf")).unwrap();
        symlink("/outside", scratch.root().join("abs")).unwrap();
        let fd = resolve_or_make(root.as_fd(), "/etc/resolv.conf", Missing::File).unwrap();
        assert_eq!(place(&fd), scratch.root().join("run/resolv.conf"));
        let fd = resolve_or_make(root.as_fd(), "/abs/x", Missing::Folder).unwrap();
        assert_eq!(place(&fd), scratch.root().join("outside/x"));
        let fd = resolve_or_make(root.as_fd(), "/../../up", Missing::Folder).unwrap();
        assert_eq!(place(&fd), scratch.root().join("up"));
        assert!(!scratch.0.join("up").exists());
    }

    #[test]
    fn loops_and_files_in_the_way_end() {
        let scratch = Scratch::new("loops");
        let root = scratch.open();
        symlink("b", scratch.root().join("a")).unwrap();
        symlink("a", scratch.root().join("b")).unwrap();
        assert!(resolve_or_make(root.as_fd(), "/a", Missing::Folder).is_err());
        std::fs::write(scratch.root().join("file"), "x").unwrap();
        assert!(resolve_or_make(root.as_fd(), "/file/x", Missing::Folder).is_err());
        assert!(resolve_or_make(root.as_fd(), &"/x".repeat(MAX_COMPONENTS + 1), Missing::Folder).is_err());
    }

    #[test]
    fn reading_is_bounded_and_never_waits() {
        let scratch = Scratch::new("read");
        let root = scratch.open();
        std::fs::write(scratch.root().join("passwd"), "root").unwrap();
        rustix::fs::mknodat(&root, "fifo", FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        symlink("/passwd", scratch.root().join("link")).unwrap();
        assert_eq!(read_in(root.as_fd(), "/passwd", 100).unwrap(), b"root");
        assert_eq!(read_in(root.as_fd(), "/link", 100).unwrap(), b"root");
        assert_eq!(read_in(root.as_fd(), "/passwd", 3), Err(Errno::FBIG));
        assert_eq!(read_in(root.as_fd(), "/fifo", 100).unwrap(), b"");
        assert_eq!(read_in(root.as_fd(), "/none", 100).unwrap(), b"");
    }
}
