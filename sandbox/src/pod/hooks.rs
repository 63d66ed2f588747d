//! Hooks of the OCI specification that run on the host: in the network namespace of the host, with the machine's process as the
//! container's, so that who finds the pod's network by it finds the namespace that the guest is joined to.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::PodError;
use super::netns::HostNetwork;
use crate::launch::scaled_ms;

/// Most hooks of one kind.
const MAX_HOOKS: usize = 32;
/// How long a hook without a limit of its own may take.
const HOOK_MS: u64 = 60_000;
/// Longest limit of its own, seconds.
const MAX_TIMEOUT_S: u64 = 600;
/// Longest last words that are kept, bytes.
const MAX_WORDS_BYTES: u64 = 4096;
/// Kinds that run in the container's namespaces, which are in the guest.
const GUEST_KINDS: [&str; 2] = ["createContainer", "startContainer"];

/// When hooks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    /// The container is made, its first process is not started.
    Create,
    /// It runs.
    Started,
    /// It is gone.
    Stopped,
}

impl Moment {
    fn kinds(self) -> &'static [&'static str] {
        match self {
            Self::Create => &["prestart", "createRuntime"],
            Self::Started => &["poststart"],
            Self::Stopped => &["poststop"],
        }
    }

    fn status(self) -> &'static str {
        match self {
            Self::Create => "creating",
            Self::Started => "running",
            Self::Stopped => "stopped",
        }
    }
}

/// One program.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hook {
    path: String,
    args: Vec<String>,
    env: Vec<(String, String)>,
    limit: Duration,
}

/// The hooks of a container.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Hooks {
    all: Vec<(String, Hook)>,
    annotations: Value,
}

impl Hooks {
    /// Reads them from a specification.
    pub(super) fn parse(spec: &Value) -> Result<Self, PodError> {
        let mut hooks =
            Self { all: Vec::new(), annotations: spec.get("annotations").cloned().unwrap_or_default() };
        for (kind, list) in spec.get("hooks").and_then(Value::as_object).into_iter().flatten() {
            let list = list.as_array().map(Vec::as_slice).unwrap_or_default();
            if GUEST_KINDS.contains(&kind.as_str()) && !list.is_empty() {
                return Err(PodError::Unsupported(format!("a hook of kind {kind}")));
            }
            if list.len() > MAX_HOOKS {
                return Err(PodError::Exhausted(format!("{kind} hooks: at most {MAX_HOOKS}")));
            }
            for one in list {
                hooks.all.push((kind.clone(), hook(one)?));
            }
        }
        Ok(hooks)
    }

    /// Runs those of a moment, in order.
    pub(super) async fn run(
        &self,
        moment: Moment,
        (id, pid, bundle): (&str, u32, &Path),
        host: &HostNetwork,
    ) -> Result<(), PodError> {
        let state = json!({
            "ociVersion": "1.0.2", "id": id, "status": moment.status(), "pid": pid,
            "bundle": bundle, "annotations": self.annotations,
        });
        for kind in moment.kinds() {
            for (_, hook) in self.all.iter().filter(|(have, _)| have == kind) {
                hook.run(state.to_string().as_bytes(), host).await?;
            }
        }
        Ok(())
    }
}

fn hook(one: &Value) -> Result<Hook, PodError> {
    let texts = |name: &str| {
        let list = one.get(name).and_then(Value::as_array).into_iter().flatten();
        list.filter_map(Value::as_str).map(str::to_owned).collect::<Vec<_>>()
    };
    let path = one.get("path").and_then(Value::as_str).unwrap_or_default();
    if !path.starts_with('/') {
        return Err(PodError::Invalid(format!("the path {path:?} of a hook is not absolute")));
    }
    let env = texts("env")
        .iter()
        .filter_map(|e| e.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())))
        .collect();
    let limit = one.get("timeout").and_then(Value::as_u64).filter(|seconds| *seconds > 0);
    let limit = limit.map_or(scaled_ms(HOOK_MS), |seconds| Duration::from_secs(seconds.min(MAX_TIMEOUT_S)));
    Ok(Hook { path: path.to_owned(), args: texts("args"), env, limit })
}

impl Hook {
    fn spawn(&self) -> std::io::Result<Child> {
        let mut command = Command::new(&self.path);
        if let Some((first, rest)) = self.args.split_first() {
            command.arg0(first).args(rest);
        }
        command
            .env_clear()
            .envs(self.env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
    }

    async fn run(&self, state: &[u8], host: &HostNetwork) -> Result<(), PodError> {
        let fail = |what: String| PodError::State(format!("hook {}: {what}", self.path));
        let spawned = host.within(|| self.spawn())?;
        let mut child = spawned.map_err(|error| fail(error.to_string()))?;
        let run = async {
            if let Some(mut stdin) = child.stdin.take() {
                // A hook that does not read it needs no state.
                let _ = stdin.write_all(state).await;
            }
            let mut words = Vec::new();
            if let Some(stderr) = child.stderr.take() {
                let mut stderr = stderr.take(MAX_WORDS_BYTES);
                let _ = stderr.read_to_end(&mut words).await;
                // What it says beyond that is read and dropped.
                tokio::io::copy(&mut stderr.into_inner(), &mut tokio::io::sink()).await?;
            }
            Ok::<_, std::io::Error>((child.wait().await?, words))
        };
        let (status, words) = timeout(self.limit, run)
            .await
            .map_err(|_| fail("it takes too long".into()))?
            .map_err(|error| fail(error.to_string()))?;
        if status.success() {
            return Ok(());
        }
        let words = String::from_utf8_lossy(&words);
        Err(fail(format!("{status}: {}", words.trim())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(kind: &str, script: &str) -> Result<Hooks, PodError> {
        let hook = json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["A=b"], "timeout": 5 });
        Hooks::parse(&json!({ "hooks": { kind: [hook] }, "annotations": { "k": "v" } }))
    }

    #[test]
    fn hooks_that_belong_into_the_container_are_refused() {
        assert!(matches!(hooks("startContainer", "true"), Err(PodError::Unsupported(_))));
        assert!(matches!(
            Hooks::parse(&json!({"hooks": {"prestart": [{"path": "x"}]}})),
            Err(PodError::Invalid(_))
        ));
        assert_eq!(Hooks::parse(&json!({})).unwrap(), Hooks::default());
    }

    #[tokio::test]
    async fn hooks_are_told_the_state_and_their_failure_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("state");
        let host = HostNetwork::current().unwrap();
        let about = ("c1", 7, dir.path());
        let good = hooks("prestart", &format!("cat >{}; test $A = b", out.display())).unwrap();
        // Where namespaces may not be entered, nothing of this runs.
        if matches!(good.run(Moment::Create, about, &host).await, Err(PodError::Failed(_))) {
            return;
        }
        let state: Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
        assert_eq!(
            (&state["pid"], &state["status"], &state["annotations"]["k"]),
            (&json!(7), &json!("creating"), &json!("v"))
        );
        let bad = hooks("poststart", "echo no such network >&2; exit 3").unwrap();
        bad.run(Moment::Create, about, &host).await.unwrap();
        let error = bad.run(Moment::Started, about, &host).await.unwrap_err().to_string();
        assert!(error.contains("no such network") && error.contains("/bin/sh"), "{error}");
    }
}
