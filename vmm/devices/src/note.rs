//! Lines on standard error about what a device met, at a rate that no guest can drive.

use std::fmt;
use std::io::Write;
use std::time::{Duration, Instant};

/// Least time between two lines of one source.
const INTERVAL: Duration = Duration::from_secs(1);

/// One source of lines.
#[derive(Debug)]
pub(crate) struct Notes {
    source: &'static str,
    last: Option<Instant>,
    suppressed: u64,
}

impl Notes {
    /// A source that names itself `source`.
    pub(crate) fn new(source: &'static str) -> Self {
        Self { source, last: None, suppressed: 0 }
    }

    /// Writes a line, unless the last one is less than [`INTERVAL`] old.
    pub(crate) fn write(&mut self, what: impl fmt::Display) {
        if let Some(line) = self.line(what, Instant::now()) {
            // Nowhere is left to report a broken standard error.
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }

    fn line(&mut self, what: impl fmt::Display, now: Instant) -> Option<String> {
        if self.last.is_some_and(|last| now.duration_since(last) < INTERVAL) {
            self.suppressed += 1;
            return None;
        }
        self.last = Some(now);
        let suppressed = std::mem::take(&mut self.suppressed);
        Some(if suppressed == 0 {
            format!("{}: {what}\n", self.source)
        } else {
            format!("{}: {what} ({suppressed} more lines left out)\n", self.source)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_per_interval_and_a_count_of_the_rest() {
        let mut notes = Notes::new("net");
        let start = Instant::now();
        assert_eq!(notes.line("a", start).as_deref(), Some("net: a\n"));
        assert_eq!(notes.line("b", start), None);
        assert_eq!(notes.line("c", start + INTERVAL / 2), None);
        assert_eq!(notes.line("d", start + INTERVAL).as_deref(), Some("net: d (2 more lines left out)\n"));
    }
}
