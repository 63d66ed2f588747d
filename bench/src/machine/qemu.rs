//! One start of QEMU's microvm machine, as close to ours as its options come.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

use anyhow::{Context, Result, bail};
use hyper_vmm_spec::control::{LIFECYCLE_PORT, lifecycle};

use super::{CMDLINE, MEM_MIB, Parts, Start};
use crate::program::{LIMIT, now_us};

/// Starts a machine, waits for its agent, ends it.
pub(crate) fn start(parts: &Parts) -> Result<Start> {
    let mut command = Command::new("qemu-system-x86_64");
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
    let forked_us = now_us();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .context("starting qemu-system-x86_64")?;
    let result = read_marks(&mut child, forked_us);
    child.kill().context("ending QEMU")?;
    child.wait().context("waiting for QEMU")?;
    result
}

fn read_marks(child: &mut Child, forked_us: u64) -> Result<Start> {
    let mut marks = child.stdout.take().context("QEMU has no output")?;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut byte = [0];
        while let Ok(1) = marks.read(&mut byte) {
            if sender.send((byte, now_us())).is_err() {
                break;
            }
        }
    });
    let mut start = Start::default();
    loop {
        match receiver.recv_timeout(LIMIT) {
            Ok(([lifecycle::USER_SPACE], at)) => start.user_space_us = Some(at.saturating_sub(forked_us)),
            Ok(([lifecycle::AGENT_READY], at)) => {
                start.agent_ready_us = Some(at.saturating_sub(forked_us));
                return Ok(start);
            }
            Ok(_) => {}
            Err(error) => bail!("QEMU's guest did not come up ({error}); it got as far as {start:?}"),
        }
    }
}
