//! What vCPU threads tell the main thread: how far the guest is, and that it has ended.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use hyper_vmm_devices::legacy::LifecycleStep;
use hyper_vmm_spec::control::Timeline;
use rustix::time::{ClockId, clock_gettime};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Something for the main thread to act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Notice {
    /// The agent serves requests.
    AgentReady,
    /// Every vCPU is stopped.
    AllParked,
    /// The guest has the memory that it was to have by the request of this serial.
    MemoryReached(u64),
    /// Try again what could not be done a moment ago.
    Retry,
    /// The guest has ended.
    Ended(Ending),
}

/// How the guest ended, as the vCPU saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It pulled the reset line.
    Reset,
    /// A vCPU cannot go on; why.
    Fault(String),
}

/// Microseconds of `CLOCK_MONOTONIC`.
pub(crate) fn now_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1000
}

/// A step of the timeline.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Mark {
    Spec,
    Built,
    Entered,
    UserSpace,
    AgentReady,
}

/// The record of one machine's life; shared by all threads.
#[derive(Debug)]
pub(crate) struct Life {
    timeline: Mutex<Timeline>,
    powering_off: AtomicBool,
    ended: AtomicBool,
    notices: Sender<Notice>,
    bell: EventFd,
}

/// The main thread's end.
#[derive(Debug)]
pub(crate) struct Notices {
    pub(crate) queue: Receiver<Notice>,
    /// Readable when there is something in the queue.
    pub(crate) bell: EventFd,
}

impl Life {
    /// A life that began at `main_us`.
    pub(crate) fn new(main_us: u64) -> std::io::Result<(Arc<Self>, Notices)> {
        let (notices, queue) = channel();
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let theirs = Notices { queue, bell: bell.try_clone()? };
        let timeline = Mutex::new(Timeline { main_us, ..Timeline::default() });
        let life = Self {
            timeline,
            powering_off: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            notices,
            bell,
        };
        Ok((Arc::new(life), theirs))
    }

    /// Notes the time of a step, the first time it is reached.
    pub(crate) fn mark(&self, mark: Mark) {
        let mut timeline = self.timeline.lock().unwrap_or_else(PoisonError::into_inner);
        let since = now_us().saturating_sub(timeline.main_us).max(1);
        let step = match mark {
            Mark::Spec => &mut timeline.spec_us,
            Mark::Built => &mut timeline.built_us,
            Mark::Entered => &mut timeline.entered_us,
            Mark::UserSpace => &mut timeline.user_space_us,
            Mark::AgentReady => &mut timeline.agent_ready_us,
        };
        if *step == 0 {
            *step = since;
        }
    }

    pub(crate) fn timeline(&self) -> Timeline {
        let marks = *self.timeline.lock().unwrap_or_else(PoisonError::into_inner);
        Timeline { jail_us: crate::confine::spent_us(), ..marks }
    }

    /// Tells the main thread.
    pub(crate) fn post(&self, notice: Notice) {
        // Both fail only when the main thread no longer listens, and then the process is about to end.
        let _not_listening = self.notices.send(notice);
        let _not_listening = self.bell.write(1);
    }

    /// What the guest reports on its lifecycle port.
    pub(crate) fn guest_step(&self, step: LifecycleStep) {
        match step {
            LifecycleStep::UserSpace => self.mark(Mark::UserSpace),
            LifecycleStep::AgentReady if self.timeline().agent_ready_us == 0 => {
                self.mark(Mark::AgentReady);
                self.post(Notice::AgentReady);
            }
            // Once is enough: a guest must not be able to flood the owner.
            LifecycleStep::AgentReady => {}
            LifecycleStep::PowerOff => self.powering_off.store(true, Ordering::SeqCst),
        }
    }

    /// Whether the guest has announced its end.
    pub(crate) fn is_powering_off(&self) -> bool {
        self.powering_off.load(Ordering::SeqCst)
    }

    /// The guest has ended; the first ending counts.
    pub(crate) fn end(&self, ending: Ending) {
        if !self.ended.swap(true, Ordering::SeqCst) {
            self.post(Notice::Ended(ending));
        }
    }

    /// Whether vCPUs should stop running.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ending_counts_and_readiness_is_told_once() {
        let (life, notices) = Life::new(now_us()).unwrap();
        for step in [LifecycleStep::UserSpace, LifecycleStep::AgentReady, LifecycleStep::AgentReady] {
            life.guest_step(step);
        }
        assert!(!life.is_powering_off());
        life.guest_step(LifecycleStep::PowerOff);
        life.end(Ending::Reset);
        life.end(Ending::Fault("later".to_owned()));
        let told: Vec<_> = notices.queue.try_iter().collect();
        assert_eq!(told, [Notice::AgentReady, Notice::Ended(Ending::Reset)]);
        assert_eq!(notices.bell.read().unwrap(), 2);
        assert!(life.is_powering_off() && life.has_ended());
        let timeline = life.timeline();
        assert!(timeline.user_space_us > 0 && timeline.agent_ready_us >= timeline.user_space_us);
        assert_eq!(timeline.entered_us, 0);
    }
}
