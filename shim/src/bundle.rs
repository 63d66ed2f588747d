//! What the shim itself wants to know of a bundle: its pod, and how large the machine must be.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::config::{Config, ConfigError, Size};

/// Largest `config.json`, bytes: what the guest takes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Annotations that name the sandbox of a pod: containerd's CRI plugin, CRI-O.
const SANDBOX_IDS: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];
/// Annotations with what all containers of a pod may use together.
const POD_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const POD_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const POD_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
/// And with what they ask for: a pod without a quota is as large as that.
const POD_SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";
/// Shares of a whole processor.
const SHARES: i64 = 1024;
/// Memory beside that of the containers, for what the guest itself needs, MiB.
const GUEST_MIB: u64 = hyper_sandbox::pod::GUEST_MIB as u64;
/// Why a bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BundleError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is larger than {MAX_CONFIG_BYTES} bytes")]
    Size { path: PathBuf },
    #[error("{path}: {source}")]
    Json { path: PathBuf, source: serde_json::Error },
}

/// The `config.json` of a bundle.
#[derive(Debug, Clone, Default)]
pub(crate) struct Bundle {
    pub(crate) json: Vec<u8>,
    spec: Value,
}

impl Bundle {
    pub(crate) fn read(dir: &Path) -> Result<Self, BundleError> {
        let path = dir.join("config.json");
        let read = || {
            let mut json = Vec::new();
            File::open(&path)?.take(MAX_CONFIG_BYTES + 1).read_to_end(&mut json)?;
            Ok(json)
        };
        let json: Vec<u8> = read().map_err(|source| BundleError::Read { path: path.clone(), source })?;
        if u64::try_from(json.len()).unwrap_or(u64::MAX) > MAX_CONFIG_BYTES {
            return Err(BundleError::Size { path });
        }
        let spec = serde_json::from_slice(&json).map_err(|source| BundleError::Json { path, source })?;
        Ok(Self { json, spec })
    }

    fn annotation(&self, name: &str) -> Option<&str> {
        self.spec.get("annotations")?.get(name)?.as_str()
    }

    /// The pod that it belongs to.
    pub(crate) fn sandbox_id(&self) -> Option<&str> {
        SANDBOX_IDS.iter().find_map(|name| self.annotation(name)).filter(|id| !id.is_empty())
    }

    /// The network namespace that somebody has made for it.
    pub(crate) fn netns(&self) -> Option<PathBuf> {
        let all = self.spec.pointer("/linux/namespaces")?.as_array()?;
        let network = all.iter().find(|one| one.get("type").and_then(Value::as_str) == Some("network"))?;
        let path = network.get("path")?.as_str().filter(|path| !path.is_empty())?;
        Some(path.into())
    }

    /// The control group of the host that it names.
    pub(crate) fn cgroup(&self) -> &str {
        self.spec.pointer("/linux/cgroupsPath").and_then(Value::as_str).unwrap_or_default()
    }

    /// All annotations.
    pub(crate) fn annotations(&self) -> BTreeMap<String, String> {
        let all = self.spec.get("annotations").and_then(Value::as_object).into_iter().flatten();
        all.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
    }

    /// The size that it asks for, or its pod does.
    pub(crate) fn size(&self, config: &Config) -> Result<Size, ConfigError> {
        let number = |pointer: &str| self.spec.pointer(pointer).and_then(Value::as_i64);
        let (memory, quota) = pod_limits(&|name| self.annotation(name));
        let memory = memory.or_else(|| number("/linux/resources/memory/limit"));
        let quota =
            quota.or_else(|| number("/linux/resources/cpu/quota").zip(number("/linux/resources/cpu/period")));
        let quota = quota.filter(|(quota, _)| *quota > 0).or_else(|| shares(&|name| self.annotation(name)));
        config.size(memory, quota, GUEST_MIB)
    }
}

/// The size that a pod's annotations ask for.
pub(crate) fn pod_size(
    annotations: &std::collections::HashMap<String, String>,
    config: &Config,
) -> Result<Size, ConfigError> {
    let find = |name: &str| annotations.get(name).map(String::as_str);
    let (memory, quota) = pod_limits(&find);
    let quota = quota.or_else(|| shares(&find));
    config.size(memory, quota, GUEST_MIB)
}

/// What the pod asks for, as a quota.
fn shares<'a>(annotation: &dyn Fn(&str) -> Option<&'a str>) -> Option<(i64, i64)> {
    let shares = annotation(POD_SHARES).and_then(|text| text.parse::<i64>().ok());
    shares.filter(|shares| *shares > 0).map(|shares| (shares, SHARES))
}

type Limits = (Option<i64>, Option<(i64, i64)>);

/// Memory, bytes, and quota with period of a pod.
fn pod_limits<'a>(annotation: &dyn Fn(&str) -> Option<&'a str>) -> Limits {
    let number = |name: &str| annotation(name).and_then(|text| text.parse::<i64>().ok());
    let memory = number(POD_MEMORY).filter(|bytes| *bytes > 0);
    let quota = number(POD_QUOTA).filter(|quota| *quota > 0);
    (memory, quota.zip(number(POD_PERIOD)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(json: &str) -> Bundle {
        Bundle { json: Vec::new(), spec: serde_json::from_str(json).unwrap() }
    }

    #[test]
    fn pods_and_namespaces_are_found() {
        let pod = bundle(
            r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"p1"},
                "linux":{"namespaces":[{"type":"network","path":"/run/netns/x"}]}}"#,
        );
        assert_eq!((pod.sandbox_id(), pod.netns()), (Some("p1"), Some("/run/netns/x".into())));
        let alone = bundle(r#"{"linux":{"namespaces":[{"type":"network"}]}}"#);
        assert_eq!((alone.sandbox_id(), alone.netns()), (None, None));
    }

    #[test]
    fn machines_are_as_large_as_what_runs_in_them() {
        let size = |json: &str| bundle(json).size(&Config::default()).unwrap();
        let json = r#"{"linux":{"resources":{"memory":{"limit":268435456},"cpu":{"quota":150000,"period":100000}}}}"#;
        assert_eq!(size(json), Size { vcpus: 2, mem_mib: 256 + 64 });
        let json = r#"{"annotations":{"io.kubernetes.cri.sandbox-memory":"1073741824",
            "io.kubernetes.cri.sandbox-cpu-quota":"300000","io.kubernetes.cri.sandbox-cpu-period":"100000"}}"#;
        let pod = Size { vcpus: 3, mem_mib: 1024 + 64 };
        assert_eq!(size(json), pod);
        let annotations = bundle(json).annotations();
        assert_eq!(annotations.len(), 3);
        assert_eq!(pod_size(&annotations.into_iter().collect(), &Config::default()).unwrap(), pod);
        let requests = r#"{"annotations":{"io.kubernetes.cri.sandbox-cpu-shares":"2049",
            "io.kubernetes.cri.sandbox-cpu-quota":"0","io.kubernetes.cri.sandbox-cpu-period":"100000"}}"#;
        assert_eq!(size(requests).vcpus, 3);
    }

    #[test]
    fn files_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Bundle::read(dir.path()), Err(BundleError::Read { .. })));
        std::fs::write(dir.path().join("config.json"), vec![b' '; (1 << 20) + 1]).unwrap();
        assert!(matches!(Bundle::read(dir.path()), Err(BundleError::Size { .. })));
        std::fs::write(dir.path().join("config.json"), "{").unwrap();
        assert!(matches!(Bundle::read(dir.path()), Err(BundleError::Json { .. })));
    }
}
