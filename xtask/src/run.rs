//! `make run`: a container in a microVM, on this host when its KVM is real, else inside the lab.

use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::command;
use crate::lab;
use crate::{fixtures, product, setup};

/// What the first container does.
const GREETING: &str = "echo \"Hello from $(uname -sr), in a microVM of its own: $(nproc) CPU, \
                        $(( $(sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo) / 1024 )) MiB\"";

/// Whether this host's KVM can run a stock kernel. Software KVM exists, and its processor has neither flag.
pub(crate) fn kvm_is_real() -> bool {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flagged = processor
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"));
    flagged && fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

/// Sets up, builds, and runs a busybox container.
pub(crate) fn run() -> Result<ExitCode> {
    setup::run()?;
    let product = product::build()?;
    let fixtures = fixtures::make()?;
    let hyper = product.hyper();
    let archive = fixtures.join("archives/busybox.tar");
    let script = format!(
        "'{hyper}' load -q -i '{archive}' && exec '{hyper}' run --rm --network none busybox sh -c '{greeting}'",
        hyper = hyper.display(),
        archive = archive.display(),
        greeting = GREETING.replace('\'', r"'\''"),
    );
    if kvm_is_real() {
        crate::say("run: on this host's KVM");
        let state = tempdir()?;
        let result = std::process::Command::new("bash")
            .args(["-c", &script])
            .env("HYPER_ROOT", state.join("data"))
            .env("HYPER_RUN", state.join("run"))
            .status()
            .context("starting bash");
        fs::remove_dir_all(&state).with_context(|| format!("removing {}", state.display()))?;
        let code = result?.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
        return Ok(ExitCode::from(code));
    }
    crate::say(
        "run: this host has no KVM that can run a stock kernel, so inside the lab machine (real KVM, emulated processor)",
    );
    let script = format!("export HYPER_TIMEOUT_SCALE=10; {script}");
    lab::run(&lab::Options::script(script, 600)).map(ExitCode::from)
}

fn tempdir() -> Result<std::path::PathBuf> {
    let path = command::text(std::process::Command::new("mktemp").args(["-d", "--tmpdir", "hyper.XXXXXX"]))?;
    Ok(path.trim().into())
}
