//! Between the queues and the connections.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EpollEvent;

use super::connection::{Fetched, Phase};
use super::request::{
    HEADER_BYTES, HOST_CID, Header, Key, Line, MAX_LINE_BYTES, NO_MORE, Op, TYPE_STREAM, parse_line,
};
use super::reset::{Progress, Reset};
use super::table::{Counters, EVENT_KICK, HostSide, LISTENER, RX_KICK, TIMER, TX_KICK};
use crate::chain::{self, Chain, Span};
use crate::device::{ActivateError, ActiveQueue, GuestMem, Interrupt};
use crate::note::Notes;

/// Largest payload of one packet, bytes (Linux: `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
pub(super) const MAX_PAYLOAD_BYTES: u32 = 64 * 1024;
/// Most that is read from one stream before the next has its turn, bytes.
const TURN_BYTES: usize = 64 * 1024;
/// Packets taken from the guest before other devices have their turn.
const TX_BUDGET: usize = 512;
/// Turns given to connections before other devices have theirs.
const RX_BUDGET: usize = 512;
/// `RST`s that wait for guest buffers; more are dropped, which only a guest that floods can cause.
const MAX_RESETS: usize = 1024;
/// Events taken from the set at once.
const EVENTS: usize = 64;

/// The queues of the device.
#[derive(Debug)]
pub(super) struct Queues {
    rx: ActiveQueue,
    tx: ActiveQueue,
    /// For the transport reset event, which a driver need not want to hear of.
    event: Option<ActiveQueue>,
}

impl Queues {
    /// Picks the queues by index.
    pub(super) fn take(queues: Vec<ActiveQueue>) -> Result<Self, ActivateError> {
        let mut slots = [None, None, None];
        for queue in queues {
            if let Some(slot) = slots.get_mut(queue.index) {
                *slot = Some(queue);
            }
        }
        let [rx, tx, event] = slots;
        let rx = rx.ok_or(ActivateError::MissingQueue(0))?;
        let tx = tx.ok_or(ActivateError::MissingQueue(1))?;
        Ok(Self { rx, tx, event })
    }
}

/// Serves the queues and the streams.
#[derive(Debug)]
pub(super) struct VsockHandler {
    cid: u64,
    mem: GuestMem,
    interrupt: Arc<dyn Interrupt>,
    queues: Queues,
    side: HostSide,
    /// What the driver has to be told first.
    reset: Option<Reset>,
    resets: VecDeque<Key>,
    /// Payload room of the last guest buffer seen, bytes: how much to read ahead.
    room: usize,
    scratch: Box<[u8]>,
    rx_used: bool,
    tx_used: bool,
    notes: Notes,
    /// A ring makes no sense: nothing is done any more.
    broken: bool,
}

impl VsockHandler {
    pub(super) fn new(
        cid: u64,
        mem: GuestMem,
        interrupt: Arc<dyn Interrupt>,
        mut queues: Queues,
        mut side: HostSide,
    ) -> io::Result<Self> {
        side.watch(&queues.tx.kick, TX_KICK)?;
        side.watch(&queues.rx.kick, RX_KICK)?;
        let due = side.counters.reset_due.load(Ordering::Relaxed);
        let reset = queues.event.take().filter(|_| due).map(Reset::new);
        match &reset {
            Some(reset) => side.watch(reset.kick(), EVENT_KICK)?,
            None if due => side.reset_is_done(),
            None => {}
        }
        Ok(Self {
            cid,
            mem,
            interrupt,
            queues,
            side,
            reset,
            resets: VecDeque::new(),
            room: 4096 - HEADER_BYTES,
            scratch: vec![0; TURN_BYTES].into_boxed_slice(),
            rx_used: false,
            tx_used: false,
            notes: Notes::new("vsock"),
            broken: false,
        })
    }

    /// Handles what has happened so far, without waiting.
    pub(super) fn run(&mut self) {
        if self.serve_events().is_err() {
            self.broken = true;
            self.interrupt.needs_reset();
        }
    }

