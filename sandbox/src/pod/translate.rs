//! From the specification that the host's tools wrote to what the guest is asked for.
//!
//! Host paths become shares, what names things of the host (devices, processors, namespaces, hooks) is left out or refused, and the rest
//! goes to the agent as it is.

use std::path::{Path, PathBuf};

use hyper_protocol::MAX_OCI_SPEC_BYTES;
use hyper_protocol::rpc::agent::{TmpfsSource, mount};
use serde_json::{Map, Value};

use super::PodError;
use super::devices::{self, HostDevice};
use super::growth::Claim;
use super::hooks::Hooks;
use super::live::{is_memory, size_bytes};

/// Most bind mounts of one container: each is a mount in the file server and one in the guest.
const MAX_MOUNTS: usize = 128;
/// Annotation with the id of a pod's sandbox.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// Devices that a guest has; others of the host are not there.
const GUEST_DEVICES: [&str; 9] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/console",
    "/dev/ptmx",
    "/dev/fuse",
];
/// Parts of `linux.resources` that name things of the host.
const HOST_RESOURCES: [&str; 4] = ["hugepageLimits", "network", "rdma", "intelRdt"];
/// Namespaces that a container must not share with the host.
const OWN_NAMESPACES: [(&str, &str); 3] = [
    ("network", "the host's network (hostNetwork)"),
    ("pid", "the host's pid namespace (hostPID)"),
    ("ipc", "the host's IPC namespace (hostIPC)"),
];

/// A container, as the guest is asked for it.
#[derive(Debug, PartialEq)]
pub(super) struct Translated {
    /// The specification without what the host does.
    pub(super) oci: Vec<u8>,
    pub(super) hostname: String,
    /// Where the root is when no mounts are handed over.
    pub(super) root: PathBuf,
    pub(super) root_read_only: bool,
    pub(super) terminal: bool,
    /// Rows and columns, if given.
    pub(super) size: Option<(u32, u32)>,
    /// In order.
    pub(super) volumes: Vec<Volume>,
    /// Container whose pid namespace is joined.
    pub(super) pid_namespace_of: Option<String>,
    /// Container whose IPC namespace is joined.
    pub(super) ipc_namespace_of: Option<String>,
    /// What runs on the host.
    pub(super) hooks: Hooks,
    /// What it may use of the machine.
    pub(super) claim: Claim,
    /// Block devices of the host that it is to have.
    pub(super) devices: Vec<HostDevice>,
}

/// Something to mount after the kernel's file systems.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Volume {
    /// A directory or file of the host.
    Bind { source: PathBuf, destination: String, read_only: bool },
    /// Memory that the host's tools made for several containers: one file system in the guest for each such `source`.
    Shared { source: PathBuf, size_bytes: u64, destination: String, read_only: bool },
    /// Memory of the guest.
    Memory { source: mount::Source, destination: String, read_only: bool },
}

pub(super) fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn invalid(what: impl Into<String>) -> PodError {
    PodError::Invalid(what.into())
}

/// Refuses a specification that asks for what no guest has, before a machine is started for it.
///
/// # Errors
/// It cannot be read, or what it asks for.
pub fn check(config: &[u8], bundle: &Path) -> Result<(), PodError> {
    container(config, bundle, "").map(drop)
}

/// Translates the specification of a container whose bundle is at `bundle`. One without a host name has its pod's.
pub(super) fn container(config: &[u8], bundle: &Path, pod_hostname: &str) -> Result<Translated, PodError> {
    if config.len() > MAX_OCI_SPEC_BYTES {
        return Err(invalid(format!("config.json of {} bytes: at most {MAX_OCI_SPEC_BYTES}", config.len())));
    }
    let mut spec: Value =
        serde_json::from_slice(config).map_err(|error| invalid(format!("config.json: {error}")))?;
    check_namespaces(&spec)?;
    let (kernel, volumes) = mounts(&spec)?;
    let root = bundle.join(text(&spec, "/root/path"));
    let root_read_only = spec.pointer("/root/readonly").and_then(Value::as_bool).unwrap_or_default();
    let (terminal, size) = console(spec.get("process").unwrap_or(&Value::Null));
    let joined = |kind| joins(&spec, kind).then(|| text_of_annotation(&spec, SANDBOX_ID)).flatten();
    let (pid_namespace_of, ipc_namespace_of) = (joined("pid"), joined("ipc"));
    let hostname = match text(&spec, "/hostname") {
        "" => pod_hostname.to_owned(),
        own => own.to_owned(),
    };
    let hooks = Hooks::parse(&spec)?;
    let claim = Claim::of(spec.pointer("/linux/resources").unwrap_or(&Value::Null), Claim::default());
    let Some(all) = spec.as_object_mut() else { return Err(invalid("config.json is no object")) };
    all.insert("mounts".into(), Value::Array(kernel));
    all.insert("hostname".into(), Value::String(hostname.clone()));
    // Annotations are the agent's own language, which bundles do not speak.
    for host_only in ["annotations", "hooks", "vm", "windows", "solaris"] {
        all.remove(host_only);
    }
    let devices = match all.get_mut("linux").and_then(Value::as_object_mut) {
        Some(linux) => guest_linux(linux)?,
        None => Vec::new(),
    };
    let oci = spec.to_string().into_bytes();
    Ok(Translated {
        oci,
        hostname,
        root,
        root_read_only,
        terminal,
        size,
        volumes,
        pid_namespace_of,
        ipc_namespace_of,
        hooks,
        claim,
        devices,
    })
}

