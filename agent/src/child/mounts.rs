//! What is mounted inside a container's root: kernel file systems, volumes, injected files, masks.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountFlags, mount};

use super::copy;
use super::fs::{self, MountOptions};
use super::path::{self, Missing};
use super::rootfs;
use crate::error::{AgentError, Tried};
use crate::plan::{File, Volume, VolumeSource};
use crate::spec::{DeviceSpec, MountSpec};

/// Device nodes that every container has: name, major, minor.
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
/// Links that every container has in /dev.
const LINKS: [(&str, &str); 6] = [
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
];

/// Mounts one kernel file system.
///
/// # Errors
/// A kind that is not supported, or a mount that fails.
pub(crate) fn kernel(root: BorrowedFd<'_>, spec: &MountSpec) -> Result<(), AgentError> {
    let kind = match spec.kind.as_str() {
        kind @ ("proc" | "sysfs" | "tmpfs" | "devpts" | "mqueue") => kind,
        "cgroup" | "cgroup2" => "cgroup2",
        other => {
            return Err(AgentError::invalid(format!(
                "mount of type {other:?} at {} is not supported: the guest has no such source",
                spec.destination
            )));
        }
    };
    let mut options = MountOptions::parse(&spec.options)?;
    let place = path::resolve_or_make(root, &spec.destination, Missing::Folder)?;
    if kind == "tmpfs" && !options.has("mode") {
        let mode = rustix::fs::fstat(&place).tried(|| format!("look at {}", spec.destination))?.st_mode;
        options = options.with("mode", format!("{:o}", mode & 0o7777));
    }
    if kind == "cgroup2" {
        // Limits are parameters of v1 hierarchies; v2 has one hierarchy and takes none.
        options.data.clear();
    }
    let source = if spec.source.is_empty() { kind } else { &spec.source };
    let made =
        fs::new_mount(kind, source, &options).map_err(|error| at_destination(error, &spec.destination))?;
    if options.copy_up {
        copy::copy_tree(place.as_fd(), made.as_fd())?;
    }
    fs::attach(made.as_fd(), place.as_fd()).tried(|| format!("mount {kind} at {}", spec.destination))
}

fn at_destination(error: AgentError, destination: &str) -> AgentError {
    match error {
        AgentError::System { tried, source } => {
            AgentError::System { tried: format!("{tried} for {destination}"), source }
        }
        refused @ AgentError::Refused { .. } => refused,
    }
}

/// Makes the device nodes and links of /dev, and the nodes of the specification. The umask must be 0.
///
/// # Errors
/// What `mknod` and `symlink` answer.
pub(crate) fn devices(root: BorrowedFd<'_>, extra: &[DeviceSpec]) -> Result<(), AgentError> {
    let dev = path::resolve_or_make(root, "/dev", Missing::Folder)?;
    for (name, major, minor) in DEVICES {
        let number = rustix::fs::makedev(major, minor);
        let mode = Mode::from_raw_mode(0o666);
        exists_is_fine(rustix::fs::mknodat(&dev, name, FileType::CharacterDevice, mode, number))
            .tried(|| format!("make device /dev/{name}"))?;
    }
    for (name, target) in LINKS {
        exists_is_fine(rustix::fs::symlinkat(target, &dev, name))
            .tried(|| format!("make link /dev/{name}"))?;
    }
    extra.iter().try_for_each(|device| node(root, device))
}

fn exists_is_fine(result: Result<(), Errno>) -> Result<(), Errno> {
    if result == Err(Errno::EXIST) { Ok(()) } else { result }
}

fn node(root: BorrowedFd<'_>, device: &DeviceSpec) -> Result<(), AgentError> {
    let kind = match device.kind.as_str() {
        "c" | "u" => FileType::CharacterDevice,
        "b" => FileType::BlockDevice,
        "p" => FileType::Fifo,
        other => return Err(AgentError::invalid(format!("device {}: no kind {other:?}", device.path))),
    };
    let number = |n: i64| {
        u32::try_from(n).map_err(|_| AgentError::invalid(format!("device {}: number {n}", device.path)))
    };
    let (folder, name) = device.path.rsplit_once('/').unwrap_or(("", &device.path));
    if matches!(name, "" | "." | "..") {
        return Err(AgentError::invalid(format!("device path {:?} has no name", device.path)));
    }
    let folder = path::resolve_or_make(root, folder, Missing::Folder)?;
    let mode = Mode::from_raw_mode(device.file_mode.unwrap_or(0o666) & 0o7777);
    let number = rustix::fs::makedev(number(device.major)?, number(device.minor)?);
    let (uid, gid) = (Uid::from_raw(device.uid.unwrap_or(0)), Gid::from_raw(device.gid.unwrap_or(0)));
    exists_is_fine(rustix::fs::mknodat(&folder, name, kind, mode, number))
        .and_then(|()| rustix::fs::chownat(&folder, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW))
        .tried(|| format!("make device {}", device.path))
}

