//! A place for a disk that comes and goes while the machine runs.
//!
//! ```text
//!  Empty (device id 0: the guest's driver passes by) --insert--> a disk, for a driver that is bound to the window anew
//!    ^------------------------ take: after the request that the disk was at ------------------------/
//! ```
//!
//! A guest in order unbinds its driver before `take`; one that does not finds that its requests are no longer served.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hyper_vmm_spec::DiskId;

use super::{Blk, BlkError, QUEUE_SIZE};
use crate::device::{ActivateContext, ActivateError, Handler, VirtioDevice};
use crate::state::StateError;
use crate::transport::F_VERSION_1;

/// Device id 0 (virtio 1.2, 4.2.2): nothing is here, and a driver says nothing about it.
const NOTHING: u32 = 0;

/// The owner's handle.
#[derive(Debug, Clone, Default)]
pub struct BayHandle {
    disk: Arc<Mutex<Option<Blk>>>,
    /// See [`Blk::with_worker`].
    worker_begins: Option<fn()>,
}

/// Why a disk was not put into a bay.
#[derive(Debug, thiserror::Error)]
pub enum BayError {
    /// There is one.
    #[error("a disk is in this bay already")]
    Taken,
    /// The files cannot be a disk.
    #[error(transparent)]
    Disk(#[from] BlkError),
}

impl BayHandle {
    fn disk(&self) -> MutexGuard<'_, Option<Blk>> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a disk with serial `id` into the bay; see [`Blk::of_parts`].
    ///
    /// # Errors
    /// The bay is taken, or the files cannot be a disk.
    pub fn insert(&self, id: &DiskId, files: Vec<(File, u64)>) -> Result<(), BayError> {
        let mut disk = self.disk();
        if disk.is_some() {
            return Err(BayError::Taken);
        }
        let blk = Blk::of_parts(id, files)?;
        *disk = Some(match self.worker_begins {
            Some(begin) => blk.with_worker(begin),
            None => blk,
        });
        Ok(())
    }

    /// Takes the disk out; when this returns its files are closed and nothing of it touches guest memory. An empty bay stays so.
    pub fn take(&self) {
        let disk = self.disk().take();
        drop(disk);
    }
}

/// The device.
#[derive(Debug, Default)]
pub struct Bay {
    handle: BayHandle,
}

impl Bay {
    /// An empty bay; see [`Blk::with_worker`] for `begin`.
    #[must_use]
    pub fn new(begin: fn()) -> Self {
        Self { handle: BayHandle { worker_begins: Some(begin), ..BayHandle::default() } }
    }

    /// The handle for the owner.
    #[must_use]
    pub fn handle(&self) -> BayHandle {
        self.handle.clone()
    }

    fn ask<T>(&self, empty: T, ask: impl FnOnce(&Blk) -> T) -> T {
        self.handle.disk().as_ref().map_or(empty, ask)
    }
}

impl VirtioDevice for Bay {
    fn name(&self) -> &'static str {
        "bay"
    }

    fn device_type(&self) -> u32 {
        self.ask(NOTHING, VirtioDevice::device_type)
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        self.ask(F_VERSION_1, VirtioDevice::features)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.ask((), |disk| disk.read_config(offset, data));
    }

    fn activate(&mut self, context: ActivateContext) -> Result<Vec<Handler>, ActivateError> {
        match self.handle.disk().as_mut() {
            Some(disk) => disk.activate(context),
            None => Err(ActivateError::MissingQueue(0)),
        }
    }

    fn reset(&mut self) {
        if let Some(disk) = self.handle.disk().as_mut() {
            disk.reset();
        }
    }

    /// Nothing, and only when it is empty: a disk belongs to one machine.
    fn save(&self) -> Result<Vec<u8>, StateError> {
        self.ask(Ok(Vec::new()), |_| {
            Err(StateError::Unsaved { device: self.name(), why: "a disk is in it".to_owned() })
        })
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.ask(Vec::new(), VirtioDevice::counters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Interrupt;
    use crate::mock::{CountingInterrupt, Driver, memory};
    use virtio_bindings::virtio_blk::VIRTIO_BLK_F_RO;
    use vm_memory::GuestAddress;

    fn id(name: &str) -> DiskId {
        DiskId::new(name).unwrap()
    }

    fn file(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    fn sectors(bay: &Bay) -> u64 {
        let mut capacity = [9; 8];
        bay.read_config(0, &mut capacity);
        u64::from_le_bytes(capacity)
    }

    #[test]
    fn disks_come_and_go() {
        let mut bay = Bay::default();
        let handle = bay.handle();
        assert_eq!((bay.device_type(), sectors(&bay)), (0, 0));
        let (first, second) = (file(8192), file(4096));
        handle.insert(&id("a"), vec![(first.reopen().unwrap(), 16)]).unwrap();
        assert_eq!((bay.device_type(), sectors(&bay)), (2, 16));
        assert_eq!(bay.features() & 1 << VIRTIO_BLK_F_RO, 0);
        assert!(matches!(handle.insert(&id("b"), vec![(second.reopen().unwrap(), 8)]), Err(BayError::Taken)));
        handle.take();
        handle.take();
        assert_eq!((bay.device_type(), sectors(&bay)), (0, 0));
        bay.reset();
        handle.insert(&id("b"), vec![(File::open(second.path()).unwrap(), 8)]).unwrap();
        assert_eq!(sectors(&bay), 8);
        assert_ne!(bay.features() & 1 << VIRTIO_BLK_F_RO, 0, "by its descriptor");
        assert!(matches!(
            Bay::default().handle().insert(&id("c"), vec![(file(0).into_file(), 1)]),
            Err(BayError::Disk(_))
        ));
    }

    #[test]
    fn a_disk_that_is_taken_is_closed_though_its_driver_runs() {
        let mut bay = Bay::default();
        let handle = bay.handle();
        let mem = memory();
        let driver = Driver::new(&mem, GuestAddress(0), 8);
        let context = || ActivateContext {
            mem: Arc::clone(&mem),
            interrupt: Arc::new(CountingInterrupt::default()) as Arc<dyn Interrupt>,
            features: F_VERSION_1,
            queues: vec![driver.active(0, false).0],
        };
        assert!(bay.activate(context()).is_err(), "nothing is there");
        let disk = file(4096);
        handle.insert(&id("a"), vec![(disk.reopen().unwrap(), 8)]).unwrap();
        bay.activate(context()).unwrap();
        assert!(open_descriptors(disk.path()) > 1);
        handle.take();
        assert_eq!(open_descriptors(disk.path()), 1, "only the test's own");
        bay.reset();
    }

    /// How many descriptors of this process are open on a file.
    fn open_descriptors(path: &std::path::Path) -> usize {
        let all = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        all.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|target| target == path)).count()
    }
}
