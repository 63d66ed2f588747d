//! One start of QEMU's microvm machine, as close to ours as its options come.

use std::process::Command;

use anyhow::Result;
use hyper_vmm_spec::control::{LIFECYCLE_PORT, lifecycle};

use super::{CMDLINE, MEM_MIB, Parts, Start};

pub(crate) const PROGRAM: &str = "qemu-system-x86_64";

/// Starts a machine, waits for its agent, ends it.
pub(crate) fn start(parts: &Parts) -> Result<Start> {
    let mut command = Command::new(PROGRAM);
    command.args([
        "-M",
        "microvm,acpi=off,rtc=off,pit=off,pic=off,x-option-roms=off",
        "-enable-kvm",
        "-cpu",
        "host",
        "-smp",
        "1",
    ]);
    command.args([
        "-m",
        &MEM_MIB.to_string(),
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    command.args(["-global", "virtio-mmio.force-legacy=false", "-serial", "null"]);
    command.arg("-kernel").arg(&parts.kernel).arg("-initrd").arg(&parts.initramfs);
    command.args(["-append", &format!("{CMDLINE} reboot=t")]);
    command.args([
        "-device",
        "vhost-vsock-device,guest-cid=3",
        "-device",
        "virtio-balloon-device,free-page-reporting=on",
    ]);
    command.args(["-device", "virtio-rng-device", "-chardev", "stdio,id=marks,signal=off"]);
    command.args(["-device", &format!("isa-debugcon,iobase={LIFECYCLE_PORT},chardev=marks")]);
    super::marks::start(&mut command, (lifecycle::USER_SPACE, Some(lifecycle::AGENT_READY)))
}
