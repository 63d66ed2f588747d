//! Between the queues and the TAP.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::io::Errno;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::request::{HEADER_BYTES, MAX_FRAME_BYTES, NUM_BUFFERS_AT, Refusal, acceptable, check};
use crate::chain::{self, Chain, Span};
use crate::device::{ActivateError, ActiveQueue, GuestMem, Interrupt};
use crate::note::Notes;

/// Frames in one direction before the other direction and other devices have their turn.
const BUDGET: usize = 256;
/// Most guest buffers of one frame: with the smallest that Linux offers (1536 bytes) the largest frame takes 43.
const MAX_BUFFERS: usize = 64;

/// An entry of the used ring: head and length (virtio 1.3, 2.7.8).
const USED_ELEMENT_BYTES: u64 = 8;

const TX_KICK: u64 = 0;
const RX_KICK: u64 = 1;
const TAP: u64 = 2;

/// What is counted since the device was made.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) rx_frames: AtomicU64,
    pub(super) rx_bytes: AtomicU64,
    pub(super) rx_dropped: AtomicU64,
    pub(super) tx_frames: AtomicU64,
    pub(super) tx_bytes: AtomicU64,
    pub(super) tx_dropped: AtomicU64,
    pub(super) tx_malformed: AtomicU64,
    pub(super) tx_spoofed: AtomicU64,
}

fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Ordering::Relaxed);
}

/// Serves both queues and the TAP.
#[derive(Debug)]
pub(super) struct NetHandler {
    tap: OwnedFd,
    mac: [u8; 6],
    features: u64,
    mem: GuestMem,
    interrupt: Arc<dyn Interrupt>,
    rx: ActiveQueue,
    tx: ActiveQueue,
    epoll: Epoll,
    /// Whether the TAP is in the event set.
    watching: bool,
    /// A frame from the TAP, header first, when `held` is not 0.
    frame: Box<[u8]>,
    held: usize,
    rx_used: bool,
    /// A frame took several buffers at once, which the queue's own account of what to notify misses.
    rx_many: bool,
    tx_used: bool,
    outgoing: Box<[u8]>,
    counters: Arc<Counters>,
    notes: Notes,
    /// A ring makes no sense: nothing is done any more.
    broken: bool,
}

impl NetHandler {
    pub(super) fn new(
        tap: OwnedFd,
        mac: [u8; 6],
        context: crate::device::ActivateContext,
        counters: Arc<Counters>,
    ) -> Result<Self, ActivateError> {
        let mut slots = [None, None];
        for queue in context.queues {
            if let Some(slot) = slots.get_mut(queue.index) {
                *slot = Some(queue);
            }
        }
        let [rx, tx] = slots;
        let rx = rx.ok_or(ActivateError::MissingQueue(0))?;
        let tx = tx.ok_or(ActivateError::MissingQueue(1))?;
        let prepare = |source| ActivateError::Io { what: "the network event set", source };
        let epoll = Epoll::new().map_err(prepare)?;
        let mut handler = Self {
            tap,
            mac,
            features: context.features,
            mem: context.mem,
            interrupt: context.interrupt,
            rx,
            tx,
            epoll,
            watching: false,
            frame: vec![0; MAX_FRAME_BYTES].into_boxed_slice(),
            held: 0,
            rx_used: false,
            rx_many: false,
            tx_used: false,
            outgoing: vec![0; MAX_FRAME_BYTES].into_boxed_slice(),
            counters,
            notes: Notes::new("net"),
            broken: false,
        };
        handler.control(ControlOperation::Add, handler.tx.kick.as_raw_fd(), TX_KICK).map_err(prepare)?;
        handler.control(ControlOperation::Add, handler.rx.kick.as_raw_fd(), RX_KICK).map_err(prepare)?;
        handler.watch_tap(true).map_err(prepare)?;
        Ok(handler)
    }

    fn control(&self, operation: ControlOperation, fd: i32, id: u64) -> io::Result<()> {
        self.epoll.ctl(operation, fd, EpollEvent::new(EventSet::IN, id))
    }

    fn watch_tap(&mut self, watch: bool) -> io::Result<()> {
        if watch != self.watching {
            let operation = if watch { ControlOperation::Add } else { ControlOperation::Delete };
            self.control(operation, self.tap.as_raw_fd(), TAP)?;
            self.watching = watch;
        }
        Ok(())
    }