/// Whether a process has a terminal, and of which size.
pub(super) fn console(process: &Value) -> (bool, Option<(u32, u32)>) {
    let side = |name: &str| {
        let value = process.pointer(&format!("/consoleSize/{name}"))?.as_u64()?;
        u32::try_from(value).ok().filter(|n| *n > 0)
    };
    let terminal = process.get("terminal").and_then(Value::as_bool).unwrap_or_default();
    (terminal, side("height").zip(side("width")))
}

/// The `linux.resources` that the guest can apply.
pub(super) fn resources(resources: &mut Map<String, Value>) {
    for host_only in HOST_RESOURCES {
        resources.remove(host_only);
    }
    // The host's processors are not the guest's.
    if let Some(cpu) = resources.get_mut("cpu").and_then(Value::as_object_mut) {
        for host_only in ["cpus", "mems", "realtimeRuntime", "realtimePeriod"] {
            cpu.remove(host_only);
        }
    }
    if let Some(block) = resources.get_mut("blockIO").and_then(Value::as_object_mut) {
        block.retain(|name, _| name == "weight");
    }
    if let Some(unified) = resources.get_mut("unified").and_then(Value::as_object_mut) {
        unified.retain(|name, _| {
            name.starts_with("memory.") || name.starts_with("pids.") || name.starts_with("cpu.")
        });
    }
}

fn text_of_annotation(spec: &Value, name: &str) -> Option<String> {
    spec.get("annotations")?.get(name)?.as_str().map(str::to_owned)
}

fn namespaces(spec: &Value) -> impl Iterator<Item = (&str, &str)> {
    let all = spec.pointer("/linux/namespaces").and_then(Value::as_array);
    all.into_iter().flatten().map(|one| (text(one, "/type"), text(one, "/path")))
}

fn check_namespaces(spec: &Value) -> Result<(), PodError> {
    for (kind, what) in OWN_NAMESPACES {
        if !namespaces(spec).any(|(have, _)| have == kind) {
            return Err(PodError::Unsupported(what.to_owned()));
        }
    }
    if namespaces(spec).any(|(kind, _)| kind == "user") {
        return Err(PodError::Unsupported("a user namespace of the host".into()));
    }
    Ok(())
}

/// A namespace with a path is that of the pod's sandbox.
fn joins(spec: &Value, wanted: &str) -> bool {
    namespaces(spec).any(|(kind, path)| kind == wanted && !path.is_empty())
}

/// Leaves what a guest has; returns the host's block devices that the container is to have.
fn guest_linux(linux: &mut Map<String, Value>) -> Result<Vec<HostDevice>, PodError> {
    for host_only in
        ["cgroupsPath", "namespaces", "uidMappings", "gidMappings", "rootfsPropagation", "mountLabel"]
    {
        linux.remove(host_only);
    }
    let mut privileged = false;
    if let Some(wish) = linux.get_mut("resources").and_then(Value::as_object_mut) {
        resources(wish);
        privileged =
            wish.get("devices").and_then(Value::as_array).is_some_and(|rules| rules.iter().any(allows_all));
    }
    let is_guests = |device: &Value| GUEST_DEVICES.contains(&text(device, "/path"));
    // Privileged containers are given every device of the host; what they get are the guest's.
    let block = devices::take(linux, |device| !privileged && !is_guests(device))?;
    if let Some(devices) = linux.get_mut("devices").and_then(Value::as_array_mut) {
        devices.retain(is_guests);
    }
    Ok(block)
}

