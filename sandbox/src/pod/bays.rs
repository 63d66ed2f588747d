//! Disks that come and go while the machine runs.
//!
//! ```text
//!  attach: VMM gets the descriptor -> the agent binds its driver when it makes the container
//!  the container is deleted: the agent unbinds -> the VMM lets go of the descriptor -> the bay is free
//! ```

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use hyper_protocol::rpc::agent::AttachedDisk;
use hyper_vmm_spec::DiskId;

use super::{PodError, held};
use crate::launch::{Levers, VmError};

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
        Ok(BayDisk { bays: Arc::clone(self), bay, slot, serial, filled: false })
    }

    /// Attaches an open file or block device; the disk is read-only when it is open for reading only.
    pub(super) async fn attach(self: &Arc<Self>, file: &File) -> Result<BayDisk, PodError> {
        let mut disk = self.take()?;
        let id = DiskId::new(disk.serial.as_str()).map_err(VmError::from)?;
        // From here on the VMM may have it, whatever it answers.
        disk.filled = true;
        self.levers.attach(disk.bay, &id, file.as_fd()).await?;
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
    filled: bool,
}

impl BayDisk {
    /// What the guest finds it by.
    pub(super) fn serial(&self) -> &str {
        &self.serial
    }

    /// What the agent is told of it.
    pub(super) fn attached(&self) -> AttachedDisk {
        AttachedDisk { slot: self.slot, serial: self.serial.clone(), ..Default::default() }
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

/// Opens a file or block device for a disk, to be written to if `write` and if it can be.
pub(super) fn open(path: &Path, write: bool) -> Result<File, PodError> {
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
        let file = tempfile::tempfile().unwrap();
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

    #[test]
    fn only_files_and_devices_are_disks() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(open(dir.path(), false), Err(PodError::Invalid(_))));
        assert!(matches!(open(Path::new("/dev/null"), false), Err(PodError::Invalid(_))));
        assert!(matches!(open(&dir.path().join("missing"), false), Err(PodError::Failed(_))));
        let file = dir.path().join("disk");
        std::fs::write(&file, "x").unwrap();
        assert!(open(&file, true).is_ok());
    }
}
