//! The OCI runtime specification of a container, and the files that are put into it: Docker's defaults, with what the user wished.

mod caps;
mod env;
mod files;

use serde_json::{Map, Value, json};

use crate::config::{ContainerConfig, ResourceConfig, SecurityConfig};
use crate::store::ExecConfig;

pub(crate) use caps::{capability, rlimit};
pub(crate) use files::{Facts, injected_files};

/// Annotation by which the agent chooses the system call filter: `default` or `unconfined`.
const SECCOMP_ANNOTATION: &str = "hyper.seccomp";
/// Period over which processor time is shared out, microseconds.
const CPU_PERIOD_US: u64 = 100_000;
/// Open files without `--ulimit nofile` (Docker's).
const DEFAULT_NOFILE: u64 = 1_048_576;

const MASKED_PATHS: [&str; 10] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
/// Character devices that every container may use: null, zero, full, random, urandom, tty, console, ptmx, pts.
const DEVICES: [(i64, i64); 9] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (136, -1)];

/// The whole specification of the container `id`.
pub(crate) fn spec(config: &ContainerConfig, id: &str) -> Value {
    let privileged = config.security.privileged;
    let unconfined = privileged || config.security.seccomp_unconfined;
    let paths =
        |list: &[&str]| if privileged { Vec::new() } else { list.iter().map(|p| (*p).to_owned()).collect() };
    json!({
        "ociVersion": "1.2.0",
        "process": process(config, id),
        "root": { "path": "rootfs", "readonly": config.read_only_rootfs },
        "hostname": config.hostname_for(id),
        "domainname": config.domainname,
        "mounts": mounts(config),
        "annotations": { SECCOMP_ANNOTATION: if unconfined { "unconfined" } else { "default" } },
        "linux": {
            "sysctl": config.sysctls,
            "resources": resources(&config.resources, privileged),
            "maskedPaths": paths(&MASKED_PATHS),
            "readonlyPaths": paths(&READONLY_PATHS),
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "cgroup"}],
        },
    })
}

fn process(config: &ContainerConfig, id: &str) -> Value {
    let wish = &config.process;
    json!({
        "terminal": wish.terminal,
        "user": { "uid": 0, "gid": 0 },
        "args": wish.args(),
        "env": env::environment(&wish.env, config.hostname_for(id), wish.terminal),
        "cwd": if wish.working_dir.is_empty() { "/" } else { &wish.working_dir },
        "capabilities": capabilities(&config.security, config.security.privileged),
        "rlimits": rlimits(&config.resources),
        "noNewPrivileges": config.security.no_new_privileges,
        "oomScoreAdj": config.resources.oom_score_adj,
    })
}

/// The process object of an exec.
pub(crate) fn exec_process(config: &ContainerConfig, exec: &ExecConfig, id: &str) -> Value {
    let mut env = config.process.env.clone();
    env.extend(exec.env.iter().cloned());
    let cwd = [&exec.working_dir, &config.process.working_dir].into_iter().find(|dir| !dir.is_empty());
    json!({
        "terminal": exec.terminal,
        "user": { "uid": 0, "gid": 0 },
        "args": exec.args,
        "env": env::environment(&env, config.hostname_for(id), exec.terminal),
        "cwd": cwd.map_or("/", String::as_str),
        "capabilities": capabilities(&config.security, exec.privileged || config.security.privileged),
        "rlimits": rlimits(&config.resources),
        "noNewPrivileges": config.security.no_new_privileges,
        "oomScoreAdj": config.resources.oom_score_adj,
    })
}

fn capabilities(security: &SecurityConfig, privileged: bool) -> Value {
    let given = caps::effective(privileged, &security.cap_add, &security.cap_drop);
    json!({ "bounding": given, "effective": given, "permitted": given, "inheritable": [], "ambient": [] })
}

fn rlimits(wish: &ResourceConfig) -> Vec<Value> {
    let value = |limit: i64| u64::try_from(limit).unwrap_or(u64::MAX);
    let mut limits: Vec<Value> = wish
        .ulimits
        .iter()
        .filter_map(|limit| {
            let kind = rlimit(&limit.name)?;
            Some(json!({ "type": kind, "soft": value(limit.soft), "hard": value(limit.hard) }))
        })
        .collect();
    if !wish.ulimits.iter().any(|limit| limit.name == "nofile") {
        limits.push(json!({ "type": "RLIMIT_NOFILE", "soft": DEFAULT_NOFILE, "hard": DEFAULT_NOFILE }));
    }
    limits
}

/// `linux.resources`; also sent alone when limits change.
pub(crate) fn resources(wish: &ResourceConfig, privileged: bool) -> Value {
    let bytes = |mib: u32| u64::from(mib) << 20;
    let mut memory = Map::from_iter([
        ("limit".to_owned(), json!(bytes(wish.mem_mib))),
        ("swap".to_owned(), json!(bytes(wish.mem_mib))),
    ]);
    if wish.mem_reservation_mib > 0 {
        memory.insert("reservation".to_owned(), json!(bytes(wish.mem_reservation_mib)));
    }
    // Whole processors are vCPUs: a quota would only cost time.
    let quota = if wish.cpus_milli.is_multiple_of(1000) { -1 } else { i64::from(wish.cpus_milli) * 100 };
    let mut cpu =
        Map::from_iter([("quota".to_owned(), json!(quota)), ("period".to_owned(), json!(CPU_PERIOD_US))]);
    if wish.cpu_shares > 0 {
        cpu.insert("shares".to_owned(), json!(wish.cpu_shares));
    }
    json!({
        "memory": memory,
        "cpu": cpu,
        "pids": { "limit": i64::from(wish.pids_limit) },
        "devices": devices(privileged),
    })
}

