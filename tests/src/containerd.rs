//! A containerd of a case's own, with this runtime, driven by `ctr`.
#![expect(clippy::panic, reason = "assertions of the cases; a panic is how a case fails")]

use std::cell::RefCell;
use std::io::Write;

use crate::program::{Run, Running, host, hyper};
use crate::{Scratch, fixtures, given, wait_for};

/// What every container is started with.
pub const RUNTIME: &str = "io.containerd.hyper.v2";
/// Name of the runtime's handler for pods.
pub const HANDLER: &str = "hyper";
/// The handler whose pods are made by the Sandbox API; of containerd 2.
pub const SANDBOX_HANDLER: &str = "hyper-sandbox";
/// Two more of those: one whose options name a file, `own.toml` in the folder of this containerd's files, and one whose options are the
/// configuration: two processors.
pub const CONFIGURED_HANDLERS: [&str; 2] = ["hyper-file", "hyper-inline"];
/// Lines of containerd's log that a failure shows.
const SHOWN_LINES: usize = 60;
/// What the names of images in the archives begin with.
const BASE: &str = "docker.io/library";

/// Which containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// Debian's, 1.6.
    One,
    /// Built from its Go module.
    Two,
}

impl Release {
    /// The name of its configuration's part for pods, and of the version that this form has.
    fn cri(self) -> (&'static str, u8) {
        match self {
            Self::One => ("io.containerd.grpc.v1.cri", 2),
            Self::Two => ("io.containerd.cri.v1.runtime", 3),
        }
    }

    /// Folder of its programs, for the front of the path.
    fn bin(self) -> String {
        match self {
            Self::One => "/usr/bin".to_owned(),
            Self::Two => peers().display().to_string(),
        }
    }
}

/// Folder of the programs that are built from Go modules.
pub(crate) fn peers() -> std::path::PathBuf {
    given("HYPER_TEST_PEERS").join("bin")
}

/// A running containerd; it and its pods are ended when dropped.
#[derive(Debug)]
pub struct Containerd {
    release: Release,
    namespace: &'static str,
    scratch: Scratch,
    /// Variables that it and its shims get, as a shell has them before a command.
    environment: String,
    daemon: RefCell<Option<Running>>,
}

impl Containerd {
    /// Starts Debian's with the image busybox.
    #[must_use]
    pub fn start() -> Self {
        Self::start_as(Release::One)
    }

    /// Starts one with the image busybox.
    #[must_use]
    pub fn start_as(release: Release) -> Self {
        Self::start_with_environment(release, "")
    }

    /// The same, with variables that it and its shims get, as a shell has them before a command.
    #[must_use]
    pub fn start_with_environment(release: Release, environment: &str) -> Self {
        let containerd = Self::prepare(release, "default", "", environment);
        containerd.import("busybox");
        containerd
    }

    /// Starts containerd 2 with its EROFS snapshotter, whose images are disks. With a size, what is written goes to a disk of that size, else
    /// to folders of the host.
    #[must_use]
    pub fn start_with_erofs(size: &str) -> Self {
        // The snapshotter is left out unless the kernel knows them already.
        host("PATH=$PATH:/sbin modprobe erofs").ok();
        let config = format!("[plugins.\"io.containerd.snapshotter.v1.erofs\"]\ndefault_size = \"{size}\"\n");
        Self::prepare(Release::Two, "default", &config, "")
    }

    /// Starts one for a Docker engine.
    pub(crate) fn start_for_docker() -> Self {
        Self::prepare(Release::Two, "moby", "", "")
    }

    /// Starts one for nerdctl.
    pub(crate) fn start_for_nerdctl(release: Release) -> Self {
        Self::prepare(release, "default", "", "")
    }

    /// Starts one for pods, whose network is that of CNI's bridge plugin.
    #[must_use]
    pub fn start_for_pods(release: Release) -> Self {
        Self::start_for_pods_with(release, "")
    }

    /// The same, with guests that turn against their agents by order: see [`Pod::order`](crate::Pod::order). Deadlines are `scale` times
    /// those of a user.
    #[must_use]
    pub fn start_sabotaged(release: Release, scale: u32) -> Self {
        let parts = Scratch::new().keep();
        let product = given("HYPER_TEST_PREFIX");
        for (part, name) in [
            (product.join("libexec/hyper/hyper-vmm"), "hyper-vmm"),
            (product.join("libexec/hyper/hyper-fs"), "hyper-fs"),
            (product.join("share/hyper/vmlinux"), "vmlinux"),
            (given("HYPER_TEST_SABOTAGED"), "initramfs.cpio"),
        ] {
            if let Err(error) = std::os::unix::fs::symlink(&part, parts.join(name)) {
                panic!("linking {}: {error}", part.display());
            }
        }
        let environment = format!("HYPER_PARTS={} HYPER_TIMEOUT_SCALE={scale}", parts.display());
        Self::start_for_pods_with(release, &environment)
    }

