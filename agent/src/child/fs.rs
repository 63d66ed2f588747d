//! Mounting through descriptors: no path is looked up twice, and nothing is followed out of the container's root.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use crate::error::{AgentError, Tried};
use crate::sys;

/// Most options of one mount.
const MAX_OPTIONS: usize = 64;
/// Longest value that `fsconfig` takes, bytes.
const MAX_VALUE_BYTES: usize = 255;

/// Mount options, as `mount -o` has them, parsed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct MountOptions {
    /// `MOUNT_ATTR_*` of the mount.
    pub attributes: u32,
    /// Parameters of the file system.
    pub data: Vec<(String, Option<String>)>,
    /// Copy what the destination holds into the new file system.
    pub copy_up: bool,
}

impl MountOptions {
    /// Reads options; those on propagation and binding mean nothing to a mount of its own and are passed over.
    ///
    /// # Errors
    /// Too many, or one too long.
    pub(crate) fn parse(options: &[String]) -> Result<Self, AgentError> {
        if options.len() > MAX_OPTIONS {
            return Err(AgentError::limit("mount options", MAX_OPTIONS));
        }
        let mut parsed = Self::default();
        for option in options {
            parsed.add(option)?;
        }
        Ok(parsed)
    }

    fn add(&mut self, option: &str) -> Result<(), AgentError> {
        let atime = MountAttrFlags::MOUNT_ATTR_NOATIME.bits() | MountAttrFlags::MOUNT_ATTR_STRICTATIME.bits();
        let (clear, set) = match option {
            "ro" => (0, MountAttrFlags::MOUNT_ATTR_RDONLY.bits()),
            "rw" => (MountAttrFlags::MOUNT_ATTR_RDONLY.bits(), 0),
            "nosuid" => (0, MountAttrFlags::MOUNT_ATTR_NOSUID.bits()),
            "suid" => (MountAttrFlags::MOUNT_ATTR_NOSUID.bits(), 0),
            "nodev" => (0, MountAttrFlags::MOUNT_ATTR_NODEV.bits()),
            "dev" => (MountAttrFlags::MOUNT_ATTR_NODEV.bits(), 0),
            "noexec" => (0, MountAttrFlags::MOUNT_ATTR_NOEXEC.bits()),
            "exec" => (MountAttrFlags::MOUNT_ATTR_NOEXEC.bits(), 0),
            "nosymfollow" => (0, MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW.bits()),
            "nodiratime" => (0, MountAttrFlags::MOUNT_ATTR_NODIRATIME.bits()),
            "diratime" => (MountAttrFlags::MOUNT_ATTR_NODIRATIME.bits(), 0),
            "relatime" | "atime" => (atime, 0),
            "noatime" => (atime, MountAttrFlags::MOUNT_ATTR_NOATIME.bits()),
            "strictatime" => (atime, MountAttrFlags::MOUNT_ATTR_STRICTATIME.bits()),
            "defaults" | "async" | "private" | "rprivate" | "slave" | "rslave" | "shared" | "rshared"
            | "unbindable" | "runbindable" | "" => (0, 0),
            "tmpcopyup" => {
                self.copy_up = true;
                (0, 0)
            }
            other => return self.add_data(other),
        };
        self.attributes = (self.attributes & !clear) | set;
        Ok(())
    }

    fn add_data(&mut self, option: &str) -> Result<(), AgentError> {
        let (key, value) = match option.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (option, None),
        };
        if key.is_empty() || option.contains('\0') || value.is_some_and(|v| v.len() > MAX_VALUE_BYTES) {
            return Err(AgentError::invalid(format!("mount option {option:?} cannot be used")));
        }
        self.data.push((key.to_owned(), value.map(str::to_owned)));
        Ok(())
    }

    /// Whether a parameter of the file system is given.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.data.iter().any(|(k, _)| k == key)
    }

    /// Adds a parameter.
    #[must_use]
    pub(crate) fn with(mut self, key: &str, value: impl Into<String>) -> Self {
        self.data.push((key.to_owned(), Some(value.into())));
        self
    }

    /// Adds `MOUNT_ATTR_*`.
    #[must_use]
    pub(crate) fn and(mut self, attributes: MountAttrFlags) -> Self {
        self.attributes |= attributes.bits();
        self
    }
}

