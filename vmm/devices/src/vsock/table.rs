//! The host side: listener, streams, timer, and the event set that they are watched with.
//!
//! All descriptors are in one epoll set of the device's own, named by ids that are never used twice, so an event can
//! never reach a connection that took over a closed one's descriptor.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::callers::Callers;
use super::connection::{Connection, Phase, SMALL_WINDOW_BYTES, WINDOW_BYTES};
use super::request::{Key, Op};

/// Most connections, counting those that are being made: bounds descriptors.
pub(super) const MAX_CONNECTIONS: usize = 1024;
/// Connections that get the full window; with the small ones for the others, buffers hold at most 31 MiB.
pub(super) const FULL_WINDOWS: usize = 64;
/// How long a host program may take for its line.
pub(super) const LINE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the guest may take to answer a request; its kernel does so within microseconds once it runs.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How often deadlines are looked at while there are any.
const TICK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// First host port of connections from the host; below are those that guests connect to by convention.
pub(super) const FIRST_HOST_PORT: u32 = 1 << 30;

/// Names in the event set.
pub(super) const TX_KICK: u64 = 0;
pub(super) const RX_KICK: u64 = 1;
pub(super) const LISTENER: u64 = 2;
pub(super) const TIMER: u64 = 3;
pub(super) const EVENT_KICK: u64 = 4;
const FIRST_CONNECTION: u64 = 16;

/// What is counted since the device was made.
#[derive(Debug)]
pub(super) struct Counters {
    /// Connections that there are just now.
    pub(super) open: AtomicU64,
    /// The driver believes in connections that are gone.
    pub(super) reset_due: AtomicBool,
    /// Host port of the next connection from the host: none is used again while a driver may remember it.
    pub(super) next_port: AtomicU32,
    pub(super) connections: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) bytes_to_guest: AtomicU64,
    pub(super) bytes_from_guest: AtomicU64,
    pub(super) packets_to_guest: AtomicU64,
    pub(super) packets_from_guest: AtomicU64,
    pub(super) bad_packets: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            open: AtomicU64::new(0),
            reset_due: AtomicBool::new(false),
            next_port: AtomicU32::new(FIRST_HOST_PORT),
            connections: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            bytes_to_guest: AtomicU64::new(0),
            bytes_from_guest: AtomicU64::new(0),
            packets_to_guest: AtomicU64::new(0),
            packets_from_guest: AtomicU64::new(0),
            bad_packets: AtomicU64::new(0),
        }
    }
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> Vec<(&'static str, u64)> {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("connections", get(&self.connections)),
            ("refused", get(&self.refused)),
            ("bytes_to_guest", get(&self.bytes_to_guest)),
            ("bytes_from_guest", get(&self.bytes_from_guest)),
            ("packets_to_guest", get(&self.packets_to_guest)),
            ("packets_from_guest", get(&self.packets_from_guest)),
            ("bad_packets", get(&self.bad_packets)),
        ]
    }
}

/// The connections and what they are watched with.
#[derive(Debug)]
pub(super) struct HostSide {
    pub(super) epoll: Epoll,
    pub(super) counters: Arc<Counters>,
    listener: UnixListener,
    listening: bool,
    /// Nobody is connected for now.
    held: bool,
    callers: Arc<Callers>,
    timer: OwnedFd,
    ticking: bool,
    connections: HashMap<u64, Connection>,
    by_key: HashMap<Key, u64>,
    next_id: u64,
    /// Connections that have something for the guest, each once.
    ready: VecDeque<u64>,
}

impl Drop for HostSide {
    fn drop(&mut self) {
        self.counters.open.store(0, Ordering::Relaxed);
    }
}

impl HostSide {
    /// When the driver has to hear of a reset first, nobody is connected before [`Self::reset_is_done`].
    pub(super) fn new(
        listener: UnixListener,
        callers: Arc<Callers>,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let held = counters.reset_due.load(Ordering::Relaxed);
        let epoll = Epoll::new()?;
        let timer = rustix::time::timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        let side = Self {
            epoll,
            counters,
            listener,
            listening: !held,
            held,
            callers,
            timer,
            ticking: false,
            connections: HashMap::new(),
            by_key: HashMap::new(),
            next_id: FIRST_CONNECTION,
            ready: VecDeque::new(),
        };
        side.watch(&side.timer, TIMER)?;
        if !held {
            side.watch(&side.listener, LISTENER)?;
        }
        Ok(side)
    }

    /// The driver knows that it has no connections: from now on new ones are made.
    pub(super) fn reset_is_done(&mut self) {
        self.counters.reset_due.store(false, Ordering::Relaxed);
        self.held = false;
        self.listen();
    }

