//! Everything that is shipped, built and put where `hyper` looks for its parts.
//!
//! ```text
//! <target>/hyper/bin/{hyper,containerd-shim-hyper-v2}
//!                libexec/hyper/{hyper-vmm,hyper-fs,hyper-bench}
//!                share/hyper/{vmlinux,initramfs.cpio,sbom.cdx.json}
//! ```

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::cache;
use crate::command;
use crate::setup::STATIC_TARGET;
use crate::{kernel, rootfs, sbom};

/// Packages with programs of the host.
pub(crate) const HOST_PACKAGES: [&str; 5] =
    ["hyper-cli", "hyper-shim", VMM, "hyper-fileserver", "hyper-bench"];
/// Started for each sandbox, so it has the C library in it, and is still loaded at a random address: to find and load the library's files
/// takes longer than to make the jail.
const VMM: &str = "hyper-vmm";
pub(crate) const HOST_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Built alone: it has no standard library, and panics of its profile must not unwind.
pub(crate) const RUDE_GUEST: &str = "hyper-rude-guest";

/// Where the parts are after a build.
pub(crate) struct Product {
    pub(crate) prefix: PathBuf,
}

impl Product {
    pub(crate) fn hyper(&self) -> PathBuf {
        self.prefix.join("bin/hyper")
    }
}

/// What the last build left.
pub(crate) fn installed() -> Result<Product> {
    let prefix = cache::target_dir()?.join("hyper");
    anyhow::ensure!(prefix.join("bin/hyper").is_file(), "nothing is installed in {}", prefix.display());
    Ok(Product { prefix })
}

/// Builds what has changed and installs it.
pub(crate) fn build() -> Result<Product> {
    let vmlinux = kernel::build()?;
    let target = cache::target_dir()?;
    crate::say("build: programs");
    let mut host = cargo()?;
    host.args(["build", "--release"]);
    for package in HOST_PACKAGES.into_iter().filter(|package| *package != VMM) {
        host.args(["--package", package]);
    }
    command::run(&mut host)?;
    let mut vmm = cargo()?;
    vmm.args(["build", "--release", "--package", VMM, "--target", HOST_TARGET, "--config"]);
    vmm.arg(format!("target.{HOST_TARGET}.rustflags=['-C', 'target-feature=+crt-static']"));
    command::run(&mut vmm)?;
    let initramfs = rootfs::build(&static_program("hyper-agent")?)?;
    let bill = target.join("sbom.cdx.json");
    sbom::write(&bill, &vmlinux)?;

    let prefix = target.join("hyper");
    let _lock = cache::lock("install")?;
    let release = target.join("release");
    for (from, to) in [
        (release.join("hyper"), "bin/hyper"),
        (release.join("containerd-shim-hyper-v2"), "bin/containerd-shim-hyper-v2"),
        (target.join(HOST_TARGET).join("release").join(VMM), "libexec/hyper/hyper-vmm"),
        (release.join("hyper-fs"), "libexec/hyper/hyper-fs"),
        (release.join("hyper-bench"), "libexec/hyper/hyper-bench"),
        (vmlinux, "share/hyper/vmlinux"),
        (initramfs, "share/hyper/initramfs.cpio"),
        (bill, "share/hyper/sbom.cdx.json"),
    ] {
        install_changed(&from, &prefix.join(to))?;
    }
    Ok(Product { prefix })
}

/// An initramfs whose first program ends or stops the agent when it is told to: for the cases alone, nothing that is shipped.
pub(crate) fn sabotaged_initramfs() -> Result<PathBuf> {
    rootfs::sabotaged(&static_program("hyper-agent")?, &static_program("hyper-saboteur")?)
}

/// A program that stands in for hyper-vmm and tries to get out of its jail: for the cases alone, nothing that is shipped.
pub(crate) fn stand_in() -> Result<PathBuf> {
    command::run(cargo()?.args(["build", "--release", "--package", "hyper-stand-in"]))?;
    Ok(cache::target_dir()?.join("release/hyper-stand-in"))
}

/// A program for bare metal that boots in place of the guest's kernel and misbehaves: for the cases alone, nothing that is shipped.
pub(crate) fn rude_guest() -> Result<PathBuf> {
    command::run(cargo()?.args(["build", "--release", "--package", RUDE_GUEST, "--features", "bare"]))?;
    Ok(cache::target_dir()?.join("release").join(RUDE_GUEST))
}

/// Builds a program of the guest.
fn static_program(package: &str) -> Result<PathBuf> {
    let arguments = ["build", "--release", "--package", package, "--target", STATIC_TARGET];
    command::run(cargo()?.args(arguments))?;
    Ok(cache::target_dir()?.join(STATIC_TARGET).join("release").join(package))
}

/// Cargo in this clone, with the target folder that we look in.
pub(crate) fn cargo() -> Result<Command> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.env("CARGO_TARGET_DIR", cache::target_dir()?).current_dir(cache::root());
    Ok(command)
}

fn install_changed(from: &Path, to: &Path) -> Result<()> {
    let same = std::fs::read(to).is_ok_and(|old| std::fs::read(from).is_ok_and(|new| old == new));
    if same { Ok(()) } else { cache::install(from, to) }
}