    /// Handles what has happened so far, without waiting.
    pub(super) fn run(&mut self) {
        let mut events = [EpollEvent::default(); 3];
        let count = self.epoll.wait(0, &mut events).unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::Interrupted {
                self.notes.write(format_args!("cannot wait for events: {error}"));
            }
            0
        });
        for event in events.iter().take(count) {
            let served = match event.data() {
                TX_KICK => self.serve_tx(),
                _ => {
                    if event.data() == RX_KICK {
                        // Just reported readable, and only this thread reads it.
                        let _ = self.rx.kick.read();
                    }
                    self.serve_rx()
                }
            };
            if served.is_err() {
                self.broken = true;
                self.interrupt.needs_reset();
                return;
            }
        }
        self.notify();
    }

    fn notify(&mut self) {
        let mem: &GuestMemoryMmap = &self.mem;
        // Rather one interrupt too many than a guest that waits.
        let rx = std::mem::take(&mut self.rx_used) && self.rx.queue.needs_notification(mem).unwrap_or(true);
        let tx = std::mem::take(&mut self.tx_used) && self.tx.queue.needs_notification(mem).unwrap_or(true);
        if std::mem::take(&mut self.rx_many) || rx || tx {
            self.interrupt.used_queue();
        }
    }

    /// Moves frames from the TAP to the guest while there are frames and buffers. An error means that the ring itself is broken, here and
    /// below.
    fn serve_rx(&mut self) -> Result<(), virtio_queue::Error> {
        let mem = Arc::clone(&self.mem);
        for _ in 0..BUDGET {
            if self.held == 0 {
                match rustix::io::read(&self.tap, &mut *self.frame) {
                    Ok(count) if acceptable(self.frame.get(..count).unwrap_or_default(), self.features) => {
                        self.held = count;
                    }
                    Ok(_) => {
                        add(&self.counters.rx_dropped, 1);
                        continue;
                    }
                    Err(Errno::INTR) => continue,
                    Err(Errno::AGAIN) => {
                        self.resume();
                        return Ok(());
                    }
                    Err(error) => {
                        self.notes.write(format_args!("cannot read from the TAP, no more frames: {error}"));
                        // Watched any longer, it would be reported without end.
                        let _ = self.watch_tap(false);
                        return Ok(());
                    }
                }
            }
            while !self.deliver(&mem)? {
                // The frame waits, and so does the TAP, until the guest has offered more buffers.
                if !chain::listen_beyond(&mut self.rx.queue, &mem)? {
                    if let Err(error) = self.watch_tap(false) {
                        self.notes.write(format_args!("cannot stop watching the TAP: {error}"));
                    }
                    return Ok(());
                }
            }
            self.held = 0;
        }
        // Others first; the event set reports the TAP again.
        self.resume();
        Ok(())
    }

    fn resume(&mut self) {
        if let Err(error) = self.watch_tap(true) {
            self.notes.write(format_args!("cannot watch the TAP: {error}"));
            self.interrupt.needs_reset();
        }
    }

    /// Puts the held frame into guest buffers; false when there are too few. A frame that can never fit is dropped.
    fn deliver(&mut self, mem: &GuestMemoryMmap) -> Result<bool, virtio_queue::Error> {
        let start = self.rx.queue.next_avail();
        let merge = self.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let most = if merge { MAX_BUFFERS } else { 1 };
        let mut buffers: Vec<(u16, Span<'_>)> = Vec::new();
        let mut room = 0;
        while room < self.held && buffers.len() < most {
            let Some(chain) = chain::take(&mut self.rx.queue, mem)? else {
                self.rx.queue.set_next_avail(start);
                return Ok(false);
            };
            let head = chain.head_index();
            let span = Chain::parse(mem, chain).map(|chain| chain.writable).unwrap_or_default();
            room += span.len();
            buffers.push((head, span));
        }
        let first = buffers.first().map_or(0, |(_, span)| span.len());
        let fits = room >= self.held && first >= HEADER_BYTES;
        let frame = self.frame.get_mut(..self.held).unwrap_or_default();
        if let Some(field) = frame.get_mut(NUM_BUFFERS_AT..HEADER_BYTES) {
            field.copy_from_slice(&(buffers.len() as u16).to_le_bytes());
        }
        let mut done = 0;
        let mut used = Vec::with_capacity(buffers.len());
        for (head, mut span) in buffers {
            let count = if fits { span.write(frame.get(done..).unwrap_or_default()) } else { 0 };
            done += count;
            used.push((head, count as u32));
        }
        if fits {
            add(&self.counters.rx_frames, 1);
            add(&self.counters.rx_bytes, self.held - HEADER_BYTES);
        } else {
            add(&self.counters.rx_dropped, 1);
        }
        self.rx_many |= used.len() > 1;
        self.rx_used |= publish(&mut self.rx.queue, mem, &used);
        Ok(true)
    }

    /// Sends frames of the guest.
    fn serve_tx(&mut self) -> Result<(), virtio_queue::Error> {
        // Just reported readable, and only this thread reads it.
        let _ = self.tx.kick.read();
        let mem = Arc::clone(&self.mem);
        let mut budget = BUDGET;
        loop {
            self.tx.queue.disable_notification(&*mem)?;
            while budget > 0
                && let Some(chain) = chain::take(&mut self.tx.queue, &mem)?
            {
                budget -= 1;
                let head = chain.head_index();
                match Chain::parse(&mem, chain) {
                    Ok(chain) => self.transmit(chain.readable),
                    Err(_) => add(&self.counters.tx_malformed, 1),
                }
                self.tx.queue.add_used(&*mem, head, 0)?;
                self.tx_used = true;
            }
            if budget == 0 {
                // Others first; the event set reports this kick again.
                let _ = self.tx.kick.write(1);
                return Ok(());
            }
            if !chain::listen(&mut self.tx.queue, &mem)? {
                return Ok(());
            }
        }
    }

    /// Sends one frame. It is copied before it is checked, so the guest cannot change it in between.
    fn transmit(&mut self, mut span: Span<'_>) {
        let len = span.len();
        let copied = span.read(&mut self.outgoing);
        let Some(frame) = self.outgoing.get_mut(..copied).filter(|_| copied == len) else {
            return add(&self.counters.tx_malformed, 1);
        };
        match check(frame, self.features, self.mac) {
            Ok(()) => {}
            Err(Refusal::Malformed) => return add(&self.counters.tx_malformed, 1),
            Err(Refusal::Spoofed) => return add(&self.counters.tx_spoofed, 1),
        }
        if let Some(field) = frame.get_mut(NUM_BUFFERS_AT..HEADER_BYTES) {
            field.fill(0);
        }
        loop {
            match rustix::io::write(&self.tap, frame) {
                Ok(_) => {
                    add(&self.counters.tx_frames, 1);
                    return add(&self.counters.tx_bytes, len - HEADER_BYTES);
                }
                Err(Errno::INTR) => {}
                // A full or downed interface loses frames, as any does.
                Err(_) => return add(&self.counters.tx_dropped, 1),
            }
        }
    }

    /// Whether the event loop would call the handler again at once.
    #[cfg(test)]
    pub(super) fn has_events(&self) -> bool {
        self.epoll.wait(0, &mut [EpollEvent::default()]).unwrap() > 0
    }
}

/// Gives buffers back all at once: a driver that saw only the first of a merged frame would take the others for missing.
fn publish(queue: &mut Queue, mem: &GuestMemoryMmap, used: &[(u16, u32)]) -> bool {
    let Some(((last, last_len), others)) = used.split_last() else { return false };
    for (head, len) in others {
        let slot = u64::from(queue.next_used() % queue.size()) * USED_ELEMENT_BYTES;
        let element = [u32::from(*head).to_le_bytes(), len.to_le_bytes()].concat();
        // An error means rings outside guest memory, which the transport has ruled out.
        let _ = mem.write_slice(&element, GuestAddress(queue.used_ring() + 4 + slot));
        queue.set_next_used(queue.next_used().wrapping_add(1));
    }
    queue.add_used(mem, *last, *last_len).is_ok()
}

impl MutEventSubscriber for NetHandler {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.epoll, EventSet::IN)) {
            self.notes.write(format_args!("cannot watch the event set: {error}"));
            self.interrupt.needs_reset();
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.run();
        if self.broken {
            // It would be reported without end.
            let _ = ops.remove(events);
        }
    }
}
