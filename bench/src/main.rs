//! `hyper bench`: hyper beside every other runtime and VMM that this machine has, in one run.
//!
//! Contenders take turns, so that what disturbs the machine disturbs all of them. What is measured, and what it cannot tell, is in
//! `docs/performance.md`.

mod containers;
mod facts;
mod html;
mod machine;
mod memory;
mod program;
mod report;
mod stats;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;

use crate::containers::{Bench, Contender};
use crate::report::Report;

/// Compare hyper with the runtimes and VMMs of this machine: start, exec, many at once, memory.
#[derive(Debug, Parser)]
#[command(name = "hyper bench", version, max_term_width = 110)]
struct Options {
    /// Image of the containers: it has `true` and `sleep`.
    #[arg(long, default_value = "busybox")]
    image: String,
    /// Runs that count, of each contender.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,
    /// Runs before them that do not.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=1_000))]
    warm_up: u32,
    /// How many containers are started at once; may be given again.
    #[arg(long = "at-once", value_name = "N", default_values_t = [10], value_parser = clap::value_parser!(u32).range(1..=1_000))]
    at_once: Vec<u32>,
    /// Idle containers over which memory is averaged.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    idle: u32,
    /// Only these measurements.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Measurement>,
    /// Write every sample to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a report with plots to this file; it needs no other.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// Docker's code for a wrong flag.
const MISUSED: u8 = 125;

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Measurement {
    /// Start of a VMM to its guest's first user instruction, and to a serving agent
    Boot,
    /// `run` to the exit of `true`
    Run,
    /// `exec` of `true` in a running container
    Exec,
    /// Several `run`s of `true` at once, until all have ended
    AtOnce,
    /// Memory of an idle container
    Memory,
}

impl Options {
    fn wants(&self, measurement: Measurement) -> bool {
        self.only.is_empty() || self.only.contains(&measurement)
    }
}

fn main() -> ExitCode {
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) if !error.use_stderr() => {
            // Help and version; a closed terminal is no reason for another status.
            drop(error.print());
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            complain(misuse(&error.to_string()));
            return ExitCode::from(MISUSED);
        }
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// One line for a person.
fn complain(what: impl std::fmt::Display) {
    drop(writeln!(std::io::stderr(), "hyper: {what}"));
}

/// What clap says of a wrong flag, without its usage, in one line.
fn misuse(said: &str) -> String {
    let lines = said.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:"));
    let words: Vec<_> = lines.filter(|line| !line.is_empty() && !line.starts_with("For more")).collect();
    format!("{}; see hyper bench --help", words.join(" ").trim_start_matches("error: "))
}

fn run(options: &Options) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the other runtimes need root here: run it with sudo");
    }
    let prefix = program::prefix()?;
    let facts = facts::gather(&prefix)?;
    let mut report = Report::new(facts, options.runs, options.warm_up);
    if options.wants(Measurement::Boot) {
        progress("boot");
        machine::measure(&prefix, options, &mut report)?;
    }
    let of_containers = [Measurement::Run, Measurement::Exec, Measurement::AtOnce, Measurement::Memory];
    if of_containers.iter().any(|measurement| options.wants(*measurement)) {
        progress("preparing the containers");
        let bench = Bench::prepare(&prefix, &options.image)?;
        measure_containers(&bench, options, &mut report)?;
    }
    std::io::stdout().write_all(report.table().as_bytes()).context("printing the table")?;
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = &options.html {
        std::fs::write(path, html::page(&report)).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn measure_containers(bench: &Bench, options: &Options, report: &mut Report) -> Result<()> {
    if options.wants(Measurement::Run) {
        progress("run");
        turns(bench, options, report, "run of `true`, start to exit", Contender::run)?;
    }
    if options.wants(Measurement::Exec) {
        progress("exec");
        let idle: Vec<_> =
            bench.contenders.iter().map(|contender| contender.idle()).collect::<Result<_>>()?;
        for round in 0..options.runs + options.warm_up {
            for (contender, container) in bench.contenders.iter().zip(&idle) {
                let ms = container.exec()?;
                if round >= options.warm_up {
                    report.add("exec of `true`, start to exit", "ms", contender.name(), ms);
                }
            }
        }
    }
    if options.wants(Measurement::AtOnce) {
        for &count in &options.at_once {
            progress("several at once");
            let name = format!("{count} at once, first start to last exit");
            turns(bench, options, report, &name, |contender| contender.run_at_once(count))?;
        }
    }
    if options.wants(Measurement::Memory) {
        progress("memory");
        memory::measure(bench, options.idle, report)?;
    }
    Ok(())
}

/// Each contender in turn, as often as is wanted.
fn turns(
    bench: &Bench,
    options: &Options,
    report: &mut Report,
    name: &str,
    measure: impl Fn(&Contender) -> Result<f64>,
) -> Result<()> {
    for round in 0..options.runs + options.warm_up {
        for contender in &bench.contenders {
            program::settle();
            let failed = || format!("{name}: {}", contender.name());
            let (ms, work) = if report.facts.counts_instructions() {
                program::at_work(|| measure(contender)).with_context(failed)?
            } else {
                (measure(contender).with_context(failed)?, None)
            };
            if round >= options.warm_up {
                report.add(name, "ms", contender.name(), ms);
                if let Some(work) = work {
                    let name = format!("{name}: instructions, what is left to the kernel included");
                    report.add(&name, "million", contender.name(), program::thousandth(work));
                }
            }
        }
    }
    Ok(())
}

/// What is under way, for somebody who watches.
fn progress(what: &str) {
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() {
        drop(writeln!(stderr, "hyper bench: {what} …"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_flag_is_one_line() {
        for (flags, part) in [
            (["--only", "nothing"], "possible values: boot, run, exec, at-once, memory"),
            (["--runs", "0"], "--runs"),
        ] {
            let error = Options::try_parse_from(["hyper bench"].into_iter().chain(flags)).unwrap_err();
            let line = misuse(&error.to_string());
            assert!(line.contains(part) && !line.contains('\n'), "{line}");
        }
    }
}
