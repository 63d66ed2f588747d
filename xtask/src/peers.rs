//! Programs of others that the cases need and Debian does not have, built from their Go modules. `go.sum` names every byte of them.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::cache::{self, Key};
use crate::command;

/// A Go module of ours that names them, and the groups of cases that need what it makes.
pub(crate) struct Module {
    name: &'static str,
    what: &'static str,
    /// The variable that tells the cases where the programs are.
    pub(crate) variable: &'static str,
    pub(crate) groups: &'static [&'static str],
    /// What decides the result, beside `go.mod` and `go.sum`.
    source: &'static str,
    packages: &'static [&'static str],
}

pub(crate) const MODULES: [Module; 2] = [
    Module {
        name: "peers",
        what: "containerd 2, a Docker engine and a CRI client",
        variable: "HYPER_TEST_PEERS",
        groups: &[
            "containerd2",
            "erofs",
            "crictl",
            "docker",
            "kubernetes",
            "kubernetes_faults",
            "kubernetes_many",
            "nerdctl",
            "tracing",
        ],
        source: "cri/main.go",
        packages: &["./cri", "tool"],
    },
    Module {
        name: "cluster",
        what: "a Kubernetes control plane and kubelet",
        variable: "HYPER_TEST_CLUSTER",
        groups: &["cluster"],
        source: "main.go",
        packages: &["."],
    },
];

/// A program of others that neither Debian nor a registry of packages has: its cases run where it is on the path.
pub(crate) struct OnPath {
    pub(crate) program: &'static str,
    /// The variable that tells the cases where it is.
    pub(crate) variable: &'static str,
    pub(crate) group: &'static str,
}

pub(crate) const ON_PATH: [OnPath; 2] = [
    OnPath { program: "crictl", variable: "HYPER_TEST_CRICTL", group: "crictl" },
    OnPath { program: "nerdctl", variable: "HYPER_TEST_NERDCTL", group: "nerdctl" },
];

impl Module {
    /// The folder with the programs in `bin`; `None` when this machine has no Go, or cannot reach the modules.
    pub(crate) fn make(&self) -> Result<Option<PathBuf>> {
        if !command::exists("go") {
            crate::say(format!("{}: no go here", self.name));
            return Ok(None);
        }
        let folder = cache::root().join("tests").join(self.name);
        let mut key = Key::new("peers 1");
        for source in ["go.mod", "go.sum", self.source] {
            key = key.file(&folder.join(source))?;
        }
        let mut is_reached = true;
        let made = cache::folder("peers", key, |making| {
            crate::say(format!("{}: building {}", self.name, self.what));
            let fetched = command::quiet(go()?.args(["mod", "download"]).current_dir(&folder));
            is_reached = fetched.is_ok();
            fetched?;
            let mut build = go()?;
            build.args(["build", "-trimpath", "-ldflags=-s -w", "-o"]).arg(making.join("bin/"));
            command::quiet(build.args(self.packages).current_dir(&folder))
        });
        match made {
            Ok(folder) => Ok(Some(folder)),
            Err(error) if !is_reached => {
                crate::say(format!("{}: {error:#}", self.name));
                Ok(None)
            }
            Err(error) => Err(error).with_context(|| format!("building {}", self.what)),
        }
    }
}

fn go() -> Result<Command> {
    let mut command = Command::new("go");
    command.env("CGO_ENABLED", "0").env("GOFLAGS", "-mod=readonly");
    Ok(command)
}
