//! The log of what was done: append-only, each record bound to the one before by its hash.
//!
//! It shows that nothing in it was changed, taken out or put in between. That its end was cut off is shown only to whoever kept a [`Head`]:
//! all after that is the same for a log that was cut and written on by somebody who may write to it.

mod record;

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

pub use record::AuditRecord;
use record::{NOTHING, bounded, hash};

use crate::clock::Timestamp;
use crate::store::{FileLock, make_private_dir};
use crate::{Dirs, SandboxError};

/// Name of the file that is written to.
const NOW: &str = "audit.log";
/// Held by whoever writes to it.
const LOCK: &str = "audit.lock";
/// A file that is longer gets a name with the number of its last record, and another is begun.
const MAX_FILE_BYTES: u64 = 16 << 20;
/// Longest line; that of a record is bounded by its fields.
const MAX_LINE: u64 = 16 << 10;
/// What is recorded of a line that power or a kill cut short.
const TORN: &str = "log torn";

/// The log of one user's sandboxes.
#[derive(Debug, Clone)]
pub struct AuditLog {
    dir: PathBuf,
    max_bytes: u64,
}

/// The last record of a chain, by which all before it is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Its number; 0: there is none.
    pub seq: u64,
    /// Its hash.
    pub hash: String,
}

/// Why a log is not to be believed.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// It cannot be read.
    #[error(transparent)]
    Unreadable(#[from] SandboxError),
    /// A line of it is not what was written, or not where it was written.
    #[error("line {line} of {path}: {why}")]
    Broken {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        why: String,
    },
    /// It does not have the record that it is held against.
    #[error("the log has no record {seq} with hash {hash}: its end was cut off, or it is another log")]
    OtherHead {
        /// Number of the record.
        seq: u64,
        /// Its hash.
        hash: String,
    },
}

impl AuditLog {
    /// That of these directories.
    #[must_use]
    pub fn of(dirs: &Dirs) -> Self {
        Self { dir: dirs.data.clone(), max_bytes: MAX_FILE_BYTES }
    }

    /// Adds what was done, with how it ended. A log that cannot be written to is told of in ours, and keeps nothing from being done.
    pub fn note<T, E: std::error::Error>(
        &self,
        action: &str,
        subject: &str,
        detail: &str,
        outcome: Result<T, E>,
    ) -> Result<T, E> {
        let error = outcome.as_ref().err().map(ToString::to_string).unwrap_or_default();
        if let Err(error) = self.append(action, subject, detail, &error) {
            tracing::warn!(action, subject, %error, "not in the audit log");
        }
        outcome
    }

    fn append(&self, action: &str, subject: &str, detail: &str, error: &str) -> Result<(), SandboxError> {
        let path = self.dir.join(NOW);
        if !self.dir.exists() {
            make_private_dir(&self.dir)?;
        }
        let _lock = FileLock::take_short(&self.dir.join(LOCK))?;
        let mut file = open(&path)?;
        let fail = |source| SandboxError::io("write to", &path, source);
        let (mut head, torn) = self.end(&mut file, &path)?;
        let mut text = String::new();
        if let Some(torn) = &torn {
            // What is there stays, as lines that the next one speaks of.
            text.push('\n');
            if !torn.is_empty() {
                head = self.add(&mut text, &head, TORN, &hash(torn), "", "")?;
            }
        }
        head = self.add(&mut text, &head, action, subject, detail, error)?;
        file.write_all(text.as_bytes()).map_err(fail)?;
        if file.metadata().map_err(fail)?.len() > self.max_bytes {
            let kept = self.dir.join(format!("audit-{:020}.log", head.seq));
            fs::rename(&path, &kept).map_err(|source| SandboxError::io("rename", &path, source))?;
        }
        Ok(())
    }

    fn add(
        &self,
        text: &mut String,
        head: &Head,
        action: &str,
        subject: &str,
        detail: &str,
        error: &str,
    ) -> Result<Head, SandboxError> {
        let record = AuditRecord {
            seq: head.seq + 1,
            at: Timestamp::now(),
            uid: rustix::process::getuid().as_raw(),
            login: login(),
            pid: std::process::id(),
            action: action.to_owned(),
            subject: bounded(subject),
            detail: bounded(detail),
            error: bounded(error),
            previous: head.hash.clone(),
        };
        let sealed = record.seal();
        let path = || self.dir.join(NOW);
        let (line, hash) = sealed.map_err(|source| SandboxError::Damaged { path: path(), source })?;
        text.push_str(&line);
        text.push('\n');
        Ok(Head { seq: record.seq, hash })
    }

    /// The last record, and what comes after it, which is empty if only the end of its line is lacking.
    fn end(&self, file: &mut File, path: &Path) -> Result<(Head, Option<Vec<u8>>), SandboxError> {
        let fail = |source| SandboxError::io("read", path, source);
        let len = file.metadata().map_err(fail)?.len();
        if len == 0 {
            return Ok((self.last_kept()?, None));
        }
        let start = len.saturating_sub(2 * MAX_LINE);
        let mut tail = Vec::new();
        file.seek(SeekFrom::Start(start)).map_err(fail)?;
        file.take(2 * MAX_LINE).read_to_end(&mut tail).map_err(fail)?;
        let mut rest = tail.len();
        for line in tail.split_inclusive(|byte| *byte == b'\n').rev() {
            let text = str::from_utf8(line.strip_suffix(b"\n").unwrap_or(line)).unwrap_or_default();
            if let Ok((record, hash)) = AuditRecord::open(text) {
                let after = tail.get(rest..).unwrap_or_default();
                let torn = !after.is_empty() || !line.ends_with(b"\n");
                return Ok((Head { seq: record.seq, hash }, torn.then(|| after.to_vec())));
            }
            rest -= line.len();
        }
        Ok((self.last_kept()?, Some(tail)))
    }

