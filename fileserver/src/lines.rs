//! Lines on standard error from the libraries, at a rate that no guest can drive.

use std::io::Write;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Lines allowed in one [`INTERVAL`].
const BURST: u32 = 10;
const INTERVAL: Duration = Duration::from_secs(10);

/// How much was written lately.
struct Window {
    start: Option<Instant>,
    lines: u32,
}

struct Lines(Mutex<Window>);

static LINES: Lines = Lines(Mutex::new(Window { start: None, lines: 0 }));

impl Window {
    /// Whether one more line may be written, and whether it is the last for now.
    fn admit(&mut self, now: Instant) -> (bool, bool) {
        if self.start.is_none_or(|start| now.duration_since(start) >= INTERVAL) {
            *self = Self { start: Some(now), lines: 0 };
        }
        self.lines = self.lines.saturating_add(1);
        (self.lines <= BURST, self.lines == BURST)
    }
}

impl Log for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut window = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (written, last) = window.admit(Instant::now());
        if written {
            let more = if last { " (more lines are left out for a while)" } else { "" };
            let line = format!("hyper-fs: {}{more}\n", record.args());
            // Nowhere is left to report a broken standard error.
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Sends the libraries' warnings to standard error.
pub(crate) fn start() {
    // Fails only when a logger is set already.
    if log::set_logger(&LINES).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_silence_then_another() {
        let mut window = Window { start: None, lines: 0 };
        let now = Instant::now();
        let admitted = (0..100).filter(|_| window.admit(now).0).count();
        assert_eq!(admitted, BURST as usize);
        assert!(!window.admit(now + INTERVAL / 2).0);
        assert!(window.admit(now + INTERVAL).0);
    }
}