fn allows_all(rule: &Value) -> bool {
    rule.get("allow").and_then(Value::as_bool) == Some(true)
        && matches!(text(rule, "/type"), "" | "a")
        && rule.get("major").is_none_or(|major| major.is_null() || major.as_i64() == Some(-1))
}

/// The kernel's file systems, which come first, and the rest in its order.
fn mounts(spec: &Value) -> Result<(Vec<Value>, Vec<Volume>), PodError> {
    let (mut kernel, mut volumes) = (Vec::new(), Vec::new());
    for one in spec.get("mounts").and_then(Value::as_array).into_iter().flatten() {
        let options: Vec<&str> = one
            .get("options")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let destination = text(one, "/destination");
        let is_bind = text(one, "/type") == "bind" || options.iter().any(|o| matches!(*o, "bind" | "rbind"));
        if is_bind {
            let source = PathBuf::from(text(one, "/source"));
            let bound = bind(source, destination, &options)?;
            volumes.push(if destination == "/dev/shm" { shared_memory(bound) } else { bound });
        } else if text(one, "/type") == "tmpfs" && !volumes.is_empty() {
            // It may lie in a volume.
            volumes.push(memory(destination, &options));
        } else {
            kernel.push(one.clone());
        }
    }
    if volumes.len() > MAX_MOUNTS {
        return Err(PodError::Exhausted(format!("{} volumes: at most {MAX_MOUNTS}", volumes.len())));
    }
    Ok((kernel, volumes))
}

/// Shared memory of the guest, as large as the host's; a folder of another file system than tmpfs is a volume like any other.
fn shared_memory(bound: Volume) -> Volume {
    match bound {
        Volume::Bind { source, destination, read_only } if is_memory(&source) => {
            let size_bytes = size_bytes(&source).unwrap_or(crate::DEFAULT_SHM_BYTES);
            Volume::Shared { source, size_bytes, destination, read_only }
        }
        other => other,
    }
}

fn bind(source: PathBuf, destination: &str, options: &[&str]) -> Result<Volume, PodError> {
    if !source.is_absolute() {
        return Err(invalid(format!("the source of the mount at {destination} is not absolute")));
    }
    if ["/proc", "/sys"].iter().any(|kernel| source.starts_with(kernel)) {
        return Err(PodError::Unsupported(format!("{} of the host as a volume", source.display())));
    }
    // The last word counts.
    let read_only =
        options.iter().rev().find(|o| matches!(**o, "ro" | "rro" | "rw")).is_some_and(|o| *o != "rw");
    Ok(Volume::Bind { source, destination: destination.to_owned(), read_only })
}

fn memory(destination: &str, options: &[&str]) -> Volume {
    let value = |key: &str| options.iter().rev().find_map(|o| o.strip_prefix(key)?.strip_prefix('='));
    let tmpfs = TmpfsSource {
        size_bytes: value("size").and_then(bytes).unwrap_or_default(),
        mode: value("mode").and_then(|mode| u32::from_str_radix(mode, 8).ok()).unwrap_or_default(),
        noexec: options.contains(&"noexec"),
        ..Default::default()
    };
    let read_only = options.contains(&"ro");
    Volume::Memory { source: mount::Source::Tmpfs(tmpfs), destination: destination.to_owned(), read_only }
}

