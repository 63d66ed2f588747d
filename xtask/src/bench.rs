//! `cargo xtask bench boot`: time from process start to agent ready, by phase, beside QEMU's microvm, on both clocks.

use anyhow::{Result, bail};

use crate::lab;
use crate::product::cargo;
use crate::{cache, command, product, setup};

/// Seconds for one table.
const LIMIT: u64 = 1800;

/// What to measure.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// What to measure: `boot`.
    #[arg(value_parser = ["boot"])]
    pub(crate) what: String,
    /// Starts that count, per contender and clock.
    #[arg(long, default_value_t = 5)]
    pub(crate) runs: u32,
    /// Take the product that is installed already instead of building it.
    #[arg(long)]
    pub(crate) prebuilt: bool,
}

/// Builds, and prints one table per clock.
pub(crate) fn run(options: &Options) -> Result<()> {
    setup::run()?;
    let product = if options.prebuilt { product::installed()? } else { product::build()? };
    command::run(cargo()?.args(["build", "--quiet", "--release", "--package", "hyper-bench"]))?;
    let program = cache::target_dir()?.join("release/bench-boot");
    // Everything lies in the machine's memory, so that no run waits for this host's disk.
    let script = format!(
        "set -e; mkdir -p /run/bench; cp -rL '{}/.' '{}' /run/bench/; export TMPDIR=/run/bench; /run/bench/bench-boot /run/bench {} 2",
        product.prefix.display(),
        program.display(),
        options.runs,
    );
    for (icount, title) in [
        (false, "ordinary clock, ms (emulated processor: only the ratio of the columns means something)"),
        (true, "instruction clock, millions of instructions of host and guest together (1 ms = 1 M)"),
    ] {
        crate::say(format!(
            "\nboot, {title}; 1 vCPU, 128 MiB, same kernel and initramfs, median of {}",
            options.runs
        ));
        let status = lab::run(&lab::Options { icount, ..lab::Options::script(script.clone(), LIMIT) })?;
        if status != 0 {
            bail!("the measurement ended with status {status}");
        }
    }
    Ok(())
}
