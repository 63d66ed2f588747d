//! The action `start`: finds the shim of the container's pod, or starts one, and says where it listens.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use containerd_shim::Flags;

use crate::bundle::Bundle;
use crate::{ShimError, socket_of};

/// The highest version of the Task API that containerd speaks; not set before 1.7.
const MAX_VERSION: &str = "MAX_SHIM_VERSION";
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
    if version < 3 {
        return socket.to_owned();
    }
    serde_json::json!({ "version": 3, "address": socket, "protocol": "ttrpc" }).to_string()
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
    // What containerd wrote to our standard input may name a cgroup for shims.
    if let Err(error) = containerd_shim::cgroup::set_cgroup_and_oom_score(child.id()) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_and_new_containerds_are_answered_in_their_words() {
        assert_eq!(answer("unix:///run/x", None), "unix:///run/x");
        assert_eq!(answer("unix:///run/x", Some("2")), "unix:///run/x");
        let parsed: serde_json::Value = serde_json::from_str(&answer("unix:///run/x", Some("3"))).unwrap();
        assert_eq!(parsed["version"], 3);
        assert_eq!(parsed["protocol"], "ttrpc");
    }
}
