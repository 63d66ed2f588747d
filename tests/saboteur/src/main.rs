//! The first process of a guest whose agent dies or falls silent when a case says so, at any stage of a pod's life.
//!
//! As `/init` it makes a second process and becomes the agent. The second one waits on a port of its own for one word: `panic` ends the
//! guest's kernel, `freeze` stops the agent for good while the kernel and everything else in the guest go on.

use std::error::Error;
use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use rustix::mount::{MountFlags, mount};
use vsock::{VMADDR_CID_ANY, VsockListener};

/// Where orders come in; no port of the agent's.
const PORT: u32 = 9_000;
/// The longest order.
const MAX_ORDER: u64 = 16;
/// Where the second process keeps its file systems: the agent has not mounted any yet, and shall not meet these.
const PROC: &str = "/saboteur/proc";
const GROUPS: &str = "/saboteur/groups";
/// The agent, beside this program.
const AGENT: &str = "/agent";

fn main() -> ExitCode {
    let ended = match std::env::args().nth(1).as_deref() {
        Some("orders") => wait_for_order(),
        _ => become_agent(),
    };
    if let Err(error) = ended {
        drop(writeln!(std::io::stderr(), "saboteur: {error}"));
    }
    ExitCode::FAILURE
}

/// Returns only when that fails.
fn become_agent() -> Result<(), Box<dyn Error>> {
    for (kind, place) in [("proc", PROC), ("cgroup2", GROUPS)] {
        fs::create_dir_all(place)?;
        mount(kind, place, kind, MountFlags::empty(), None::<&CStr>)?;
    }
    Command::new("/init").arg("orders").spawn()?;
    Err(Command::new(AGENT).exec().into())
}

fn wait_for_order() -> Result<(), Box<dyn Error>> {
    // Opened before the agent changes what the paths mean.
    let mut trigger = File::options().write(true).open(format!("{PROC}/sysrq-trigger"))?;
    let group = format!("{GROUPS}/frozen");
    fs::create_dir(&group)?;
    let open = |name: &str| File::options().write(true).open(format!("{group}/{name}"));
    let (mut members, mut freeze) = (open("cgroup.procs")?, open("cgroup.freeze")?);
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, PORT)?;
    loop {
        let (stream, _) = listener.accept()?;
        let mut order = String::new();
        stream.take(MAX_ORDER).read_to_string(&mut order)?;
        match order.trim() {
            "panic" => trigger.write_all(b"c")?,
            "freeze" => {
                members.write_all(b"1")?;
                freeze.write_all(b"1")?;
            }
            other => drop(writeln!(std::io::stderr(), "saboteur: no such order: {other}")),
        }
    }
}
