//! Root file systems: the mounts that a snapshotter hands over, made in a mount namespace of this process.

use std::ffi::CString;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::thread::UnshareFlags;

use super::PodError;
use crate::SandboxError;

/// Most mounts of one root.
const MAX_MOUNTS: usize = 64;
/// What `mount` takes of options, bytes: a page, with its end.
const MAX_DATA_BYTES: usize = 4095;
/// What is mounted on the host: file systems whose form the host's own tools have made. Images of somebody else's making, such as
/// EROFS layers, and ext4 on a device are the guest's kernel's to read (`disks`).
const KINDS: [&str; 4] = ["overlay", "xfs", "btrfs", "tmpfs"];
/// Neither devices nor programs of a root work on the host.
const HARMLESS: MountFlags = MountFlags::NODEV.union(MountFlags::NOSUID).union(MountFlags::NOEXEC);

/// One mount of a root, as a snapshotter describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RootMount {
    /// File system, or `bind`.
    pub kind: String,
    /// What is mounted.
    pub source: String,
    /// As `mount -o` has them.
    pub options: Vec<String>,
}

/// Gives the calling process a mount namespace of its own: it sees what the host mounts, and what it mounts goes when it ends, however it
/// ends. To be called before there is a second thread.
///
/// # Errors
/// What the kernel answers.
#[expect(deprecated, reason = "the safe form; CLONE_FILES, which makes it unsafe, is not among the flags")]
pub fn private_mounts() -> Result<(), SandboxError> {
    let fail = |what| move |errno: rustix::io::Errno| SandboxError::io(what, "a mount namespace", errno);
    rustix::thread::unshare(UnshareFlags::NEWNS).map_err(fail("make"))?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(fail("detach from"))
}

#[derive(Debug, PartialEq, Eq)]
struct Parsed {
    flags: MountFlags,
    data: Vec<String>,
}

fn parse(options: &[String]) -> Parsed {
    let mut parsed = Parsed { flags: MountFlags::empty(), data: Vec::new() };
    for option in options {
        match option.as_str() {
            "ro" => parsed.flags |= MountFlags::RDONLY,
            "rw" => parsed.flags -= MountFlags::RDONLY,
            "bind" | "rbind" | "nodev" | "nosuid" | "noexec" | "suid" | "dev" | "exec" | "defaults"
            | "loop" => {}
            "noatime" => parsed.flags |= MountFlags::NOATIME,
            "nodiratime" => parsed.flags |= MountFlags::NODIRATIME,
            "relatime" => parsed.flags |= MountFlags::RELATIME,
            data => parsed.data.push(data.to_owned()),
        }
    }
    parsed
}

/// Mounts a root at `target`, which exists; what was mounted stays when one of them fails, for the caller to undo.
pub(super) fn mount_root(mounts: &[RootMount], target: &Path) -> Result<(), PodError> {
    if mounts.len() > MAX_MOUNTS {
        return Err(PodError::Exhausted(format!("a root of {} mounts: at most {MAX_MOUNTS}", mounts.len())));
    }
    for one in mounts {
        if one.options.iter().any(|option| option == "loop") {
            return Err(PodError::Unsupported(format!("a root of kind {} on a loop device", one.kind)));
        }
        match one.kind.as_str() {
            "bind" | "rbind" => bind(one, target)?,
            kind if KINDS.contains(&kind) => mount_one(one, target)?,
            kind => return Err(PodError::Unsupported(format!("a root of kind {kind:?}"))),
        }
    }
    Ok(())
}

fn bind(wish: &RootMount, target: &Path) -> Result<(), PodError> {
    let read_only = parse(&wish.options).flags.contains(MountFlags::RDONLY);
    let recursive = wish.kind == "rbind" || wish.options.iter().any(|option| option == "rbind");
    super::live::bind_at(Path::new(&wish.source), target, read_only, recursive)
}

fn mount_one(wish: &RootMount, target: &Path) -> Result<(), PodError> {
    let parsed = parse(&wish.options);
    let (folder, data) = shorten(parsed.data);
    let data = data.join(",");
    if data.len() > MAX_DATA_BYTES {
        return Err(PodError::Exhausted(format!(
            "{} bytes of options for {}: at most {MAX_DATA_BYTES}",
            data.len(),
            wish.kind
        )));
    }
    let c = |text: &str| CString::new(text).map_err(|_| PodError::Invalid("a mount holds a NUL byte".into()));
    let (kind, source, data) = (c(&wish.kind)?, c(&wish.source)?, c(&data)?);
    let made = {
        let _cwd = folder.as_deref().map(Cwd::enter).transpose()?;
        mount(source.as_c_str(), target, kind.as_c_str(), parsed.flags | HARMLESS, data.as_c_str())
    };
    made.map_err(|errno| PodError::io("mount the root at", target, errno))
}

