//! `make test`: format, lints, house rules, unit tests, the fuzz targets for a minute each, the black-box cases on a real KVM, then the figures that must not get worse.
//!
//! Nothing is skipped silently: every step runs even when one before it failed, every case ends up as passed or failed,
//! and the last line counts them.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::cases::{self, Tally};
use crate::product::cargo;
use crate::{baseline, command, fixtures, fuzz, product, rules, sbom, setup};

/// What to run.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only lab cases whose names contain one of these; all when none is given.
    pub(crate) filter: Vec<String>,
    /// Only the lab cases.
    #[arg(long)]
    pub(crate) lab_only: bool,
    /// Only the cases in `tests/trial.txt`.
    #[arg(long)]
    pub(crate) trial: bool,
    /// Lab machines at a time.
    #[arg(long, default_value_t = 2)]
    pub(crate) jobs: usize,
    /// Take the product that is installed already instead of building it.
    #[arg(long)]
    pub(crate) prebuilt: bool,
    /// Run the cases on this host's own KVM, as root; they change its network and kill its virtual machines.
    #[arg(long)]
    pub(crate) here: bool,
}

/// Runs everything and prints the count.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    setup::run()?;
    let mut failed_steps = Vec::new();
    let mut units = Tally::default();
    if !options.lab_only {
        for (name, step) in STEPS {
            crate::say(format!("test: {name}"));
            if let Err(error) = step() {
                crate::say(format!("test: {name} failed: {error:#}"));
                failed_steps.push(*name);
            }
        }
        crate::say("test: unit tests");
        units = unit_tests()?;
    }
    if !options.lab_only {
        crate::say("test: fuzz targets");
        if let Err(error) = fuzz::in_short() {
            crate::say(format!("test: fuzz targets failed: {error:#}"));
            failed_steps.push("fuzz targets");
        }
    }
    let product = if options.prebuilt { product::installed()? } else { product::build()? };
    let fixtures = fixtures::make()?;
    let sabotaged = product::sabotaged_initramfs()?;
    let stand_in = product::stand_in()?;
    let rude_guest = product::rude_guest()?;
    let inputs = cases::Inputs {
        product: &product,
        fixtures: &fixtures,
        sabotaged: &sabotaged,
        stand_in: &stand_in,
        rude_guest: &rude_guest,
    };
    let cases = cases::run(options, &inputs)?;
    // Whoever asks for some cases asks for no figures; and on this host's own KVM there is no clock that counts.
    if options.filter.is_empty() && !options.lab_only && !options.trial && !options.here {
        crate::say("test: baseline");
        if let Err(error) = baseline::run(&baseline::Options { prebuilt: true, ratchet: false }) {
            crate::say(format!("test: baseline failed: {error:#}"));
            failed_steps.push("baseline");
        }
    }
    let passed = units.passed + cases.passed;
    let failed = units.failed + cases.failed + failed_steps.len();
    crate::say(format!(
        "{} unit tests, {} lab cases run, {} lab cases failed, {} on trial and not run (cargo xtask test --lab-only --trial){}{}{}",
        units.passed + units.failed,
        cases.passed + cases.failed,
        cases.failed,
        cases.on_trial,
        match cases.without_peers {
            0 => String::new(),
            count => format!(", {count} not run for want of go or its modules"),
        },
        match cases.not_on_path {
            0 => String::new(),
            count => format!(", {count} not run for want of crictl or nerdctl on the path"),
        },
        if failed_steps.is_empty() {
            String::new()
        } else {
            format!("; failed steps: {}", failed_steps.join(", "))
        },
    ));
    crate::say(format!("{passed} passed, {failed} failed"));
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

type Step = fn() -> Result<()>;

const STEPS: &[(&str, Step)] =
    &[("format", format), ("lints", lint), ("house rules", rules::run), ("packages of others", sbom::check)];

fn format() -> Result<()> {
    command::run(cargo()?.args(["fmt", "--all", "--check"]))
}

/// Clippy over everything, the cases included.
pub(crate) fn lint() -> Result<()> {
    command::run(cargo()?.args([
        "clippy",
        "--quiet",
        "--workspace",
        "--all-targets",
        "--",
        "--deny",
        "warnings",
    ]))?;
    command::run(
        cargo()?
            .args(["clippy", "--quiet", "--package", "hyper-tests", "--test", "cases"])
            .args(["--", "--deny", "warnings"]),
    )?;
    // Left out above: it needs a profile whose panics do not unwind.
    command::run(
        cargo()?
            .args(["clippy", "--quiet", "--release", "--package", product::RUDE_GUEST, "--features", "bare"])
            .args(["--", "--deny", "warnings"]),
    )
}

/// Runs the unit tests and adds up cargo's own counts.
fn unit_tests() -> Result<Tally> {
    let mut command: Command = cargo()?;
    let output = command
        .args(["test", "--workspace", "--no-fail-fast", "--quiet"])
        .output()
        .context("starting cargo test")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut tally = Tally::default();
    for line in text.lines().filter_map(|line| line.strip_prefix("test result: ")) {
        tally.passed += count(line, "passed");
        // What is ignored did not pass.
        tally.failed += count(line, "failed") + count(line, "ignored");
    }
    if !output.status.success() {
        crate::say(format!("{text}{}", String::from_utf8_lossy(&output.stderr)));
        tally.failed = tally.failed.max(1);
    }
    Ok(tally)
}

/// The number before a word in `ok. 3 passed; 0 failed; …`.
fn count(line: &str, word: &str) -> usize {
    let words: Vec<_> = line.split([' ', ';']).filter(|word| !word.is_empty()).collect();
    words
        .windows(2)
        .find_map(|pair| match pair {
            [number, found] if *found == word => number.parse().ok(),
            _ => None,
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn cargos_counts_are_read() {
        let line = "FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        assert_eq!(super::count(line, "passed"), 12);
        assert_eq!(super::count(line, "failed"), 3);
        assert_eq!(super::count(line, "ignored"), 1);
    }
}