/// Mounts shares and memory.
#[derive(Debug, Default)]
pub(crate) struct Volumes {
    /// Root of each share that was opened, by tag.
    shares: HashMap<String, OwnedFd>,
}

impl Volumes {
    /// Mounts one volume.
    ///
    /// # Errors
    /// A source that is not there, or a mount that fails.
    pub(crate) fn mount(&mut self, root: BorrowedFd<'_>, volume: &Volume) -> Result<(), AgentError> {
        let destination = &volume.destination;
        match &volume.source {
            VolumeSource::Share { tag, path } => {
                let source = self.open_share(tag, path)?;
                self.bind(root, volume, &source).map_err(|error| at_destination(error, destination))
            }
            VolumeSource::Shared { name, .. } => {
                let path = format!("{}/{name}", rootfs::MEMORY_DIR);
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let source = rustix::fs::open(path.as_str(), flags, Mode::empty())
                    .tried(|| format!("open shared memory {name}"))?;
                self.bind(root, volume, &source).map_err(|error| at_destination(error, destination))
            }
            VolumeSource::Socket { id, .. } => {
                let path = format!("{}/{id}", rootfs::SOCKET_DIR);
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let source = rustix::fs::open(path.as_str(), flags, Mode::empty())
                    .tried(|| format!("open the listener of socket {id}"))?;
                self.bind(root, volume, &source).map_err(|error| at_destination(error, destination))
            }
            VolumeSource::Tmpfs { size_bytes, mode, noexec } => {
                let size = if *size_bytes == 0 { "50%".to_owned() } else { size_bytes.to_string() };
                let mode = if *mode == 0 { 0o1777 } else { mode & 0o7777 };
                let mut options = MountOptions::default()
                    .with("size", size)
                    .with("mode", format!("{mode:o}"))
                    .and(MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV);
                if *noexec {
                    options = options.and(MountAttrFlags::MOUNT_ATTR_NOEXEC);
                }
                let place = path::resolve_or_make(root, destination, Missing::Folder)?;
                let made = fs::new_mount("tmpfs", "tmpfs", &options)?;
                if volume.copy_up {
                    copy::copy_tree(place.as_fd(), made.as_fd())?;
                }
                if volume.read_only {
                    fs::restrict(made.as_fd(), MountAttrFlags::MOUNT_ATTR_RDONLY, false)
                        .tried(|| format!("make {destination} read-only"))?;
                }
                fs::attach(made.as_fd(), place.as_fd()).tried(|| format!("mount tmpfs at {destination}"))
            }
        }
    }

    fn bind(&self, root: BorrowedFd<'_>, volume: &Volume, source: &OwnedFd) -> Result<(), AgentError> {
        let stat = rustix::fs::fstat(source).tried(|| "look at a share".to_owned())?;
        let is_folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let missing = if is_folder { Missing::Folder } else { Missing::File };
        let place = path::resolve_or_make(root, &volume.destination, missing)?;
        if volume.copy_up
            && is_folder
            && copy::is_empty(source.as_fd()).tried(|| "list a volume".to_owned())?
        {
            copy::copy_tree(place.as_fd(), source.as_fd())?;
        }
        let mount = fs::clone_of(source.as_fd(), false).tried(|| "take a mount of a share".to_owned())?;
        let mut attributes = MountAttrFlags::MOUNT_ATTR_NODEV;
        if volume.read_only {
            attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
        }
        fs::restrict(mount.as_fd(), attributes, false).tried(|| "set a mount's attributes".to_owned())?;
        fs::attach(mount.as_fd(), place.as_fd()).tried(|| "mount a share".to_owned())
    }

    /// Opens a folder or file of a share, which the agent has mounted.
    ///
    /// # Errors
    /// A tag that is none, or a path that is not there.
    pub(crate) fn open_share(&mut self, tag: &str, path: &str) -> Result<OwnedFd, AgentError> {
        if !self.shares.contains_key(tag) {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let share = rustix::fs::open(format!("{}/{tag}", rootfs::SHARE_DIR), flags, Mode::empty())
                .tried(|| format!("open share {tag}"))?;
            self.shares.insert(tag.to_owned(), share);
        }
        let share = self.shares.get(tag).ok_or_else(|| AgentError::not_found(format!("no share {tag}")))?;
        let path = path.trim_start_matches('/');
        rustix::fs::openat2(
            share,
            if path.is_empty() { "." } else { path },
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
        )
        .tried(|| format!("open {path:?} of share {tag}"))
    }
}