/// Rules of allowed devices; what no rule names is denied.
fn devices(privileged: bool) -> Vec<Value> {
    let all = |kind: &str, access: &str| json!({ "allow": true, "type": kind, "access": access });
    if privileged {
        return vec![all("c", "rwm"), all("b", "rwm")];
    }
    let mut rules = vec![all("c", "m"), all("b", "m")];
    rules.extend(DEVICES.map(|(major, minor)| match minor {
        -1 => json!({ "allow": true, "type": "c", "major": major, "access": "rwm" }),
        _ => json!({ "allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm" }),
    }));
    rules
}

fn mounts(config: &ContainerConfig) -> Vec<Value> {
    let kernel = if config.security.privileged { "rw" } else { "ro" };
    let shm = format!("size={}", config.resources.shm_size_bytes);
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": source, "options": options });
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", kernel]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", kernel]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", &shm]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::UlimitConfig;
    use crate::store::tests::config;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn defaults_are_dockers() {
        let spec = spec(&config("c1"), ID);
        assert_eq!(spec["process"]["args"], json!(["true"]));
        assert_eq!(spec["process"]["cwd"], "/");
        assert_eq!(spec["hostname"], "0123456789ab");
        assert_eq!(spec["root"]["readonly"], false);
        assert_eq!(spec["annotations"]["hyper.seccomp"], "default");
        assert_eq!(spec["linux"]["resources"]["memory"]["limit"], 512_u64 << 20);
        assert_eq!(spec["linux"]["resources"]["cpu"]["quota"], -1);
        assert_eq!(spec["process"]["capabilities"]["bounding"].as_array().unwrap().len(), 14);
        assert_eq!(spec["process"]["capabilities"]["ambient"], json!([]));
        assert_eq!(spec["process"]["rlimits"][0]["type"], "RLIMIT_NOFILE");
        let shm = &spec["mounts"][6];
        assert_eq!(
            (shm["destination"].as_str(), &shm["options"][4]),
            (Some("/dev/shm"), &json!("size=67108864"))
        );
        assert!(spec["linux"]["maskedPaths"].as_array().unwrap().contains(&json!("/proc/kcore")));
        assert!(spec.to_string().len() < hyper_protocol::MAX_OCI_SPEC_BYTES);
    }

    #[test]
    fn wishes_are_kept() {
        let mut wish = config("c1");
        wish.hostname = "box".into();
        wish.read_only_rootfs = true;
        wish.resources.cpus_milli = 1500;
        wish.resources.pids_limit = 7;
        wish.resources.ulimits = vec![UlimitConfig { name: "nofile".into(), soft: 5, hard: -1 }];
        wish.security.no_new_privileges = true;
        wish.sysctls.insert("net.ipv4.ping_group_range".into(), "1 0".into());
        let spec = spec(&wish, ID);
        assert_eq!(spec["hostname"], "box");
        assert_eq!(spec["root"]["readonly"], true);
        assert_eq!(spec["linux"]["resources"]["cpu"]["quota"], 150_000);
        assert_eq!(spec["linux"]["resources"]["pids"]["limit"], 7);
        assert_eq!(
            spec["process"]["rlimits"],
            json!([{"type": "RLIMIT_NOFILE", "soft": 5, "hard": u64::MAX}])
        );
        assert_eq!(spec["process"]["noNewPrivileges"], true);
        assert_eq!(spec["linux"]["sysctl"]["net.ipv4.ping_group_range"], "1 0");
    }

    #[test]
    fn privileged_is_everything() {
        let mut wish = config("c1");
        wish.security.privileged = true;
        let spec = spec(&wish, ID);
        assert_eq!(spec["annotations"]["hyper.seccomp"], "unconfined");
        assert_eq!(spec["linux"]["maskedPaths"], json!([]));
        assert_eq!(spec["linux"]["readonlyPaths"], json!([]));
        assert_eq!(spec["process"]["capabilities"]["effective"].as_array().unwrap().len(), 41);
        assert_eq!(
            spec["linux"]["resources"]["devices"],
            json!([{"allow": true, "type": "c", "access": "rwm"}, {"allow": true, "type": "b", "access": "rwm"}])
        );
        assert!(spec["mounts"][3]["options"].as_array().unwrap().contains(&json!("rw")));
    }

    #[test]
    fn exec_inherits_and_overrides() {
        let mut wish = config("c1");
        wish.process.env = vec!["A=1".into(), "B=2".into()];
        wish.process.working_dir = "/work".into();
        let exec = ExecConfig { args: vec!["env".into()], env: vec!["B=3".into()], ..Default::default() };
        let process = exec_process(&wish, &exec, ID);
        let env = process["env"].as_array().unwrap();
        assert!(env.contains(&json!("A=1")) && env.contains(&json!("B=3")) && !env.contains(&json!("B=2")));
        assert_eq!(process["cwd"], "/work");
        assert_eq!(process["capabilities"]["bounding"].as_array().unwrap().len(), 14);
        let all = ExecConfig { privileged: true, ..exec };
        assert_eq!(exec_process(&wish, &all, ID)["capabilities"]["bounding"].as_array().unwrap().len(), 41);
    }
}