    /// Starts one for pods, with variables that it and its shims get.
    #[must_use]
    pub fn start_for_pods_with(release: Release, environment: &str) -> Self {
        let (cri, _) = release.cri();
        let images = "io.containerd.cri.v1.images";
        let (pause, cni) = match release {
            Release::One => (
                format!("[plugins.\"{cri}\"]\nsandbox_image = \"{BASE}/pause:latest\"\n"),
                "bin_dir = \"/usr/lib/cni\"",
            ),
            Release::Two => (
                format!("[plugins.\"{images}\".pinned_images]\nsandbox = \"{BASE}/pause:latest\"\n"),
                "bin_dirs = [\"/usr/lib/cni\"]",
            ),
        };
        let mut config = format!("{pause}[plugins.\"{cri}\".cni]\n{cni}\nconf_dir = \"@/cni\"\n");
        if release == Release::Two {
            config.push_str(&format!(
                "[plugins.\"{cri}\".containerd.runtimes.{SANDBOX_HANDLER}]\nruntime_type = \"{RUNTIME}\"\n\
                 sandboxer = \"shim\"\n"
            ));
            for (handler, options) in
                CONFIGURED_HANDLERS.iter().zip(["ConfigPath = \"@/own.toml\"", "vcpus = 2"])
            {
                let table = format!("[plugins.\"{cri}\".containerd.runtimes.{handler}");
                config.push_str(&format!(
                    "{table}]\nruntime_type = \"{RUNTIME}\"\nsandboxer = \"shim\"\n{table}.options]\n{options}\n"
                ));
            }
        }
        let containerd = Self::prepare(release, "k8s.io", &config, environment);
        containerd.import("busybox");
        containerd.import("pause");
        containerd
    }

    /// Starts one with more configuration, in which `@` is the folder of its files.
    fn prepare(release: Release, namespace: &'static str, more: &str, environment: &str) -> Self {
        let scratch = Scratch::new();
        let path = scratch.path().display().to_string();
        let (cri, version) = release.cri();
        // Without pods nothing of theirs is wanted.
        let disabled = if more.is_empty() { format!("\"{cri}\"") } else { String::new() };
        let config = format!(
            "version = {version}\nroot = \"{path}/root\"\nstate = \"{path}/state\"\n\
             disabled_plugins = [{disabled}]\n[grpc]\naddress = \"{path}/sock\"\n{}",
            more.replace('@', &path)
        );
        scratch.file("config.toml", &config);
        if let Err(error) = std::fs::create_dir(scratch.path().join("cni")) {
            panic!("making a folder for CNI: {error}");
        }
        scratch.file("cni/10-case.conflist", CNI_CONF);
        if !more.is_empty() {
            // The handler for pods comes as an operator gets it.
            let folders = ["--config", "--runtime-config", "--bin-dir"].map(str::to_owned);
            let files = ["config.toml", "hyper.toml", "bin"].map(|name| scratch.join(name));
            drop(std::fs::create_dir(scratch.join("bin")));
            let words: Vec<_> = folders.iter().zip(&files).flat_map(|(flag, file)| [flag, file]).collect();
            words.into_iter().fold(hyper("install containerd"), |run, word| run.arg(word)).ok();
        }
        let environment = environment.to_owned();
        let containerd = Self { release, namespace, scratch, environment, daemon: RefCell::default() };
        containerd.launch();
        containerd
    }

    /// Brings in an image of the fixtures.
    pub fn import(&self, name: &str) {
        let archive = fixtures().join(format!("archives/{name}.tar"));
        let base = format!("{BASE}/{name}");
        self.ctr("image import --base-name").args(&[&base, &archive.to_string_lossy()]).ok();
    }

    /// Starts it, after [`Self::kill`].
    pub fn launch(&self) {
        let path = self.scratch.path().display();
        let bin = given("HYPER_TEST_PREFIX").join("bin");
        let script = format!(
            "export PATH={path}/bin:{}:{}:$PATH:/usr/sbin:/sbin {}; exec containerd --config {path}/config.toml >>{path}/log 2>&1",
            bin.display(),
            self.release.bin(),
            self.environment,
        );
        self.daemon.replace(Some(host(&script).within(3600).start()));
        wait_for("containerd", || self.ctr("version").done().code_is(0).then_some(()));
    }

