//! Fuzzing: builds `hyper-fuzz` with the compiler's coverage counters, and lets libFuzzer drive its targets, two at a time.
//!
//! What a target has learned is kept in the cache and is where the next run begins; `fuzz/corpus` is where the first one does. What it
//! finds is put into `fuzz/regressions/<target>`, where unit tests try it from then on.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, bail};

use crate::cache;
use crate::command;
use crate::product::{HOST_TARGET, cargo};

/// Seconds that each target is driven by `make test`.
pub(crate) const SECONDS: u64 = 60;
/// At a time.
const LANES: usize = 2;
/// Longest input, bytes.
const MOST_BYTES: usize = 64 << 10;
/// Seconds that one input may take, and MiB that the program may.
const INPUT_SECONDS: u64 = 20;
const INPUT_MIB: u64 = 1536;
/// What the compiler adds: a counter for each edge, and a note of each comparison.
const COVERAGE: &str = "['-Cpasses=sancov-module', '-Cllvm-args=-sanitizer-coverage-level=4', \
    '-Cllvm-args=-sanitizer-coverage-inline-8bit-counters', '-Cllvm-args=-sanitizer-coverage-pc-table', \
    '-Cllvm-args=-sanitizer-coverage-trace-compares', '-Clinker=cc', '--cfg=fuzzing']";

/// What to drive.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Targets; all when none is given.
    targets: Vec<String>,
    /// Seconds for each.
    #[arg(long, default_value_t = SECONDS)]
    seconds: u64,
}

/// As `make test` does it.
pub(crate) fn in_short() -> Result<()> {
    run(&Options { targets: Vec::new(), seconds: SECONDS })
}

/// Drives the targets; fails when one of them found something.
pub(crate) fn run(options: &Options) -> Result<()> {
    let all = targets()?;
    if let Some(unknown) = options.targets.iter().find(|name| !all.contains(name)) {
        bail!("{unknown} is no target: there are {}", all.join(", "));
    }
    let chosen = if options.targets.is_empty() { all } else { options.targets.clone() };
    let program = build()?;
    let queue = Mutex::new(VecDeque::from(chosen));
    let found = Mutex::new(Vec::new());
    thread::scope(|scope| {
        let lanes: Vec<_> = (0..LANES)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    loop {
                        let next =
                            queue.lock().map_err(|_| anyhow::anyhow!("another lane broke"))?.pop_front();
                        let Some(target) = next else { return Ok(()) };
                        if let Some(what) = drive(&program, &target, options)? {
                            found.lock().map_err(|_| anyhow::anyhow!("another lane broke"))?.push(what);
                        }
                    }
                })
            })
            .collect();
        for lane in lanes {
            lane.join().map_err(|_| anyhow::anyhow!("a lane broke"))??;
        }
        Ok::<_, anyhow::Error>(())
    })?;
    let found = found.into_inner().unwrap_or_default();
    if found.is_empty() { Ok(()) } else { bail!("{}", found.join("\n")) }
}

/// The targets are the folders of beginnings; unit tests hold them against the program.
fn targets() -> Result<Vec<String>> {
    let folder = cache::root().join("fuzz/corpus");
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    Ok(names)
}

fn build() -> Result<PathBuf> {
    let mut build = cargo()?;
    build.args(["build", "--quiet", "--profile", "fuzz", "--package", "hyper-fuzz", "--features", "driver"]);
    build.args(["--target", HOST_TARGET, "--config"]);
    build.arg(format!("target.{HOST_TARGET}.rustflags={COVERAGE}"));
    command::run(&mut build)?;
    Ok(cache::target_dir()?.join(HOST_TARGET).join("fuzz/hyper-fuzz"))
}

/// Drives one target; what it found, if anything.
fn drive(program: &Path, target: &str, options: &Options) -> Result<Option<String>> {
    let learned = cache::dir()?.join("fuzz").join(target);
    let beginnings = cache::root().join("fuzz/corpus").join(target);
    let regressions = cache::root().join("fuzz/regressions").join(target);
    for folder in [&learned, &regressions] {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    }
    let log = cache::dir()?.join("fuzz").join(format!("{target}.log"));
    let mut fuzz = Command::new(program);
    fuzz.env("HYPER_FUZZ_TARGET", target)
        .arg(format!("-timeout={INPUT_SECONDS}"))
        .arg(format!("-rss_limit_mb={INPUT_MIB}"))
        .arg(format!("-max_total_time={}", options.seconds))
        .arg(format!("-max_len={MOST_BYTES}"))
        .arg(format!("-artifact_prefix={}/", regressions.display()))
        .arg("-print_final_stats=1")
        .args([&learned, &beginnings, &regressions]);
    let ended = logged(&mut fuzz, &log)?;
    let text = String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()).into_owned();
    // Nothing was found, so nothing is there to be kept.
    drop(fs::remove_dir(&regressions));
    if !ended {
        let tail: Vec<&str> = text.lines().rev().take(40).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        return Ok(Some(format!("{target} found something, and ends with\n{}", tail.join("\n"))));
    }
    let runs = text.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    let reached = text.lines().rev().find_map(|line| line.split_once(" cov: ")).map(|(_, rest)| rest);
    let reached = reached.and_then(|rest| rest.split(' ').next());
    let (Some(runs), Some(reached)) = (runs, reached) else {
        bail!("{target} ran, but does not say how far: see {}", log.display());
    };
    crate::say(format!(
        "fuzz: {target}: {} inputs in {} s, {reached} edges, nothing found",
        runs.trim(),
        options.seconds
    ));
    Ok(None)
}

/// Whether the program ended well.
fn logged(command: &mut Command, log: &Path) -> Result<bool> {
    let out = File::create(log).with_context(|| format!("creating {}", log.display()))?;
    let err = out.try_clone().context("sharing the log")?;
    let status = command.stdin(Stdio::null()).stdout(out).stderr(err).status();
    Ok(status.context("starting the fuzzer")?.success())
}
