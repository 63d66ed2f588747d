//! The bare start of a machine: the same kernel, initramfs, memory and devices under each VMM.
//!
//! Both ends of the measurement are the same too: the guest's first process and its agent each write one byte to an I/O port, which
//! hyper-vmm knows as its lifecycle device and QEMU and Cloud Hypervisor are given as a debug console. Firecracker has none: see there.

mod cloud_hypervisor;
mod firecracker;
mod marks;
mod qemu;
mod vmm;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::report::Report;
use crate::{Options, program};

/// Guest memory, MiB.
const MEM_MIB: u32 = 128;
/// Kernel arguments, as the product gives them; `reboot=` is each machine's own.
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
    /// Not waits: see [`program::Watch`].
    user_space_work_us: Option<u64>,
    agent_ready_work_us: Option<u64>,
    /// Processor time.
    jail_us: Option<u64>,
}

type Step = fn(&Start) -> Option<u64>;

const STEPS: [(&str, Step); 6] = [
    ("start of the VMM to its own first instruction", |start| start.main_us),
    ("start of the VMM to the request read", |start| start.spec_us),
    ("start of the VMM to the machine built", |start| start.built_us),
    ("start of the VMM to the guest entered", |start| start.entered_us),
    ("start of the VMM to the first user instruction", |start| start.user_space_us),
    ("start of the VMM to the agent ready", |start| start.agent_ready_us),
];

/// The same on the counting clock without waits.
const WORK: [(&str, Step); 2] = [
    ("start of the VMM to the first user instruction: instructions", |start| start.user_space_work_us),
    ("start of the VMM to the agent ready: instructions", |start| start.agent_ready_work_us),
];

/// Processor time of the VMM's jail, filters included.
const JAIL: &str = "jail of the VMM: processor time";
/// Its share of the start to the agent ready: of the instructions where they are counted, else of the time.
const JAIL_SHARE: &str = "jail of the VMM: share of its start";

/// What is started.
#[derive(Debug)]
struct Parts {
    vmm: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
}

/// Name, program and start of a VMM of others.
type Peer = (&'static str, &'static str, fn(&Parts) -> Result<Start>);

const PEERS: [Peer; 3] = [
    ("QEMU microvm", qemu::PROGRAM, qemu::start),
    ("Firecracker", firecracker::PROGRAM, firecracker::start),
    ("Cloud Hypervisor", cloud_hypervisor::PROGRAM, cloud_hypervisor::start),
];

/// Starts a machine under each VMM in turn, as often as is wanted.
pub(crate) fn measure(prefix: &Path, options: &Options, report: &mut Report) -> Result<()> {
    let parts = Parts {
        vmm: prefix.join("libexec/hyper/hyper-vmm"),
        kernel: prefix.join("share/hyper/vmlinux"),
        initramfs: prefix.join("share/hyper/initramfs.cpio"),
    };
    let peers: Vec<_> = PEERS.into_iter().filter(|(_, name, _)| program::on_path(name).is_some()).collect();
    for round in 0..options.runs + options.warm_up {
        program::settle();
        let mut starts = vec![("hyper-vmm", vmm::start(&parts).context("starting hyper-vmm")?)];
        for (contender, program, start) in &peers {
            program::settle();
            starts.push((contender, start(&parts).with_context(|| format!("starting {program}"))?));
        }
        if round < options.warm_up {
            continue;
        }
        let work = if report.facts.counts_instructions() { &WORK[..] } else { &[] };
        let all = STEPS.iter().map(|step| (step, "ms")).chain(work.iter().map(|step| (step, "million")));
        for ((name, step), unit) in all {
            for (contender, start) in &starts {
                if let Some(us) = step(start) {
                    report.add(name, unit, contender, program::thousandth(us));
                }
            }
        }
        for (contender, start) in &starts {
            if let (Some(jail), Some(all)) =
                (start.jail_us, start.agent_ready_work_us.or(start.agent_ready_us))
            {
                report.add(JAIL, "ms", contender, program::thousandth(jail));
                report.add(
                    JAIL_SHARE,
                    "%",
                    contender,
                    program::thousandth(jail) / program::thousandth(all) * 100.0,
                );
            }
        }
    }
    Ok(())
}