    /// The last record of the files that are written no more.
    fn last_kept(&self) -> Result<Head, SandboxError> {
        let nothing = Head { seq: 0, hash: NOTHING.to_owned() };
        let Some(path) = self.kept()?.pop() else { return Ok(nothing) };
        let mut lines = Vec::new();
        let fail = |source| SandboxError::io("read", &path, source);
        let mut file = File::open(&path).map_err(fail)?;
        file.seek(SeekFrom::Start(file.metadata().map_err(fail)?.len().saturating_sub(MAX_LINE)))
            .map_err(fail)?;
        file.take(MAX_LINE).read_to_end(&mut lines).map_err(fail)?;
        let text = String::from_utf8_lossy(&lines);
        let last = text.lines().rev().find_map(|line| AuditRecord::open(line).ok());
        Ok(last.map_or(nothing, |(record, hash)| Head { seq: record.seq, hash }))
    }

    /// Files that are written no more, the oldest first.
    fn kept(&self) -> Result<Vec<PathBuf>, SandboxError> {
        let names = crate::store::list(&self.dir)?;
        let is_kept = |name: &&String| name.starts_with("audit-") && name.ends_with(".log");
        let mut kept: Vec<_> = names.iter().filter(is_kept).map(|name| self.dir.join(name)).collect();
        kept.sort();
        Ok(kept)
    }

    /// Reads it from the oldest file that is there, and checks that each record is whole and follows from the one before. `seen` is given each.
    /// With `expected` the log must have that record.
    ///
    /// # Errors
    /// [`AuditError::Broken`] at the first line that is not what was written, [`AuditError::OtherHead`].
    pub fn verify(
        &self,
        expected: Option<&Head>,
        seen: &mut dyn FnMut(&AuditRecord),
    ) -> Result<Head, AuditError> {
        let mut chain = Chain { head: None, torn: Vec::new(), met: expected.is_none() };
        let current = self.dir.join(NOW);
        let files = self.kept()?.into_iter().chain(current.exists().then_some(current));
        for path in files {
            let fail = |source| SandboxError::io("read", &path, source);
            let mut lines = BufReader::new(File::open(&path).map_err(fail)?);
            let broken = |line, why| AuditError::Broken { path: path.clone(), line, why };
            for number in 1.. {
                let mut line = Vec::new();
                if lines.by_ref().take(MAX_LINE).read_until(b'\n', &mut line).map_err(fail)? == 0 {
                    chain.end().map_err(|why| broken(number - 1, why))?;
                    break;
                }
                if let Some(record) = chain.add(&line, expected).map_err(|why| broken(number, why))? {
                    seen(&record);
                }
            }
        }
        match expected {
            Some(head) if !chain.met => Err(AuditError::OtherHead { seq: head.seq, hash: head.hash.clone() }),
            _ => Ok(chain.head.unwrap_or(Head { seq: 0, hash: NOTHING.to_owned() })),
        }
    }
}

/// How far a log was followed.
struct Chain {
    head: Option<Head>,
    /// Lines that are no records: the next record must be of them.
    torn: Vec<u8>,
    /// Whether the expected record was met.
    met: bool,
}

impl Chain {
    /// What is cut short is at the end of a file, and has no end of its own.
    fn end(&self) -> Result<(), String> {
        if self.torn.ends_with(b"\n") { Err("it is no record".to_owned()) } else { Ok(()) }
    }

    fn add(&mut self, line: &[u8], expected: Option<&Head>) -> Result<Option<AuditRecord>, String> {
        let text = str::from_utf8(line.strip_suffix(b"\n").unwrap_or(line)).unwrap_or_default();
        let (record, hash) = match AuditRecord::open(text) {
            Ok(opened) => opened,
            Err(broken) if self.torn.len() as u64 > MAX_LINE => return Err(broken.to_string()),
            Err(_) => {
                self.torn.extend_from_slice(line);
                return Ok(None);
            }
        };
        if !self.torn.is_empty() {
            let torn = std::mem::take(&mut self.torn);
            let of_it = record::hash(torn.strip_suffix(b"\n").unwrap_or(&torn));
            if record.action != TORN || record.subject != of_it {
                return Err("the line before it is no record".to_owned());
            }
        }
        if let Some(head) = &self.head {
            if record.seq != head.seq + 1 {
                return Err(format!("record {} comes after record {}", record.seq, head.seq));
            }
            if record.previous != head.hash {
                return Err(format!("record {} does not follow from the one before", record.seq));
            }
        } else if record.seq == 1 && record.previous != NOTHING {
            return Err("the first record follows from another".to_owned());
        }
        let head = Head { seq: record.seq, hash };
        self.met |= expected.is_some_and(|expected| *expected == head);
        self.head = Some(head);
        Ok(Some(record))
    }
}

fn open(path: &Path) -> Result<File, SandboxError> {
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true).mode(0o600);
    options.open(path).map_err(|source| SandboxError::io("open", path, source))
}

/// The user that logged in.
fn login() -> Option<u32> {
    let text = fs::read_to_string("/proc/self/loginuid").ok()?;
    text.trim().parse().ok().filter(|uid| *uid != u32::MAX)
}

#[cfg(test)]
mod tests;
