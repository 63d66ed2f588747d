//! `bench-boot PREFIX RUNS WARM`: starts a machine RUNS + WARM times under each contender, interleaved, and prints medians.
//!
//! The contenders get the same kernel, initramfs, memory and devices. Both ends of the measurement are the same too: the
//! guest's first process and its agent each write one byte to an I/O port, which hyper-vmm knows as its lifecycle device
//! and QEMU is given as a debug console.

mod hyper;
mod qemu;
mod table;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::time::{ClockId, clock_gettime};

/// Guest memory, MiB.
const MEM_MIB: u32 = 128;
/// How long one start may take: ten times what the slowest contender needs in the lab.
const LIMIT: Duration = Duration::from_secs(120);
/// Kernel arguments of both, as the product gives them; `reboot=` is each machine's own.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check random.trust_cpu=on";

/// Steps of a start, microseconds after the fork; what a contender does not tell is absent.
#[derive(Debug, Clone, Copy, Default)]
struct Start {
    main_us: Option<u64>,
    spec_us: Option<u64>,
    built_us: Option<u64>,
    entered_us: Option<u64>,
    user_space_us: Option<u64>,
    agent_ready_us: Option<u64>,
}

/// What is started.
#[derive(Debug)]
struct Parts {
    vmm: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A closed terminal is no reason for another status.
            drop(writeln!(std::io::stderr(), "bench-boot: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [prefix, runs, warm] = arguments.as_slice() else {
        bail!("give the product's folder, the number of runs and the number of runs to drop");
    };
    let prefix = PathBuf::from(prefix);
    let runs: usize = runs.parse().context("number of runs")?;
    let warm: usize = warm.parse().context("number of runs to drop")?;
    let parts = Parts {
        vmm: prefix.join("libexec/hyper/hyper-vmm"),
        kernel: prefix.join("share/hyper/vmlinux"),
        initramfs: prefix.join("share/hyper/initramfs.cpio"),
    };
    let mut ours = Vec::new();
    let mut peers = Vec::new();
    for number in 0..runs + warm {
        let our = hyper::start(&parts).context("starting hyper-vmm")?;
        let peer = qemu::start(&parts).context("starting QEMU")?;
        if number >= warm {
            ours.push(our);
            peers.push(peer);
        }
    }
    let text = table::render(&ours, &peers);
    std::io::stdout().write_all(text.as_bytes()).context("printing the table")
}

/// `CLOCK_MONOTONIC`, which hyper-vmm's timeline uses too.
fn now_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or_default() * 1_000_000
        + u64::try_from(now.tv_nsec).unwrap_or_default() / 1000
}
