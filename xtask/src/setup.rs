//! What this machine needs before anything else works: Debian packages and the Rust target for static programs.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};

use crate::command;

/// Packages, each with a file that shows it is there.
const PACKAGES: &[(&str, &str)] = &[
    ("bc", "/usr/bin/bc"),
    ("binutils", "/usr/bin/objcopy"),
    ("bison", "/usr/bin/bison"),
    ("ca-certificates", "/usr/sbin/update-ca-certificates"),
    ("containerd", "/usr/bin/containerd"),
    ("containernetworking-plugins", "/usr/lib/cni/bridge"),
    ("curl", "/usr/bin/curl"),
    ("docker.io", "/usr/sbin/dockerd"),
    ("e2fsprogs", "/sbin/mkfs.ext4"),
    ("erofs-utils", "/usr/bin/mkfs.erofs"),
    ("flex", "/usr/bin/flex"),
    ("g++", "/usr/bin/g++"),
    ("gcc", "/usr/bin/cc"),
    ("iperf3", "/usr/bin/iperf3"),
    ("iproute2", "/usr/bin/ss"),
    ("kmod", "/sbin/modprobe"),
    ("libc6-dev", "/usr/include/stdio.h"),
    ("libcap-ng-dev", "/usr/include/cap-ng.h"),
    ("libelf-dev", "/usr/include/libelf.h"),
    ("make", "/usr/bin/make"),
    ("nftables", "/usr/sbin/nft"),
    ("passt", "/usr/bin/pasta"),
    ("procps", "/usr/bin/pgrep"),
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
    ("runc", "/usr/sbin/runc"),
    ("strace", "/usr/bin/strace"),
    ("tmux", "/usr/bin/tmux"),
    ("xz-utils", "/usr/bin/xz"),
    ("zstd", "/usr/bin/zstd"),
];

/// What the agent and the lab's first process are built for.
pub(crate) const STATIC_TARGET: &str = "x86_64-unknown-linux-musl";

/// Installs what is missing; quick when nothing is.
pub(crate) fn run() -> Result<()> {
    if !Path::new("/usr/bin/apt-get").exists() {
        crate::say("setup: no apt-get here; expecting the programs that README lists to be installed");
    } else {
        let missing: Vec<&str> = PACKAGES
            .iter()
            .filter(|(_, file)| !Path::new(file).exists())
            .map(|(package, _)| *package)
            .collect();
        install(&missing)?;
    }
    add_static_target()
}

/// Installs Debian packages, saying which.
fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    crate::say(format!("setup: installing {}", packages.join(" ")));
    refresh_index()?;
    let mut command = as_root("env")?;
    command.args([
        "DEBIAN_FRONTEND=noninteractive",
        "apt-get",
        "install",
        "-y",
        "-q",
        "--no-install-recommends",
    ]);
    command::quiet(command.args(packages))
}

/// `apt-get update`, once per run: an index that is older than the mirror names packages that are gone.
pub(crate) fn refresh_index() -> Result<()> {
    static DONE: OnceLock<()> = OnceLock::new();
    if DONE.set(()).is_ok() {
        crate::say("setup: apt-get update");
        command::quiet(as_root("apt-get")?.args(["update", "-q"]))?;
    }
    Ok(())
}

/// A command that runs with root's rights.
pub(crate) fn as_root(program: &str) -> Result<Command> {
    let user = fs::metadata("/proc/self").context("reading /proc/self")?.uid();
    if user == 0 {
        return Ok(Command::new(program));
    }
    if !command::exists("sudo") {
        bail!("{program} needs root, and sudo is not installed");
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    Ok(command)
}

fn add_static_target() -> Result<()> {
    let sysroot = command::text(Command::new("rustc").args(["--print", "sysroot"]))?;
    if Path::new(sysroot.trim()).join("lib/rustlib").join(STATIC_TARGET).exists() {
        return Ok(());
    }
    if !command::exists("rustup") {
        bail!(
            "the Rust toolchain in {} lacks the target {STATIC_TARGET}, and rustup is not here",
            sysroot.trim()
        );
    }
    crate::say(format!("setup: adding the Rust target {STATIC_TARGET}"));
    command::quiet(Command::new("rustup").args(["target", "add", STATIC_TARGET]))
}
