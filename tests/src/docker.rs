//! A Docker engine of a case's own, on a containerd of its own, and Debian's client.
//!
//! Debian 12's own engine, 20.10, knows no runtimes of containerd.

use crate::containerd::{Containerd, peers, show_log};
use crate::program::{Run, Running, host};
use crate::{Scratch, fixtures, given, wait_for};

/// A running dockerd; it and its containers are ended when dropped.
#[derive(Debug)]
pub struct Docker {
    scratch: Scratch,
    daemon: Option<Running>,
    containerd: Containerd,
}

impl Docker {
    /// Starts one with the image busybox.
    #[must_use]
    pub fn start() -> Self {
        let (scratch, containerd) = (Scratch::new(), Containerd::start_for_docker());
        let path = scratch.path().display();
        let bin = given("HYPER_TEST_PREFIX").join("bin");
        let script = format!(
            "DOCKER_MIN_API_VERSION=1.41 PATH={}:{}:$PATH:/usr/sbin:/sbin exec dockerd --host unix://{path}/sock --data-root {path}/data \
             --exec-root {path}/exec --pidfile {path}/pid --containerd {} --storage-driver overlay2 >{path}/log 2>&1",
            bin.display(),
            peers().display(),
            containerd.scratch().join("sock"),
        );
        let daemon = Some(host(&script).within(3600).start());
        let docker = Self { scratch, daemon, containerd };
        wait_for("dockerd", || docker.docker("version").done().code_is(0).then_some(()));
        docker.docker("load -q -i").arg(&fixtures().join("archives/busybox.tar").to_string_lossy()).ok();
        docker
    }

    /// `docker` with words that are split at white space.
    #[must_use]
    pub fn docker(&self, words: &str) -> Run {
        let script =
            format!("exec /usr/bin/docker --host unix://{}/sock \"$@\"", self.scratch.path().display());
        words.split_whitespace().fold(host(&script).arg("docker"), |run, word| run.arg(word))
    }

    /// `docker run` with this runtime.
    #[must_use]
    pub fn run(&self, words: &str) -> Run {
        self.docker(&format!("run --runtime {} {words}", crate::RUNTIME))
    }

    /// Nothing of a container is left on the host.
    pub fn leaves_nothing(&self) {
        self.containerd.leaves_nothing();
    }

    /// Where its files are.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            show_log(&self.scratch.join("log"));
        }
        let script = "docker rm -f $(docker ps -aq)".replace(
            "docker ",
            &format!("timeout 120 /usr/bin/docker --host unix://{}/sock ", self.scratch.path().display()),
        );
        drop(host(&script).done());
        if let Some(daemon) = self.daemon.take() {
            daemon.signal("TERM");
            drop(daemon.done());
        }
    }
}
