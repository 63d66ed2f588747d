//! Programs: where they are, and running them to their end under a deadline.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::time::{ClockId, clock_gettime};

/// How long one program may take: ten times what the slowest contender needs on an emulated processor.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// The folder that holds `bin/hyper`: this program is in `libexec/hyper` there.
pub(crate) fn prefix() -> Result<PathBuf> {
    let program = std::env::current_exe().context("finding this program")?;
    let prefix = program.ancestors().nth(3).map(Path::to_path_buf);
    match prefix.filter(|prefix| prefix.join("bin/hyper").is_file()) {
        Some(prefix) => Ok(prefix),
        None => bail!("{} is not where hyper was installed: run it as `hyper bench`", program.display()),
    }
}

/// A program on the path, or `None`.
pub(crate) fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|program| program.is_file())
}

/// Microseconds of `CLOCK_MONOTONIC`, which hyper-vmm's own timeline uses too.
pub(crate) fn now_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or_default() * 1_000_000
        + u64::try_from(now.tv_nsec).unwrap_or_default() / 1000
}

/// Milliseconds since a point of [`now_us`].
pub(crate) fn ms_since(start_us: u64) -> f64 {
    thousandth(now_us().saturating_sub(start_us))
}

/// Microseconds in milliseconds, or thousands in millions.
#[expect(clippy::cast_precision_loss, reason = "microseconds of a run are far below 2^52")]
pub(crate) fn thousandth(us: u64) -> f64 {
    us as f64 / 1000.0
}

/// How long the host is given to take away what the contender before has left: network namespaces go in the background.
const SETTLE: Duration = Duration::from_millis(500);

/// Waits so that no contender pays for the end of another.
pub(crate) fn settle() {
    std::thread::sleep(SETTLE);
}

/// A point in time from which work is counted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Watch {
    start_us: u64,
    idle_ns: Option<u64>,
}

impl Watch {
    /// From now on.
    pub(crate) fn start() -> Self {
        // Looked up first: it takes a while.
        let idle_ns = idle_ns();
        Self { start_us: now_us(), idle_ns }
    }

    /// How long the one processor of the lab has been at work since, us: on the lab's clock, thousands of instructions.
    pub(crate) fn work_us(self) -> Option<u64> {
        let now_us = now_us();
        let idle_us = idle_ns()?.saturating_sub(self.idle_ns?) / 1000;
        Some(now_us.saturating_sub(self.start_us).saturating_sub(idle_us))
    }
}

/// How long the processors have been idle, ns; none where the kernel does not say it that finely (`/proc/timer_list`).
fn idle_ns() -> Option<u64> {
    idle_of(&std::fs::read_to_string("/proc/timer_list").ok()?)
}

fn idle_of(timers: &str) -> Option<u64> {
    let lines = timers.lines().filter_map(|line| line.trim().strip_prefix(".idle_sleeptime"));
    let idle = lines.map(|line| line.trim_start_matches([' ', ':']).split(' ').next()?.parse::<u64>().ok());
    idle.sum::<Option<u64>>().filter(|sum| *sum > 0)
}

/// Does something; with its outcome, how long the one processor of the lab was at work for it, us, with what is left to the kernel
/// afterwards and without what the machine does when nobody asks for anything.
pub(crate) fn at_work<T>(what: impl FnOnce() -> Result<T>) -> Result<(T, Option<u64>)> {
    let watch = Watch::start();
    settle();
    let nothing = watch.work_us();
    let watch = Watch::start();
    let done = what()?;
    settle();
    let all = watch.work_us();
    Ok((done, all.zip(nothing).map(|(all, nothing)| all.saturating_sub(nothing))))
}

/// A command without input and output, whose complaints are kept for the error.
pub(crate) fn quiet(program: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// Runs a command to its end; milliseconds from its start to its exit.
pub(crate) fn timed(command: &mut Command) -> Result<f64> {
    let start = now_us();
    let mut child = Waited::start(command)?;
    child.end()?;
    Ok(ms_since(start))
}

/// What a command prints.
pub(crate) fn text(program: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = quiet(program, arguments);
    let line = line(&command);
    let output = command.stdout(Stdio::piped()).output().with_context(|| format!("starting {line}"))?;
    if !output.status.success() {
        bail!("{line}: {}: {}", output.status, last_words(&String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A command as it would be typed.
fn line(command: &Command) -> String {
    let name = Path::new(command.get_program()).file_name().unwrap_or_default();
    let words: Vec<_> = [name]
        .into_iter()
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    words.join(" ")
}

/// The last line of what a program complained of, without its own name before it.
fn last_words(said: &str) -> &str {
    let last = said.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or_default();
    last.strip_prefix("hyper: ").unwrap_or(last)
}

/// A program that runs; it is gone when this is dropped.
pub(crate) struct Waited {
    child: Child,
    line: String,
}

impl Waited {
    /// Starts it.
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        let line = line(command);
        let child = command.spawn().with_context(|| format!("starting {line}"))?;
        Ok(Self { child, line })
    }

    /// Waits until it has ended, which must be well.
    pub(crate) fn end(&mut self) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        let watch = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
            .context("watching a program")?;
        let deadline = Instant::now() + LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let wait = rustix::time::Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or_default(),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut watched = [rustix::event::PollFd::new(&watch, rustix::event::PollFlags::IN)];
            match rustix::event::poll(&mut watched, Some(&wait)) {
                Ok(0) => bail!("{} did not end within {} s", self.line, LIMIT.as_secs()),
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("waiting for a program"),
            }
        }
        let status = self.child.wait().context("waiting for a program")?;
        if !status.success() {
            let mut said = String::new();
            if let Some(mut stderr) = self.child.stderr.take() {
                // What was said is for the error only.
                drop(std::io::Read::read_to_string(&mut stderr, &mut said));
            }
            bail!("{}: {status}: {}", self.line, last_words(&said));
        }
        Ok(())
    }
}

impl Drop for Waited {
    fn drop(&mut self) {
        // It has ended by itself unless something failed on the way.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_that_of_all_processors() {
        let timers = "cpu: 0\n  .nohz_mode      : 2\n  .idle_sleeptime : 1000 nsecs\ncpu: 1\n  .idle_sleeptime : 234 nsecs\n";
        assert_eq!(idle_of(timers), Some(1234));
        assert_eq!(idle_of("  .idle_sleeptime : some nsecs\n"), None);
        assert_eq!(idle_of(""), None);
    }

    #[test]
    fn a_failure_is_one_line() {
        let script = "echo first >&2; echo hyper: second >&2; exit 3";
        let error = timed(&mut quiet(Path::new("/bin/sh"), &["-c", script])).unwrap_err().to_string();
        assert_eq!(error, format!("sh -c {script}: exit status: 3: second"));
        assert_eq!(text(Path::new("/bin/echo"), &["a", "b"]).unwrap(), "a b");
    }
}
