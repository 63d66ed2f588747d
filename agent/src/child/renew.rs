//! Makes a container another one, in a machine that goes on from one that was saved: host name, files, and the ids of machine and boot.
//!
//! The container's processes are frozen meanwhile, so nothing changes between a look and what follows it; and its root is this
//! program's own, so no link leads out of it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, UnmountFlags};
use rustix::thread::ThreadNameSpaceType;

use super::fs::{self, MountOptions};
use super::launch::open_root;
use super::path;
use crate::error::{AgentError, Tried};
use crate::plan::{RenewPlan, Report};
use crate::sys;

/// Where distributions keep the id of a machine, 32 hexadecimal digits (machine-id(5)).
const MACHINE_IDS: [&str; 2] = ["/etc/machine-id", "/var/lib/dbus/machine-id"];
/// Longest such file that is looked at, bytes.
const MAX_MACHINE_ID_BYTES: usize = 4096;
/// The folder of the id of this run of the kernel, which makes it when it is first asked for and keeps it.
const RANDOM_DIR: &str = "/proc/sys/kernel/random";
const BOOT_ID: &str = "boot_id";

/// Random bytes of an id.
const ID_BYTES: usize = 16;

/// Gives the container its new names and files.
///
/// # Errors
/// What the kernel answers.
pub(crate) fn run(plan: &RenewPlan) -> Result<Report, AgentError> {
    let (machine_id, boot_id) = (random_id()?, random_id()?);
    let container = sys::take_inherited_fd(plan.pidfd).tried(|| "take the container's pidfd".to_owned())?;
    let namespaces = ThreadNameSpaceType::MOUNT.union(ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME);
    rustix::thread::move_into_thread_name_spaces(container.as_fd(), namespaces)
        .tried(|| "join the container's namespaces".to_owned())?;
    if !plan.hostname.is_empty() {
        rustix::system::sethostname(plan.hostname.as_bytes())
            .tried(|| format!("set hostname {}", plan.hostname))?;
    }
    let root = open_root()?;
    for file in &plan.files {
        overwrite(root.as_fd(), &file.path, &file.content)?;
    }
    for path in MACHINE_IDS {
        let old = path::read_in(root.as_fd(), path, MAX_MACHINE_ID_BYTES).unwrap_or_default();
        // One that is empty is for the container to fill.
        if !old.is_empty() {
            overwrite(root.as_fd(), path, format!("{}\n", hex(&machine_id)).as_bytes())?;
        }
    }
    cover_boot_id(root.as_fd(), &boot_id)?;
    Ok(Report::Renewed)
}

/// By the agent's own device: the container's may be anything.
fn random_id() -> Result<[u8; ID_BYTES], AgentError> {
    let mut bytes = [0; ID_BYTES];
    let read = File::open("/dev/urandom").and_then(|mut device| device.read_exact(&mut bytes));
    read.tried(|| "read /dev/urandom".to_owned())?;
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An id in the form of the kernel's: a random UUID (RFC 9562, version 4).
fn uuid(mut id: [u8; ID_BYTES]) -> String {
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    let digits = hex(&id);
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if matches!(at, 8 | 12 | 16 | 20) {
            text.push('-');
        }
        text.push(digit);
    }
    text
}

/// Writes over a regular file; what is something else, or not there, or on a file system that is read-only is passed over.
fn overwrite(root: BorrowedFd<'_>, path: &str, content: &[u8]) -> Result<(), AgentError> {
    let tried = || format!("write {path}");
    let place = match path::open_in(root, path, OFlags::PATH) {
        Ok(place) => place,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
        Err(errno) => return Err(errno).tried(tried),
    };
    if FileType::from_raw_mode(rustix::fs::fstat(&place).tried(tried)?.st_mode) != FileType::RegularFile {
        return Ok(());
    }
    let open = || path::open_in(root, path, OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY);
    let read_only = MountAttrFlags::MOUNT_ATTR_RDONLY.bits().into();
    let mut restricted = false;
    let file = match open() {
        // A file of ours is a mount of its own, which is read-only when the root is.
        Err(Errno::ROFS) => {
            if sys::mount_setattr(place.as_fd(), 0, read_only, false).is_err() {
                return Ok(());
            }
            restricted = true;
            open()
        }
        other => other,
    };
    let written = file.map_err(std::io::Error::from).and_then(|file| {
        let mut file = File::from(file);
        file.set_len(0)?;
        file.write_all(content)
    });
    if restricted {
        sys::mount_setattr(place.as_fd(), read_only, 0, false).tried(tried)?;
    }
    match written {
        Err(error) if error.kind() == std::io::ErrorKind::ReadOnlyFilesystem => Ok(()),
        written => written.tried(tried),
    }
}