/// The working directory while a mount names its layers relative to it. This process works with absolute paths only.
struct Cwd(rustix::fd::OwnedFd);

impl Cwd {
    fn enter(folder: &Path) -> Result<Self, PodError> {
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::DIRECTORY;
        let before = rustix::fs::open(".", flags, rustix::fs::Mode::empty())
            .map_err(|errno| PodError::io("open", ".", errno))?;
        rustix::process::chdir(folder).map_err(|errno| PodError::io("enter", folder, errno))?;
        Ok(Self(before))
    }
}

impl Drop for Cwd {
    fn drop(&mut self) {
        if let Err(error) = rustix::process::fchdir(&self.0) {
            tracing::warn!(%error, "undo failed");
        }
    }
}

/// Names the layers of an overlay relative to the folder that they have in common: a hundred of them fit into a page.
fn shorten(data: Vec<String>) -> (Option<PathBuf>, Vec<String>) {
    let layers = |option: &String| option.strip_prefix("lowerdir=").map(str::to_owned);
    let Some(lower) = data.iter().find_map(layers) else { return (None, data) };
    let paths: Vec<&str> = lower.split(':').collect();
    // Escaped colons and data-only layers are left alone.
    if paths.len() < 2 || paths.iter().any(|path| !path.starts_with('/') || path.ends_with('\\')) {
        return (None, data);
    }
    let first = paths.first().copied().unwrap_or_default();
    let common = Path::new(first).ancestors().skip(1).find(|folder| {
        paths.iter().all(|path| Path::new(path).strip_prefix(folder).is_ok_and(|p| p != Path::new("")))
    });
    let Some(common) = common.filter(|folder| *folder != Path::new("/")) else { return (None, data) };
    let short: Vec<_> = paths
        .iter()
        .filter_map(|path| Path::new(path).strip_prefix(common).ok())
        .map(|path| path.to_string_lossy().into_owned())
        .collect();
    let short = format!("lowerdir={}", short.join(":"));
    let replace = |option: String| if option.starts_with("lowerdir=") { short.clone() } else { option };
    (Some(common.to_owned()), data.into_iter().map(replace).collect())
}

/// Takes away what is mounted at a place, and what is below it; it is no error if nothing is.
pub(super) fn unmount_all(target: &Path) {
    // Several may be stacked.
    for _ in 0..MAX_MOUNTS {
        match unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => return,
            Err(error) => {
                tracing::warn!(target = %target.display(), %error, "undo failed");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn options_are_flags_or_data() {
        let parsed = parse(&own(&["rbind", "ro", "noatime", "index=off", "nosuid", "upperdir=/u"]));
        assert_eq!(parsed.flags, MountFlags::RDONLY | MountFlags::NOATIME);
        assert_eq!(parsed.data, own(&["index=off", "upperdir=/u"]));
    }

    #[test]
    fn many_layers_fit_into_a_page() {
        let base = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";
        let lower: Vec<_> = (0..100).map(|n| format!("{base}/{n}/fs")).collect();
        let data = vec![format!("upperdir={base}/200/fs"), format!("lowerdir={}", lower.join(":"))];
        let (folder, data) = shorten(data);
        assert_eq!(folder.as_deref(), Some(Path::new(base)));
        assert!(data[1].starts_with("lowerdir=0/fs:1/fs:") && data[1].len() < 1000);
        assert_eq!(data[0], format!("upperdir={base}/200/fs"));
    }

    #[test]
    fn layers_without_a_common_folder_are_left_alone() {
        for lower in ["lowerdir=/a", "lowerdir=/a:/b", "lowerdir=a/b:a/c", "lowerdir=/x/a\\:b:/x/c"] {
            let (folder, data) = shorten(own(&["index=off", lower]));
            assert_eq!((folder, data), (None, own(&["index=off", lower])), "{lower}");
        }
        let (folder, data) = shorten(own(&["lowerdir=/x/a:/x/a/b"]));
        assert_eq!((folder, data), (Some("/x".into()), own(&["lowerdir=a:a/b"])));
    }

    #[test]
    fn what_cannot_be_mounted_is_refused() {
        let wish = |kind: &str, options: &[&str]| RootMount {
            kind: kind.into(),
            source: "/x".into(),
            options: own(options),
        };
        let refused = |mounts: &[RootMount]| mount_root(mounts, Path::new("/nonexistent")).unwrap_err();
        assert!(matches!(refused(&[wish("format/mkdir/overlay", &[])]), PodError::Unsupported(_)));
        assert!(matches!(refused(&[wish("ext4", &["loop"])]), PodError::Unsupported(_)));
        assert!(matches!(refused(&[wish("erofs", &[])]), PodError::Unsupported(_)));
        assert!(matches!(refused(&vec![wish("bind", &[]); MAX_MOUNTS + 1]), PodError::Exhausted(_)));
    }
}