    /// Has the event set report `source` as `id` when it is readable.
    pub(super) fn watch(&self, source: &impl AsRawFd, id: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, source.as_raw_fd(), EpollEvent::new(EventSet::IN, id))
    }

    /// The opposite of [`Self::watch`].
    pub(super) fn unwatch(&self, source: &impl AsRawFd) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Delete, source.as_raw_fd(), EpollEvent::default())
    }

    pub(super) fn len(&self) -> usize {
        self.connections.len()
    }

    pub(super) fn get(&mut self, id: u64) -> Option<&mut Connection> {
        self.connections.get_mut(&id)
    }

    pub(super) fn find(&self, key: Key) -> Option<u64> {
        self.by_key.get(&key).copied()
    }

    fn count(&self) {
        self.counters.open.store(self.connections.len() as u64, Ordering::Relaxed);
    }

    fn window(&self) -> u32 {
        if self.connections.len() < FULL_WINDOWS { WINDOW_BYTES } else { SMALL_WINDOW_BYTES }
    }

    fn insert(&mut self, mut connection: Connection, wait: Option<Duration>) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        connection.deadline = wait.map(|wait| Instant::now() + wait);
        self.connections.insert(id, connection);
        self.count();
        if wait.is_some() {
            self.tick();
        }
        id
    }

    /// Connects to a port of the host that the guest asked for. False when it is not served or there is no room.
    pub(super) fn connect(&mut self, key: Key, window: u32, forwarded: u32) -> bool {
        if self.held || self.len() >= MAX_CONNECTIONS {
            return false;
        }
        let Ok(stream) = self.callers.call(key.host_port) else { return false };
        let mut connection = Connection::new(stream, key, Phase::Open, self.window());
        connection.set_credit(window, forwarded);
        connection.set_reply(Op::Response);
        let id = self.insert(connection, None);
        self.by_key.insert(key, id);
        Counters::add(&self.counters.connections, 1);
        self.settle(id).is_none()
    }

    /// Takes in host programs while there is room.
    pub(super) fn accept(&mut self) {
        while self.len() < MAX_CONNECTIONS {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // No descriptor left, most likely: the next tick tries again.
                Err(_) => break,
            };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            let key = Key { guest_port: 0, host_port: 0 };
            let connection = Connection::new(stream, key, Phase::Handshake, self.window());
            let id = self.insert(connection, Some(LINE_TIMEOUT));
            self.settle(id);
        }
        self.listening = self.unwatch(&self.listener).is_err();
        self.tick();
    }

    /// The host's line named `port`: asks the guest.
    pub(super) fn request(&mut self, id: u64, port: u32) {
        let key = loop {
            let host_port = self.counters.next_port.load(Ordering::Relaxed);
            let key = Key { guest_port: port, host_port };
            let next = host_port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            self.counters.next_port.store(next, Ordering::Relaxed);
            if !self.by_key.contains_key(&key) {
                break key;
            }
        };
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.key = key;
            connection.phase = Phase::Requested;
            connection.deadline = Some(Instant::now() + ANSWER_TIMEOUT);
            connection.set_reply(Op::Request);
            self.by_key.insert(key, id);
            Counters::add(&self.counters.connections, 1);
        }
    }

    /// The guest no longer knows this connection.
    pub(super) fn forget_key(&mut self, id: u64) {
        if let Some(connection) = self.connections.get(&id)
            && self.by_key.get(&connection.key) == Some(&id)
        {
            self.by_key.remove(&connection.key);
        }
    }

    /// Ends a connection: the host reads the end of its stream.
    pub(super) fn remove(&mut self, id: u64) {
        self.forget_key(id);
        if let Some(connection) = self.connections.remove(&id) {
            self.count();
            if connection.watched.is_some() {
                // Closing would do it as well.
                let _ = self.unwatch(connection.stream());
            }
            connection.close();
        }
        if !self.listening && self.len() < MAX_CONNECTIONS {
            self.listen();
        }
    }

    fn listen(&mut self) {
        self.listening = !self.held && self.watch(&self.listener, LISTENER).is_ok();
    }

    /// Brings the event set and the ready list up to date with a connection. Returns its key when the guest is to be
    /// sent `RST` for it; the connection is gone then, or when it had finished.
    pub(super) fn settle(&mut self, id: u64) -> Option<Key> {
        let connection = self.connections.get_mut(&id)?;
        if connection.closed_by_guest() {
            let key = connection.key;
            self.remove(id);
            return Some(key);
        }
        if connection.finished() {
            self.remove(id);
            return None;
        }
        if connection.has_packet() && !connection.queued {
            connection.queued = true;
            self.ready.push_back(id);
        }
        let wanted = connection.interest();
        if wanted == connection.watched {
            return None;
        }
        let operation = match (connection.watched, wanted) {
            (None, _) => ControlOperation::Add,
            (Some(_), Some(_)) => ControlOperation::Modify,
            (Some(_), None) => ControlOperation::Delete,
        };
        let event = EpollEvent::new(wanted.unwrap_or(EventSet::empty()), id);
        let done = self.epoll.ctl(operation, connection.stream().as_raw_fd(), event);
        connection.watched = wanted;
        if done.is_err() {
            // Out of kernel memory: an unwatched stream would hang silently, so it ends.
            let key = connection.key;
            self.remove(id);
            return Some(key);
        }
        None
    }

    /// The next connection that has something for the guest; to be given back through [`Self::settle`].
    pub(super) fn pop_ready(&mut self) -> Option<u64> {
        while let Some(id) = self.ready.pop_front() {
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.queued = false;
                if connection.has_packet() {
                    return Some(id);
                }
            }
        }
        None
    }

    fn tick(&mut self) {
        if !self.ticking {
            self.set_timer(TICK);
            self.ticking = true;
        }
    }

    fn set_timer(&self, interval: Timespec) {
        let spec = Itimerspec { it_interval: interval, it_value: interval };
        // Cannot fail with these arguments.
        let _ = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec);
    }

    /// The timer fired: returns the connections that are past their deadline.
    pub(super) fn expired(&mut self, now: Instant) -> Vec<u64> {
        let mut buf = [0; 8];
        let _ = rustix::io::read(&self.timer, &mut buf);
        if !self.listening && self.len() < MAX_CONNECTIONS {
            self.listen();
        }
        let waiting = self.connections.values().any(|c| c.deadline.is_some());
        if !waiting && (self.listening || self.held) {
            self.set_timer(Timespec { tv_sec: 0, tv_nsec: 0 });
            self.ticking = false;
        }
        let late = |c: &Connection| c.deadline.is_some_and(|deadline| deadline <= now);
        self.connections.iter().filter(|(_, c)| late(c)).map(|(id, _)| *id).collect()
    }
}
