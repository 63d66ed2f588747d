//! The supervisor's half: bytes in, lines in Docker's json-file format out.

use std::borrow::Cow;
use std::io;
use std::path::Path;

use super::{LOG_FILE, LogLine, LogSource, RotatingFile};
use crate::clock::Timestamp;

/// Size at which `log.json` is rotated, bytes: with its predecessor a container's log takes at most twice this.
const MAX_LOG_BYTES: u64 = 50 << 20;
/// A line longer than this is written in parts (Docker's limit), bytes.
const MAX_LINE_BYTES: usize = 16 * 1024;

/// Writes a container's log.
#[derive(Debug)]
pub(crate) struct LogWriter {
    file: RotatingFile,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl LogWriter {
    /// Opens the log in a container's directory.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        let file = RotatingFile::open(&dir.join(LOG_FILE), MAX_LOG_BYTES)?;
        Ok(Self { file, stdout: Vec::new(), stderr: Vec::new() })
    }

    /// Takes what was read from a stream; a line is written when it is whole.
    pub(crate) fn append(&mut self, source: LogSource, bytes: &[u8]) -> io::Result<()> {
        let time = Timestamp::now();
        let pending = match source {
            LogSource::Stdout => &mut self.stdout,
            LogSource::Stderr => &mut self.stderr,
        };
        pending.extend_from_slice(bytes);
        let mut done = 0;
        let mut out = Vec::new();
        while let Some(rest) = pending.get(done..).filter(|rest| !rest.is_empty()) {
            let Some(len) = next_line(rest) else { break };
            encode(&mut out, source, time, rest.get(..len).unwrap_or_default())?;
            done += len;
        }
        pending.drain(..done);
        if out.is_empty() { Ok(()) } else { self.file.write(&out) }
    }

    /// Writes the lines that have no end: the container has ended.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        let time = Timestamp::now();
        let mut out = Vec::new();
        for (source, pending) in
            [(LogSource::Stdout, &mut self.stdout), (LogSource::Stderr, &mut self.stderr)]
        {
            if !pending.is_empty() {
                encode(&mut out, source, time, pending)?;
                pending.clear();
            }
        }
        if out.is_empty() { Ok(()) } else { self.file.write(&out) }
    }
}

/// Length of the next line with its newline, or of the next part of a line that is too long; `None` when more must come.
fn next_line(bytes: &[u8]) -> Option<usize> {
    let window = bytes.get(..MAX_LINE_BYTES).unwrap_or(bytes);
    if let Some(end) = window.iter().position(|byte| *byte == b'\n') {
        return Some(end + 1);
    }
    if bytes.len() < MAX_LINE_BYTES {
        return None;
    }
    // Do not cut a character in two: step back over the continuation bytes of an unfinished one.
    let tail = window.iter().rev().take(4).position(|byte| byte & 0xc0 != 0x80)?;
    let start = MAX_LINE_BYTES - 1 - tail;
    let width = match window.get(start)? {
        0xc0..=0xdf => 2,
        0xe0..=0xef => 3,
        0xf0..=0xf7 => 4,
        _ => 1,
    };
    Some(if tail + 1 < width { start } else { MAX_LINE_BYTES })
}

fn encode(out: &mut Vec<u8>, stream: LogSource, time: Timestamp, bytes: &[u8]) -> io::Result<()> {
    let log: Cow<'_, str> = String::from_utf8_lossy(bytes);
    serde_json::to_writer(&mut *out, &LogLine { log, stream, time })?;
    out.push(b'\n');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(write: impl FnOnce(&mut LogWriter)) -> Vec<(LogSource, String)> {
        let dir = tempfile::tempdir().unwrap();
        let mut log = LogWriter::open(dir.path()).unwrap();
        write(&mut log);
        log.finish().unwrap();
        let text = std::fs::read_to_string(dir.path().join(LOG_FILE)).unwrap();
        let parse = |line: &str| {
            let line: LogLine<'_> = serde_json::from_str(line).unwrap();
            (line.stream, line.log.into_owned())
        };
        text.lines().map(parse).collect()
    }

    #[test]
    fn format_is_dockers() {
        let mut out = Vec::new();
        encode(&mut out, LogSource::Stderr, Timestamp::from_unix_ns(0), b"a\"\x01\n").unwrap();
        let text = "{\"log\":\"a\\\"\\u0001\\n\",\"stream\":\"stderr\",\"time\":\"1970-01-01T00:00:00.000000000Z\"}\n";
        assert_eq!(String::from_utf8(out).unwrap(), text);
    }

    #[test]
    fn streams_are_cut_into_lines_apart() {
        let found = lines(|log| {
            log.append(LogSource::Stdout, b"one\ntw").unwrap();
            log.append(LogSource::Stderr, b"err\n").unwrap();
            log.append(LogSource::Stdout, b"o\nthree").unwrap();
        });
        let expected = [
            (LogSource::Stdout, "one\n"),
            (LogSource::Stderr, "err\n"),
            (LogSource::Stdout, "two\n"),
            (LogSource::Stdout, "three"),
        ];
        assert_eq!(found, expected.map(|(source, text)| (source, text.to_owned())));
    }

    #[test]
    fn long_lines_are_cut_between_characters() {
        let text = format!("x{}", "é€𝄞".repeat(5000));
        let found = lines(|log| {
            for chunk in text.as_bytes().chunks(1000) {
                log.append(LogSource::Stdout, chunk).unwrap();
            }
        });
        assert!(found.len() > 2 && found.iter().all(|(_, part)| part.len() <= MAX_LINE_BYTES));
        assert_eq!(found.into_iter().map(|(_, part)| part).collect::<String>(), text);
    }

    #[test]
    fn bytes_that_are_no_text_do_not_stop_it() {
        let found = lines(|log| log.append(LogSource::Stdout, &[0x80; MAX_LINE_BYTES * 3]).unwrap());
        assert_eq!(found.iter().map(|(_, part)| part.chars().count()).sum::<usize>(), MAX_LINE_BYTES * 3);
    }
}
