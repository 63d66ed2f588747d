//! A detached container that is removed when its case ends, however it ends.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::program::{Done, Run, hyper};

/// How the containers of a case come to be, when it is not by a start of their own.
static ORIGIN: OnceLock<fn(&Container) -> Container> = OnceLock::new();

/// Runs a case whose detached containers are all forks of the ones that it starts, which are gone.
pub fn from_fork(case: fn()) {
    // Each case has a process of its own, and is run once in it.
    ORIGIN.get_or_init(|| Container::forked);
    case();
}

/// Runs a case whose detached containers all go on from snapshots of the ones that it starts, which are gone.
pub fn from_snapshot(case: fn()) {
    ORIGIN.get_or_init(|| Container::restored);
    case();
}

/// A detached container; removed by force when dropped.
#[derive(Debug)]
pub struct Container {
    /// Its full id.
    pub id: String,
}

/// Starts `hyper run -d` with these words; [`hyper`] says how they are read.
#[must_use]
pub fn detached(words: &str) -> Container {
    Container::from(hyper(&format!("run -d {words}")))
}

impl Container {
    /// Runs a `hyper run -d` or `hyper create` that prints the id.
    #[must_use]
    pub fn from(run: Run) -> Self {
        let made = Self { id: run.ok().text() };
        match ORIGIN.get() {
            Some(origin) => origin(&made),
            None => made,
        }
    }

    /// A copy of it that goes on where it is.
    #[must_use]
    pub fn forked(&self) -> Self {
        Self { id: self.call("fork").ok().text() }
    }

    /// A container that goes on from a snapshot of it, which is gone.
    #[must_use]
    pub fn restored(&self) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("of-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        hyper("snapshot create").args(&[&self.id, &name]).ok().says(&name);
        let restored = Self { id: hyper("run -d --from-snapshot").arg(&name).ok().text() };
        hyper("snapshot rm").arg(&name).ok().says(&name);
        restored
    }

    /// `hyper <verb> <id>`.
    #[must_use]
    pub fn call(&self, verb: &str) -> Run {
        hyper(verb).arg(&self.id)
    }

    /// `hyper exec <id> sh -c <script>`.
    #[must_use]
    pub fn sh(&self, script: &str) -> Run {
        hyper("exec").args(&[&self.id, "sh", "-c", script])
    }

    /// One field of `hyper inspect`, such as `.State.Status`.
    #[must_use]
    pub fn field(&self, field: &str) -> String {
        hyper("inspect --format").args(&[&format!("{{{{{field}}}}}"), &self.id]).ok().text()
    }

    /// Its logs so far.
    pub fn logs(&self) -> Done {
        self.call("logs").ok()
    }

    /// Waits for its end; the exit code.
    #[must_use]
    pub fn wait(&self) -> String {
        self.call("wait").ok().text()
    }

    /// Waits until its logs have a text in them.
    pub fn wait_for_log(&self, text: &str) {
        self.wait_for_log_within(crate::DEADLINE.as_secs(), text);
    }

    /// As [`Container::wait_for_log`], for what takes long even on hardware.
    ///
    /// # Panics
    /// When the time is up, or the container has ended without it; the message has the logs.
    pub fn wait_for_log_within(&self, seconds: u64, text: &str) {
        let start = Instant::now();
        loop {
            // Asked first: what it logged before its end is in the logs then.
            let ended = self.field(".State.Status") == "exited";
            let done = self.logs();
            let logs = format!("{}\n{}", done.text(), done.error());
            if logs.contains(text) {
                return;
            }
            assert!(!ended, "it ended without {text:?} in the logs:\n{logs}");
            assert!(
                start.elapsed().as_secs() < seconds,
                "waited {seconds} s for {text:?} in the logs:\n{logs}"
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // It may be gone already.
        drop(hyper("rm -f -v").arg(&self.id).done());
    }
}
