//! Programs that take a process's output: containerd's `binary://` log URIs.
//!
//! ```text
//! binary:///usr/bin/logger?key=value   runs   /usr/bin/logger key value
//!   environment: CONTAINER_ID, CONTAINER_NAMESPACE, nothing else
//!   descriptors: 3 standard output, 4 standard error (both to be read to their end), 5 closed by it when it is ready
//! ```
//! The program belongs to the host: it runs in the host's network namespace and outlives a shim that dies, to read what is left.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::Stdio;

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::PodError;
use super::netns::HostNetwork;
use crate::launch::scaled_ms;

/// How long a logger may take until it is ready: nobody's process starts before.
const READY_MS: u64 = 10_000;
/// How long it may take to end after the last output.
const END_MS: u64 = 10_000;
/// How long it may take to end when it is asked to.
const TERMINATE_MS: u64 = 2_000;
/// How long both take at most, with some slack.
pub(super) const ENDED_MS: u64 = END_MS + TERMINATE_MS + 1_000;
/// Longest URI, bytes.
const MAX_URI_BYTES: usize = 16 * 1024;
/// Most arguments.
const MAX_ARGS: usize = 128;

/// Whose output it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Whose<'a> {
    /// The container's id, or that of a process that was added to one.
    pub(super) id: &'a str,
    /// containerd's namespace.
    pub(super) namespace: &'a str,
    /// Where it runs.
    pub(super) host: &'a HostNetwork,
}

/// A logger, as a URI names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LoggerSpec {
    program: PathBuf,
    args: Vec<OsString>,
}

/// One that runs; killed when dropped.
#[derive(Debug)]
pub(super) struct Logger {
    child: Child,
    program: PathBuf,
}

/// What was asked for, in words.
fn bad(uri: &str, why: &str) -> PodError {
    PodError::Invalid(format!("the log URI {uri:?}: {why}"))
}

/// The path of a URI, decoded, without query and fragment.
pub(super) fn path(uri: &str, rest: &str) -> Result<PathBuf, PodError> {
    let end = rest.find(['?', '#']).unwrap_or(rest.len());
    let bytes = decode(rest.get(..end).unwrap_or_default(), false)
        .ok_or_else(|| bad(uri, "a % that two hexadecimal digits do not follow"))?;
    if bytes.first() != Some(&b'/') || bytes.contains(&0) {
        return Err(bad(uri, "it needs an absolute path after the two slashes, such as file:///var/log/x"));
    }
    Ok(OsString::from_vec(bytes).into())
}

/// Undoes the encoding by `%`; in a query `+` is a space.
fn decode(text: &str, query: bool) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                let plain = digits.iter().all(u8::is_ascii_hexdigit);
                let digits = std::str::from_utf8(&digits).ok().filter(|_| plain)?;
                u8::from_str_radix(digits, 16).ok()?
            }
            b'+' if query => b' ',
            byte => byte,
        });
    }
    Some(decoded)
}

impl LoggerSpec {
    /// Reads what follows `binary://` in `uri`.
    pub(super) fn parse(uri: &str, rest: &str) -> Result<Self, PodError> {
        if uri.len() > MAX_URI_BYTES {
            return Err(PodError::Exhausted(format!(
                "a log URI of {} bytes: at most {MAX_URI_BYTES}",
                uri.len()
            )));
        }
        let program = path(uri, rest)?;
        let rest = rest.split('#').next().unwrap_or_default();
        let query = rest.split_once('?').map_or("", |(_, query)| query);
        let (mut args, mut keys) = (Vec::new(), Vec::new());
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let text = |text| {
                let bytes = decode(text, true).filter(|bytes| !bytes.contains(&0));
                bytes.map(OsString::from_vec).ok_or_else(|| bad(uri, "a query that cannot be decoded"))
            };
            let (key, value) = (text(key)?, text(value)?);
            // Of a key that is given twice the first value counts, as with containerd's own shims.
            if !keys.contains(&key) {
                args.extend([key.clone(), value]);
                keys.push(key);
            }
            if args.len() > MAX_ARGS {
                return Err(PodError::Exhausted(format!("arguments of a logger: at most {MAX_ARGS}")));
            }
        }
        Ok(Self { program, args })
    }

    /// Starts it and waits until it is ready. Returns the ends that standard output and standard error are written to.
    ///
    /// # Errors
    /// It cannot be started, or is not ready in time.
    pub(super) async fn start(&self, whose: Whose<'_>) -> Result<(Logger, Sender, Sender), PodError> {
        let program = self.program.display();
        let make =
            || pipe_with(PipeFlags::CLOEXEC).map_err(|e| PodError::io("make a pipe for", &self.program, e));
        let (out, stdout) = make()?;
        let (err, stderr) = make()?;
        let (ready, tell) = make()?;
        let child = self.spawn(whose, [out, err, tell])?;
        let fail = |source| PodError::io("use a pipe of", &self.program, source);
        let mut ready = Receiver::from_owned_fd(ready).map_err(fail)?;
        // A byte says the same as the end.
        if timeout(scaled_ms(READY_MS), ready.read_u8()).await.is_err() {
            return Err(PodError::Deadline(format!(
                "the logger {program} was not ready within {} ms: it must close its descriptor 5",
                scaled_ms(READY_MS).as_millis()
            )));
        }
        let stdout = Sender::from_owned_fd(stdout).map_err(fail)?;
        let stderr = Sender::from_owned_fd(stderr).map_err(fail)?;
        Ok((Logger { child, program: self.program.clone() }, stdout, stderr))
    }

    fn spawn(&self, whose: Whose<'_>, given: [OwnedFd; 3]) -> Result<Child, PodError> {
        let mut command = Command::new(&self.program);
        command
            .args(&self.args)
            .env_clear()
            .env("CONTAINER_ID", whose.id)
            .env("CONTAINER_NAMESPACE", whose.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        crate::sys::give_descriptors(&mut command, given);
        let spawned = whose.host.within(|| command.spawn())?;
        spawned.map_err(|source| PodError::io("run the logger", &self.program, source))
    }
}

