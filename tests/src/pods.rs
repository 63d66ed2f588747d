//! Pods, made through the Container Runtime Interface as a kubelet makes them.
#![expect(
    clippy::indexing_slicing,
    reason = "of JSON values: what is not there is null, and a panic is how a case fails"
)]

use std::cell::Cell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::containerd::{Containerd, image_name, peers};
use crate::program::{Run, Running, host};
use crate::{DEADLINE, wait_for};

/// Where `tests/saboteur` listens in a guest.
const SABOTEUR_PORT: u32 = 9_000;

/// What a pod is to be.
#[derive(Debug, Clone)]
pub struct PodSpec {
    name: String,
    config: Value,
}

impl PodSpec {
    /// A pod with nothing special.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let config = json!({
            "metadata": { "name": name, "namespace": "default", "uid": format!("uid-{name}"), "attempt": 0 },
            "hostname": name,
            "linux": { "securityContext": { "namespaceOptions": { "pid": "CONTAINER" } } },
        });
        Self { name: name.to_owned(), config }
    }

    /// Changes a part of the configuration, by its JSON pointer's last step.
    #[must_use]
    pub fn with(mut self, path: &str, key: &str, value: Value) -> Self {
        if let Some(part) = self.config.pointer_mut(path) {
            part[key] = value;
        }
        self
    }
}

/// A pod that runs.
#[derive(Debug)]
pub struct Pod<'a> {
    containerd: &'a Containerd,
    /// Its id.
    pub id: String,
    config: String,
    folder: PathBuf,
    made: Cell<u32>,
}

/// Gives the order to the second process of a guest, through its virtual machine's socket.
fn given_order(folder: &Path, word: &str) -> std::io::Result<()> {
    let mut stream = UnixStream::connect(folder.join("vsock"))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(format!("CONNECT {SABOTEUR_PORT}\n").as_bytes())?;
    let mut answer = [0; 3];
    stream.read_exact(&mut answer)?;
    if answer != *b"OK " {
        return Err(std::io::ErrorKind::ConnectionRefused.into());
    }
    stream.write_all(word.as_bytes())?;
    stream.shutdown(std::net::Shutdown::Write)
}