/// Puts files over what the image has at their places, from a file system of their own, so that links there do no harm.
///
/// # Errors
/// A file that cannot be written or mounted.
pub(crate) fn inject(root: BorrowedFd<'_>, files: &[File], read_only: bool) -> Result<(), AgentError> {
    if files.is_empty() {
        return Ok(());
    }
    let total: usize = files.iter().map(|f| f.content.len().saturating_add(8192)).sum();
    let options = format!("mode=0755,size={}", total.saturating_add(65_536));
    let options = std::ffi::CString::new(options).map_err(|_| AgentError::invalid("NUL in an option"))?;
    mount(
        "tmpfs",
        rootfs::FILES_DIR,
        "tmpfs",
        MountFlags::NODEV | MountFlags::NOSUID,
        Some(options.as_c_str()),
    )
    .tried(|| "mount a tmpfs for injected files".to_owned())?;
    for (number, file) in files.iter().enumerate() {
        let staged = format!("{}/{number}", rootfs::FILES_DIR);
        std::fs::write(&staged, &file.content).tried(|| format!("write {}", file.path))?;
        let mode = if file.mode == 0 { 0o644 } else { file.mode & 0o7777 };
        rustix::fs::chmod(staged.as_str(), Mode::from_raw_mode(mode))
            .tried(|| format!("set mode of {}", file.path))?;
        let source = rustix::fs::open(staged.as_str(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .tried(|| format!("open {}", file.path))?;
        let place = path::resolve_or_make(root, &file.path, Missing::File)?;
        let mount = fs::clone_of(source.as_fd(), false).tried(|| format!("take a mount of {}", file.path))?;
        if read_only {
            fs::restrict(mount.as_fd(), MountAttrFlags::MOUNT_ATTR_RDONLY, false)
                .tried(|| format!("make {} read-only", file.path))?;
        }
        fs::attach(mount.as_fd(), place.as_fd()).tried(|| format!("mount {}", file.path))?;
    }
    Ok(())
}

/// Hides paths: files behind /dev/null, folders behind an empty one. What is not there needs no mask.
///
/// # Errors
/// A mount that fails.
pub(crate) fn mask(root: BorrowedFd<'_>, paths: &[String]) -> Result<(), AgentError> {
    for masked in paths {
        let Some(place) = existing(root, masked)? else { continue };
        let stat = rustix::fs::fstat(&place).tried(|| format!("look at {masked}"))?;
        let cover = if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let options = MountOptions::default()
                .with("size", "0")
                .with("mode", "755")
                .and(MountAttrFlags::MOUNT_ATTR_RDONLY);
            fs::new_mount("tmpfs", "tmpfs", &options)?
        } else {
            let null = rustix::fs::open("/dev/null", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .tried(|| "open /dev/null".to_owned())?;
            fs::clone_of(null.as_fd(), false).tried(|| "take a mount of /dev/null".to_owned())?
        };
        fs::attach(cover.as_fd(), place.as_fd()).tried(|| format!("mask {masked}"))?;
    }
    Ok(())
}

/// Makes paths read-only. What is not there is passed over.
///
/// # Errors
/// A mount that fails.
pub(crate) fn read_only(root: BorrowedFd<'_>, paths: &[String]) -> Result<(), AgentError> {
    for path in paths {
        let Some(place) = existing(root, path)? else { continue };
        let tried = || format!("make {path} read-only");
        let cover = fs::clone_of(place.as_fd(), true).tried(tried)?;
        fs::restrict(cover.as_fd(), MountAttrFlags::MOUNT_ATTR_RDONLY, true).tried(tried)?;
        fs::attach(cover.as_fd(), place.as_fd()).tried(tried)?;
    }
    Ok(())
}

fn existing(root: BorrowedFd<'_>, path: &str) -> Result<Option<OwnedFd>, AgentError> {
    match path::open_in(root, path, OFlags::PATH) {
        Ok(place) => Ok(Some(place)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(errno) => Err(errno).tried(|| format!("find {path}")),
    }
}

/// Writes kernel parameters through the container's own /proc, before it becomes read-only.
///
/// # Errors
/// A name that is none, or what the kernel answers.
pub(crate) fn sysctl(root: BorrowedFd<'_>, settings: &[(String, String)]) -> Result<(), AgentError> {
    for (name, value) in settings {
        let path = crate::sysctl::path_of(name)?;
        let file = path::open_in(root, &format!("/proc/sys/{path}"), OFlags::WRONLY)
            .tried(|| format!("open sysctl {name}"))?;
        rustix::io::write(&file, value.as_bytes()).tried(|| format!("set sysctl {name} to {value:?}"))?;
    }
    Ok(())
}
