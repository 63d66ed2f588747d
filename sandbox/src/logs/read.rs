//! The half of `logs`: entries from the files, and what comes.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::rotate::predecessor;
use super::{LOG_FILE, LogEntry, LogLine, LogOptions, LogSource};
use crate::SandboxError;
use crate::clock::Timestamp;
use crate::state::{ContainerState, read_json};
use crate::store::FileLock;

/// How often a followed log is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// Every how many looks it is checked that the supervisor lives.
const LOOKS_PER_CHECK: u32 = 20;
/// Longest line of a log file that is read, bytes: six times a part of a line (every byte may be an escape) and its frame.
const MAX_LINE_BYTES: usize = 128 * 1024;

/// The entries of a log, one after the other.
#[derive(Debug)]
pub struct LogStream {
    dir: PathBuf,
    lock: PathBuf,
    options: LogOptions,
    ready: VecDeque<LogEntry>,
    current: Option<LogFile>,
    ended: bool,
    looks: u32,
}

#[derive(Debug)]
struct LogFile {
    reader: BufReader<File>,
    inode: u64,
    partial: Vec<u8>,
}

impl LogFile {
    fn open(path: &Path) -> Result<Option<Self>, SandboxError> {
        let fail = |source| SandboxError::io("open", path, source);
        match File::open(path) {
            Ok(file) => {
                let inode = file.metadata().map_err(fail)?.ino();
                Ok(Some(Self {
                    reader: BufReader::with_capacity(64 * 1024, file),
                    inode,
                    partial: Vec::new(),
                }))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(fail(error)),
        }
    }

    /// The next whole line without its newline; `None` when there is none yet. A line that is too long is left out.
    fn line(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            let bytes = self.reader.fill_buf()?;
            if bytes.is_empty() {
                return Ok(None);
            }
            let end = bytes.iter().position(|byte| *byte == b'\n');
            let part = bytes.get(..end.unwrap_or(bytes.len())).unwrap_or_default();
            if self.partial.len() <= MAX_LINE_BYTES {
                self.partial.extend_from_slice(part);
            }
            let used = part.len() + usize::from(end.is_some());
            self.reader.consume(used);
            if end.is_some() {
                let line = std::mem::take(&mut self.partial);
                if line.len() <= MAX_LINE_BYTES {
                    return Ok(Some(line));
                }
            }
        }
    }
}

fn parse(line: &[u8]) -> Option<LogEntry> {
    let line: LogLine<'_> = serde_json::from_slice(line).ok()?;
    Some(LogEntry { source: line.stream, time: line.time, bytes: line.log.into_owned().into_bytes() })
}

impl LogStream {
    pub(crate) fn open(dir: &Path, lock: PathBuf, options: LogOptions) -> Result<Self, SandboxError> {
        let current = dir.join(LOG_FILE);
        let mut stream = Self {
            dir: dir.to_owned(),
            lock,
            options,
            ready: VecDeque::new(),
            current: LogFile::open(&predecessor(&current))?,
            ended: false,
            looks: 0,
        };
        if let Some(tail) = stream.options.tail {
            stream.skip_to_tail(tail)?;
        }
        Ok(stream)
    }

    /// Reads all there is and keeps the last lines.
    fn skip_to_tail(&mut self, tail: usize) -> Result<(), SandboxError> {
        let mut last = VecDeque::new();
        while let Some(line) = self.line()? {
            last.push_back(line);
            if last.len() > tail {
                last.pop_front();
            }
        }
        self.ready = last.iter().filter_map(|line| parse(line)).filter(|entry| self.wanted(entry)).collect();
        Ok(())
    }

    /// The next line of the predecessor, then of the current file; goes on to a new file when it was rotated.
    fn line(&mut self) -> Result<Option<Vec<u8>>, SandboxError> {
        let path = self.dir.join(LOG_FILE);
        loop {
            let mut read = None;
            if let Some(file) = &mut self.current {
                let line = file.line().map_err(|source| SandboxError::io("read", &path, source))?;
                if line.is_some() {
                    return Ok(line);
                }
                read = Some(file.inode);
            }
            match LogFile::open(&path)? {
                Some(next) if read != Some(next.inode) => self.current = Some(next),
                _ => return Ok(None),
            }
        }
    }

    fn wanted(&self, entry: &LogEntry) -> bool {
        let source = match entry.source {
            LogSource::Stdout => !self.options.no_stdout,
            LogSource::Stderr => !self.options.no_stderr,
        };
        let since = self.options.since.is_none_or(|since| entry.time >= since);
        source && since && self.options.until.is_none_or(|until| entry.time <= until)
    }