impl Logger {
    /// Waits for its end, which follows that of its pipes; ends it when that takes too long.
    pub(super) async fn end(mut self) {
        if let Ok(ended) = timeout(scaled_ms(END_MS), self.child.wait()).await {
            if !ended.as_ref().is_ok_and(std::process::ExitStatus::success) {
                tracing::warn!(program = %self.program.display(), ?ended, "the logger failed");
            }
            return;
        }
        tracing::warn!(program = %self.program.display(), "the logger does not end with the output");
        let pid = self.child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        if let Some(pid) = pid
            && kill_process(pid, Signal::TERM).is_ok()
            && timeout(scaled_ms(TERMINATE_MS), self.child.wait()).await.is_ok()
        {
            return;
        }
        if let Err(error) = self.child.kill().await {
            tracing::warn!(program = %self.program.display(), %error, "the logger cannot be killed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tokio::io::AsyncWriteExt;

    use super::*;

    fn parse(uri: &str) -> Result<LoggerSpec, PodError> {
        LoggerSpec::parse(uri, uri.strip_prefix("binary://").unwrap())
    }

    #[test]
    fn uris_name_a_program_and_its_arguments() {
        let spec = parse("binary:///usr/my%20bin/log?-f=/a%2Fb&x=1+2&x=3&bare#part").unwrap();
        assert_eq!(spec.program, Path::new("/usr/my bin/log"));
        assert_eq!(spec.args, ["-f", "/a/b", "x", "1 2", "bare", ""]);
        for wrong in ["binary://", "binary://host/x", "binary:///x%2", "binary:///x%00", "binary:///x?a=%zz"]
        {
            assert!(matches!(parse(wrong), Err(PodError::Invalid(_))), "{wrong}");
        }
        let long = format!("binary:///{}", "x".repeat(MAX_URI_BYTES));
        assert!(matches!(parse(&long), Err(PodError::Exhausted(_))));
        let many = format!("binary:///x?{}", (0..100).map(|n| format!("a{n}=b&")).collect::<String>());
        assert!(matches!(parse(&many), Err(PodError::Exhausted(_))));
    }

    /// Where namespaces may not be entered, nothing can be started.
    async fn start(script: &str) -> Option<Result<(Logger, Sender, Sender), PodError>> {
        let host = HostNetwork::current().unwrap();
        host.within(|| ()).ok()?;
        let spec = LoggerSpec { program: "/bin/sh".into(), args: vec!["-c".into(), script.into()] };
        Some(spec.start(Whose { id: "c1", namespace: "ns", host: &host }).await)
    }

    #[tokio::test]
    async fn loggers_read_both_streams_to_their_end() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let script = format!(
            "exec 5>&-; {{ echo $CONTAINER_ID $CONTAINER_NAMESPACE; cat <&3; cat <&4; }} >{}",
            log.display()
        );
        let Some(started) = start(&script).await else { return };
        let (logger, mut out, mut err) = started.unwrap();
        out.write_all(b"out\n").await.unwrap();
        err.write_all(b"err\n").await.unwrap();
        drop((out, err));
        logger.end().await;
        assert_eq!(std::fs::read_to_string(log).unwrap(), "c1 ns\nout\nerr\n");
    }

    #[tokio::test(start_paused = true)]
    async fn loggers_that_are_never_ready_and_those_that_are_missing_are_told() {
        let Some(started) = start("exec sleep 1000").await else { return };
        let error = started.unwrap_err();
        assert!(matches!(&error, PodError::Deadline(text) if text.contains("/bin/sh")), "{error}");
        let missing = parse("binary:///nonexistent/logger").unwrap();
        let host = HostNetwork::current().unwrap();
        let error = missing.start(Whose { id: "c1", namespace: "ns", host: &host }).await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent/logger"), "{error}");
    }

    #[tokio::test]
    async fn loggers_that_do_not_end_are_ended() {
        let Some(started) = start("exec 5>&-; trap '' TERM; while :; do sleep 1000; done").await else {
            return;
        };
        let (logger, out, err) = started.unwrap();
        let pid = logger.child.id().unwrap();
        tokio::time::pause();
        drop((out, err));
        logger.end().await;
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
}
