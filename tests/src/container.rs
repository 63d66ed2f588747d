//! A detached container that is removed when its case ends, however it ends.

use std::time::{Duration, Instant};

use crate::program::{Done, Run, hyper};

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
        Self { id: run.ok().text() }
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
