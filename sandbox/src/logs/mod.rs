//! What containers write: Docker's json-file format in `log.json` and, after a rotation, `log.json.1`.
//!
//! One line for each line of output: `{"log":"text\n","stream":"stdout","time":"2026-…Z"}`. Files: `rotate` (files that cannot fill a
//! disk), `write` (the supervisor's half), `read` (the half of `logs`).

mod read;
mod rotate;
mod write;

use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;

pub use read::LogStream;
pub(crate) use rotate::RotatingFile;
pub(crate) use write::LogWriter;

/// Name of the current log in a container's directory.
pub(crate) const LOG_FILE: &str = "log.json";

/// Which stream a log entry came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogSource {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One entry: a line with its newline, or a part of a very long one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// Where it came from.
    pub source: LogSource,
    /// When it was read.
    pub time: Timestamp,
    /// The bytes; what was not UTF-8 has become U+FFFD, as in Docker's logs.
    pub bytes: Vec<u8>,
}

/// Which entries are wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Go on with what comes, until the container ends.
    pub follow: bool,
    /// Only the last so many lines.
    pub tail: Option<usize>,
    /// Not older than this.
    pub since: Option<Timestamp>,
    /// Not newer than this.
    pub until: Option<Timestamp>,
    /// Leave out standard output.
    pub no_stdout: bool,
    /// Leave out standard error.
    pub no_stderr: bool,
}

/// A line of the file.
#[derive(Debug, Serialize, Deserialize)]
struct LogLine<'a> {
    #[serde(borrow)]
    log: std::borrow::Cow<'a, str>,
    stream: LogSource,
    time: Timestamp,
}
