//! The main thread: takes the boot request, starts the machine, serves the owner until one of them ends.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use hyper_vmm_devices::legacy::LineLog;
use hyper_vmm_hv::{HvError, Hypervisor};
use hyper_vmm_spec::control::{Event, ExitCause, Message, Reply, Request, RunState, exit_code};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::event_loop::EventThread;
use crate::life::{Ending, Life, Mark, Notice, Notices};
use crate::log;
use crate::machine::{self, BuildError, Machine};
use crate::socket::{ControlSocket, Descriptors, Packet, SocketError};

/// Why the process ends without a machine having run to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("{0}")]
    FirstPacket(String),
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error("cannot read the control socket")]
    Receive(#[source] io::Error),
    #[error("cannot make an event descriptor")]
    EventFd(#[source] io::Error),
    #[error("event loop")]
    EventLoop(#[from] event_manager::Error),
}

impl RunError {
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Socket(_) | Self::FirstPacket(_) => exit_code::USAGE,
            Self::Build(_) => exit_code::BUILD,
            Self::Receive(_) | Self::EventFd(_) | Self::EventLoop(_) => exit_code::INTERNAL,
        }
    }
}

/// Runs one machine from boot request to end; returns the exit code.
pub(crate) fn run(main_us: u64, kvm: Result<Hypervisor, HvError>) -> Result<u8, RunError> {
    let socket = ControlSocket::from_stdin()?;
    let (life, notices) = Life::new(main_us).map_err(RunError::EventFd)?;
    let (request, fds) = match socket.receive().map_err(RunError::Receive)? {
        Packet::Closed => return Ok(exit_code::ENDED),
        Packet::Bad(why) => return Err(refuse(&socket, RunError::FirstPacket(why))),
        Packet::Request(request, fds) => (request, fds),
    };
    let (spec, snapshot) = match *request {
        Request::Boot { spec } => (spec, None),
        Request::Restore { spec, snapshot } => (spec, Some(snapshot)),
        _ => {
            let why = "the first request must be a boot request".to_owned();
            return Err(refuse(&socket, RunError::FirstPacket(why)));
        }
    };
    life.mark(Mark::Spec);
    let mut events = EventThread::new()?;
    let machine = machine::start(&spec, kvm, snapshot, fds, &events.handle(), &life)
        .map_err(|e| refuse(&socket, e.into()))?;
    socket.send(&Message::Reply { result: Ok(Reply::Done) });

    let outcome = Arc::new(Mutex::new(None));
    let Notices { queue, bell } = notices;
    events.add(Box::new(Controller {
        socket,
        machine,
        life,
        notices: queue,
        bell,
        state: RunState::Running,
        pending: None,
        outcome: Arc::clone(&outcome),
    }));
    loop {
        events.run_once()?;
        if let Some(code) = *outcome.lock().unwrap_or_else(PoisonError::into_inner) {
            return Ok(code);
        }
    }
}

/// Tells the owner why nothing was started.
fn refuse(socket: &ControlSocket, error: RunError) -> RunError {
    socket.send(&Message::Reply { result: Err(log::chain(&error)) });
    error
}

/// A request whose answer has to wait. Requests are answered in order, so the next one is not read before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pending {
    /// For all vCPUs to stop.
    Pause,
    /// For a device that a vCPU thread is busy with, which may itself be waiting for this thread.
    Metrics,
}

/// The handler of the control socket and of what vCPU threads tell.
#[derive(Debug)]
struct Controller {
    socket: ControlSocket,
    machine: Machine,
    life: Arc<Life>,
    notices: Receiver<Notice>,
    bell: EventFd,
    state: RunState,
    pending: Option<Pending>,
    outcome: Arc<Mutex<Option<u8>>>,
}

impl Controller {
    fn reply(&mut self, result: Result<Reply, String>, ops: &mut EventOps<'_>) {
        self.socket.send(&Message::Reply { result });
        if self.pending.take().is_some() {
            self.listen(EventSet::IN, ops);
        }
    }

    /// Puts off the answer: no further request is read, but a closed socket is still noticed.
    fn wait_for(&mut self, pending: Pending, ops: &mut EventOps<'_>) {
        self.pending = Some(pending);
        self.listen(EventSet::empty(), ops);
    }

    fn listen(&self, what: EventSet, ops: &mut EventOps<'_>) {
        if let Err(e) = ops.modify(Events::new(&self.socket, what)) {
            log::line(format_args!("cannot watch the control socket: {e}"));
            self.finish(exit_code::INTERNAL);
        }
    }

    fn serve_request(&mut self, ops: &mut EventOps<'_>) {
        match self.socket.receive() {
            Ok(Packet::Request(request, fds)) => self.serve(*request, fds, ops),
            Ok(Packet::Bad(why)) => self.reply(Err(why), ops),
            Ok(Packet::Closed) => self.end(ExitCause::Shutdown, exit_code::ENDED),
            Err(e) => {
                log::line(format_args!("cannot read the control socket: {e}"));
                self.end(ExitCause::Shutdown, exit_code::INTERNAL);
            }
        }
    }

