//! From OCI resources, which speak cgroup v1, to the files of cgroup v2.

use crate::error::AgentError;
use crate::spec::{ResourceSpec, ThrottleSpec};

/// Longest value, bytes.
const MAX_VALUE_BYTES: usize = 4096;
/// Period of processor time when a quota comes without one, microseconds.
const DEFAULT_PERIOD_US: u64 = 100_000;

/// One file and what to write to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    pub file: String,
    pub value: String,
    /// Passed over when the kernel has no such file.
    pub optional: bool,
}

fn setting(file: &str, value: impl Into<String>) -> Setting {
    Setting { file: file.to_owned(), value: value.into(), optional: false }
}

fn optional(file: &str, value: impl Into<String>) -> Setting {
    Setting { optional: true, ..setting(file, value) }
}

/// The settings for these resources, in the order in which they have to be written.
///
/// # Errors
/// A value that makes no sense, or a name in `unified` that is no file of a cgroup.
pub(crate) fn settings(resources: &ResourceSpec) -> Result<Vec<Setting>, AgentError> {
    let mut settings = Vec::new();
    memory(resources, &mut settings)?;
    cpu(resources, &mut settings);
    if let Some(limit) = resources.pids.limit {
        settings.push(setting("pids.max", limit_or_max(limit)));
    }
    block_io(resources, &mut settings);
    for page in &resources.hugepage_limits {
        if page.page_size.is_empty() || !page.page_size.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(AgentError::invalid(format!("huge page size {:?}", page.page_size)));
        }
        settings.push(setting(&format!("hugetlb.{}.max", page.page_size), page.limit.to_string()));
    }
    for (file, value) in &resources.unified {
        let is_name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_');
        if !file.contains('.') || file.starts_with('.') || file.contains("..") || !file.bytes().all(is_name) {
            return Err(AgentError::invalid(format!("{file:?} is no file of a cgroup")));
        }
        if value.len() > MAX_VALUE_BYTES {
            return Err(AgentError::limit("bytes of a cgroup value", MAX_VALUE_BYTES));
        }
        settings.push(setting(file, value.as_str()));
    }
    Ok(settings)
}

/// 0 and below mean no limit.
fn limit_or_max(limit: i64) -> String {
    if limit > 0 { limit.to_string() } else { "max".to_owned() }
}

fn memory(resources: &ResourceSpec, settings: &mut Vec<Setting>) -> Result<(), AgentError> {
    let memory = &resources.memory;
    if let Some(swap) = memory.swap.filter(|s| *s != 0) {
        // v1 counts memory and swap together, v2 swap alone.
        let value = match (swap, memory.limit) {
            (swap, _) if swap < 0 => "max".to_owned(),
            (swap, Some(limit)) if limit > 0 && swap >= limit => swap.saturating_sub(limit).to_string(),
            (swap, limit) => {
                return Err(AgentError::invalid(format!(
                    "memory and swap {swap} is less than memory {}",
                    limit.unwrap_or(-1)
                )));
            }
        };
        settings.push(optional("memory.swap.max", value));
    }
    if let Some(limit) = memory.limit.filter(|l| *l != 0) {
        settings.push(setting("memory.max", limit_or_max(limit)));
    }
    if let Some(reservation) = memory.reservation.filter(|r| *r != 0) {
        settings.push(setting("memory.low", limit_or_max(reservation)));
    }
    Ok(())
}

fn cpu(resources: &ResourceSpec, settings: &mut Vec<Setting>) {
    let cpu = &resources.cpu;
    if let Some(shares) = cpu.shares.filter(|s| *s != 0) {
        settings.push(setting("cpu.weight", weight_of_shares(shares).to_string()));
    }
    if let Some(idle) = cpu.idle {
        settings.push(setting("cpu.idle", idle.to_string()));
    }
    if cpu.quota.is_some() || cpu.period.is_some() {
        let quota = limit_or_max(cpu.quota.unwrap_or_default());
        let period = cpu.period.filter(|p| *p != 0).unwrap_or(DEFAULT_PERIOD_US);
        settings.push(setting("cpu.max", format!("{quota} {period}")));
    }
    if !cpu.cpus.is_empty() {
        settings.push(setting("cpuset.cpus", cpu.cpus.as_str()));
    }
    if !cpu.mems.is_empty() {
        settings.push(setting("cpuset.mems", cpu.mems.as_str()));
    }
}

