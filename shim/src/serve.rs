//! The pod's shim: listens, serves until containerd wants no more of it, and ends the machine.

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use containerd_shim::Flags;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use containerd_shim_protos::ttrpc::r#async::Server;
use containerd_shim_protos::ttrpc::r#async::transport::Listener;
use hyper_sandbox::Dirs;
use rustix::stdio::{dup2_stderr, dup2_stdout};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use crate::ShimError;
use crate::bundle::Bundle;
use crate::config::Config;
use crate::publish::Publisher;
use crate::sandbox::SandboxService;
use crate::service::Service;
use crate::task::TaskService;
use crate::trace::Tracing;

const TASK_V2: &str = "containerd.task.v2.Task";
const TASK_V3: &str = "containerd.task.v3.Task";
/// How long the last answers may take.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
/// Digits of the socket's name that name the run directory: paths of sockets in it are short.
const NAME_DIGITS: usize = 32;

/// The directory of a pod's sockets and logs; the socket's name is a digest of containerd's address, namespace and pod.
pub(crate) fn run_dir(socket: &str) -> PathBuf {
    let name = socket.rsplit('/').next().unwrap_or("pod");
    Dirs::from_env().run.join("pods").join(name.get(..NAME_DIGITS).unwrap_or(name))
}

/// Serves; returns when the pod is gone.
pub(crate) fn run(flags: &Flags) -> Result<(), ShimError> {
    let ttrpc = std::env::var("TTRPC_ADDRESS").map_err(|_| ShimError::Environment("TTRPC_ADDRESS"))?;
    let bundle = std::env::current_dir().map_err(ShimError::io("find", "the bundle"))?;
    // A session of our own. It fails only if we lead one already.
    let _ = rustix::process::setsid();
    // Before there is a second thread.
    hyper_sandbox::pod::private_mounts()?;
    let options = crate::options::kept(&bundle);
    // Before this thread enters the network of the pod.
    let tracing = start_tracing(flags, &bundle, options.as_ref());
    crate::log::start(&bundle, flags, tracing.as_ref().ok().and_then(Option::as_ref));
    let tracing = tracing.unwrap_or_else(|why| {
        // A pod without traces is better than none.
        tracing::warn!(why, "no spans are exported");
        None
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(ShimError::io("start", "the runtime"))?;
    // One thread: every line of the log is in this span, with the pod's id.
    let pod = tracing::info_span!("pod", id = flags.id, namespace = flags.namespace);
    let is_traced = tracing.is_some();
    pod.in_scope(|| {
        let served = runtime.block_on(serve(flags, &ttrpc, options, is_traced));
        if let Some(tracing) = tracing {
            tracing.finish();
        }
        served
    })
}

/// The way to the collector that the handler's configuration or the environment names. Mistakes in a configuration are told to who wants
/// a container.
fn start_tracing(flags: &Flags, bundle: &Path, options: Option<&Any>) -> Result<Option<Tracing>, String> {
    let config = Config::load(options, &BTreeMap::new()).unwrap_or_default();
    let annotations = Bundle::read(bundle).unwrap_or_default().annotations();
    Tracing::start(config.otlp_endpoint.as_deref(), flags, &annotations)
}

async fn serve(flags: &Flags, ttrpc: &str, options: Option<Any>, is_traced: bool) -> Result<(), ShimError> {
    let path = flags.socket.strip_prefix("unix://").unwrap_or(&flags.socket);
    if let Some(folder) = Path::new(path).parent() {
        std::fs::create_dir_all(folder).map_err(ShimError::io("make", folder.display().to_string()))?;
    }
    let listener = UnixListener::bind(path).map_err(ShimError::io("listen on", path))?;
    let undo = Socket(path.into());
    let listener = Listener::try_from(listener).map_err(ShimError::io("listen on", path))?;
    let (publisher, delivery) = Publisher::start(ttrpc, &flags.namespace);
    let service = Arc::new(Service::new(run_dir(&flags.socket), options, publisher));
    let mut tasks = create_task(Arc::new(TaskService(Arc::clone(&service))));
    // The messages of version 3 are those of version 2.
    let again = create_task(Arc::new(TaskService(Arc::clone(&service))));
    tasks.extend(again.into_iter().map(|(name, methods)| match name.as_str() {
        TASK_V2 => (TASK_V3.to_owned(), methods),
        _ => (name, methods),
    }));
    tasks.extend(create_sandbox(Arc::new(SandboxService::new(Arc::clone(&service)))));
    if is_traced {
        tasks = crate::trace::continued(tasks);
    }
    let mut server = Server::new().add_listener(listener).register_service(tasks);
    server.start().await?;
    let ignored = tokio::spawn(ignore_signals());
    quiet()?;
    tracing::info!("serving");
    service.done().await;
    tracing::info!("ending");
    drop(undo);
    if is_traced {
        Tracing::settle().await;
    }
    service.end().await;
    match timeout(CLOSE_LIMIT, server.shutdown()).await {
        Ok(Ok(())) => {}
        other => tracing::debug!(?other, "connections are cut"),
    }
    ignored.abort();
    drop((server, service));
    delivery.finish().await;
    Ok(())
}

/// The name of our socket.
struct Socket(PathBuf);

impl Drop for Socket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "undo failed");
        }
    }
}

/// Lets go of standard output, by which whoever started us knows that we serve.
fn quiet() -> Result<(), ShimError> {
    let fail = ShimError::io("open", "/dev/null");
    let null = std::fs::OpenOptions::new().write(true).open("/dev/null").map_err(fail)?;
    dup2_stdout(&null)
        .and_then(|()| dup2_stderr(&null))
        .map_err(|errno| ShimError::io("let go of", "standard output")(errno.into()))
}

/// Ends come by Shutdown: a signal to all of a service's processes must not take the pods with it.
async fn ignore_signals() {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return;
    };
    loop {
        let name = tokio::select! {
            _ = term.recv() => "SIGTERM",
            _ = int.recv() => "SIGINT",
        };
        tracing::info!(name, "ignored");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_short_enough_for_sockets() {
        let socket = format!("unix:///run/containerd/s/{}", "a".repeat(64));
        let dir = run_dir(&socket);
        assert!(dir.ends_with(format!("pods/{}", "a".repeat(32))));
    }
}
