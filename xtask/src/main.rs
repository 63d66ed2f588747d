//! House tasks: set-up, build, lab, fixtures, tests, house rules, measurements.
//!
//! `make` targets are one-liners onto these, and CI runs the same ones. What is slow is kept outside the clone
//! under the hash of its inputs (`cache`).

mod baseline;
mod bench;
mod bzimage;
mod cache;
mod cases;
mod command;
mod cpio;
mod deps;
mod fixtures;
mod fuzz;
mod kernel;
mod lab;
mod lab_parts;
mod peers;
mod product;
mod rootfs;
mod rules;
mod run;
mod sbom;
mod setup;
mod test;
mod tsc;

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

/// House tasks; `make` calls these.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing: Debian packages, the Rust target for static programs.
    Setup,
    /// Build everything that is shipped and put it in <target>/hyper.
    Build,
    /// Build the guest kernel.
    Kernel,
    /// Make the images that the tests use.
    Fixtures,
    /// Build the programs of others that the tests use and Debian does not have.
    Peers,
    /// Build, then run a container in a microVM: here, or in the lab when this host's KVM cannot.
    Run,
    /// Format, lints, house rules, unit tests, and the black-box cases in the lab.
    Test(test::Options),
    /// Clippy over everything.
    Lint,
    /// The house rules.
    Rules,
    /// The edges between our crates; source and licence of those of others.
    Deps,
    /// Drive the parsers of what guests, images and registries send with a fuzzer.
    Fuzz(fuzz::Options),
    /// Measure, in the lab, on both of its clocks.
    Bench(bench::Options),
    /// Instructions of a start and sizes of what is shipped, held against `bench/baseline.json`.
    Baseline(baseline::Options),
    /// Run a command in the lab machine, which has real KVM, and return its status.
    Lab(lab::Options),
}

fn main() -> ExitCode {
    match perform(Cli::parse().task) {
        Ok(code) => code,
        Err(error) => {
            say(format!("xtask: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn perform(task: Task) -> Result<ExitCode> {
    match task {
        Task::Setup => setup::run()?,
        Task::Build => {
            setup::run()?;
            say(format!("built {}", product::build()?.prefix.display()));
        }
        Task::Kernel => {
            setup::run()?;
            say(format!("built {}", kernel::build()?.display()));
        }
        Task::Fixtures => {
            setup::run()?;
            say(format!("made {}", fixtures::make()?.display()));
        }
        Task::Peers => {
            for module in &peers::MODULES {
                let folder = module.make()?.context("these programs need go and its modules")?;
                say(format!("built {}", folder.display()));
            }
        }
        Task::Test(options) => return test::run(&options),
        Task::Fuzz(options) => {
            setup::run()?;
            fuzz::run(&options)?;
        }
        Task::Bench(options) => bench::run(&options)?,
        Task::Baseline(options) => baseline::run(&options)?,
        Task::Lint => test::lint()?,
        Task::Rules => rules::run()?,
        Task::Deps => {
            deps::run()?;
            sbom::check()?;
        }
        Task::Run => return run::run(),
        Task::Lab(options) => return lab::run(&options).map(ExitCode::from),
    }
    Ok(ExitCode::SUCCESS)
}

/// One line of progress for the person who waits.
fn say(line: impl Display) {
    // A closed terminal is no reason to stop.
    drop(writeln!(std::io::stderr(), "{line}"));
}
