//! A containerd of a case's own, with this runtime, driven by `ctr`.

use crate::program::{Run, Running, host};
use crate::{Scratch, fixtures, given, wait_for};

/// What every container is started with.
pub const RUNTIME: &str = "io.containerd.hyper.v2";
/// The image that is there.
const IMAGE: &str = "busybox";

/// A running containerd; it and its pods are ended when dropped.
#[derive(Debug)]
pub struct Containerd {
    scratch: Scratch,
    daemon: Option<Running>,
}

impl Containerd {
    /// Starts one with the image busybox.
    #[must_use]
    pub fn start() -> Self {
        let scratch = Scratch::new();
        let path = scratch.path().display().to_string();
        let config = format!(
            "version = 2\nroot = \"{path}/root\"\nstate = \"{path}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"{path}/sock\"\n"
        );
        scratch.file("config.toml", &config);
        let mut containerd = Self { scratch, daemon: None };
        containerd.launch();
        let archive = fixtures().join("archives/busybox.tar");
        containerd.ctr("image import --base-name busybox").arg(&archive.to_string_lossy()).ok();
        containerd
    }

    fn launch(&mut self) {
        let path = self.scratch.path().display();
        let bin = given("HYPER_TEST_PREFIX").join("bin");
        let script = format!(
            "PATH={}:$PATH:/usr/sbin:/sbin exec containerd --config {path}/config.toml >>{path}/log 2>&1",
            bin.display()
        );
        self.daemon = Some(host(&script).within(3600).start());
        wait_for("containerd", || self.ctr("version").done().code_is(0).then_some(()));
    }

    /// Kills containerd itself and starts it again; the pods live on.
    pub fn restart(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            daemon.signal("KILL");
            drop(daemon.done());
        }
        self.launch();
    }

    /// `ctr` with words that are split at white space; `@busybox` is the image.
    #[must_use]
    pub fn ctr(&self, words: &str) -> Run {
        let script = format!("exec ctr --address {}/sock \"$@\"", self.scratch.path().display());
        let mut run = host(&script).arg("ctr");
        for word in words.split_whitespace() {
            run = match word.strip_prefix('@') {
                Some(IMAGE) => run.arg(&self.image()),
                _ => run.arg(word),
            };
        }
        run
    }

    /// `ctr run` with this runtime.
    #[must_use]
    pub fn run(&self, words: &str) -> Run {
        self.ctr(&format!("run --runtime {RUNTIME} {words}"))
    }

    /// Listens to events; what happens from now on is heard.
    #[must_use]
    pub fn events(&self) -> Events {
        let log = self.scratch.join("events");
        let script = format!("exec ctr --address {}/sock events >{log}", self.scratch.path().display());
        let events = Events { log, _listener: host(&script).within(3600).start() };
        wait_for("the listener to hear something", || {
            self.ctr("image label @busybox heard=yes").ok();
            events.text().contains("/images/update").then_some(())
        });
        events
    }

    fn image(&self) -> String {
        let script = format!("ctr --address {}/sock image ls -q | head -n 1", self.scratch.path().display());
        host(&script).ok().text()
    }

    /// What a task does, as `ctr task ls` says it; empty when there is none.
    #[must_use]
    pub fn status(&self, id: &str) -> String {
        let table = self.ctr("task ls").ok().text();
        let line = table.lines().find(|line| line.split_whitespace().next() == Some(id));
        line.and_then(|line| line.split_whitespace().nth(2)).unwrap_or_default().to_owned()
    }

    /// Process id that `ctr task ls` shows.
    #[must_use]
    pub fn pid(&self, id: &str) -> String {
        let table = self.ctr("task ls").ok().text();
        let line = table.lines().find(|line| line.split_whitespace().next() == Some(id));
        line.and_then(|line| line.split_whitespace().nth(1)).unwrap_or_default().to_owned()
    }

    /// Waits until a task does this.
    pub fn wait_for_status(&self, id: &str, status: &str) {
        wait_for(&format!("{id} to be {status}"), || (self.status(id) == status).then_some(()));
    }

    /// Where its files are.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Nothing of a pod is left on the host: no process, no interface, no directory.
    pub fn leaves_nothing(&self) {
        wait_for("the shim to be gone", || {
            let found = host("pgrep -x 'hyper-vmm|hyper-fs|containerd-shim' ; ls ${HYPER_RUN:-/run/hyper}/pods 2>/dev/null").done();
            found.text().is_empty().then_some(())
        });
        host("! grep hytap /proc/net/dev && ! grep /pods/ /proc/mounts").ok();
    }
}

/// Events that `ctr events` prints, until this is dropped.
#[derive(Debug)]
pub struct Events {
    log: String,
    _listener: Running,
}

impl Events {
    /// What was printed so far.
    #[must_use]
    pub fn text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // What a failed case left; containers that are gone are no matter.
        let script = format!(
            "for t in $(ctr --address {0}/sock task ls -q); do timeout 30 ctr --address {0}/sock task rm -f $t; done",
            self.scratch.path().display()
        );
        drop(host(&script).done());
        if let Some(daemon) = self.daemon.take() {
            daemon.signal("TERM");
            drop(daemon.done());
        }
    }
}
