//! Serving the queue, on the disk's own thread.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES};
use virtio_queue::QueueT;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::disk::{BOUNCE_BYTES, Disk};
use super::request::{Command, ID_BYTES, Request, Status, parse_ranges};
use crate::chain::{self, Chain};
use crate::device::{ActiveQueue, GuestMem, Interrupt};
use crate::note::Notes;

/// Longest that a finished request waits for others so that one interrupt tells of all.
const COALESCE: Duration = Duration::from_micros(100);

/// What is counted since the device was made.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reads: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) write_bytes: AtomicU64,
    pub(super) flushes: AtomicU64,
    pub(super) errors: AtomicU64,
    pub(super) malformed: AtomicU64,
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

/// How a worker is told to end.
#[derive(Debug)]
pub(super) struct Stop {
    asked: AtomicBool,
    wake: EventFd,
}

impl Stop {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { asked: AtomicBool::new(false), wake: EventFd::new(0)? })
    }

    /// Asks; the worker ends after the request that it is at.
    pub(super) fn ask(&self) {
        self.asked.store(true, Ordering::Release);
        // Written once, so the counter has room.
        let _ = self.wake.write(1);
    }
}

/// Serves one queue.
#[derive(Debug)]
pub(super) struct BlkHandler {
    pub(super) disk: Disk,
    pub(super) serial: [u8; ID_BYTES],
    pub(super) mem: GuestMem,
    pub(super) interrupt: Arc<dyn Interrupt>,
    /// Features that the driver accepted.
    pub(super) features: u64,
    pub(super) active: ActiveQueue,
    pub(super) counters: Arc<Counters>,
}

impl BlkHandler {
    /// The event set that the worker waits in.
    pub(super) fn event_set(&self, stop: &Stop) -> io::Result<Epoll> {
        let epoll = Epoll::new()?;
        for source in [&self.active.kick, &stop.wake] {
            let event = EpollEvent::new(EventSet::IN, source.as_raw_fd() as u64);
            epoll.ctl(ControlOperation::Add, source.as_raw_fd(), event)?;
        }
        Ok(epoll)
    }

    /// The worker's whole life: until `stop`. Then all that was served has been told, and another may go on.
    pub(super) fn work(mut self, epoll: &Epoll, stop: &Stop) -> Self {
        let mut bounce = vec![0; BOUNCE_BYTES].into_boxed_slice();
        let mut notes = Notes::new("blk");
        while !stop.asked.load(Ordering::Acquire) {
            // A driver may have offered requests before its first notification was watched.
            if self.serve(stop, &mut bounce).is_err() {
                self.interrupt.needs_reset();
                break;
            }
            let mut events = [EpollEvent::default(); 2];
            match epoll.wait(-1, &mut events) {
                Ok(count) => {
                    let kick = self.active.kick.as_raw_fd() as u64;
                    if events.iter().take(count).any(|event| event.data() == kick) {
                        // Readable, so it does not block; only this thread reads it.
                        let _ = self.active.kick.read();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    notes.write(format_args!("cannot wait for requests: {error}"));
                    self.interrupt.needs_reset();
                    break;
                }
            }
        }
        self
    }

    /// Serves all requests that are there; an error means that the ring itself is broken.
    pub(super) fn serve(&mut self, stop: &Stop, bounce: &mut [u8]) -> Result<(), virtio_queue::Error> {
        let mem = Arc::clone(&self.mem);
        let mut untold: Option<Instant> = None;
        loop {
            self.active.queue.disable_notification(&*mem)?;
            while !stop.asked.load(Ordering::Acquire)
                && let Some(chain) = chain::take(&mut self.active.queue, &mem)?
            {
                let head = chain.head_index();
                let written = match Chain::parse(&mem, chain).and_then(Request::parse) {
                    Ok(request) => self.execute(request, bounce),
                    Err(_) => {
                        add(&self.counters.malformed, 1);
                        0
                    }
                };
                self.active.queue.add_used(&*mem, head, written)?;
                let since = *untold.get_or_insert_with(Instant::now);
                if since.elapsed() > COALESCE {
                    self.notify();
                    untold = None;
                }
            }
            if stop.asked.load(Ordering::Acquire) || !chain::listen(&mut self.active.queue, &mem)? {
                break;
            }
        }
        if untold.is_some() {
            self.notify();
        }
        Ok(())
    }

    fn notify(&mut self) {
        // Rather one interrupt too many than a guest that waits.
        if self.active.queue.needs_notification(&*self.mem).unwrap_or(true) {
            self.interrupt.used_queue();
        }
    }

    /// Executes a request and stores its status; returns the bytes written to the guest.
    fn execute(&self, mut request: Request<'_>, bounce: &mut [u8]) -> u32 {
        let room = request.data_in.len();
        let status = match self.perform(&mut request, bounce) {
            Ok(()) => Status::Ok,
            Err(status) => {
                add(&self.counters.errors, 1);
                status
            }
        };
        let written = room - request.data_in.len();
        request.status.write(&[status as u8]);
        u32::try_from(written).map_or(u32::MAX, |written| written.saturating_add(1))
    }

    fn perform(&self, request: &mut Request<'_>, bounce: &mut [u8]) -> Result<(), Status> {
        let accepted = |bit: u32| self.features & 1 << bit != 0;
        let data = std::mem::take(&mut request.data_out);
        match request.command {
            Command::Read { sector } => {
                add(&self.counters.reads, 1);
                add(&self.counters.read_bytes, request.data_in.len() as u64);
                self.disk.read(sector, &mut request.data_in, bounce)
            }
            Command::Write { sector } => {
                let mut data = data;
                add(&self.counters.writes, 1);
                add(&self.counters.write_bytes, data.len() as u64);
                self.disk.write(sector, &mut data, bounce)?;
                // A driver that does not flush expects writes to be durable (5.2.6.2).
                if accepted(VIRTIO_BLK_F_FLUSH) { Ok(()) } else { self.disk.flush() }
            }
            Command::Flush => {
                add(&self.counters.flushes, 1);
                self.disk.flush()
            }
            Command::Id => {
                request.data_in.write(&self.serial);
                Ok(())
            }
            Command::Discard if accepted(VIRTIO_BLK_F_DISCARD) => {
                let ranges = parse_ranges(data, false)?;
                self.disk.check_ranges(&ranges)?;
                ranges.into_iter().try_for_each(|range| self.disk.discard(range))
            }
            Command::WriteZeroes if accepted(VIRTIO_BLK_F_WRITE_ZEROES) => {
                let ranges = parse_ranges(data, true)?;
                self.disk.check_ranges(&ranges)?;
                add(&self.counters.write_bytes, ranges.iter().map(|range| range.bytes()).sum());
                ranges.into_iter().try_for_each(|range| self.disk.write_zeroes(range, bounce))
            }
            Command::Discard | Command::WriteZeroes | Command::Unknown => Err(Status::Unsupported),
        }
    }
}
