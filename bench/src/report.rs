//! Samples, and the table of them.

use std::fmt::Write;

use serde::Serialize;

use crate::facts::Facts;
use crate::stats::Sorted;

/// All that was measured, in the order in which it was.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) facts: Facts,
    pub(crate) runs: u32,
    pub(crate) warm_up: u32,
    pub(crate) measurements: Vec<Measured>,
}

/// One thing, of all contenders that can do it.
#[derive(Debug, Serialize)]
pub(crate) struct Measured {
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    pub(crate) contenders: Vec<Samples>,
}

/// Of one contender.
#[derive(Debug, Serialize)]
pub(crate) struct Samples {
    pub(crate) contender: String,
    pub(crate) samples: Vec<f64>,
}

impl Report {
    /// Without samples.
    pub(crate) fn new(facts: Facts, runs: u32, warm_up: u32) -> Self {
        Self { facts, runs, warm_up, measurements: Vec::new() }
    }

    /// One more sample.
    pub(crate) fn add(&mut self, name: &str, unit: &'static str, contender: &str, sample: f64) {
        let at = match self.measurements.iter().position(|measured| measured.name == name) {
            Some(at) => at,
            None => {
                self.measurements.push(Measured { name: name.to_owned(), unit, contenders: Vec::new() });
                self.measurements.len() - 1
            }
        };
        let Some(measured) = self.measurements.get_mut(at) else { return };
        match measured.contenders.iter_mut().find(|samples| samples.contender == contender) {
            Some(samples) => samples.samples.push(sample),
            None => {
                measured.contenders.push(Samples { contender: contender.to_owned(), samples: vec![sample] })
            }
        }
    }

    /// For a terminal: the facts, then one block a measurement.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        for (what, fact) in self.facts.lines() {
            // A string takes whatever is written to it.
            let _ = writeln!(text, "{what:<22}{fact}");
        }
        for measured in &self.measurements {
            let _ = writeln!(
                text,
                "\n{} ({})\n  {:<20}{:>10}{:>10}{:>10}{:>8}{:>9}",
                measured.name, measured.unit, "", "median", "p99", "spread", "runs", "ratio"
            );
            let base = measured.contenders.first().map_or(0.0, |first| Sorted::new(&first.samples).median());
            for samples in &measured.contenders {
                let sorted = Sorted::new(&samples.samples);
                let ratio =
                    if base > 0.0 { format!("{:.2}", sorted.median() / base) } else { "-".to_owned() };
                let _ = writeln!(
                    text,
                    "  {:<20}{:>10.1}{:>10.1}{:>10.1}{:>8}{:>9}",
                    samples.contender,
                    sorted.median(),
                    sorted.quantile(0.99),
                    sorted.spread(),
                    samples.samples.len(),
                    ratio,
                );
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contenders_stand_below_what_was_measured_of_them() {
        let mut report = Report::new(Facts::default(), 2, 0);
        for (contender, ms) in [("hyper", 10.0), ("runc", 20.0), ("hyper", 12.0), ("runc", 24.0)] {
            report.add("run", "ms", contender, ms);
        }
        report.add("memory", "MiB", "hyper", 25.0);
        let table = report.table();
        let rows: Vec<Vec<_>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert!(rows.contains(&vec!["hyper", "10.0", "12.0", "1.0", "2", "1.00"]), "{table}");
        assert!(rows.contains(&vec!["runc", "20.0", "24.0", "2.0", "2", "2.00"]), "{table}");
        assert!(rows.contains(&vec!["memory", "(MiB)"]), "{table}");
    }
}
