//! Disks that the machine is given while it runs: each is in a device window that was empty at boot, to which the driver is bound now.
//!
//! Binding returns when the disk is there, with the features and the size of this disk; unbinding returns when it is gone.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use hyper_protocol::MAX_DISK_PARTS;
use hyper_protocol::rpc::agent::{AttachedDisk, BlockDevice, DiskPart};
use rustix::fs::{Mode, OFlags};

use crate::disk::{self, check_serial};
use crate::error::{AgentError, Tried};
use crate::spec::{DeviceRule, DeviceSpec, Spec, absolute};
use crate::{log, sys};

/// Where the driver of device windows is bound and unbound.
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
/// Most windows of a machine.
const MAX_SLOTS: u32 = 19;
/// How long a file system of a container that has ended may hold its disk.
const LET_GO_TIMEOUT: Duration = Duration::from_secs(5);
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// A disk whose driver is bound; unbound when this is dropped.
#[derive(Debug)]
struct Bay {
    slot: u32,
    node: Option<PathBuf>,
}

impl Bay {
    fn bind(wish: &AttachedDisk) -> Result<Self, AgentError> {
        check_serial(&wish.serial)?;
        if wish.slot >= MAX_SLOTS {
            return Err(AgentError::invalid(format!("there is no device window {}", wish.slot)));
        }
        std::fs::write(format!("{DRIVER}/bind"), name(wish.slot))
            .tried(|| format!("bind the driver of disk {}", wish.serial))?;
        let mut bay = Self { slot: wish.slot, node: None };
        let deadline = Instant::now().checked_add(disk::APPEAR_TIMEOUT);
        bay.node = disk::wait_for(&[&wish.serial], deadline)?.pop();
        if let (Some(node), false) = (&bay.node, wish.parts.is_empty()) {
            part(node, &wish.parts)?;
        }
        Ok(bay)
    }

    /// Whether nothing holds the disk: one that is mounted cannot be had alone.
    fn is_free(&self) -> bool {
        let Some(node) = &self.node else { return true };
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
        !matches!(rustix::fs::open(node, flags, Mode::empty()), Err(rustix::io::Errno::BUSY))
    }
}

impl Drop for Bay {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(format!("{DRIVER}/unbind"), name(self.slot)) {
            log::error(format!("unbind device window {}: {error}", self.slot));
        }
    }
}

/// Tells the kernel of a disk's parts, which no table on the disk says.
fn part(node: &Path, parts: &[DiskPart]) -> Result<(), AgentError> {
    if parts.len() > MAX_DISK_PARTS {
        return Err(AgentError::limit("parts of a disk", MAX_DISK_PARTS));
    }
    let disk = std::fs::File::open(node).tried(|| format!("open {}", node.display()))?;
    for (number, part) in (1..).zip(parts) {
        sys::add_part(disk.as_fd(), number, part.first, part.count)
            .tried(|| format!("make part {number} of {}", node.display()))?;
    }
    Ok(())
}

/// The platform device of a window.
fn name(slot: u32) -> String {
    format!("virtio-mmio.{slot}")
}

/// The disks of one container.
#[derive(Debug, Default)]
pub(crate) struct Disks(Vec<Bay>);

impl Disks {
    /// Binds the driver of each. Waits for the kernel.
    ///
    /// # Errors
    /// A window that has no disk, or a disk that is in use; those before it are unbound then.
    pub(crate) fn bind(wishes: &[AttachedDisk]) -> Result<Self, AgentError> {
        wishes.iter().map(Bay::bind).collect::<Result<_, _>>().map(Self)
    }

    /// Waits until the file systems on them are gone, and lets go of them. Waits for the kernel.
    fn let_go(self) {
        let deadline = Instant::now() + LET_GO_TIMEOUT;
        for bay in &self.0 {
            while !bay.is_free() && Instant::now() < deadline {
                std::thread::sleep(LOOK);
            }
        }
        rustix::fs::sync();
    }
}

/// The disks of all containers, by the container's id.
#[derive(Debug, Default)]
pub(crate) struct Table(Mutex<BTreeMap<String, Disks>>);

impl Table {
    /// Keeps a container's disks until it is removed.
    pub(crate) fn keep(&self, container: &str, disks: Disks) {
        if let Ok(mut table) = self.0.lock()
            && !disks.0.is_empty()
        {
            table.insert(container.to_owned(), disks);
        }
    }

    /// Lets go of a container's disks; it has ended.
    pub(crate) async fn let_go(&self, container: &str) {
        let disks = self.0.lock().ok().and_then(|mut table| table.remove(container));
        if let Some(disks) = disks
            && tokio::task::spawn_blocking(|| disks.let_go()).await.is_err()
        {
            log::error("let go of disks: the thread is gone");
        }
    }
}

/// Adds block devices to a specification, by the numbers that their disks have here.
///
/// # Errors
/// A disk that is not there, or a path that is none.
pub(crate) fn add_devices(spec: &mut Spec, wishes: &[BlockDevice]) -> Result<(), AgentError> {
    for wish in wishes {
        absolute("path of a block device", &wish.path)?;
        check_serial(&wish.serial)?;
        let node = disk::wait_for(&[&wish.serial], None)?;
        let node = node.first().map_or(Path::new("/"), PathBuf::as_path);
        let numbers = std::fs::metadata(node).tried(|| format!("look at {}", node.display()))?.rdev();
        let (major, minor) = (rustix::fs::major(numbers).into(), rustix::fs::minor(numbers).into());
        let access: String = wish.access.chars().filter(|c| "rwm".contains(*c)).collect();
        spec.linux.devices.push(DeviceSpec {
            path: wish.path.clone(),
            kind: "b".to_owned(),
            major,
            minor,
            file_mode: Some(wish.mode),
            uid: Some(wish.uid),
            gid: Some(wish.gid),
        });
        // A rule without a letter would allow everything; without rules the device is allowed as all others are.
        if let Some(rules) = spec.linux.resources.devices.as_mut().filter(|rules| !rules.is_empty())
            && !access.is_empty()
        {
            let (major, minor) = (Some(major), Some(minor));
            rules.push(DeviceRule { allow: true, kind: "b".to_owned(), major, minor, access });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_and_serials_are_checked() {
        let wish =
            |slot, serial: &str| AttachedDisk { slot, serial: serial.to_owned(), ..Default::default() };
        for bad in [wish(MAX_SLOTS, "a"), wish(0, ""), wish(0, "a b")] {
            assert_eq!(Disks::bind(&[bad]).unwrap_err().kind(), crate::error::ErrorKind::Invalid);
        }
        assert!(Disks::bind(&[]).unwrap().0.is_empty());
        assert_eq!(name(7), "virtio-mmio.7");
    }

    #[test]
    fn devices_need_their_disk() {
        let mut spec = Spec::parse(br#"{"process":{"args":["a"]}}"#).unwrap();
        let wish = |path: &str, serial: &str| BlockDevice {
            path: path.to_owned(),
            serial: serial.to_owned(),
            ..Default::default()
        };
        for bad in [wish("dev/x", "a"), wish("/dev/x", ""), wish("/dev/x", "no-such-disk")] {
            assert!(add_devices(&mut spec, &[bad]).is_err());
        }
        assert!(spec.linux.devices.is_empty());
    }
}
