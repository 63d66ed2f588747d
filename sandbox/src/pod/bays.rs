//! Disks that come and go while the machine runs.
//!
//! ```text
//!  attach: VMM gets the descriptor -> the agent binds its driver when it makes the container
//!  the container is deleted: the agent unbinds -> the VMM lets go of the descriptor -> the bay is free
//! ```

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use hyper_protocol::MAX_DISK_PARTS;
use hyper_protocol::rpc::agent::{AttachedDisk, DiskName, DiskPart};
use hyper_vmm_spec::DiskId;
use hyper_vmm_spec::control::part_starts;

use super::{PodError, held};
use crate::launch::{Levers, VmError};

const _: () =
    assert!(MAX_DISK_PARTS == hyper_vmm_spec::control::MAX_DISK_PARTS, "agent and VMM take as many");
/// Bytes of a sector.
const SECTOR_BYTES: u64 = 512;
/// Most bays of a pod's machine. An empty one costs the guest three register reads at boot.
pub(super) const MAX_BAYS: u8 = 8;

/// The bays of a machine.
#[derive(Debug)]
pub(super) struct Bays {
    levers: Arc<Levers>,
    /// Slot of each.
    slots: Vec<u32>,
    free: Mutex<Vec<u8>>,
    /// Makes every serial another one.
    next: AtomicU64,
}

impl Bays {
    pub(super) fn new(levers: Arc<Levers>, slots: &[u32]) -> Self {
        let count = u8::try_from(slots.len()).unwrap_or(MAX_BAYS);
        // The first is taken first.
        let free = (0..count).rev().collect();
        Self { levers, slots: slots.to_vec(), free: Mutex::new(free), next: AtomicU64::new(0) }
    }

    fn take(self: &Arc<Self>) -> Result<BayDisk, PodError> {
        let all = self.slots.len();
        let bay = held(&self.free).pop();
        let bay = bay.ok_or_else(|| {
            PodError::Exhausted(format!("all {all} places for disks of this pod are taken"))
        })?;
        let slot = self.slots.get(usize::from(bay)).copied().unwrap_or_default();
        let serial = format!("bay{bay}-{}", self.next.fetch_add(1, Ordering::Relaxed));
        Ok(BayDisk { bays: Arc::clone(self), bay, slot, serial, parts: Vec::new(), filled: false })
    }

    /// Attaches open files or block devices as one disk; several are parts of it. One that is open for reading only is read-only.
    pub(super) async fn attach(self: &Arc<Self>, files: &[Backing]) -> Result<BayDisk, PodError> {
        let sectors: Vec<u64> = files.iter().map(|file| file.sectors).collect();
        let starts = part_starts(&sectors).filter(|_| (1..=MAX_DISK_PARTS).contains(&files.len()));
        let (starts, _) = starts.ok_or_else(|| {
            PodError::Exhausted(format!("{} disks of one root: at most {MAX_DISK_PARTS}", files.len()))
        })?;
        let mut disk = self.take()?;
        if files.len() > 1 {
            disk.parts = starts.into_iter().zip(sectors).collect();
        }
        let id = DiskId::new(disk.serial.as_str()).map_err(VmError::from)?;
        let files: Vec<_> = files.iter().map(|file| (file.file.as_fd(), file.sectors)).collect();
        // From here on the VMM may have it, whatever it answers.
        disk.filled = true;
        self.levers.attach(disk.bay, &id, &files).await?;
        Ok(disk)
    }
}

/// A disk in a bay, taken out when this is dropped.
#[derive(Debug)]
pub(super) struct BayDisk {
    bays: Arc<Bays>,
    bay: u8,
    slot: u32,
    serial: String,
    /// First sector and sectors of each part, if there are several.
    parts: Vec<(u64, u64)>,
    filled: bool,
}

impl BayDisk {
    /// What the guest finds it by.
    pub(super) fn serial(&self) -> &str {
        &self.serial
    }

    /// What the guest finds its file of this number by, counted from 0.
    pub(super) fn name(&self, file: usize) -> DiskName {
        let part = if self.parts.is_empty() { 0 } else { u32::try_from(file + 1).unwrap_or(u32::MAX) };
        DiskName { serial: self.serial.clone(), part, ..Default::default() }
    }

    /// What the agent is told of it.
    pub(super) fn attached(&self) -> AttachedDisk {
        let part = |&(first, count): &(u64, u64)| DiskPart { first, count, ..Default::default() };
        AttachedDisk {
            slot: self.slot,
            serial: self.serial.clone(),
            parts: self.parts.iter().map(part).collect(),
            ..Default::default()
        }
    }
}

impl Drop for BayDisk {
    fn drop(&mut self) {
        let (bays, bay) = (Arc::clone(&self.bays), self.bay);
        if !self.filled {
            held(&bays.free).push(bay);
            return;
        }
        // Outside of a runtime the machine is going as well.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(async move {
            match bays.levers.detach(bay).await {
                Ok(()) => held(&bays.free).push(bay),
                // The machine has gone with all its disks, or a bay is lost.
                Err(error) => tracing::debug!(bay, %error, "a disk stays in its bay"),
            }
        });
    }
}