/// Makes a file system and a mount of it that is attached nowhere yet.
///
/// # Errors
/// What the kernel answers, with the option that it did not take.
pub(crate) fn new_mount(kind: &str, source: &str, options: &MountOptions) -> Result<OwnedFd, AgentError> {
    let fs = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).tried(|| format!("open file system {kind}"))?;
    fsconfig_set_string(fs.as_fd(), "source", source)
        .tried(|| format!("set source of {kind} to {source}"))?;
    for (key, value) in &options.data {
        match value {
            Some(value) => fsconfig_set_string(fs.as_fd(), key.as_str(), value.as_str()),
            None => fsconfig_set_flag(fs.as_fd(), key.as_str()),
        }
        .tried(|| {
            format!("set option {key}{} of {kind}", value.as_ref().map_or(String::new(), |v| format!("={v}")))
        })?;
    }
    fsconfig_create(fs.as_fd()).tried(|| format!("make file system {kind}"))?;
    fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::from_bits_retain(options.attributes))
        .tried(|| format!("mount {kind}"))
}

/// Attaches a mount to a place.
///
/// # Errors
/// What `move_mount` answers.
pub(crate) fn attach(mount: BorrowedFd<'_>, place: BorrowedFd<'_>) -> Result<(), rustix::io::Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, c"", place, c"", flags)
}

/// A second mount of what is at `place`, attached nowhere yet; with the mounts below it when `recursive`.
///
/// # Errors
/// What `open_tree` answers.
pub(crate) fn clone_of(place: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd, rustix::io::Errno> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(place, c"", flags)
}

/// Adds attributes to a mount.
///
/// # Errors
/// What `mount_setattr` answers.
pub(crate) fn restrict(
    mount: BorrowedFd<'_>,
    attributes: MountAttrFlags,
    recursive: bool,
) -> std::io::Result<()> {
    sys::mount_setattr(mount, attributes.bits().into(), 0, recursive)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> MountOptions {
        let options: Vec<String> = options.iter().map(|o| (*o).to_owned()).collect();
        MountOptions::parse(&options).unwrap()
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let parsed =
            parse(&["nosuid", "noexec", "nodev", "mode=755", "size=65536k", "newinstance", "rprivate"]);
        let expected = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NODEV;
        assert_eq!(parsed.attributes, expected.bits());
        assert_eq!(
            parsed.data,
            [
                ("mode".to_owned(), Some("755".to_owned())),
                ("size".to_owned(), Some("65536k".to_owned())),
                ("newinstance".to_owned(), None)
            ]
        );
        assert!(parsed.has("mode") && !parsed.has("uid"));
    }

    #[test]
    fn the_last_word_counts() {
        assert_eq!(parse(&["ro", "rw"]).attributes, 0);
        assert_eq!(parse(&["rw", "ro"]).attributes, MountAttrFlags::MOUNT_ATTR_RDONLY.bits());
        assert_eq!(parse(&["noatime", "relatime"]).attributes, 0);
        assert_eq!(
            parse(&["noatime", "strictatime"]).attributes,
            MountAttrFlags::MOUNT_ATTR_STRICTATIME.bits()
        );
        assert!(parse(&["tmpcopyup"]).copy_up);
    }

    #[test]
    fn nonsense_is_refused() {
        let bad = |o: &str| MountOptions::parse(&[o.to_owned()]).is_err();
        assert!(bad("=x"));
        assert!(bad("a\0b"));
        assert!(bad(&format!("mode={}", "7".repeat(300))));
        assert!(MountOptions::parse(&vec!["ro".to_owned(); MAX_OPTIONS + 1]).is_err());
    }
}
