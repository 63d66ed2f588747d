//! The only place that writes to standard output and standard error.
//!
//! A closed standard output (`hyper ps | head -1`) ends the program quietly, as it does for every good citizen of a pipe.
use std::io::{IsTerminal, Write};

/// Writes a line to standard output.
pub(crate) fn line(text: impl std::fmt::Display) {
    bytes_out(format!("{text}\n").as_bytes());
}

/// Writes bytes to standard output and flushes.
pub(crate) fn bytes_out(bytes: &[u8]) {
    let mut out = std::io::stdout().lock();
    // A reader that went away is not our failure; the exit code stays what the verb says.
    let _ = out.write_all(bytes).and_then(|()| out.flush());
}

/// Writes bytes to standard error.
pub(crate) fn bytes_err(bytes: &[u8]) {
    let mut err = std::io::stderr().lock();
    let _ = err.write_all(bytes).and_then(|()| err.flush());
}

/// Writes `hyper: …` to standard error.
pub(crate) fn error(text: impl std::fmt::Display) {
    bytes_err(format!("hyper: {text}\n").as_bytes());
}

/// Writes a remark to standard error.
pub(crate) fn note(text: impl std::fmt::Display) {
    bytes_err(format!("{text}\n").as_bytes());
}

/// Whether standard output is a terminal.
pub(crate) fn stdout_is_terminal() -> bool {
    std::io::stdout().is_terminal()
}