    /// An error means that a ring itself is broken, here and below.
    fn serve_events(&mut self) -> Result<(), virtio_queue::Error> {
        let mut events = [EpollEvent::default(); EVENTS];
        let count = self.side.epoll.wait(0, &mut events).unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::Interrupted {
                self.notes.write(format_args!("cannot wait for events: {error}"));
            }
            0
        });
        for event in events.iter().take(count) {
            let (id, flags) = (event.data(), event.event_set());
            match id {
                TX_KICK => self.serve_tx()?,
                RX_KICK => {
                    // Nonblocking; a lost race means that the kick was already seen.
                    let _ = self.queues.rx.kick.read();
                }
                EVENT_KICK => {}
                LISTENER => self.side.accept(),
                TIMER => self.expire(Instant::now()),
                id => self.serve_stream(id, flags),
            }
        }
        self.tell_reset()?;
        self.fill_rx()?;
        self.notify();
        Ok(())
    }

    /// Goes on telling the driver that the connections that it believes in are gone.
    fn tell_reset(&mut self) -> Result<(), virtio_queue::Error> {
        let Some(reset) = &mut self.reset else { return Ok(()) };
        match reset.advance(&self.mem)? {
            Progress::Waits => {}
            Progress::Tells => self.interrupt.used_queue(),
            Progress::Done => {
                // It is in the set, so this cannot fail.
                let _ = self.side.unwatch(reset.kick());
                self.reset = None;
                self.side.reset_is_done();
            }
        }
        Ok(())
    }

    /// Ends what is past its deadline.
    pub(super) fn expire(&mut self, now: Instant) {
        for id in self.side.expired(now) {
            self.give_up(id);
        }
    }

    #[cfg(test)]
    pub(super) fn connections(&self) -> usize {
        self.side.len()
    }

    /// Whether the event loop would call the handler again at once.
    #[cfg(test)]
    pub(super) fn has_events(&self) -> bool {
        self.side.epoll.wait(0, &mut [EpollEvent::default()]).unwrap() > 0
    }

    fn notify(&mut self) {
        let mem: &GuestMemoryMmap = &self.mem;
        let mut wanted = false;
        for (used, queue) in
            [(&mut self.rx_used, &mut self.queues.rx.queue), (&mut self.tx_used, &mut self.queues.tx.queue)]
        {
            // Rather one interrupt too many than a guest that waits.
            wanted |= std::mem::take(used) && queue.needs_notification(mem).unwrap_or(true);
        }
        if wanted {
            self.interrupt.used_queue();
        }
    }

    /// A stream has bytes, room or an end.
    fn serve_stream(&mut self, id: u64, flags: EventSet) {
        let Some(connection) = self.side.get(id) else { return };
        match connection.phase {
            Phase::Handshake => {
                let (bytes, ended) = connection.read_line(MAX_LINE_BYTES);
                match parse_line(bytes) {
                    Line::Connect { port, rest } => {
                        connection.consume_line(rest);
                        self.side.request(id, port);
                    }
                    Line::Partial if !ended => {}
                    _ => {
                        Counters::add(&self.side.counters.refused, 1);
                        return self.side.remove(id);
                    }
                }
            }
            _ => connection.host_event(flags),
        }
        if self.side.get(id).is_some_and(|c| c.phase == Phase::Requested && c.hung_up()) {
            return self.give_up(id);
        }
        self.settle(id);
    }

    /// A connection is ended from our side.
    fn give_up(&mut self, id: u64) {
        if let Some(connection) = self.side.get(id) {
            let (key, phase) = (connection.key, connection.phase);
            self.side.remove(id);
            if phase != Phase::Handshake {
                self.reset(key);
            }
        }
    }

    fn settle(&mut self, id: u64) {
        if let Some(key) = self.side.settle(id) {
            self.reset(key);
        }
    }

    /// Has the guest told that it has no such connection. One that is yet to hear that it has none at all would take that for an end in
    /// order.
    fn reset(&mut self, key: Key) {
        if self.reset.is_none() && self.resets.len() < MAX_RESETS {
            self.resets.push_back(key);
        }
    }

    /// Takes packets from the guest.
    fn serve_tx(&mut self) -> Result<(), virtio_queue::Error> {
        // Nonblocking; a lost race means that the kick was already seen.
        let _ = self.queues.tx.kick.read();
        let mem = Arc::clone(&self.mem);
        let mut budget = TX_BUDGET;
        loop {
            self.queues.tx.queue.disable_notification(&*mem)?;
            while budget > 0
                && let Some(chain) = chain::take(&mut self.queues.tx.queue, &mem)?
            {
                budget -= 1;
                let head = chain.head_index();
                let taken = Chain::parse(&mem, chain).ok().and_then(|chain| self.take_packet(chain.readable));
                if taken.is_none() {
                    Counters::add(&self.side.counters.bad_packets, 1);
                }
                self.queues.tx.queue.add_used(&*mem, head, 0)?;
                self.tx_used = true;
            }
            if budget == 0 {
                // Others first; the set reports this kick again.
                let _ = self.queues.tx.kick.write(1);
                return Ok(());
            }
            if !chain::listen(&mut self.queues.tx.queue, &mem)? {
                return Ok(());
            }
        }
    }

    /// One packet of the guest; `None` when it is malformed or forged.
    fn take_packet(&mut self, mut span: Span<'_>) -> Option<()> {
        let header = Header::decode(&span.read_array::<HEADER_BYTES>().ok()?);
        if header.len > MAX_PAYLOAD_BYTES || span.len() < header.len as usize {
            return None;
        }
        span.truncate(header.len as usize);
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            return None;
        }
        Counters::add(&self.side.counters.packets_from_guest, 1);
        let key = header.guest_key();
        let known = self.side.find(key);
        match (header.op, known) {
            _ if header.kind != TYPE_STREAM => self.refuse(header.op, key),
            (Op::Request, None) => {
                if !self.side.connect(key, header.buf_alloc, header.fwd_cnt) {
                    Counters::add(&self.side.counters.refused, 1);
                    self.reset(key);
                }
            }
            (_, Some(id)) => self.take_for(id, &header, span),
            (_, None) => self.refuse(header.op, key),
        }
        Some(())
    }

    /// Answers a packet that belongs to nothing; `RST` is never answered.
    fn refuse(&mut self, op: Op, key: Key) {
        if op != Op::Reset {
            self.reset(key);
        }
    }

    /// One packet for a connection.
    fn take_for(&mut self, id: u64, header: &Header, payload: Span<'_>) {
        let Some(connection) = self.side.get(id) else { return };
        connection.set_credit(header.buf_alloc, header.fwd_cnt);
        let kept = match (header.op, connection.phase) {
            (Op::Reset, phase) => {
                self.side.forget_key(id);
                let drains = self.side.get(id).is_some_and(|c| phase == Phase::Open && c.reset_by_guest());
                if drains {
                    self.settle(id);
                } else {
                    if phase == Phase::Requested {
                        Counters::add(&self.side.counters.refused, 1);
                    }
                    self.side.remove(id);
                }
                return;
            }
            (Op::Response, Phase::Requested) => connection.accept(),
            (Op::Data, Phase::Open) => {
                let len = payload.len() as u64;
                let taken = connection.absorb(payload).is_ok();
                Counters::add(&self.side.counters.bytes_from_guest, len);
                taken
            }
            (Op::Shutdown, Phase::Open) => {
                connection.shutdown_by_guest(header.flags & NO_MORE);
                true
            }
            (Op::CreditUpdate, Phase::Open) => true,
            (Op::CreditRequest, Phase::Open) => {
                connection.ask_update();
                true
            }
            _ => false,
        };
        if kept {
            self.settle(id);
        } else {
            Counters::add(&self.side.counters.bad_packets, 1);
            self.give_up(id);
        }
    }

    /// Sends what is due to the guest while it has buffers.
    fn fill_rx(&mut self) -> Result<(), virtio_queue::Error> {
        let mem = Arc::clone(&self.mem);
        for _ in 0..RX_BUDGET {
            if chain::offered(&self.queues.rx.queue, &mem)? == 0 {
                if chain::listen(&mut self.queues.rx.queue, &mem)? {
                    continue;
                }
                return Ok(());
            }
            if let Some(key) = self.resets.pop_front() {
                self.send(&mem, &mut Header::to_guest(self.cid, key, Op::Reset), &[])?;
            } else if let Some(id) = self.side.pop_ready() {
                self.send_from(&mem, id)?;
                self.settle(id);
            } else {
                // Without a reason to send there is no reason to hear of new buffers.
                self.queues.rx.queue.disable_notification(&*mem)?;
                return Ok(());
            }
        }
        // Others first; the set reports this kick again.
        let _ = self.queues.rx.kick.write(1);
        Ok(())
    }

    /// One connection's turn: a packet without payload, or up to [`TURN_BYTES`] of its stream.
    fn send_from(&mut self, mem: &GuestMemoryMmap, id: u64) -> Result<(), virtio_queue::Error> {
        let Some(connection) = self.side.get(id) else { return Ok(()) };
        let key = connection.key;
        if let Some((op, flags)) = connection.next_control() {
            let (buf_alloc, fwd_cnt) = connection.announce();
            let plain = Header::to_guest(self.cid, key, op);
            self.send(mem, &mut Header { flags, buf_alloc, fwd_cnt, ..plain }, &[])?;
            return Ok(());
        }
        let ahead = chain::offered(&self.queues.rx.queue, mem)?.saturating_mul(self.room).max(1);
        let mut scratch = std::mem::take(&mut self.scratch);
        let Some(connection) = self.side.get(id) else { return Ok(()) };
        let credit = connection.credit() as usize;
        let kept = connection.pending().len();
        let limit = credit.min(ahead).min(scratch.len());
        let fetched = match scratch.get_mut(..limit) {
            Some(buf) if kept == 0 => connection.fetch(buf),
            Some(buf) => {
                let count = kept.min(buf.len());
                for (to, from) in buf.iter_mut().zip(connection.pending()) {
                    *to = *from;
                }
                Fetched::Bytes(count)
            }
            None => Fetched::Nothing,
        };
        if let Fetched::Bytes(count) = fetched {
            let data = scratch.get(..count).unwrap_or_default();
            let done = self.send_data(mem, id, key, data)?;
            if let Some(connection) = self.side.get(id) {
                if kept > 0 {
                    connection.consume_pending(done);
                } else {
                    connection.keep(data.get(done..).unwrap_or_default());
                }
                connection.count_sent(done);
            }
            Counters::add(&self.side.counters.bytes_to_guest, done as u64);
        }
        self.scratch = scratch;
        Ok(())
    }

    /// Puts bytes into as many packets as it takes and the guest has buffers for; returns how many bytes.
    fn send_data(
        &mut self,
        mem: &GuestMemoryMmap,
        id: u64,
        key: Key,
        data: &[u8],
    ) -> Result<usize, virtio_queue::Error> {
        let mut done = 0;
        while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
            let Some(connection) = self.side.get(id) else { break };
            let (buf_alloc, fwd_cnt) = connection.announce();
            let plain = Header::to_guest(self.cid, key, Op::Data);
            match self.send(mem, &mut Header { buf_alloc, fwd_cnt, ..plain }, rest)? {
                Some(count) => done += count,
                None => break,
            }
        }
        Ok(done)
    }

    /// Puts one packet into the guest's next buffer, as much payload as fits; returns how much, or `None` when there is
    /// no buffer. A guest that offers useless ones as fast as they are given back gets no further than that.
    fn send(
        &mut self,
        mem: &GuestMemoryMmap,
        header: &mut Header,
        payload: &[u8],
    ) -> Result<Option<usize>, virtio_queue::Error> {
        for _ in 0..self.queues.rx.queue.size() {
            let Some(chain) = chain::take(&mut self.queues.rx.queue, mem)? else { return Ok(None) };
            let head = chain.head_index();
            let parsed = Chain::parse(mem, chain).ok();
            let span = parsed.map(|chain| chain.writable).filter(|s| s.len() > HEADER_BYTES);
            let Some(mut span) = span else {
                // Useless to us: the guest has it back.
                Counters::add(&self.side.counters.bad_packets, 1);
                self.queues.rx.queue.add_used(mem, head, 0)?;
                self.rx_used = true;
                continue;
            };
            self.room = (span.len() - HEADER_BYTES).min(MAX_PAYLOAD_BYTES as usize);
            let count = payload.len().min(self.room);
            header.len = count as u32;
            span.write(&header.encode());
            span.write(payload.get(..count).unwrap_or_default());
            let written = (HEADER_BYTES + count) as u32;
            self.queues.rx.queue.add_used(mem, head, written)?;
            self.rx_used = true;
            Counters::add(&self.side.counters.packets_to_guest, 1);
            return Ok(Some(count));
        }
        Ok(None)
    }
}

impl MutEventSubscriber for VsockHandler {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.side.epoll, EventSet::IN)) {
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
