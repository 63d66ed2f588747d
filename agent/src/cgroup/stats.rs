//! Resource use: a container's from its cgroup, the network's from /proc/net/dev.

use std::path::Path;

use hyper_protocol::rpc::agent::{NetworkStats, StatsResponse};

use super::{Cgroup, number};

/// Most interfaces that are reported.
const MAX_INTERFACES: usize = 64;

impl Cgroup {
    /// Counters of now. What the kernel does not count is 0.
    pub(crate) fn stats(&self) -> StatsResponse {
        let read = |file: &str| std::fs::read_to_string(self.path().join(file)).unwrap_or_default();
        let value = |file: &str| limit(&read(file));
        let (cpu, memory, io) = (read("cpu.stat"), read("memory.stat"), read("io.stat"));
        let micro = |key: &str| number(&cpu, key).saturating_mul(1000);
        StatsResponse {
            cpu_usage_ns: micro("usage_usec"),
            cpu_user_ns: micro("user_usec"),
            cpu_system_ns: micro("system_usec"),
            cpus: online_cpus(),
            memory_usage_bytes: value("memory.current"),
            memory_inactive_file_bytes: number(&memory, "inactive_file"),
            memory_limit_bytes: value("memory.max"),
            pids: value("pids.current"),
            pids_limit: value("pids.max"),
            block_read_bytes: io_total(&io, "rbytes"),
            block_write_bytes: io_total(&io, "wbytes"),
            networks: networks(&std::fs::read_to_string("/proc/net/dev").unwrap_or_default()),
            oom_kills: self.oom_kills(),
            sampled_at_unix_ns: u64::try_from(crate::reaper::now_unix_ns()).unwrap_or_default(),
            ..StatsResponse::default()
        }
    }
}

/// A single value; `max`, no limit, is 0.
fn limit(text: &str) -> u64 {
    text.trim().parse().unwrap_or_default()
}

/// Processors that are online.
pub(crate) fn online_cpus() -> u32 {
    let path = Path::new("/sys/devices/system/cpu/online");
    count_list(&std::fs::read_to_string(path).unwrap_or_default()).max(1)
}

/// The length of a list such as `0-3,5`.
fn count_list(list: &str) -> u32 {
    list.trim()
        .split(',')
        .filter_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
            last.checked_sub(first)?.checked_add(1)
        })
        .fold(0, u32::saturating_add)
}

/// A counter of io.stat over all disks.
fn io_total(text: &str, key: &str) -> u64 {
    text.split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse::<u64>().ok())
        .fold(0, u64::saturating_add)
}

/// All interfaces but the loopback.
fn networks(text: &str) -> Vec<NetworkStats> {
    let interface = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        let n: Vec<u64> = counters.split_ascii_whitespace().filter_map(|w| w.parse().ok()).collect();
        let [rx_bytes, rx_packets, rx_errors, rx_dropped, ..] = *n.as_slice() else { return None };
        let [tx_bytes, tx_packets, tx_errors, tx_dropped, ..] = *n.get(8..)? else { return None };
        Some(NetworkStats {
            name: name.trim().to_owned(),
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
            ..NetworkStats::default()
        })
    };
    text.lines().filter_map(interface).filter(|i| i.name != "lo").take(MAX_INTERFACES).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_formats_are_read() {
        assert_eq!(count_list("0-3,5\n"), 5);
        assert_eq!(count_list(""), 0);
        assert_eq!(limit("max\n"), 0);
        assert_eq!(limit("4096\n"), 4096);
        let io = "254:0 rbytes=10 wbytes=1 rios=1 wios=1 dbytes=0 dios=0\n254:16 rbytes=5 wbytes=2\n";
        assert_eq!((io_total(io, "rbytes"), io_total(io, "wbytes")), (15, 3));
    }

    #[test]
    fn interfaces_are_read_without_the_loopback() {
        let text = "Inter-|   Receive\n face |bytes    packets\n    lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n\
                    \x20 eth0: 100 2 3 4 0 0 0 0 200 5 6 7 0 0 0 0\n";
        let got = networks(text);
        assert_eq!(got.len(), 1);
        assert_eq!((got[0].name.as_str(), got[0].rx_bytes, got[0].tx_bytes), ("eth0", 100, 200));
        assert_eq!((got[0].rx_dropped, got[0].tx_errors), (4, 6));
    }
}
