//! What was tried, what came of it, and the serial port that says so.

use core::fmt::{self, Write};

use crate::device::Device;
use crate::{requests, sys};

const SERIAL: u16 = 0x3f8;

/// The first serial port.
pub(crate) struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            sys::out8(SERIAL, byte);
        }
        Ok(())
    }
}

/// One line.
#[macro_export]
macro_rules! say {
    ($($what:tt)*) => {{
        use core::fmt::Write as _;
        // The port takes everything.
        let _infallible = writeln!($crate::tally::Serial, $($what)*);
    }};
}

/// What an attempt came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was done, as far as it was allowed.
    Answered,
    /// It was given back undone, with an error, or had no effect.
    Refused,
    /// The device asks for a reset.
    NeedsReset,
    /// Something that must not be.
    Bad(&'static str),
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Refused => "refused",
            Self::NeedsReset => "needs reset",
            Self::Bad(_) => "BAD",
        }
    }
}

/// Refused when it is so.
pub(crate) fn refused(so: bool, otherwise: &'static str) -> Outcome {
    if so { Outcome::Refused } else { Outcome::Bad(otherwise) }
}

/// Answered when it is so.
pub(crate) fn answered(so: bool, otherwise: &'static str) -> Outcome {
    if so { Outcome::Answered } else { Outcome::Bad(otherwise) }
}

/// What an attempt may come to.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Must {
    Answer,
    Refuse,
    NeedReset,
    /// Whatever the standard leaves open, as long as the device lives.
    Live,
}

impl Must {
    fn allows(self, outcome: Outcome) -> bool {
        match (self, outcome) {
            (_, Outcome::Bad(_)) => false,
            (Self::Live, _)
            | (Self::Answer, Outcome::Answered)
            | (Self::Refuse, Outcome::Refused)
            | (Self::NeedReset, Outcome::NeedsReset) => true,
            _ => false,
        }
    }
}

/// Counts.
#[derive(Debug, Default, Clone, Copy)]
struct Count {
    answered: u32,
    refused: u32,
    needs_reset: u32,
    bad: u32,
}

impl Count {
    fn tried(&self) -> u32 {
        self.answered + self.refused + self.needs_reset + self.bad
    }

    fn add(&mut self, other: Self) {
        self.answered += other.answered;
        self.refused += other.refused;
        self.needs_reset += other.needs_reset;
        self.bad += other.bad;
    }
}

/// All counts.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    here: Count,
    all: Count,
    devices: u32,
}

impl Tally {
    /// An attempt and its outcome.
    pub(crate) fn note(&mut self, device: &str, name: &str, must: Must, outcome: Outcome) {
        let good = must.allows(outcome);
        match outcome {
            _ if !good => self.here.bad += 1,
            Outcome::Answered => self.here.answered += 1,
            Outcome::Refused => self.here.refused += 1,
            Outcome::NeedsReset => self.here.needs_reset += 1,
            Outcome::Bad(_) => {}
        }
        match outcome {
            Outcome::Bad(why) => say!("try {device}/{name}: BAD: {why}"),
            _ if !good => say!("try {device}/{name}: {} BAD: must {must:?}", outcome.name()),
            _ => say!("try {device}/{name}: {}", outcome.name()),
        }
    }

    /// Makes an attempt on a device and sees that it serves a good request afterwards.
    pub(crate) fn attempt(
        &mut self,
        device: &Device,
        name: &str,
        must: Must,
        attempt: impl FnOnce(&Device) -> Outcome,
    ) {
        let outcome = attempt(device);
        let outcome = match requests::good(device) {
            Err(why) => {
                say!("{} after {name} ({}): {why}", device.name(), outcome.name());
                Outcome::Bad("no good request is served after it")
            }
            Ok(()) => outcome,
        };
        self.note(device.name(), name, must, outcome);
    }

    /// Something that must be so and is not counted unless it is not.
    pub(crate) fn check(&mut self, name: &str, device: &Device, check: impl FnOnce(&Device) -> Outcome) {
        if let Outcome::Bad(why) = check(device) {
            self.note(device.name(), name, Must::Answer, Outcome::Bad(why));
        }
    }

    /// The counts of a device, which is done.
    pub(crate) fn end_device(&mut self, name: &str, slot: usize) {
        let Count { answered, refused, needs_reset, bad } = self.here;
        let tried = self.here.tried();
        say!(
            "count {name} in slot {slot}: {tried} tried, {answered} answered, {refused} refused, {needs_reset} needed a reset, {bad} bad"
        );
        self.all.add(core::mem::take(&mut self.here));
        self.devices += 1;
    }

    /// The last line.
    pub(crate) fn total(&self) {
        let Count { answered, refused, needs_reset, bad } = self.all;
        let (tried, devices) = (self.all.tried(), self.devices);
        say!(
            "total: {tried} attempts on {devices} devices: {answered} answered, {refused} refused, {needs_reset} needed a reset, {bad} bad"
        );
    }
}