    /// The next entry; `None` at the end. With `follow`, the end of the container. Cancel safe.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub async fn next(&mut self) -> Result<Option<LogEntry>, SandboxError> {
        loop {
            if let Some(entry) = self.ready.pop_front() {
                return Ok(Some(entry));
            }
            while let Some(line) = self.line()? {
                if let Some(entry) = parse(&line).filter(|entry| self.wanted(entry)) {
                    return Ok(Some(entry));
                }
            }
            let over = self.options.until.is_some_and(|until| Timestamp::now() > until);
            if self.ended || !self.options.follow || over {
                return Ok(None);
            }
            // What was written before the end is read once more after it was seen.
            self.ended = !self.lives()?;
            if !self.ended {
                tokio::time::sleep(LOOK).await;
            }
        }
    }

    fn lives(&mut self) -> Result<bool, SandboxError> {
        let state: Option<ContainerState> = read_json(&self.dir.join("state.json"))?;
        if !state.is_some_and(|state| state.status.is_live()) {
            return Ok(false);
        }
        self.looks += 1;
        let check = self.looks.is_multiple_of(LOOKS_PER_CHECK);
        Ok(!check || FileLock::try_take_existing(&self.lock)?.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::super::LogWriter;
    use super::*;
    use crate::state::{Status, write_json};

    async fn all(dir: &Path, options: LogOptions) -> String {
        let mut stream = LogStream::open(dir, dir.join("lock"), options).unwrap();
        let mut text = String::new();
        while let Some(entry) = stream.next().await.unwrap() {
            text.push_str(&String::from_utf8(entry.bytes).unwrap());
        }
        text
    }

    fn written(dir: &Path) -> LogWriter {
        let mut log = LogWriter::open(dir).unwrap();
        log.append(LogSource::Stdout, b"a\nb\n").unwrap();
        log.append(LogSource::Stderr, b"c\n").unwrap();
        log.append(LogSource::Stdout, b"d\n").unwrap();
        log
    }

    #[tokio::test]
    async fn entries_are_chosen() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(all(dir.path(), LogOptions::default()).await, "");
        written(dir.path());
        assert_eq!(all(dir.path(), LogOptions::default()).await, "a\nb\nc\nd\n");
        assert_eq!(all(dir.path(), LogOptions { tail: Some(2), ..Default::default() }).await, "c\nd\n");
        assert_eq!(all(dir.path(), LogOptions { tail: Some(0), ..Default::default() }).await, "");
        assert_eq!(all(dir.path(), LogOptions { no_stdout: true, ..Default::default() }).await, "c\n");
        assert_eq!(all(dir.path(), LogOptions { no_stderr: true, ..Default::default() }).await, "a\nb\nd\n");
        let now = Timestamp::now();
        assert_eq!(all(dir.path(), LogOptions { since: Some(now), ..Default::default() }).await, "");
        assert_eq!(
            all(dir.path(), LogOptions { until: Some(now), ..Default::default() }).await,
            "a\nb\nc\nd\n"
        );
    }

    #[tokio::test]
    async fn predecessor_comes_first_and_damage_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        written(dir.path());
        std::fs::rename(dir.path().join(LOG_FILE), dir.path().join("log.json.1")).unwrap();
        std::fs::write(dir.path().join(LOG_FILE), "not json\n").unwrap();
        LogWriter::open(dir.path()).unwrap().append(LogSource::Stdout, b"new\n").unwrap();
        assert_eq!(all(dir.path(), LogOptions::default()).await, "a\nb\nc\nd\nnew\n");
    }

    #[tokio::test]
    async fn following_ends_with_the_container_and_outlives_rotation() {
        let dir = tempfile::tempdir().unwrap();
        let state = |status| ContainerState { status, ..Default::default() };
        write_json(&dir.path().join("state.json"), &state(Status::Running)).unwrap();
        written(dir.path());
        let options = LogOptions { follow: true, tail: Some(1), ..Default::default() };
        let mut stream = LogStream::open(dir.path(), dir.path().join("lock"), options).unwrap();
        assert_eq!(stream.next().await.unwrap().unwrap().bytes, b"d\n");
        std::fs::rename(dir.path().join(LOG_FILE), dir.path().join("log.json.1")).unwrap();
        LogWriter::open(dir.path()).unwrap().append(LogSource::Stderr, b"later\n").unwrap();
        let entry = stream.next().await.unwrap().unwrap();
        assert_eq!((entry.bytes.as_slice(), entry.source), (b"later\n".as_slice(), LogSource::Stderr));
        write_json(&dir.path().join("state.json"), &state(Status::Exited)).unwrap();
        assert!(stream.next().await.unwrap().is_none());
    }
}
