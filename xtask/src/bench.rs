//! `cargo xtask bench`: `hyper bench` in the lab machine, on one of its clocks, with everything in that machine's memory.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::command;
use crate::lab;
use crate::{fixtures, product, setup};

/// Seconds for one run.
const LIMIT: u64 = 3600;
/// Memory of the lab machine: product, image and containers lie in it.
const MEMORY: &str = "10G";

/// Programs of others that are copied into that memory when this machine has them; runc it always has.
const CONTENDERS: [&str; 4] = ["runc", "crun", "firecracker", "cloud-hypervisor"];

/// How to measure.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// The ordinary clock, on which only ratios mean something, instead of the one that counts instructions.
    #[arg(long)]
    pub(crate) ordinary: bool,
    /// Take the product that is installed already instead of building it.
    #[arg(long)]
    pub(crate) prebuilt: bool,
    /// A folder for `bench.json` and `bench.html`.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) out: Option<PathBuf>,
    /// Flags of `hyper bench`.
    #[arg(last = true)]
    pub(crate) flags: Vec<String>,
}

/// Builds, measures, and prints the table.
pub(crate) fn run(options: &Options) -> Result<()> {
    setup::run()?;
    let product = if options.prebuilt { product::installed()? } else { product::build()? };
    let fixtures = fixtures::make()?;
    let clock = if options.ordinary { "ordinary" } else { "instructions" };
    // No run waits for this host's disk; on the instruction clock such a wait would be a random leap.
    let script = format!(
        "set -e; mkdir -p /run/bench; mount -t tmpfs -o size=80% none /run/bench; cp -rL '{prefix}/.' /run/bench/; \
         export PATH=/run/bench/programs:$PATH:/usr/sbin:/sbin TMPDIR=/run/bench HYPER_ROOT=/run/bench/state HYPER_RUN=/run/bench/run \
         HYPER_TIMEOUT_SCALE=10 HYPER_BENCH_CLOCK={clock}; mkdir /run/bench/programs; \
         cp {contenders} /run/bench/programs/; \
         /run/bench/bin/hyper load -q -i '{fixtures}/archives/busybox.tar' >/dev/null; \
         /run/bench/bin/hyper bench --json /lab/bench.json --html /lab/bench.html {flags}",
        prefix = product.prefix.display(),
        fixtures = fixtures.display(),
        contenders = CONTENDERS
            .iter()
            .filter_map(|name| Some(command::find(name)?.display().to_string()))
            .collect::<Vec<_>>()
            .join(" "),
        flags = options.flags.join(" "),
    );
    let share = match &options.out {
        Some(out) => {
            std::fs::create_dir_all(out).with_context(|| format!("creating {}", out.display()))?;
            Some(out.clone())
        }
        None => None,
    };
    let mut lab = lab::Options::script(script, LIMIT);
    lab.icount = !options.ordinary;
    lab.mem = MEMORY.to_owned();
    lab.share = share;
    let status = lab::run(&lab)?;
    if status != 0 {
        bail!("the measurement ended with status {status}");
    }
    Ok(())
}
