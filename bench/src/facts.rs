//! What of the host decides the result.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::program;

/// Set where an instruction counts as a nanosecond.
const CLOCK: &str = "HYPER_BENCH_CLOCK";

/// Facts of the host; empty where the host does not say.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Facts {
    /// Model of the processor, and how many there are.
    pub(crate) processor: String,
    /// The host's kernel.
    pub(crate) kernel: String,
    /// What `hyper-vmm --probe` says of this KVM.
    pub(crate) kvm: serde_json::Value,
    /// Mitigations of the kernel that are not "Not affected".
    pub(crate) mitigations: Vec<String>,
    /// `nx_huge_pages` of kvm.
    pub(crate) nx_huge_pages: String,
    /// Options of the control groups' mount: `favordynmods` makes starts cheaper.
    pub(crate) cgroup_options: String,
    /// `ordinary`, or `instructions` on the lab's counting clock, where 1 ms is one million instructions.
    pub(crate) clock: String,
    /// First line of each contender's `--version`.
    pub(crate) versions: Vec<(String, String)>,
}

/// Reads them.
pub(crate) fn gather(prefix: &Path) -> Result<Facts> {
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let count = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let mut mitigations = Vec::new();
    for entry in std::fs::read_dir("/sys/devices/system/cpu/vulnerabilities").into_iter().flatten().flatten()
    {
        let said = read(entry.path());
        if said.trim() != "Not affected" {
            mitigations.push(format!("{}: {}", entry.file_name().to_string_lossy(), said.trim()));
        }
    }
    mitigations.sort_unstable();
    let mounts = read("/proc/mounts");
    let cgroup = mounts.lines().find(|line| line.contains(" cgroup2 ")).unwrap_or_default();
    // A host without KVM is told by the measurement that needs it.
    let probe = program::text(&prefix.join("libexec/hyper/hyper-vmm"), &["--probe"]).unwrap_or_default();
    let mut versions = Vec::new();
    for name in ["runc", "crun", "qemu-system-x86_64", "firecracker", "cloud-hypervisor"] {
        if let Some(found) = program::on_path(name) {
            let said = program::text(&found, &["--version"]).unwrap_or_default();
            versions.push((name.to_owned(), said.lines().next().unwrap_or_default().to_owned()));
        }
    }
    versions.insert(0, ("hyper".to_owned(), env!("CARGO_PKG_VERSION").to_owned()));
    Ok(Facts {
        processor: format!("{} x {count}", model.trim_start_matches(['\t', ' ', ':'])),
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        kvm: serde_json::from_str(&probe).unwrap_or_default(),
        mitigations,
        nx_huge_pages: read("/sys/module/kvm/parameters/nx_huge_pages").trim().to_owned(),
        cgroup_options: cgroup.split_whitespace().nth(3).unwrap_or_default().to_owned(),
        clock: std::env::var(CLOCK).unwrap_or_else(|_| "ordinary".to_owned()),
        versions,
    })
}

fn read(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

impl Facts {
    /// Whether times are instructions.
    pub(crate) fn counts_instructions(&self) -> bool {
        self.clock == "instructions"
    }

    /// For people: what, and the fact.
    pub(crate) fn lines(&self) -> Vec<(&'static str, String)> {
        let kvm = self.kvm.get("kind").and_then(|kind| kind.as_str()).unwrap_or("none that answers");
        let clock = if self.counts_instructions() {
            "the lab's: 1 ms is one million instructions of host and guests together".to_owned()
        } else {
            self.clock.clone()
        };
        let versions: Vec<_> =
            self.versions.iter().map(|(name, version)| format!("{name} ({version})")).collect();
        vec![
            ("processor", self.processor.clone()),
            ("kernel", self.kernel.clone()),
            ("kvm", kvm.to_owned()),
            ("mitigations", self.mitigations.join("; ")),
            ("kvm.nx_huge_pages", self.nx_huge_pages.clone()),
            ("cgroup mount", self.cgroup_options.clone()),
            ("clock", clock),
            ("contenders found", versions.join(", ")),
        ]
    }
}
