//! virtio-blk (virtio 1.3, 5.2) on raw files or block devices, served by a thread of its own so that a slow disk stalls neither
//! a virtual processor nor the other devices. Their content is never looked at.

mod bay;
mod disk;
mod handler;
mod request;
mod state;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use hyper_vmm_spec::DiskId;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

pub use self::bay::{Bay, BayError, BayHandle};
pub use self::disk::BlkError;
use self::disk::Disk;
use self::handler::{BlkHandler, Counters, Stop};
use self::request::{ID_BYTES, config_space};
use crate::device::{ActivateContext, ActivateError, Handler, VirtioDevice};
use crate::state::StateError;

/// Largest size of the queue.
const QUEUE_SIZE: u16 = 256;

/// A thread that serves the disk between activation and reset.
#[derive(Debug)]
struct Worker {
    stop: Arc<Stop>,
    thread: JoinHandle<BlkHandler>,
}

impl Worker {
    fn start(handler: BlkHandler, begin: Option<fn()>) -> io::Result<Self> {
        let stop = Arc::new(Stop::new()?);
        let epoll = handler.event_set(&stop)?;
        let asked = Arc::clone(&stop);
        let work = move || {
            if let Some(begin) = begin {
                begin();
            }
            handler.work(&epoll, &asked)
        };
        Ok(Self { stop, thread: std::thread::Builder::new().name("blk".to_owned()).spawn(work)? })
    }

    /// Returns when the request that it was at has ended; none when it has panicked, and said so.
    fn stop(self) -> Option<BlkHandler> {
        self.stop.ask();
        self.thread.join().ok()
    }
}

/// The device.
#[derive(Debug)]
pub struct Blk {
    serial: [u8; ID_BYTES],
    disk: Disk,
    config: Vec<u8>,
    counters: Arc<Counters>,
    worker: Option<Worker>,
    /// What the worker left when it was paused.
    paused: Option<BlkHandler>,
    /// The driver was started with another capacity.
    resized: bool,
    /// See [`Blk::with_worker`].
    worker_begins: Option<fn()>,
}

impl Blk {
    /// A disk with serial `id` on `file`, whose size, rounded down to sectors of 512 bytes, is the capacity.
    ///
    /// # Errors
    /// When the descriptor's mode does not match `read_only`, or the file has no size or less than a sector.
    pub fn new(id: &DiskId, file: File, read_only: bool) -> Result<Self, BlkError> {
        Ok(Self::on(id, Disk::new(id.as_str(), file, read_only)?))
    }

    /// A disk with serial `id` of one or several files and how many sectors are used of each, where
    /// [`part_starts`](hyper_vmm_spec::control::part_starts) says. Files that are open for reading only are not written to.
    ///
    /// # Errors
    /// When a file is open for writing only or has fewer sectors, and when they are none or too many.
    pub fn of_parts(id: &DiskId, files: Vec<(File, u64)>) -> Result<Self, BlkError> {
        Ok(Self::on(id, Disk::of_parts(id.as_str(), files)?))
    }

    fn on(id: &DiskId, disk: Disk) -> Self {
        let mut serial = [0; ID_BYTES];
        for (to, from) in serial.iter_mut().zip(id.as_str().bytes()) {
            *to = from;
        }
        let config = config_space(disk.sectors(), disk.read_only());
        Self {
            serial,
            disk,
            config,
            counters: Arc::default(),
            worker: None,
            paused: None,
            resized: false,
            worker_begins: None,
        }
    }

    /// The worker calls `begin` before it serves anything.
    #[must_use]
    pub fn with_worker(mut self, begin: fn()) -> Self {
        self.worker_begins = Some(begin);
        self
    }

    fn stop(&mut self) {
        self.paused = None;
        self.resized = false;
        if let Some(worker) = self.worker.take() {
            drop(worker.stop());
        }
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        self.stop();
    }
}

impl VirtioDevice for Blk {
    fn name(&self) -> &'static str {
        "blk"
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
        ];
        if self.disk.read_only() {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        bits.into_iter().fold(0, |features, bit| features | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::config::read(&self.config, offset, data);
    }

    /// Starts the worker; nothing runs on the event loop.
    fn activate(&mut self, context: ActivateContext) -> Result<Vec<Handler>, ActivateError> {
        let prepare = |source| ActivateError::Io { what: "the disk's thread", source };
        let active =
            context.queues.into_iter().find(|q| q.index == 0).ok_or(ActivateError::MissingQueue(0))?;
        let handler = BlkHandler {
            disk: self.disk.clone(),
            serial: self.serial,
            mem: context.mem,
            interrupt: context.interrupt,
            features: context.features,
            active,
            counters: Arc::clone(&self.counters),
        };
        if std::mem::take(&mut self.resized) {
            handler.interrupt.config_changed();
        }
        self.worker = Some(Worker::start(handler, self.worker_begins).map_err(prepare)?);
        Ok(Vec::new())
    }

    fn pause(&mut self) {
        if let Some(worker) = self.worker.take() {
            self.paused = worker.stop();
        }
    }

    fn resume(&mut self) {
        let Some(handler) = self.paused.take() else { return };
        let interrupt = Arc::clone(&handler.interrupt);
        match Worker::start(handler, self.worker_begins) {
            Ok(worker) => self.worker = Some(worker),
            Err(_) => interrupt.needs_reset(),
        }
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(state::save(self.disk.sectors()))
    }

    /// Another disk may be here than in the machine that was saved: its driver is told when it is activated.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        self.resized = state::restore(state)? != self.disk.sectors();
        Ok(())
    }

    /// Returns when the request that the worker was at has ended: after it, nothing touches guest memory.
    fn reset(&mut self) {
        self.stop();
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let c = &self.counters;
        [
            ("reads", &c.reads),
            ("read_bytes", &c.read_bytes),
            ("writes", &c.writes),
            ("write_bytes", &c.write_bytes),
            ("flushes", &c.flushes),
            ("errors", &c.errors),
            ("malformed", &c.malformed),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
        .to_vec()
    }
}