/// What a disk, or a part of one, is kept in.
#[derive(Debug)]
pub(super) struct Backing {
    file: File,
    sectors: u64,
}

/// Opens a file or block device for a disk, to be written to if `write` and if it can be.
pub(super) fn open(path: &Path, write: bool) -> Result<Backing, PodError> {
    let file = open_file(path, write)?;
    // The end also tells the size of a block device, for which `stat` says 0.
    let bytes = (&file).seek(SeekFrom::End(0));
    let bytes = bytes.map_err(|source| PodError::io("find the size of", path, source))?;
    if bytes < SECTOR_BYTES {
        return Err(PodError::Invalid(format!("{} holds {bytes} bytes, not even a sector", path.display())));
    }
    Ok(Backing { file, sectors: bytes / SECTOR_BYTES })
}

fn open_file(path: &Path, write: bool) -> Result<File, PodError> {
    let failed = |source| PodError::io("open", path, source);
    let kind = std::fs::metadata(path).map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(PodError::Invalid(format!("{} is neither a file nor a block device", path.display())));
    }
    match OpenOptions::new().read(true).write(write).open(path) {
        // Read-only devices say either.
        Err(error)
            if write
                && kind.is_block_device()
                && matches!(
                    error.kind(),
                    std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem
                ) =>
        {
            File::open(path).map_err(failed)
        }
        opened => opened.map_err(failed),
    }
}

#[cfg(test)]
mod tests {
    use hyper_vmm_spec::control::Request;

    use super::*;
    use crate::launch::testing;

    #[tokio::test]
    async fn bays_are_given_back_when_the_disk_is_out() {
        let (levers, vmm) = testing::levers();
        let bays = Arc::new(Bays::new(Arc::new(levers), &[7, 8]));
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(5 * 512 + 1).unwrap();
        let file = [open(file.path(), false).unwrap()];
        assert!(matches!(bays.attach(&[]).await, Err(PodError::Exhausted(_))));
        let first = bays.attach(&file).await.unwrap();
        assert!(matches!(vmm.heard(), Request::Attach { bay: 0, .. }));
        assert_eq!((first.attached().slot, first.serial()), (7, "bay0-0"));
        let second = bays.attach(&file).await.unwrap();
        assert!(matches!(vmm.heard(), Request::Attach { bay: 1, .. }));
        assert!(matches!(bays.attach(&file).await, Err(PodError::Exhausted(_))));
        drop(first);
        let again = loop {
            match bays.attach(&file).await {
                Ok(disk) => break disk,
                Err(_) => tokio::task::yield_now().await,
            }
        };
        assert!(matches!(vmm.heard(), Request::Detach { bay: 0 }));
        assert_eq!((again.attached().slot, again.serial()), (7, "bay0-2"));
        drop(second);
    }

    #[tokio::test]
    async fn several_files_are_parts_of_one_disk() {
        let (levers, vmm) = testing::levers();
        let bays = Arc::new(Bays::new(Arc::new(levers), &[7]));
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: u64| {
            let path = dir.path().join(name);
            File::create(&path).unwrap().set_len(bytes).unwrap();
            open(&path, false).unwrap()
        };
        let disk = bays.attach(&[file("a", 9 * 512), file("b", 512)]).await.unwrap();
        let Request::Attach { parts, .. } = vmm.heard() else { panic!("not that") };
        assert_eq!(parts.iter().map(|part| (part.fd.0, part.sectors)).collect::<Vec<_>>(), [(0, 9), (1, 1)]);
        assert_eq!((disk.name(0).part, disk.name(1).part), (1, 2));
        let told: Vec<_> = disk.attached().parts.iter().map(|part| (part.first, part.count)).collect();
        assert_eq!(told, [(0, 9), (16, 1)]);
        let many: Vec<_> = (0..=MAX_DISK_PARTS).map(|_| file("c", 512)).collect();
        assert!(matches!(bays.attach(&many).await, Err(PodError::Exhausted(_))));
    }

    #[test]
    fn only_files_and_devices_are_disks() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(open(dir.path(), false), Err(PodError::Invalid(_))));
        assert!(matches!(open(Path::new("/dev/null"), false), Err(PodError::Invalid(_))));
        assert!(matches!(open(&dir.path().join("missing"), false), Err(PodError::Failed(_))));
        let file = dir.path().join("disk");
        std::fs::write(&file, "x").unwrap();
        assert!(matches!(open(&file, true), Err(PodError::Invalid(_))), "less than a sector");
        std::fs::write(&file, [0; 1024]).unwrap();
        assert_eq!(open(&file, true).unwrap().sectors, 2);
    }
}
