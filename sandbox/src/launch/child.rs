//! The processes of a sandbox, and what they say, in files that cannot grow without end.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use super::VmError;
use crate::logs::RotatingFile;

/// Half of what a log of ours may take, bytes (there is one predecessor).
const MAX_LOG_BYTES: u64 = 512 * 1024;
/// Last bytes of a console that are looked at for its last words.
const TAIL_BYTES: usize = 4096;

/// Spawns a program with `stdin` as its standard input; its standard error goes to `log`. It dies with us, and sees no process but itself.
/// `cgroups` are entrances of the
/// control groups that it runs in; none: ours.
pub(super) fn spawn(
    part: &'static str,
    program: &Path,
    args: &[&OsStr],
    stdin: OwnedFd,
    log: &Path,
    cgroups: &[OwnedFd],
) -> Result<(Child, JoinHandle<()>), VmError> {
    let mut command = Command::new(program);
    command
        .args(args)
        .current_dir("/")
        .stdin(Stdio::from(stdin))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // A Ctrl-C at the terminal is for us to handle.
        .process_group(0)
        .kill_on_drop(true);
    crate::sys::die_with_parent(&mut command);
    let fail = |source| VmError::Part { part, path: program.to_owned(), source };
    if !cgroups.is_empty() {
        let copies: io::Result<Vec<OwnedFd>> = cgroups.iter().map(OwnedFd::try_clone).collect();
        crate::sys::enter_cgroups(&mut command, copies.map_err(fail)?);
    }
    // It may be another thread that spawns.
    let runtime = tokio::runtime::Handle::current();
    let spawn = move || {
        let _runtime = runtime.enter();
        command.spawn()
    };
    let id = |spawned: &io::Result<Child>| spawned.as_ref().ok().and_then(Child::id);
    let spawned = hyper_jail::spawn::in_pid_namespace(spawn, id).map_err(fail)?;
    let mut child = spawned.map_err(fail)?;
    let stderr = child.stderr.take().ok_or_else(|| fail(io::ErrorKind::BrokenPipe.into()))?;
    Ok((child, keep(stderr, log)))
}

/// Copies what comes into a bounded file, until its writer closes.
pub(super) fn keep(mut from: impl AsyncRead + Unpin + Send + 'static, log: &Path) -> JoinHandle<()> {
    let log = log.to_owned();
    tokio::spawn(async move {
        let mut file = RotatingFile::open(&log, MAX_LOG_BYTES)
            .inspect_err(|error| tracing::warn!(log = %log.display(), %error, "log is dropped"))
            .ok();
        let mut buffer = vec![0; 8192];
        loop {
            match from.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(len) => {
                    // A full disk must not stop the writer: the bytes are dropped.
                    let bytes = buffer.get(..len).unwrap_or_default();
                    if let Some(Err(error)) = file.as_mut().map(|file| file.write(bytes)) {
                        tracing::debug!(log = %log.display(), %error, "log is dropped");
                    }
                }
            }
        }
    })
}

/// The last line of a file that says something; printable characters only, at most 200.
pub(crate) fn last_words(log: &Path) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    let tail = bytes.get(bytes.len().saturating_sub(TAIL_BYTES)..).unwrap_or_default();
    let text = String::from_utf8_lossy(tail);
    let line = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("none");
    line.chars().filter(|c| !c.is_control()).take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_child_says_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let args = ["-c", "echo one >&2; echo 'two\u{1b}[2J' >&2"].map(OsStr::new);
        let (mut child, kept) = spawn("sh", Path::new("/bin/sh"), &args, null, &log, &[]).unwrap();
        assert!(child.wait().await.unwrap().success());
        kept.await.unwrap();
        assert_eq!(last_words(&log), "two[2J");
        assert_eq!(last_words(&dir.path().join("none")), "none");
    }

    #[tokio::test]
    async fn missing_part_is_named() {
        let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let error = spawn("hyper-vmm", Path::new("/nonexistent/vmm"), &[], null, Path::new("/dev/null"), &[])
            .unwrap_err();
        assert!(
            error.to_string().starts_with("hyper-vmm cannot be used, looked for at /nonexistent/vmm"),
            "{error}"
        );
    }
}
