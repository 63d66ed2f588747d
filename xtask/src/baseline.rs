//! `cargo xtask baseline`: what a start costs and how large the product is, held against `bench/baseline.json`. Only figures that do not
//! depend on the machine that this runs on: instructions on the lab's counting clock, and lengths of files.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::product::{self, Product};
use crate::{bench, cache};

/// The figures, by name, as they are to be at most, and the lab's kernel that they were measured on.
const FILE: &str = "bench/baseline.json";
/// What names of instructions end with; those of another kernel say nothing.
const MILLION: &str = ", million";
/// What a figure may be above its baseline: samples differ by less than a hundredth from each other.
const TOLERANCE: f64 = 1.02;
/// Below this part of its baseline a figure has improved for good.
const IMPROVED: f64 = 0.98;
/// How the measurement is made.
const FLAGS: [&str; 6] = ["--only", "boot,run", "--runs", "3", "--warm-up", "2"];
/// What is measured of whom: part of the measurement's name, contender.
const WORK: [(&str, &str); 3] = [
    ("agent ready: instructions", "hyper-vmm"),
    ("run of `true`, start to exit: instructions", "hyper, booted"),
    ("run of `true`, start to exit: instructions", "hyper, template"),
];
/// What is shipped.
const SHIPPED: [&str; 6] = [
    "bin/containerd-shim-hyper-v2",
    "bin/hyper",
    "libexec/hyper/hyper-fs",
    "libexec/hyper/hyper-vmm",
    "share/hyper/initramfs.cpio",
    "share/hyper/vmlinux",
];

/// How to compare.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Take the product that is installed already instead of building it.
    #[arg(long)]
    pub(crate) prebuilt: bool,
    /// Write what has become better to the baseline; what has become worse stays there as it is.
    #[arg(long)]
    pub(crate) ratchet: bool,
}

type Figures = BTreeMap<String, f64>;

/// What is in the file.
#[derive(Debug, Default, PartialEq)]
struct Baseline {
    kernel: String,
    figures: Figures,
}

impl Baseline {
    fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).with_context(|| format!("reading {FILE}"))?;
        let all: Value = serde_json::from_slice(&text).with_context(|| format!("reading {FILE}"))?;
        let kernel =
            all.get("kernel").and_then(Value::as_str).with_context(|| format!("{FILE} names no kernel"))?;
        let figures = all.get("figures").and_then(Value::as_object);
        let figures = figures.with_context(|| format!("{FILE} has no figures"))?;
        let figures = figures.iter().filter_map(|(name, figure)| Some((name.clone(), figure.as_f64()?)));
        Ok(Self { kernel: kernel.to_owned(), figures: figures.collect() })
    }

    fn write(&self, path: &Path) -> Result<()> {
        let all = json!({ "kernel": self.kernel, "figures": self.figures });
        let text = serde_json::to_string_pretty(&all)? + "\n";
        std::fs::write(path, text).with_context(|| format!("writing {FILE}"))
    }

    /// Without the figures that cannot be compared with those of a kernel.
    fn comparable(mut self, kernel: &str) -> Self {
        if self.kernel != kernel {
            crate::say(format!(
                "baseline: instructions are those of {}, and not compared: the lab has {kernel} now",
                self.kernel
            ));
            self.figures.retain(|name, _| !name.ends_with(MILLION));
        }
        self
    }
}

/// Measures and compares.
pub(crate) fn run(options: &Options) -> Result<()> {
    let product = if options.prebuilt { product::installed()? } else { product::build()? };
    let path = cache::root().join(FILE);
    let baseline =
        if options.ratchet && !path.exists() { Baseline::default() } else { Baseline::read(&path)? };
    let found = measure(&product)?;
    let baseline = baseline.comparable(&found.kernel);
    for (name, figure) in &found.figures {
        let of = baseline.figures.get(name).map_or_else(String::new, |most| format!(" (baseline {most})"));
        crate::say(format!("baseline: {name}: {figure}{of}"));
    }
    if options.ratchet {
        let least = |(name, figure): (String, f64)| {
            let most = baseline.figures.get(&name).map_or(figure, |most| most.min(figure));
            (name, most)
        };
        let figures = found.figures.into_iter().map(least).collect();
        return Baseline { kernel: found.kernel, figures }.write(&path);
    }
    let is_lacking = |name: &str| name.ends_with(MILLION) && baseline.kernel != found.kernel;
    let compared: Figures = found.figures.into_iter().filter(|(name, _)| !is_lacking(name)).collect();
    judge(&baseline.figures, &compared)
}