/// 2 to 262144 shares on a line to 1 to 10000 of weight, as Kubernetes and runc map them.
fn weight_of_shares(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + (shares - 2) * 9999 / 262_142
}

fn block_io(resources: &ResourceSpec, settings: &mut Vec<Setting>) {
    let io = &resources.block_io;
    if let Some(weight) = io.weight.filter(|w| *w != 0) {
        // 10 to 1000 on a line to 1 to 10000.
        let weight = u64::from(weight.clamp(10, 1000));
        settings.push(optional("io.weight", (1 + (weight - 10) * 9999 / 990).to_string()));
    }
    let kinds: [(&str, &[ThrottleSpec]); 4] = [
        ("rbps", &io.throttle_read_bps_device),
        ("wbps", &io.throttle_write_bps_device),
        ("riops", &io.throttle_read_iops_device),
        ("wiops", &io.throttle_write_iops_device),
    ];
    for (key, devices) in kinds {
        for device in devices {
            let rate = if device.rate == 0 { "max".to_owned() } else { device.rate.to_string() };
            settings.push(setting("io.max", format!("{}:{} {key}={rate}", device.major, device.minor)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Vec<(String, String)> {
        let resources = ResourceSpec::parse(json.as_bytes()).unwrap();
        settings(&resources).unwrap().into_iter().map(|s| (s.file, s.value)).collect()
    }

    fn is(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(f, v)| ((*f).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn docker_limits_are_converted() {
        assert_eq!(
            of(r#"{"memory":{"limit":67108864,"swap":134217728,"reservation":1},"pids":{"limit":100},
                "cpu":{"quota":150000,"period":100000,"shares":1024,"cpus":"0-1"}}"#),
            is(&[
                ("memory.swap.max", "67108864"),
                ("memory.max", "67108864"),
                ("memory.low", "1"),
                ("cpu.weight", "39"),
                ("cpu.max", "150000 100000"),
                ("cpuset.cpus", "0-1"),
                ("pids.max", "100"),
            ])
        );
        assert_eq!(of("{}"), is(&[]));
        assert_eq!(
            of(r#"{"memory":{"limit":-1,"swap":-1},"pids":{"limit":0},"cpu":{"quota":-1}}"#),
            is(&[
                ("memory.swap.max", "max"),
                ("memory.max", "max"),
                ("cpu.max", "max 100000"),
                ("pids.max", "max")
            ])
        );
    }

    #[test]
    fn block_io_and_the_rest() {
        assert_eq!(
            of(r#"{"blockIO":{"weight":1000,"throttleReadBpsDevice":[{"major":254,"minor":0,"rate":1024}],
                "throttleWriteIOPSDevice":[{"major":254,"minor":0,"rate":10}]},
                "hugepageLimits":[{"pageSize":"2MB","limit":0}],"unified":{"memory.high":"5M"}}"#),
            is(&[
                ("io.weight", "10000"),
                ("io.max", "254:0 rbps=1024"),
                ("io.max", "254:0 wiops=10"),
                ("hugetlb.2MB.max", "0"),
                ("memory.high", "5M"),
            ])
        );
    }

    #[test]
    fn ends_of_the_scales() {
        assert_eq!((weight_of_shares(0), weight_of_shares(2), weight_of_shares(262_144)), (1, 1, 10_000));
        assert_eq!(weight_of_shares(u64::MAX), 10_000);
    }

    #[test]
    fn nonsense_is_refused() {
        let bad = |json: &str| settings(&ResourceSpec::parse(json.as_bytes()).unwrap()).is_err();
        assert!(bad(r#"{"unified":{"../x":"1"}}"#));
        assert!(bad(r#"{"unified":{"a..b":"1"}}"#));
        assert!(bad(r#"{"memory":{"limit":10,"swap":5}}"#));
        assert!(bad(r#"{"hugepageLimits":[{"pageSize":"../","limit":1}]}"#));
    }
}
