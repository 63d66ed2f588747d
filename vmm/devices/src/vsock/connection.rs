//! One stream between a guest port and a Unix socket: its state, its credit, its buffers. No queues, no events.
//!
//! ```text
//!  host connects -> Handshake --CONNECT line--> Requested --guest: RESPONSE--\
//!  guest: REQUEST, listener found ------------------------------------------> Open --both ends shut--> gone
//!                                                     guest: RST after its SHUTDOWN \--> Draining --flushed--> gone
//! ```
//! Half-close travels in both directions: the guest's `SHUTDOWN(send)` becomes `shutdown(WR)` once all that it sent has been
//! delivered; the end of the host's stream becomes `SHUTDOWN(send)` once all of it lies in guest buffers.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use vm_memory::{VolatileMemoryError, WriteVolatile};
use vmm_sys_util::epoll::EventSet;

use super::request::{Key, NO_MORE, NO_RECEIVE, NO_SEND, Op};
use crate::chain::Span;

/// Bytes that the guest may send ahead of the host's reader, per connection: its whole buffer here.
pub(super) const WINDOW_BYTES: u32 = 256 * 1024;
/// The same once more than [`super::handler::FULL_WINDOWS`] connections exist, so that all buffers together stay small.
pub(super) const SMALL_WINDOW_BYTES: u32 = 16 * 1024;

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The host's line has not been read.
    Handshake,
    /// The guest has been asked and has not answered.
    Requested,
    /// Both ends agreed.
    Open,
    /// The guest has forgotten it; what it sent is still being delivered.
    Draining,
}

/// What reading the host's stream gave.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fetched {
    /// This many bytes are in the buffer.
    Bytes(usize),
    /// None now.
    Nothing,
    /// The stream has ended.
    End,
}

/// The guest sent more than its credit.
#[derive(Debug)]
pub(super) struct CreditBroken;

/// Bytes in order, freed when empty.
#[derive(Debug, Default)]
struct Backlog {
    data: Vec<u8>,
    start: usize,
}

impl Backlog {
    fn len(&self) -> usize {
        self.data.len() - self.start
    }
    fn bytes(&self) -> &[u8] {
        self.data.get(self.start..).unwrap_or_default()
    }
    fn consume(&mut self, count: usize) {
        self.start += count;
        if self.start >= self.data.len() {
            *self = Self::default();
        }
    }
    fn push_span(&mut self, span: &mut Span<'_>) {
        if self.start > self.data.len() / 2 {
            self.data.drain(..self.start);
            self.start = 0;
        }
        let old = self.data.len();
        self.data.resize(old + span.len(), 0);
        let read = self.data.get_mut(old..).map_or(0, |tail| span.read(tail));
        self.data.truncate(old + read);
    }
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    /// Ports; the guest port is 0 until the line has been read.
    pub(super) key: Key,
    pub(super) phase: Phase,
    /// When [`Phase::Handshake`] or [`Phase::Requested`] is given up.
    pub(super) deadline: Option<Instant>,
    /// In the list of those that have something for the guest.
    pub(super) queued: bool,
    /// What epoll watches: `None` when it does not know the stream.
    pub(super) watched: Option<EventSet>,
    stream: UnixStream,

    /// Guest to host: bytes taken from the guest and not yet by the host.
    to_host: Backlog,
    window: u32,
    received: u32,
    forwarded: u32,
    announced: u32,
    host_gone: bool,
    host_write_shut: bool,
    /// `SHUTDOWN` flags of the guest.
    guest_shutdown: u32,

    /// Host to guest: bytes read from the host and not yet put in guest buffers.
    to_guest: Backlog,
    sent: u32,
    peer_window: u32,
    peer_forwarded: u32,
    credit_asked: bool,
    /// The stream may have bytes, or its end, for us.
    readable: bool,
    host_eof: bool,
    hung_up: bool,
    /// `SHUTDOWN` flags told to the guest.
    told_shutdown: u32,