fn measure(product: &Product) -> Result<Baseline> {
    let folder = cache::dir()?.join("baseline");
    let options = bench::Options {
        ordinary: false,
        prebuilt: true,
        out: Some(folder.clone()),
        flags: FLAGS.map(str::to_owned).to_vec(),
    };
    // What was measured before must not be taken for this.
    drop(std::fs::remove_file(folder.join("bench.json")));
    bench::run(&options)?;
    let report: Value = serde_json::from_slice(&std::fs::read(folder.join("bench.json"))?)?;
    let kernel =
        report.pointer("/facts/kernel").and_then(Value::as_str).context("a report without a kernel")?;
    let mut figures = work(&report)?;
    for part in SHIPPED {
        figures.insert(format!("{part}, bytes"), length(&product.prefix.join(part))?);
    }
    Ok(Baseline { kernel: kernel.to_owned(), figures })
}

#[expect(clippy::cast_precision_loss, reason = "no file of ours has 2^52 bytes")]
fn length(path: &Path) -> Result<f64> {
    let about = std::fs::metadata(path).with_context(|| format!("looking at {}", path.display()))?;
    Ok(about.len() as f64)
}

/// The medians that count, millions.
fn work(report: &Value) -> Result<Figures> {
    let all =
        report.get("measurements").and_then(Value::as_array).context("a report without measurements")?;
    let mut figures = Figures::new();
    for (part, contender) in WORK {
        let samples = all
            .iter()
            .filter(|one| one.get("name").and_then(Value::as_str).is_some_and(|name| name.contains(part)))
            .flat_map(|one| one.get("contenders").and_then(Value::as_array).into_iter().flatten())
            .find(|one| one.get("contender").and_then(Value::as_str) == Some(contender))
            .and_then(|one| one.get("samples").and_then(Value::as_array))
            .with_context(|| format!("{part} of {contender} was not measured"))?;
        let mut samples: Vec<f64> = samples.iter().filter_map(Value::as_f64).collect();
        samples.sort_by(f64::total_cmp);
        let median = samples.get(samples.len() / 2).context("a measurement without samples")?;
        figures.insert(format!("{part}, {contender}{MILLION}"), (median * 10.0).round() / 10.0);
    }
    Ok(figures)
}

/// Fails when a figure is worse than its baseline, or has none.
fn judge(baseline: &Figures, found: &Figures) -> Result<()> {
    let mut worse = Vec::new();
    for (name, figure) in found {
        match baseline.get(name) {
            None => worse.push(format!("{name} has no baseline")),
            Some(most) if *figure > most * TOLERANCE => worse.push(format!("{name}: {figure}, not {most}")),
            Some(most) if *figure < most * IMPROVED => {
                crate::say(format!(
                    "baseline: {name} is better: keep it with `cargo xtask baseline --ratchet`"
                ));
            }
            Some(_) => {}
        }
    }
    if worse.is_empty() { Ok(()) } else { bail!("worse than {FILE}: {}", worse.join("; ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(all: &[(&str, f64)]) -> Figures {
        all.iter().map(|(name, figure)| ((*name).to_owned(), *figure)).collect()
    }

    #[test]
    fn medians_are_found_by_name_and_contender() {
        let run = "run of `true`, start to exit: instructions, what is left to the kernel included";
        let samples = |name: &str, all: &[f64]| json!({ "contender": name, "samples": all });
        let report = json!({ "measurements": [
            { "name": "run of `true`, start to exit", "contenders": [samples("hyper, booted", &[1.0])] },
            { "name": "start of the VMM to the agent ready: instructions",
              "contenders": [samples("QEMU microvm", &[180.0]), samples("hyper-vmm", &[99.26, 120.0, 99.0])] },
            { "name": run,
              "contenders": [samples("hyper, template", &[87.0]), samples("hyper, booted", &[167.0, 168.0])] },
        ]});
        let found: Vec<f64> = work(&report).unwrap().into_values().collect();
        assert_eq!(found, [99.3, 168.0, 87.0]);
        assert!(work(&json!({ "measurements": [] })).unwrap_err().to_string().contains("was not measured"));
    }

    #[test]
    fn what_is_worse_or_unknown_fails() {
        let baseline = figures(&[("a", 100.0), ("b", 50.0)]);
        assert!(judge(&baseline, &figures(&[("a", 101.9), ("b", 10.0)])).is_ok());
        let error = judge(&baseline, &figures(&[("a", 102.1), ("b", 50.0), ("c", 1.0)])).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("a: 102.1, not 100") && error.contains("c has no baseline"), "{error}");
    }

    #[test]
    fn figures_of_another_kernel_are_left_out() {
        let folder = std::env::temp_dir().join(format!("baseline-{}", std::process::id()));
        let all = figures(&[("run, million", 88.0), ("bin/hyper, bytes", 9.0)]);
        Baseline { kernel: "6.1".to_owned(), figures: all.clone() }.write(&folder).unwrap();
        let read = Baseline::read(&folder).unwrap();
        std::fs::remove_file(&folder).unwrap();
        assert_eq!(read, Baseline { kernel: "6.1".to_owned(), figures: all });
        assert_eq!(read.comparable("6.2").figures, figures(&[("bin/hyper, bytes", 9.0)]));
    }
}
