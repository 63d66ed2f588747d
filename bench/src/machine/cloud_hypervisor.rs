//! One start of Cloud Hypervisor. The guest's kernel finds none of its devices, for it knows neither PCI nor ACPI: it has nothing to probe, and
//! its agent does not come up, so only the first user instruction can be compared.

use std::process::Command;

use anyhow::Result;
use hyper_vmm_spec::control::{LIFECYCLE_PORT, lifecycle};

use super::{CMDLINE, MEM_MIB, Parts, Start};

pub(crate) const PROGRAM: &str = "cloud-hypervisor";

/// Starts a machine, waits for its first process, ends it.
pub(crate) fn start(parts: &Parts) -> Result<Start> {
    let folder = tempfile::tempdir()?;
    let mut command = Command::new(PROGRAM);
    command.arg("--kernel").arg(&parts.kernel).arg("--initramfs").arg(&parts.initramfs);
    command.args(["--cmdline", &format!("{CMDLINE} reboot=t")]);
    command.args(["--cpus", "boot=1", "--memory", &format!("size={MEM_MIB}M")]);
    command.args(["--serial", "off", "--console", "off"]);
    command.args(["--debug-console", &format!("file=/dev/stdout,iobase={LIFECYCLE_PORT:#x}")]);
    command.args(["--balloon", "size=0,free_page_reporting=on"]);
    command.args(["--vsock", &format!("cid=3,socket={}", folder.path().join("vsock").display())]);
    super::marks::start(&mut command, (lifecycle::USER_SPACE, None))
}
