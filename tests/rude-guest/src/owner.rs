//! Whoever started the machine, who reads the serial port and answers by the balloon's target.

use crate::device::{Device, Kind, reg};
use crate::{say, sys};

/// As in `ring`: seconds.
const PATIENCE: u64 = 60_000_000_000;

/// The way to ask.
#[derive(Debug)]
pub(crate) struct Owner {
    balloon: Option<Device>,
    asked: u32,
}

impl Owner {
    /// By the first balloon.
    pub(crate) fn find(windows: impl Iterator<Item = u64>) -> Self {
        let mut devices = windows.filter_map(Device::find);
        Self { balloon: devices.find(|device| device.kind == Kind::Balloon), asked: 0 }
    }

    /// Asks for something and waits until the target (5.5.4, `num_pages`) is how often was asked.
    pub(crate) fn ask(&mut self, word: &str) {
        self.asked += 1;
        say!("? {word}");
        let Some(balloon) = self.balloon else { panic!("nobody can answer") };
        let start = sys::ticks();
        while balloon.read(reg::CONFIG) < self.asked {
            assert!(sys::ticks().wrapping_sub(start) < PATIENCE, "nobody answers {word}");
        }
    }
}
