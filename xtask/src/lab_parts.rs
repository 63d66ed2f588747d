//! What the lab machine boots: Debian's stock kernel, unpacked, and an initramfs with our first process.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cache::{self, Key};
use crate::command;
use crate::cpio::Archive;
use crate::product;
use crate::setup::{self, STATIC_TARGET};

/// The package that always names Debian's newest stock kernel.
const KERNEL_PACKAGE: &str = "linux-image-amd64";

/// Loaded before anything else runs; the rest is loaded by modprobe when first used.
const MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "9pnet_virtio",
    "9p",
    "overlay",
    "crc32c_generic",
    "ext4",
    "kvm_amd",
    "tun",
    "loop",
    "fuse",
    "vhost_net",
    "vhost_vsock",
    "bridge",
    "veth",
    "br_netfilter",
    "erofs",
    "nf_tables",
    "nft_ct",
    "nft_masq",
    "nft_chain_nat",
    "nft_compat",
    "nft_fib_inet",
    "nft_reject_inet",
    "xt_MASQUERADE",
    "dm_mod",
];

/// The files that QEMU is given.
pub(crate) struct Parts {
    pub(crate) vmlinux: PathBuf,
    pub(crate) initramfs: PathBuf,
    /// `…/lib/modules/<version>` of that kernel.
    pub(crate) modules: PathBuf,
}

/// Makes what is missing.
pub(crate) fn make() -> Result<Parts> {
    let kernel = cache::folder("lab-kernel", Key::new("lab-kernel 1").text(KERNEL_PACKAGE), make_kernel)?;
    let modules = only_entry(&kernel.join("lib/modules"))?;
    let init = build_init()?;
    let key =
        Key::new("lab-initramfs 1").text(&MODULES.join(" ")).text(&modules.to_string_lossy()).file(&init)?;
    let folder = cache::folder("lab-initramfs", key, |making| {
        let image = initramfs(&init, &modules)?;
        fs::write(making.join("initramfs.cpio"), image).context("writing the lab's initramfs")
    })?;
    Ok(Parts { vmlinux: kernel.join("vmlinux"), initramfs: folder.join("initramfs.cpio"), modules })
}

/// Downloads the kernel package and unpacks it here: nothing is installed on this machine for it.
fn make_kernel(making: &Path) -> Result<()> {
    crate::say(format!("lab: fetching {KERNEL_PACKAGE}"));
    setup::refresh_index()?;
    let depends = command::text(Command::new("apt-cache").args([
        "depends",
        "--no-recommends",
        "--no-suggests",
        "--important",
        KERNEL_PACKAGE,
    ]))?;
    let package = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .with_context(|| {
            format!("{KERNEL_PACKAGE} names no kernel; is the package index there (apt-get update)?")
        })?
        .to_owned();
    command::quiet(Command::new("apt-get").args(["download", "-q", &package]).current_dir(making))?;
    let archive = only_entry(making)?;
    command::quiet(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(making.join("package")))?;
    fs::remove_file(&archive).with_context(|| format!("removing {}", archive.display()))?;
    let package = making.join("package");
    let image = fs::read_dir(package.join("boot"))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
        .context("the kernel package has no vmlinuz")?;
    let image = fs::read(&image).with_context(|| format!("reading {}", image.display()))?;
    fs::write(making.join("vmlinux"), crate::bzimage::unpack(&image)?).context("writing the lab's kernel")?;
    fs::rename(package.join("lib"), making.join("lib")).context("keeping the lab's modules")?;
    cache::remove_dir(&package)?;
    let modules = only_entry(&making.join("lib/modules"))?;
    let version = modules.file_name().context("no kernel version")?.to_owned();
    command::quiet(Command::new("/sbin/depmod").arg("--basedir").arg(making).arg(version))
}

fn build_init() -> Result<PathBuf> {
    command::run(product::cargo()?.args([
        "build",
        "--quiet",
        "--release",
        "--package",
        "hyper-lab-init",
        "--target",
        STATIC_TARGET,
    ]))?;
    Ok(cache::target_dir()?.join(STATIC_TARGET).join("release/hyper-lab-init"))
}

fn initramfs(init: &Path, modules: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    for folder in ["dev", "proc", "sys", "top", "lower", "new", "modules"] {
        archive.directory(folder, 0o755)?;
    }
    archive.character("dev/console", 0o600, (5, 1))?;
    archive.file("init", 0o755, &fs::read(init).with_context(|| format!("reading {}", init.display()))?)?;
    let mut list = String::new();
    for path in module_order(modules)? {
        let name = path.file_name().context("module without a name")?.to_string_lossy().into_owned();
        let content = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        archive.file(&format!("modules/{name}"), 0o644, &content)?;
        list.push_str(&name);
        list.push('\n');
    }
    archive.file("modules/list", 0o644, list.as_bytes())?;
    Ok(archive.finish()?)
}

/// The modules and what they need, each after its needs.
fn module_order(modules: &Path) -> Result<Vec<PathBuf>> {
    let version = modules.file_name().context("no kernel version")?;
    // lib/modules/<version> is three levels below what modprobe wants.
    let base = modules.ancestors().nth(3).context("no module folder")?;
    let mut seen = BTreeSet::new();
    let mut order = Vec::new();
    for module in MODULES {
        let text = command::text(
            Command::new("/sbin/modprobe")
                .arg("--dirname")
                .arg(base)
                .arg("--set-version")
                .arg(version)
                .args(["--show-depends", module]),
        )?;
        for path in text.lines().filter_map(|line| line.strip_prefix("insmod ")) {
            let path = path.trim().to_owned();
            if seen.insert(path.clone()) {
                order.push(PathBuf::from(path));
            }
        }
    }
    Ok(order)
}

fn only_entry(folder: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let first = entries.next().with_context(|| format!("{} is empty", folder.display()))??;
    Ok(first.path())
}