    /// Process id of containerd.
    #[must_use]
    pub fn daemon_pid(&self) -> u32 {
        self.daemon.borrow().as_ref().map_or(0, Running::pid)
    }

    /// Kills containerd itself; the pods live on.
    pub fn kill(&self) {
        if let Some(daemon) = self.daemon.take() {
            daemon.signal("KILL");
            drop(daemon.done());
        }
    }

    /// Kills it and starts it again.
    pub fn restart(&self) {
        self.kill();
        self.launch();
    }

    /// `ctr` with words that are split at white space; `@NAME` is an image of the fixtures.
    #[must_use]
    pub fn ctr(&self, words: &str) -> Run {
        let script = format!("exec {} \"$@\"", self.ctr_words());
        let mut run = host(&script).arg("ctr");
        for word in words.split_whitespace() {
            run = match word.strip_prefix('@') {
                Some(name) => run.arg(&image_name(name)),
                None => run.arg(word),
            };
        }
        run
    }

    fn ctr_words(&self) -> String {
        let (bin, path) = (self.release.bin(), self.scratch.path().display());
        format!("{bin}/ctr --address {path}/sock --namespace {}", self.namespace)
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
        let script = format!("exec {} events >{log}", self.ctr_words());
        let events = Events { log, _listener: host(&script).within(3600).start() };
        wait_for("the listener to hear something", || {
            self.ctr("image label @busybox heard=yes").ok();
            events.text().contains("/images/update").then_some(())
        });
        events
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

    /// Nothing of a pod is left on the host: no process, mount, interface, control group, network namespace or file.
    ///
    /// # Panics
    /// When something stays; it says what.
    pub fn leaves_nothing(&self) {
        let script = format!(
            "pgrep -ax 'hyper-vmm|hyper-fs|containerd-shim'; find ${{HYPER_RUN:-/run/hyper}}/pods /run/containerd/s \
             /var/run/netns {state}/io.containerd.runtime.v2.task/*/ -mindepth 1 2>/dev/null | grep -v /podnet; \
             grep hytap /proc/net/dev; grep -e /pods/ -e {state} /proc/mounts; \
             find /sys/fs/cgroup -mindepth 2 -type d -path '*/{namespace}/*'; true",
            state = self.scratch.join("state"),
            namespace = self.namespace,
        );
        let start = std::time::Instant::now();
        loop {
            let left = host(&script).ok().text();
            if left.is_empty() {
                return;
            }
            assert!(start.elapsed() < crate::DEADLINE, "left on the host:\n{left}");
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
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

/// What an image of the fixtures is called in containerd.
#[must_use]
pub fn image_name(name: &str) -> String {
    format!("{BASE}/{name}:latest")
}

/// A network of CNI's bridge plugin.
pub(crate) const CNI_CONF: &str = r#"{"cniVersion":"0.4.0","name":"pods","plugins":[{"type":"bridge","bridge":"cnipods","isGateway":true,
    "ipMasq":false,"ipam":{"type":"host-local","subnet":"10.88.9.0/24","routes":[{"dst":"0.0.0.0/0"}]}},
    {"type":"loopback"}]}"#;

/// Prints the last lines of a daemon's log that are no mere news.
pub(crate) fn show_log(path: &str) {
    let log = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<_> = log.lines().filter(|line| !line.contains("level=info")).collect();
    let shown = lines.get(lines.len().saturating_sub(SHOWN_LINES)..).unwrap_or_default();
    drop(writeln!(std::io::stderr(), "--- {path}\n{}", shown.join("\n")));
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            show_log(&self.scratch.join("log"));
        }
        // What a failed case left; containers that are gone are no matter.
        let ctr = self.ctr_words();
        let script = format!("for t in $({ctr} task ls -q); do timeout 30 {ctr} task rm -f $t; done");
        drop(host(&script).done());
        if let Some(daemon) = self.daemon.take() {
            daemon.signal("TERM");
            drop(daemon.done());
        }
        if std::thread::panicking() {
            // The next case must not find it.
            drop(host(SWEEP).done());
        }
    }
}

/// Ends all pods by force and removes what they leave; the mounts in them were those of the shims.
const SWEEP: &str = "pkill -9 -x 'containerd-shim|hyper-vmm|hyper-fs'; while pgrep -x 'containerd-shim|hyper-vmm|hyper-fs'; do :; done; \
    export PATH=$PATH:/sbin:/usr/sbin; for name in $(ls /var/run/netns); do ip netns del $name; done; \
    find ${HYPER_RUN:-/run/hyper}/pods /run/containerd/s -xdev -depth -mindepth 1 -delete; \
    find /sys/fs/cgroup -depth -mindepth 2 -type d -path '*/k8s.io/*' -delete";