    reply: Option<Op>,
    credit_request_due: bool,
    credit_update_due: bool,
}

impl Connection {
    /// A connection on a nonblocking stream.
    pub(super) fn new(stream: UnixStream, key: Key, phase: Phase, window: u32) -> Self {
        Self {
            key,
            phase,
            deadline: None,
            queued: false,
            watched: None,
            stream,
            to_host: Backlog::default(),
            window,
            received: 0,
            forwarded: 0,
            announced: 0,
            host_gone: false,
            host_write_shut: false,
            guest_shutdown: 0,
            to_guest: Backlog::default(),
            sent: 0,
            peer_window: 0,
            peer_forwarded: 0,
            credit_asked: false,
            readable: false,
            host_eof: false,
            hung_up: false,
            told_shutdown: 0,
            reply: None,
            credit_request_due: false,
            credit_update_due: false,
        }
    }

    /// The stream, to be watched.
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sets the operation that the guest is to be sent first.
    pub(super) fn set_reply(&mut self, op: Op) {
        self.reply = Some(op);
    }

    /// Reads more of the host's line; true when the stream has ended or failed.
    pub(super) fn read_line(&mut self, max: usize) -> (&[u8], bool) {
        let mut buf = [0; super::request::MAX_LINE_BYTES];
        let room = max.saturating_sub(self.to_guest.len()).min(buf.len());
        let mut ended = false;
        match buf.get_mut(..room).map(|part| self.stream.read(part)) {
            Some(Ok(0)) => ended = true,
            Some(Ok(count)) => self.to_guest.data.extend_from_slice(buf.get(..count).unwrap_or_default()),
            Some(Err(error)) => ended = !would_block(&error),
            None => {}
        }
        (self.to_guest.bytes(), ended)
    }

    /// Drops the line from what goes to the guest.
    pub(super) fn consume_line(&mut self, count: usize) {
        self.to_guest.consume(count);
    }

    /// The guest accepted: the host is told its port. False when the host is gone.
    pub(super) fn accept(&mut self) -> bool {
        self.phase = Phase::Open;
        self.deadline = None;
        self.readable = true;
        // A fresh Unix socket has room for this line.
        self.stream.write_all(format!("OK {}\n", self.key.host_port).as_bytes()).is_ok()
    }

    /// The guest's view of its buffers, from any packet of it.
    pub(super) fn set_credit(&mut self, window: u32, forwarded: u32) {
        let before = self.credit();
        self.peer_window = window;
        self.peer_forwarded = forwarded;
        if self.credit() > before {
            self.credit_asked = false;
            // Perhaps nothing is there; one read finds out.
            self.readable |= before == 0 && !self.host_eof;
        }
    }

