//! The action `start`: finds the shim of the container's pod, or starts one, and says where it listens.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use containerd_shim::Flags;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci::Options;
use protobuf::Message;

use crate::bundle::Bundle;
use crate::{ShimError, socket_of};

/// The highest version of the Task API that containerd speaks; not set before 1.7.
const MAX_VERSION: &str = "MAX_SHIM_VERSION";
/// The highest version that we speak.
const NEWEST_VERSION: u32 = 3;
/// Largest options of a runtime, bytes.
const MAX_OPTIONS_BYTES: u64 = 1 << 20;
/// What of a root's mounts is left to the runtime, from containerd 2.4 on; before, [`crate::info`] says it. The message
/// `containerd.types.MountCapabilities` with the types `erofs` and the transforms `format` and `mkdir`, encoded, in base 64.
const MOUNT_CAPABILITIES: (&str, &str) =
    ("type.googleapis.com/containerd.types.MountCapabilities", "CgVlcm9mcxIGZm9ybWF0EgVta2Rpcg==");
/// Longest last words of a shim that did not start, bytes.
const MAX_WORDS_BYTES: u64 = 16 * 1024;

/// Returns what containerd is to be told.
pub(crate) fn run(flags: &Flags) -> Result<String, ShimError> {
    let bundle = std::env::current_dir().map_err(ShimError::io("find", "the bundle"))?;
    // A sandbox of the Sandbox API has no specification of its own.
    let group = match Bundle::read(&bundle) {
        Ok(bundle) => bundle.sandbox_id().unwrap_or(&flags.id).to_owned(),
        Err(crate::bundle::BundleError::Read { source, .. })
            if source.kind() == std::io::ErrorKind::NotFound =>
        {
            flags.id.clone()
        }
        Err(error) => return Err(error.into()),
    };
    let socket = socket_of(flags, &group);
    let path = socket.strip_prefix("unix://").unwrap_or(&socket);
    if UnixStream::connect(path).is_err() {
        // Nobody listens: what is there belonged to a shim that has died.
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(ShimError::io("remove", path)(error));
            }
            _ => {}
        }
        spawn(flags, &group, &socket)?;
    }
    // containerd 1 finds the shim by this file when it is started again.
    let file = bundle.join("address");
    std::fs::write(&file, &socket).map_err(ShimError::io("write", file.display().to_string()))?;
    Ok(answer(&socket, std::env::var(MAX_VERSION).ok().as_deref()))
}

/// The address alone, or parameters as JSON for who understands them.
fn answer(socket: &str, max_version: Option<&str>) -> String {
    let version: u32 = max_version.and_then(|text| text.parse().ok()).unwrap_or_default();
    if version < 2 {
        return socket.to_owned();
    }
    let version = version.min(NEWEST_VERSION);
    let (type_url, value) = MOUNT_CAPABILITIES;
    let extensions = [serde_json::json!({ "value": { "type_url": type_url, "value": value } })];
    serde_json::json!({ "version": version, "address": socket, "protocol": "ttrpc", "extensions": extensions })
        .to_string()
}

/// Starts the pod's shim and waits until it listens.
fn spawn(flags: &Flags, group: &str, socket: &str) -> Result<(), ShimError> {
    let exe = std::env::current_exe().map_err(ShimError::io("find", "this program"))?;
    let mut command = Command::new(exe);
    command
        .args(["-namespace", &flags.namespace, "-id", group, "-address", &flags.address, "-socket", socket])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    if flags.debug {
        command.arg("-debug");
    }
    let mut child = command.spawn().map_err(ShimError::io("start", "the pod's shim"))?;
    if let Err(error) = place(child.id()) {
        tracing::debug!(%error, "the shim stays in its cgroup");
    }
    let mut words = String::new();
    if let Some(out) = child.stdout.take() {
        // Its end says that the shim listens, or that it is gone.
        let read = out.take(MAX_WORDS_BYTES).read_to_string(&mut words);
        read.map_err(ShimError::io("hear from", "the pod's shim"))?;
    }
    let listens = Path::new(socket.strip_prefix("unix://").unwrap_or(socket)).exists();
    if words.is_empty() && listens { Ok(()) } else { Err(ShimError::NotStarted(words.trim().to_owned())) }
}

/// Puts the shim where runc's options, which containerd may have written to our standard input, say that shims are. Options of other
/// runtimes number their fields differently.
fn place(pid: u32) -> Result<(), String> {
    let mut bytes = Vec::new();
    let read = std::io::stdin().take(MAX_OPTIONS_BYTES).read_to_end(&mut bytes);
    read.map_err(|error| error.to_string())?;
    let any = Any::parse_from_bytes(&bytes).map_err(|error| error.to_string())?;
    if any.type_url.rsplit('/').next() == Some("containerd.runc.v1.Options") {
        let options = Options::parse_from_bytes(&any.value).map_err(|error| error.to_string())?;
        if !options.shim_cgroup.is_empty() {
            let placed = containerd_shim::cgroup::add_task_to_cgroup(&options.shim_cgroup, pid);
            placed.map_err(|error| error.to_string())?;
        }
    }
    containerd_shim::cgroup::adjust_oom_score(pid).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_and_new_containerds_are_answered_in_their_words() {
        assert_eq!(answer("unix:///run/x", None), "unix:///run/x");
        let parsed = |max: &str| -> serde_json::Value {
            serde_json::from_str(&answer("unix:///run/x", Some(max))).unwrap()
        };
        assert_eq!(parsed("2")["version"], 2);
        assert_eq!(parsed("9")["version"], 3);
        let parsed = parsed("3");
        assert_eq!((&parsed["version"], &parsed["address"]), (&3.into(), &"unix:///run/x".into()));
        assert_eq!(parsed["protocol"], "ttrpc");
        assert_eq!(parsed["extensions"][0]["value"]["type_url"], MOUNT_CAPABILITIES.0);
    }
}
