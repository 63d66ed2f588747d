//! `crictl`, the client that administrators have, when it is on the path of those who run the cases.

use std::path::Path;

use crate::containerd::{Containerd, image_name};
use crate::given;
use crate::program::{Run, host};

/// A `crictl` for one containerd.
#[derive(Debug)]
pub struct Crictl<'a> {
    containerd: &'a Containerd,
    words: String,
}

impl<'a> Crictl<'a> {
    /// For this one.
    #[must_use]
    pub fn of(containerd: &'a Containerd) -> Self {
        let socket = format!("unix://{}", containerd.scratch().join("sock"));
        let config = containerd.scratch().file(
            "crictl.yaml",
            format!("runtime-endpoint: {socket}\nimage-endpoint: {socket}\ntimeout: 100\npull-image-on-create: false\n"),
        );
        Self { containerd, words: format!("{} --config {config}", given("HYPER_TEST_CRICTL").display()) }
    }

    /// `crictl` with words that are split at white space.
    #[must_use]
    pub fn run(&self, words: &str) -> Run {
        let script = format!("exec {} \"$@\"", self.words);
        words.split_whitespace().fold(host(&script).arg("crictl"), |run, word| run.arg(word))
    }

    /// The same on a terminal, with what is typed there.
    #[must_use]
    pub fn on_terminal(&self, words: &str, typed: &str) -> Run {
        let script = format!("exec script -qec \"{} {words}\" /dev/null", self.words);
        host(&script).stdin(typed)
    }

    /// Makes a pod out of a JSON text; its id.
    #[must_use]
    pub fn pod(&self, handler: &str, config: &str) -> (String, String) {
        let config = self.containerd.scratch().file("pod.json", config);
        (self.run(&format!("runp --runtime {handler} {config}")).ok().text(), config)
    }

    /// Makes and starts a container of busybox that runs a shell script; `more` are further fields of its configuration, each with a
    /// comma before it.
    #[must_use]
    pub fn start(&self, pod: &(String, String), name: &str, script: &str, more: &str) -> String {
        let (image, script) = (image_name("busybox"), serde_json::Value::from(script));
        let config = self.containerd.scratch().file(
            &format!("{name}.json"),
            format!(
                r#"{{"metadata":{{"name":"{name}"}},"image":{{"image":"{image}"}},"command":["sh","-c",{script}],"log_path":"{name}.log"{more}}}"#
            ),
        );
        let id = self.run(&format!("create {} {config} {}", pod.0, pod.1)).ok().text();
        self.run(&format!("start {id}")).ok();
        id
    }

    /// Where a pod's logs go.
    #[must_use]
    pub fn log_folder(&self) -> &Path {
        self.containerd.scratch().path()
    }
}