/// Folders of the pods' sockets.
fn run_folders() -> Vec<PathBuf> {
    let run = std::env::var_os("HYPER_RUN").map_or_else(|| PathBuf::from("/run/hyper"), PathBuf::from);
    std::fs::read_dir(run.join("pods")).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Asks containerd; words are split at white space.
fn cri(containerd: &Containerd, words: &str) -> Run {
    let script = format!("exec {}/cri {} \"$@\"", peers().display(), containerd.scratch().join("sock"));
    words.split_whitespace().fold(host(&script).arg("cri"), |run, word| run.arg(word))
}

impl<'a> Pod<'a> {
    /// Runs one.
    #[must_use]
    pub fn run(containerd: &'a Containerd, handler: &str, spec: &PodSpec) -> Self {
        let (run, pod) = Self::prepare(containerd, handler, spec);
        Self { id: run.ok().text(), ..pod }
    }

    /// The request that would run one, for cases in which it fails.
    #[must_use]
    pub fn request(containerd: &'a Containerd, handler: &str, spec: &PodSpec) -> Run {
        Self::prepare(containerd, handler, spec).0
    }

    /// The same, started, with the pod that it will make.
    #[must_use]
    pub fn requested(containerd: &'a Containerd, handler: &str, spec: &PodSpec) -> (Running, Self) {
        let (run, pod) = Self::prepare(containerd, handler, spec);
        (run.start(), pod)
    }

    /// The pod, once its id is known.
    #[must_use]
    pub fn named(mut self, id: String) -> Self {
        self.id = id;
        self
    }

    fn prepare(containerd: &'a Containerd, handler: &str, spec: &PodSpec) -> (Run, Self) {
        let folder = containerd.scratch().path().join(format!("pod-{}", spec.name));
        // It may be there from a pod of that name before.
        drop(std::fs::create_dir(&folder));
        let mut config = spec.config.clone();
        config["logDirectory"] = json!(folder);
        let config = containerd.scratch().file(&format!("pod-{}.json", spec.name), config.to_string());
        let run = cri(containerd, &format!("run-pod {handler} {config}"));
        (run, Self { containerd, id: String::new(), config, folder, made: Cell::new(0) })
    }

    /// A verb that takes an id, and more words.
    #[must_use]
    pub fn cri(&self, words: &str) -> Run {
        cri(self.containerd, words)
    }

    /// A verb whose standard input stays open: with a terminal the end of input is the end of everything.
    #[must_use]
    pub fn cri_on_terminal(&self, words: &str) -> Run {
        let fifo = self.folder.join("never-ending");
        let script = format!(
            "rm -f {fifo}; mkfifo {fifo}; exec {}/cri {} \"$@\" <>{fifo}",
            peers().display(),
            self.containerd.scratch().join("sock"),
            fifo = fifo.display(),
        );
        words.split_whitespace().fold(host(&script).arg("cri"), |run, word| run.arg(word))
    }

    /// Makes a container of busybox that runs a shell script; `more` is mixed into its configuration.
    #[must_use]
    pub fn create(&self, name: &str, script: &str, more: &Value) -> String {
        self.creating(name, script, more).ok().text()
    }

    /// The request that makes a container.
    #[must_use]
    pub fn creating(&self, name: &str, script: &str, more: &Value) -> Run {
        let count = self.made.get();
        self.made.set(count + 1);
        let mut config = json!({
            "metadata": { "name": name, "attempt": count },
            "image": { "image": image_name("busybox") },
            "command": ["sh", "-c", script],
            "logPath": format!("{name}.log"),
            "linux": {},
        });
        if let (Some(config), Some(more)) = (config.as_object_mut(), more.as_object()) {
            config.extend(more.clone());
        }
        let path = self.folder.join(format!("{name}-{count}.json"));
        drop(std::fs::write(&path, config.to_string()));
        self.cri("create").args(&[&self.id, &self.config, &path.to_string_lossy()])
    }

    /// Makes a container and starts it.
    pub fn start(&self, name: &str, script: &str, more: &Value) -> String {
        let id = self.create(name, script, more);
        self.cri(&format!("start {id}")).ok();
        id
    }

    /// Runs a script in a container that runs.
    #[must_use]
    pub fn exec(&self, container: &str, script: &str) -> Run {
        self.cri(&format!("exec-sync {container} sh -c")).arg(script)
    }

    /// What is known of a container.
    #[must_use]
    pub fn status(&self, container: &str) -> Value {
        let text = self.cri(&format!("status {container}")).ok().text();
        serde_json::from_str(&text).unwrap_or_default()
    }

    /// Waits for the end of a container; its exit code.
    #[must_use]
    pub fn exit_code(&self, container: &str) -> i64 {
        wait_for("the container's end", || {
            let status = self.status(container);
            (status["state"] == "CONTAINER_EXITED").then(|| status["exitCode"].as_i64().unwrap_or_default())
        })
    }

    /// What a container has logged, as the kubelet finds it.
    #[must_use]
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.join(format!("{name}.log"))).unwrap_or_default()
    }

    /// Waits until a container's log has this.
    pub fn logs(&self, name: &str, part: &str) {
        wait_for(&format!("{part:?} in the log of {name}"), || self.log(name).contains(part).then_some(()));
    }

    /// The pod's address.
    #[must_use]
    pub fn address(&self) -> String {
        let text = self.cri(&format!("pod-status {}", self.id)).ok().text();
        let status: Value = serde_json::from_str(&text).unwrap_or_default();
        status["network"]["ip"].as_str().unwrap_or_default().to_owned()
    }

    /// Stops and removes every pod that containerd knows, as a kubelet does with those that nobody wants.
    pub fn remove_all(containerd: &Containerd) {
        wait_for("no pods", || {
            let pods = cri(containerd, "pods").ok().text();
            for id in pods.lines().filter_map(|line| line.split_whitespace().next()) {
                // What fails is tried again, until nothing is listed.
                drop(cri(containerd, &format!("stop-pod {id}")).done());
                drop(cri(containerd, &format!("remove-pod {id}")).done());
            }
            pods.is_empty().then_some(())
        });
    }

    /// Orders the guest of the only pod, of [`Containerd::start_sabotaged`], to end its kernel (`panic`) or to stop its agent for good
    /// (`freeze`).
    ///
    /// # Panics
    /// When no guest takes it in time.
    pub fn order_the_only_one(word: &str) {
        wait_for("a guest that takes the order", || {
            run_folders().iter().find_map(|folder| given_order(folder, word).ok())
        });
    }

    /// The same of this pod.
    ///
    /// # Panics
    /// When its guest does not take it in time.
    pub fn order(&self, word: &str) {
        // The folder is named after the digest that names the shim's socket.
        let script = format!(
            "cat {}/io.containerd.runtime.v2.task/k8s.io/{}/bootstrap.json",
            self.containerd.scratch().join("state"),
            self.id
        );
        let bootstrap = host(&script).ok().text();
        wait_for("the guest to take the order", || {
            let mut folders = run_folders().into_iter();
            let folder = folders.find(|folder| {
                folder.file_name().is_some_and(|name| bootstrap.contains(&*name.to_string_lossy()))
            });
            given_order(&folder?, word).ok()
        });
    }

    /// Whether it is ready.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let done = self.cri(&format!("pod-status {}", self.id)).done();
        let status: Value = serde_json::from_str(&done.text()).unwrap_or_default();
        // The first state is the default one, which this form leaves out.
        done.code_is(0) && matches!(status["state"].as_str(), None | Some("SANDBOX_READY"))
    }

    /// Stops it and removes it.
    pub fn remove(self) {
        self.cri(&format!("stop-pod {}", self.id)).ok();
        self.cri(&format!("remove-pod {}", self.id)).ok();
    }
}
