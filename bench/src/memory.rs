//! Memory of idle containers: the share of each process in what it maps, and what the VMM itself takes beside its guest's memory.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use crate::containers::Bench;
use crate::report::Report;

const KIB_PER_MIB: f64 = 1024.0;
/// What a VMM's mapping of its guest's memory is called: one that a file server sees too, and that of a machine that goes on from a template.
const GUEST_MEMORY: [&str; 2] = ["memfd:", "/templates/vm-"];
/// Without a name it is at least this long (no guest has less), and longer than all else that a VMM maps without one.
const LEAST_GUEST_BYTES: u64 = 32 << 20;

/// Whether a mapping, by the line that it begins with (`55d0-55d4 rw-p …`), is a guest's memory.
fn is_guest_memory(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let bytes = words.next().and_then(|range| {
        let (start, end) = range.split_once('-')?;
        u64::from_str_radix(end, 16).ok()?.checked_sub(u64::from_str_radix(start, 16).ok()?)
    });
    match words.nth(4) {
        Some(name) => GUEST_MEMORY.iter().any(|part| name.contains(part)),
        None => bytes >= Some(LEAST_GUEST_BYTES),
    }
}

/// Starts idle containers under each contender, and adds up their processes.
pub(crate) fn measure(bench: &Bench, count: u32, report: &mut Report) -> Result<()> {
    for contender in &bench.contenders {
        let idle: Vec<_> = (0..count).map(|_| contender.idle()).collect::<Result<_>>()?;
        for container in &idle {
            let (mut pss, mut overhead) = (0, 0);
            for pid in descendants(&container.roots()?) {
                let Ok(maps) = std::fs::read_to_string(format!("/proc/{pid}/smaps")) else { continue };
                pss += total(&maps, "Pss:", |_| true);
                if comm(pid) == "hyper-vmm" {
                    overhead += total(&maps, "Rss:", |line| !is_guest_memory(line));
                }
            }
            report.add(
                "memory of all processes of an idle container (PSS)",
                "MiB",
                contender.name(),
                mib(pss),
            );
            if overhead > 0 {
                let name = "memory of the VMM without its guest's (RSS)";
                report.add(name, "MiB", contender.name(), mib(overhead));
            }
        }
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "memory in KiB is far below 2^52")]
fn mib(kib: u64) -> f64 {
    kib as f64 / KIB_PER_MIB
}

fn comm(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

/// Sums a field of `/proc/PID/smaps` (KiB) over the mappings whose first line fits.
fn total(maps: &str, field: &str, fits: impl Fn(&str) -> bool) -> u64 {
    let (mut sum, mut counts) = (0, false);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some(word) if word == field && counts => {
                sum += words.next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default();
            }
            // A mapping begins with its addresses; the name is the sixth word.
            Some(word) if !word.ends_with(':') => counts = fits(line),
            _ => {}
        }
    }
    sum
}

/// These processes and all below them.
fn descendants(roots: &[u32]) -> Vec<u32> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").context("reading /proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // The name may hold anything but ends with the last parenthesis.
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
        if let Some(parent) = parent {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = roots.to_vec();
    let mut at = 0;
    while let Some(pid) = found.get(at) {
        found.extend(children.remove(pid).unwrap_or_default());
        at += 1;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "55d0-55d1 r--p 00000000 00:2d 7 /usr/bin/x\nSize: 4 kB\nRss: 4 kB\nPss: 2 kB\n\
        7f00-7f10 rw-s 00000000 00:01 9 /memfd:guest (deleted)\nRss: 100 kB\nPss: 100 kB\nVmFlags: rd wr\n\
        7f0010000000-7f0014000000 rw-p 00000000 00:00 0\nRss: 5000 kB\nPss: 5000 kB\n\
        7f10-7f11 rw-p 00000000 00:00 0\nRss: 8 kB\nPss: 8 kB\n";

    #[test]
    fn fields_are_summed_by_mapping() {
        assert_eq!(total(MAPS, "Pss:", |_| true), 5110);
        assert_eq!(total(MAPS, "Rss:", |line| !is_guest_memory(line)), 12);
        assert!(is_guest_memory("7f00-7f10 rw-p 00000000 00:2d 7 /var/lib/hyper/templates/vm-0123/memory"));
    }

    #[test]
    fn a_process_is_below_itself() {
        let own = std::process::id();
        assert_eq!(descendants(&[own]).first(), Some(&own));
    }
}
