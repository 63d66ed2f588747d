//! `nerdctl`, when it is on the path of those who run the cases, on a containerd of a case's own.

use crate::containerd::{Containerd, RUNTIME, Release};
use crate::given;
use crate::program::{Run, host};

/// A `nerdctl` with its containerd; its containers are ended when dropped.
#[derive(Debug)]
pub struct Nerdctl {
    words: String,
    containerd: Containerd,
}

impl Nerdctl {
    /// Starts a containerd with the image busybox.
    #[must_use]
    pub fn start(release: Release) -> Self {
        let containerd = Containerd::start_for_nerdctl(release);
        let path = containerd.scratch().path().display();
        let words = format!(
            "PATH=$PATH:/usr/sbin:/sbin {} --address {path}/sock --data-root {path}/nerdctl --cni-path /usr/lib/cni \
             --cni-netconfpath {path}/nets",
            given("HYPER_TEST_NERDCTL").display()
        );
        // Its own `load` wants a containerd of 1.7 at least.
        containerd.import("busybox");
        Self { words, containerd }
    }

    /// `nerdctl` with words that are split at white space.
    #[must_use]
    pub fn run(&self, words: &str) -> Run {
        let script = format!("{} \"$@\"", self.words);
        words.split_whitespace().fold(host(&script).arg("nerdctl"), |run, word| run.arg(word))
    }

    /// `nerdctl run` with this runtime.
    #[must_use]
    pub fn container(&self, words: &str) -> Run {
        self.run(&format!("run --runtime {RUNTIME} {words}"))
    }

    /// `nerdctl run -it` on a terminal, with what is typed there.
    #[must_use]
    pub fn on_terminal(&self, words: &str, typed: &str) -> Run {
        let script = format!(
            "script -qec \"{} run --runtime {RUNTIME} -it {words}\" /dev/null",
            self.words.replace('$', "\\$")
        );
        host(&script).stdin(typed)
    }

    /// Its containerd.
    #[must_use]
    pub fn containerd(&self) -> &Containerd {
        &self.containerd
    }
}

impl Drop for Nerdctl {
    fn drop(&mut self) {
        let script = format!(
            "{words} rm -f $({words} ps -aq)",
            words = format_args!("timeout 120 env {}", self.words)
        );
        drop(host(&script).done());
        // The next case makes its own.
        drop(host("PATH=$PATH:/sbin:/usr/sbin ip link del nerdctl0").done());
    }
}
