//! Lines on the console, for errors only: a serial line is slow and every byte is an exit to the VMM.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Most lines in one [`WINDOW`]: a guest process must not be able to keep the console busy through us.
const MAX_LINES: u32 = 20;
/// Window of the rate limit.
const WINDOW: Duration = Duration::from_secs(10);
/// Longest line, bytes.
const MAX_LINE_BYTES: usize = 400;

static LIMIT: Mutex<Option<(Instant, u32)>> = Mutex::new(None);

/// Writes one line to standard error, which is the console for PID 1.
pub(crate) fn error(message: impl AsRef<str>) {
    if !admit(Instant::now()) {
        return;
    }
    let line = line_of(message.as_ref());
    // There is nobody to tell when the console does not take it.
    let _ = rustix::io::write(rustix::stdio::stderr(), line.as_bytes());
}

fn admit(now: Instant) -> bool {
    let Ok(mut limit) = LIMIT.lock() else { return false };
    match limit.as_mut() {
        Some((start, count)) if now.duration_since(*start) < WINDOW => {
            *count = count.saturating_add(1);
            *count <= MAX_LINES
        }
        _ => {
            *limit = Some((now, 1));
            true
        }
    }
}

fn line_of(message: &str) -> String {
    let mut line = String::from("hyper-agent: ");
    for c in message.chars() {
        if line.len() >= MAX_LINE_BYTES {
            break;
        }
        line.push(if c.is_control() { ' ' } else { c });
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_one_line_and_bounded() {
        assert_eq!(line_of("a\nb"), "hyper-agent: a b\n");
        assert!(line_of(&"x".repeat(10_000)).len() <= MAX_LINE_BYTES + 5);
    }

    #[test]
    fn a_flood_is_cut_and_ends() {
        let start = Instant::now();
        let admitted = (0..1000).filter(|_| admit(start)).count();
        assert_eq!(admitted, usize::try_from(MAX_LINES).unwrap());
        assert!(admit(start + WINDOW));
    }
}