/// A size as tmpfs takes it.
fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = match text.strip_suffix(['k', 'K']) {
        Some(number) => (number, 10),
        None => match text.strip_suffix(['m', 'M']) {
            Some(number) => (number, 20),
            None => text.strip_suffix(['g', 'G']).map_or((text, 0), |number| (number, 30)),
        },
    };
    number.parse::<u64>().ok()?.checked_shl(unit)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec() -> Value {
        json!({
            "process": { "args": ["sh"], "terminal": true, "consoleSize": { "height": 50, "width": 120 } },
            "root": { "path": "rootfs", "readonly": true },
            "hostname": "box",
            "annotations": { "io.kubernetes.cri.sandbox-id": "pod1", "hyper.seccomp": "unconfined" },
            "hooks": {},
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/tmp", "type": "tmpfs", "source": "tmpfs" },
                { "destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind", "ro"] },
                { "destination": "/data/tmp", "type": "tmpfs", "options": ["size=64m", "mode=0700", "noexec"] },
                { "destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["rbind", "ro"] },
            ],
            "linux": {
                "cgroupsPath": "/x",
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "network", "path": "/var/run/netns/x"}],
                "resources": {
                    "cpu": { "cpus": "3", "shares": 512 }, "hugepageLimits": [1], "memory": { "limit": 5 },
                    "blockIO": { "weight": 7, "throttleReadBpsDevice": [1] },
                },
            },
        })
    }

    fn translated(spec: &Value) -> Result<Translated, PodError> {
        container(spec.to_string().as_bytes(), Path::new("/bundle"), "pod")
    }

    #[test]
    fn what_is_the_hosts_is_taken_out() {
        let done = translated(&spec()).unwrap();
        assert_eq!(done.root, Path::new("/bundle/rootfs"));
        assert!(done.root_read_only && done.terminal);
        assert_eq!((done.size, done.hostname.as_str()), (Some((50, 120)), "box"));
        assert_eq!((done.pid_namespace_of, done.ipc_namespace_of), (None, None));
        let oci: Value = serde_json::from_slice(&done.oci).unwrap();
        assert_eq!((oci.get("annotations"), oci.get("hooks")), (None, None));
        assert_eq!(oci["hostname"], "box");
        let mut nameless = spec();
        nameless["hostname"] = json!("");
        assert_eq!(translated(&nameless).unwrap().hostname, "pod");
        assert_eq!(
            oci["linux"]["resources"],
            json!({"cpu": {"shares": 512}, "memory": {"limit": 5}, "blockIO": {"weight": 7}})
        );
        let kernel: Vec<_> =
            oci["mounts"].as_array().unwrap().iter().map(|m| text(m, "/destination")).collect();
        assert_eq!(kernel, ["/proc", "/tmp"]);
        assert_eq!(
            done.volumes[0],
            Volume::Bind { source: "/srv".into(), destination: "/data".into(), read_only: true }
        );
        let Volume::Memory { source: mount::Source::Tmpfs(tmpfs), .. } = &done.volumes[1] else { panic!() };
        assert_eq!((tmpfs.size_bytes, tmpfs.mode, tmpfs.noexec), (64 << 20, 0o700, true));
    }

    #[test]
    fn shared_memory_of_the_host_is_memory_of_the_guest() {
        let Volume::Shared { source, size_bytes, read_only, .. } =
            translated(&spec()).unwrap().volumes.remove(2)
        else {
            panic!("it is a tmpfs")
        };
        assert_eq!(
            (source.as_path(), Some(size_bytes), read_only),
            (Path::new("/dev/shm"), super::size_bytes(&source), true)
        );
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let mut on_disk = spec();
        on_disk["mounts"][4]["source"] = json!(dir.path());
        let volume = translated(&on_disk).unwrap().volumes.remove(2);
        assert_eq!(matches!(volume, Volume::Shared { .. }), is_memory(dir.path()), "{volume:?}");
    }

    #[test]
    fn the_hosts_namespaces_are_refused_in_words() {
        for (kind, word) in [("network", "hostNetwork"), ("pid", "hostPID"), ("ipc", "hostIPC")] {
            let mut spec = spec();
            spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|one| one["type"] != kind);
            let refused = translated(&spec).unwrap_err().to_string();
            assert!(refused.contains(word) && refused.ends_with("is not supported by hyper"), "{refused}");
        }
        let mut spec = spec();
        spec["linux"]["namespaces"][0] = json!({"type": "pid", "path": "/proc/7/ns/pid"});
        spec["linux"]["namespaces"][1] = json!({"type": "ipc", "path": "/proc/7/ns/ipc"});
        let joins = translated(&spec).unwrap();
        assert_eq!(joins.pid_namespace_of.as_deref(), Some("pod1"));
        assert_eq!(joins.ipc_namespace_of.as_deref(), Some("pod1"));
    }

    #[test]
    fn devices_of_the_host_are_refused_unless_privileged() {
        let mut spec = spec();
        spec["linux"]["devices"] = json!([{"path": "/dev/fuse"}, {"path": "/dev/sda"}]);
        assert!(translated(&spec).unwrap_err().to_string().contains("/dev/sda"));
        spec["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
        let oci: Value = serde_json::from_slice(&translated(&spec).unwrap().oci).unwrap();
        assert_eq!(oci["linux"]["devices"], json!([{"path": "/dev/fuse"}]));
    }

    #[test]
    fn sources_are_checked() {
        for source in ["relative", "/proc/1", "/sys/fs/cgroup"] {
            let mut spec = spec();
            spec["mounts"][2]["source"] = json!(source);
            assert!(translated(&spec).is_err(), "{source}");
        }
        assert_eq!(
            (bytes("5"), bytes("2K"), bytes("1g"), bytes("x")),
            (Some(5), Some(2048), Some(1 << 30), None)
        );
    }
}
