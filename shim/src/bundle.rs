//! What the shim itself wants to know of a bundle: its pod, and how large the machine must be.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;

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
pub(crate) const SHARES: i64 = 1024;
/// Most vCPUs of a machine.
const MAX_VCPUS: u64 = 32;
/// Most memory of a machine, MiB (1 TiB less what the guest's kernel needs).
const MAX_MEM_MIB: u64 = 1_000_000;

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

/// How large a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) vcpus: u8,
    pub(crate) mem_mib: u32,
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

    /// The size that it asks for, or its pod does.
    pub(crate) fn size(&self) -> Size {
        let number = |pointer: &str| self.spec.pointer(pointer).and_then(Value::as_i64);
        let pod = |name: &str| self.annotation(name).and_then(|text| text.parse::<i64>().ok());
        let memory =
            pod(POD_MEMORY).filter(|bytes| *bytes > 0).or_else(|| number("/linux/resources/memory/limit"));
        let quota = pod(POD_QUOTA).filter(|quota| *quota > 0);
        let quota = quota
            .zip(pod(POD_PERIOD))
            .or_else(|| number("/linux/resources/cpu/quota").zip(number("/linux/resources/cpu/period")))
            .filter(|(quota, _)| *quota > 0)
            .or_else(|| pod(POD_SHARES).map(|shares| (shares, SHARES)));
        size(memory, quota)
    }
}

/// A size for a limit in bytes and a quota with its period; what is not limited gets the default.
pub(crate) fn size(memory: Option<i64>, quota: Option<(i64, i64)>) -> Size {
    let memory = memory.and_then(|bytes| u64::try_from(bytes).ok()).filter(|bytes| *bytes > 0);
    let mem_mib = memory.map_or(u64::from(hyper_sandbox::DEFAULT_MEM_MIB), |bytes| {
        (bytes.div_ceil(1 << 20)).saturating_add(u64::from(hyper_sandbox::pod::GUEST_MIB))
    });
    let quota = quota.and_then(|(quota, period)| u64::try_from(quota).ok().zip(u64::try_from(period).ok()));
    let vcpus = quota.filter(|(_, period)| *period > 0).map_or(1, |(quota, period)| quota.div_ceil(period));
    Size {
        vcpus: u8::try_from(vcpus.clamp(1, MAX_VCPUS)).unwrap_or(1),
        mem_mib: u32::try_from(mem_mib.clamp(u64::from(hyper_sandbox::LEAST_MEM_MIB), MAX_MEM_MIB))
            .unwrap_or(hyper_sandbox::DEFAULT_MEM_MIB),
    }
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
        let default = Size { vcpus: 1, mem_mib: hyper_sandbox::DEFAULT_MEM_MIB };
        assert_eq!(bundle("{}").size(), default);
        let json = r#"{"linux":{"resources":{"memory":{"limit":268435456},"cpu":{"quota":150000,"period":100000}}}}"#;
        assert_eq!(bundle(json).size(), Size { vcpus: 2, mem_mib: 256 + 64 });
        let pod = bundle(
            r#"{"annotations":{"io.kubernetes.cri.sandbox-memory":"1073741824",
                "io.kubernetes.cri.sandbox-cpu-quota":"300000","io.kubernetes.cri.sandbox-cpu-period":"100000"}}"#,
        );
        assert_eq!(pod.size(), Size { vcpus: 3, mem_mib: 1024 + 64 });
        let requests = r#"{"annotations":{"io.kubernetes.cri.sandbox-cpu-shares":"2049",
            "io.kubernetes.cri.sandbox-cpu-quota":"0","io.kubernetes.cri.sandbox-cpu-period":"100000"}}"#;
        assert_eq!(bundle(requests).size(), Size { vcpus: 3, ..default });
        assert_eq!(size(Some(-1), Some((-1, 100_000))), default);
        let most = size(Some(i64::MAX), Some((i64::MAX, 1)));
        assert_eq!((most.vcpus, most.mem_mib), (32, 1_000_000));
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
