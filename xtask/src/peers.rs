//! Programs of others that the cases need and Debian does not have, built from their Go modules: containerd 2 with its `ctr`, a
//! Docker engine that knows runtimes of containerd, and a client of the Container Runtime Interface. `go.sum` names every byte of them.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::cache::{self, Key};
use crate::command;

/// Where the module is.
const MODULE: &str = "tests/peers";
/// What decides the result.
const SOURCES: [&str; 3] = ["go.mod", "go.sum", "cri/main.go"];

/// The folder with the programs; `None` when this machine has no Go, or cannot reach the modules.
pub(crate) fn make() -> Result<Option<PathBuf>> {
    if !command::exists("go") {
        crate::say("peers: no go here");
        return Ok(None);
    }
    let module = cache::root().join(MODULE);
    let mut key = Key::new("peers 1");
    for source in SOURCES {
        key = key.file(&module.join(source))?;
    }
    let mut is_reached = true;
    let made = cache::folder("peers", key, |making| {
        crate::say("peers: building containerd 2, a Docker engine and a CRI client");
        let fetched = command::quiet(go()?.args(["mod", "download"]).current_dir(&module));
        is_reached = fetched.is_ok();
        fetched?;
        let mut build = go()?;
        build.args(["build", "-trimpath", "-ldflags=-s -w", "-o"]).arg(making.join("bin/"));
        command::quiet(build.args(["./cri", "tool"]).current_dir(&module))
    });
    match made {
        Ok(folder) => Ok(Some(folder)),
        Err(error) if !is_reached => {
            crate::say(format!("peers: {error:#}"));
            Ok(None)
        }
        Err(error) => Err(error).context("building the peers"),
    }
}

fn go() -> Result<Command> {
    let mut command = Command::new("go");
    command.env("CGO_ENABLED", "0").env("GOFLAGS", "-mod=readonly");
    Ok(command)
}