    /// Bytes that the guest has room for.
    pub(super) fn credit(&self) -> u32 {
        self.peer_window.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// Takes a payload of the guest: straight to the host while that keeps up, else into the buffer.
    pub(super) fn absorb(&mut self, mut payload: Span<'_>) -> Result<(), CreditBroken> {
        let len = u32::try_from(payload.len()).map_err(|_| CreditBroken)?;
        let held = self.received.wrapping_sub(self.forwarded);
        if self.phase != Phase::Open
            || self.guest_shutdown & NO_SEND != 0
            || held.saturating_add(len) > self.window
        {
            return Err(CreditBroken);
        }
        self.received = self.received.wrapping_add(len);
        if self.to_host.len() == 0 && !self.host_gone {
            while let Some(slice) = payload.front(usize::MAX).filter(|slice| !slice.is_empty()) {
                match (&self.stream).write_volatile(&slice) {
                    Ok(count) => {
                        payload.skip(count);
                        // At most `len`, which fits.
                        self.forwarded = self.forwarded.wrapping_add(count as u32);
                    }
                    Err(VolatileMemoryError::IOError(error)) if interrupted(&error) => {}
                    Err(VolatileMemoryError::IOError(error)) if would_block(&error) => break,
                    Err(_) => {
                        self.lose_host();
                        break;
                    }
                }
            }
        }
        if self.host_gone {
            self.forwarded = self.received;
        } else if payload.len() > 0 {
            self.to_host.push_span(&mut payload);
        }
        self.check_announcement();
        Ok(())
    }

    /// Delivers what is buffered for the host, then its half-close.
    pub(super) fn flush(&mut self) {
        while self.to_host.len() > 0 {
            match self.stream.write(self.to_host.bytes()) {
                Ok(count) => {
                    self.to_host.consume(count);
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                }
                Err(error) if interrupted(&error) => {}
                Err(error) if would_block(&error) => break,
                Err(_) => self.lose_host(),
            }
        }
        self.check_announcement();
        if self.guest_shutdown & NO_SEND != 0 && self.to_host.len() == 0 && !self.host_write_shut {
            self.host_write_shut = true;
            // Fails only when the host is gone, which its hang-up tells too.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// The guest learns of room in the buffer when it believes less than half of it free and a quarter has been freed.
    fn check_announcement(&mut self) {
        let believed_used = self.received.wrapping_sub(self.announced);
        let news = self.forwarded.wrapping_sub(self.announced);
        if believed_used > self.window / 2 && news >= self.window / 4 {
            self.credit_update_due = true;
        }
    }

    /// Nothing more can be delivered to the host.
    fn lose_host(&mut self) {
        self.host_gone = true;
        self.to_host = Backlog::default();
        self.forwarded = self.received;
    }

    /// The guest sent `SHUTDOWN`.
    pub(super) fn shutdown_by_guest(&mut self, flags: u32) {
        self.guest_shutdown |= flags & NO_MORE;
        if self.guest_shutdown & NO_RECEIVE != 0 && !self.host_eof {
            self.host_eof = true;
            self.readable = false;
            self.to_guest = Backlog::default();
            self.told_shutdown |= NO_SEND;
            // As in `flush`.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.flush();
    }

    /// The guest sent `RST`. True when something is left to deliver, which then goes on without the guest.
    pub(super) fn reset_by_guest(&mut self) -> bool {
        self.phase = Phase::Draining;
        self.deadline = None;
        self.guest_shutdown & NO_SEND != 0 && self.to_host.len() > 0
    }

    /// epoll reported `flags`.
    pub(super) fn host_event(&mut self, flags: EventSet) {
        if flags.contains(EventSet::OUT) {
            self.flush();
        }
        if flags.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.hung_up = true;
            self.lose_host();
        }
        self.readable |=
            !self.host_eof && flags.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR);
    }

    /// What epoll is to watch. Hang-up is always reported, so a stream that has hung up is watched only to be read.
    pub(super) fn interest(&self) -> Option<EventSet> {
        let mut flags = EventSet::empty();
        let reads = match self.phase {
            Phase::Handshake => true,
            Phase::Open => !self.host_eof && !self.readable && self.credit() > 0 && self.to_guest.len() == 0,
            Phase::Requested | Phase::Draining => false,
        };
        flags.set(EventSet::IN, reads);
        flags.set(EventSet::OUT, self.to_host.len() > 0);
        (!flags.is_empty() || !self.hung_up).then_some(flags)
    }

    /// Whether the host's end has closed altogether.
    pub(super) fn hung_up(&self) -> bool {
        self.hung_up
    }

    /// Whether there is something to send to the guest.
    pub(super) fn has_packet(&self) -> bool {
        let data = (self.readable || self.to_guest.len() > 0) && self.credit() > 0;
        match self.phase {
            Phase::Requested => self.reply.is_some(),
            Phase::Open => {
                let credit = self.credit_update_due || self.credit_request_due;
                self.reply.is_some() || credit || data || self.shutdown_due() != 0
            }
            Phase::Handshake | Phase::Draining => false,
        }
    }

    fn shutdown_due(&self) -> u32 {
        let mut flags = 0;
        if self.host_eof && self.to_guest.len() == 0 {
            flags |= NO_SEND;
        }
        if self.host_gone {
            flags |= NO_RECEIVE;
        }
        flags & !self.told_shutdown
    }

    /// The next packet without payload, if one is due: operation and flags.
    pub(super) fn next_control(&mut self) -> Option<(Op, u32)> {
        if let Some(op) = self.reply.take() {
            return Some((op, 0));
        }
        if std::mem::take(&mut self.credit_request_due) {
            return Some((Op::CreditRequest, 0));
        }
        if self.shutdown_due() != 0 {
            self.told_shutdown |= self.shutdown_due();
            return Some((Op::Shutdown, self.told_shutdown));
        }
        self.credit_update_due.then_some((Op::CreditUpdate, 0))
    }

    /// Bytes that wait for guest buffers.
    pub(super) fn pending(&self) -> &[u8] {
        self.to_guest.bytes()
    }

    /// `count` bytes of [`Self::pending`] lie in guest buffers.
    pub(super) fn consume_pending(&mut self, count: usize) {
        self.to_guest.consume(count);
    }

    /// Keeps what did not fit in guest buffers.
    pub(super) fn keep(&mut self, rest: &[u8]) {
        self.to_guest.data.extend_from_slice(rest);
    }

    /// Reads the host's stream into `buf`.
    pub(super) fn fetch(&mut self, buf: &mut [u8]) -> Fetched {
        if !self.readable || buf.is_empty() {
            return Fetched::Nothing;
        }
        let result = loop {
            match self.stream.read(buf) {
                Err(error) if interrupted(&error) => {}
                other => break other,
            }
        };
        match result {
            Ok(count) if count > 0 => {
                // A short read means that the stream was emptied; epoll tells when there is more.
                self.readable = count == buf.len() || self.hung_up;
                Fetched::Bytes(count)
            }
            Err(error) if would_block(&error) => {
                self.readable = false;
                Fetched::Nothing
            }
            _ => {
                self.readable = false;
                self.host_eof = true;
                Fetched::End
            }
        }
    }

    /// `count` payload bytes went to the guest.
    pub(super) fn count_sent(&mut self, count: usize) {
        // Payloads are bounded by the credit, a `u32`.
        self.sent = self.sent.wrapping_add(count as u32);
        let waiting = self.readable || self.to_guest.len() > 0;
        if self.credit() == 0 && waiting && !self.credit_asked {
            self.credit_asked = true;
            self.credit_request_due = true;
        }
    }

    /// Credit fields of a packet to the guest: window and bytes forwarded.
    pub(super) fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        self.credit_update_due = false;
        (self.window, self.forwarded)
    }

    /// The guest asked for credit.
    pub(super) fn ask_update(&mut self) {
        self.credit_update_due = true;
    }

    /// Whether the guest has closed and all that it sent is delivered or lost: answer with `RST`.
    pub(super) fn closed_by_guest(&self) -> bool {
        self.phase == Phase::Open && self.guest_shutdown == NO_MORE && self.to_host.len() == 0
    }

    /// Whether nothing is left to do, and nothing to say.
    pub(super) fn finished(&self) -> bool {
        match self.phase {
            Phase::Open => self.told_shutdown == NO_MORE && self.host_gone,
            Phase::Draining => self.to_host.len() == 0,
            Phase::Handshake | Phase::Requested => false,
        }
    }

    /// Closes the stream so that the host reads all that was delivered and then its end: unread bytes in the receive
    /// queue of a Unix socket would turn that end into `ECONNRESET`.
    pub(super) fn close(mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        let mut sink = [0; 4096];
        while matches!(self.stream.read(&mut sink), Ok(count) if count > 0) {}
    }
}

fn would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

fn interrupted(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Interrupted
}