    fn serve(&mut self, request: Request, fds: Descriptors, ops: &mut EventOps<'_>) {
        let done = Ok(Reply::Done);
        match request {
            Request::Boot { .. } | Request::Restore { .. } => {
                self.reply(Err("this machine has been booted already".to_owned()), ops)
            }
            Request::State => {
                let reply = Reply::State { state: self.state, timeline: self.life.timeline() };
                self.reply(Ok(reply), ops);
            }
            Request::Pause if self.state == RunState::Paused => self.reply(done, ops),
            Request::Pause => {
                self.wait_for(Pending::Pause, ops);
                self.machine.vcpus.pause();
            }
            Request::Resume => {
                self.machine.resume();
                self.state = RunState::Running;
                self.reply(done, ops);
            }
            Request::Save { .. } if self.state == RunState::Running => {
                self.reply(Err("this machine runs: pause it first".to_owned()), ops);
            }
            Request::Save { snapshot, limit_ms } => {
                let saved = self.machine.save(snapshot, limit_ms, fds);
                self.reply(saved.map(|()| Reply::Done).map_err(|e| log::chain(&e)), ops);
            }
            Request::Metrics => self.serve_metrics(ops),
            Request::Balloon { pages } => {
                let set = self.machine.balloon.as_ref().map(|balloon| balloon.set_pages(pages));
                self.reply(set.map(|()| Reply::Done).ok_or("this machine has no balloon".to_owned()), ops);
            }
            Request::Vcpus { .. } if self.state == RunState::Paused => {
                self.reply(Err("this machine is paused: resume it first".to_owned()), ops);
            }
            Request::Vcpus { count } => {
                let made = self.machine.add_vcpus(count);
                self.reply(made.map(|()| Reply::Done).map_err(|e| log::chain(&e)), ops);
            }
            Request::HotMemory { mib, serial } => {
                // Answered first: the event that follows may be there already.
                let goal = self.machine.memory.clone();
                self.reply(
                    goal.as_ref()
                        .map(|_| Reply::Done)
                        .ok_or("no memory can be added to this machine".to_owned()),
                    ops,
                );
                if let Some(goal) = goal {
                    goal.set(u64::from(mib) << 20, serial);
                }
            }
            Request::Attach { bay, id, parts } => {
                let attached = self.machine.attach(bay, &id, &parts, fds);
                self.reply(attached.map(|()| Reply::Done).map_err(|e| log::chain(&e)), ops);
            }
            Request::Detach { bay } => {
                let detached = self.machine.detach(bay);
                self.reply(detached.map(|()| Reply::Done).map_err(|e| log::chain(&e)), ops);
            }
            Request::Shutdown => {
                self.reply(done, ops);
                self.end(ExitCause::Shutdown, exit_code::ENDED);
            }
        }
    }

    /// A device may be locked by a vCPU thread that waits for this thread to remove a handler: never wait for the lock here.
    fn serve_metrics(&mut self, ops: &mut EventOps<'_>) {
        if let Some(metrics) = self.machine.metrics() {
            self.reply(Ok(Reply::Metrics(metrics)), ops);
        } else {
            self.wait_for(Pending::Metrics, ops);
            self.life.post(Notice::Retry);
        }
    }

    fn serve_notices(&mut self, ops: &mut EventOps<'_>) {
        // Nothing to read means that the queue was emptied before: look at it all the same.
        let _count = self.bell.read();
        while let Ok(notice) = self.notices.try_recv() {
            match notice {
                Notice::AgentReady => self.socket.send(&Message::Event { event: Event::AgentReady }),
                Notice::AllParked if self.pending == Some(Pending::Pause) => {
                    self.state = RunState::Paused;
                    self.reply(Ok(Reply::Done), ops);
                }
                Notice::Retry if self.pending == Some(Pending::Metrics) => {
                    self.serve_metrics(ops);
                    // One try per turn of the loop, so that the vCPU thread gets what it waits for.
                    return;
                }
                Notice::MemoryReached(serial) => {
                    self.socket.send(&Message::Event { event: Event::MemoryReached { serial } });
                }
                Notice::AllParked | Notice::Retry => {}
                Notice::Ended(ending) => return self.guest_ended(ending),
            }
        }
    }

    fn guest_ended(&mut self, ending: Ending) {
        let mut serial = self.machine.serial.lock().unwrap_or_else(PoisonError::into_inner);
        LineLog::flush_pending(&mut serial);
        let last_lines = serial.last_lines();
        drop(serial);
        match ending {
            // Whichever way it resets: it has said that it would.
            _ if self.life.is_powering_off() => self.end(ExitCause::PowerOff, exit_code::ENDED),
            Ending::Reset => self.end(ExitCause::GuestCrash { last_lines }, exit_code::GUEST_CRASH),
            Ending::Fault(reason) => {
                self.end(ExitCause::Fault { reason, last_lines }, exit_code::GUEST_CRASH)
            }
        }
    }

    fn end(&mut self, cause: ExitCause, code: u8) {
        self.socket.send(&Message::Event { event: Event::Exited { cause, timeline: self.life.timeline() } });
        self.finish(code);
    }

    fn finish(&self, code: u8) {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(code);
    }
}

impl MutEventSubscriber for Controller {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() == self.bell.as_raw_fd() {
            self.serve_notices(ops);
        } else if events.event_set().intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.end(ExitCause::Shutdown, exit_code::ENDED);
        } else {
            self.serve_request(ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let watched = ops.add(Events::new(&self.bell, EventSet::IN));
        if let Err(e) = watched.and_then(|()| ops.add(Events::new(&self.socket, EventSet::IN))) {
            log::line(format_args!("cannot watch the control socket: {e}"));
            self.finish(exit_code::INTERNAL);
        }
    }
}