/// Puts another id of this run over the kernel's, which cannot be changed.
fn cover_boot_id(root: BorrowedFd<'_>, id: &[u8; ID_BYTES]) -> Result<(), AgentError> {
    let tried = || format!("cover {RANDOM_DIR}/{BOOT_ID}");
    let Ok(folder) = path::open_in(root, RANDOM_DIR, OFlags::PATH | OFlags::DIRECTORY) else { return Ok(()) };
    // A file can be taken out of a file system that has a place only; it has this one for a moment.
    let options = MountOptions::default().with("size", "4096").with("mode", "755");
    let made = fs::new_mount("tmpfs", "tmpfs", &options)?;
    fs::attach(made.as_fd(), folder.as_fd()).tried(tried)?;
    let cover = write_cover(made.as_fd(), id).tried(tried);
    rustix::mount::unmount(RANDOM_DIR, UnmountFlags::DETACH).tried(tried)?;
    let cover = cover?;
    fs::restrict(cover.as_fd(), MountAttrFlags::MOUNT_ATTR_RDONLY, false).tried(tried)?;
    let place = path::open_in(root, &format!("{RANDOM_DIR}/{BOOT_ID}"), OFlags::PATH).tried(tried)?;
    fs::attach(cover.as_fd(), place.as_fd()).tried(tried)
}

/// A mount of a file with the id, attached nowhere.
fn write_cover(folder: BorrowedFd<'_>, id: &[u8; ID_BYTES]) -> std::io::Result<std::os::fd::OwnedFd> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(folder, BOOT_ID, flags, Mode::from_raw_mode(0o444))?;
    File::from(file).write_all(format!("{}\n", uuid(*id)).as_bytes())?;
    let written = rustix::fs::openat(folder, BOOT_ID, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    Ok(fs::clone_of(written.as_fd(), false)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::child::path::tests::Scratch;

    #[test]
    fn ids_have_the_form_of_the_kernels() {
        assert_eq!(uuid([0xff; ID_BYTES]), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        assert_eq!(uuid([0; ID_BYTES]), "00000000-0000-4000-8000-000000000000");
        assert_eq!(hex(&[0, 0xab]), "00ab");
        assert_ne!(random_id().unwrap(), random_id().unwrap());
    }

    #[test]
    fn only_regular_files_are_written_over() {
        let scratch = Scratch::new("renew");
        let (root, dir) = (scratch.open(), scratch.root());
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
        std::fs::write(dir.join("hosts"), "a long line of the old container").unwrap();
        overwrite(root.as_fd(), "/hosts", b"new\n").unwrap();
        assert_eq!(read("hosts"), "new\n");
        std::os::unix::fs::symlink("/hosts", dir.join("link")).unwrap();
        overwrite(root.as_fd(), "/link", b"through\n").unwrap();
        assert_eq!(read("hosts"), "through\n", "inside the root");
        std::os::unix::fs::symlink("nowhere", dir.join("dangling")).unwrap();
        rustix::fs::mknodat(&root, "fifo", FileType::Fifo, Mode::RUSR, 0).unwrap();
        for other in ["/missing", "/dangling", "/fifo", "/hosts/below", "/"] {
            overwrite(root.as_fd(), other, b"x").unwrap();
        }
        assert!(!dir.join("missing").exists() && !dir.join("nowhere").exists());
    }
}
