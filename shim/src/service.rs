//! What the services share: the pod's sandbox, its events, and the wish to end.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use containerd_shim_protos::events::task::{
    TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::ttrpc::{self, Code};
use hyper_sandbox::Parts;
use hyper_sandbox::pod::{EventSink, PodEvent, Sandbox, SandboxSpec};
use tokio::sync::{Mutex, Notify};

use crate::bundle::Bundle;
use crate::config::{Config, Size};
use crate::publish::Publisher;
use crate::{encode, status};

/// What a machine is to be.
#[derive(Debug, Clone)]
pub(crate) struct Wish {
    pub(crate) netns: Option<PathBuf>,
    /// Of the host; empty: the shim's.
    pub(crate) cgroup: String,
    pub(crate) size: Size,
    pub(crate) config: Config,
}

/// The pod.
pub(crate) struct Service {
    run_dir: PathBuf,
    /// Of the runtime's handler, as they were when the shim was started.
    pub(crate) options: Option<Any>,
    pub(crate) publisher: Publisher,
    sandbox: Mutex<Option<Arc<Sandbox>>>,
    /// Of the machine, once it was started.
    pid: Arc<AtomicU32>,
    /// The pod's life is governed by the Sandbox API, not by that of its containers.
    has_sandbox: AtomicBool,
    done: Notify,
}

/// Whoever waits for a container to be made.
pub(crate) struct Caller<'s> {
    service: &'s Service,
    answered: bool,
}

impl Caller<'_> {
    /// The outcome reaches the caller, who does what follows.
    pub(crate) fn answered(mut self) {
        self.answered = true;
    }
}

impl Drop for Caller<'_> {
    fn drop(&mut self) {
        if !self.answered {
            self.service.finish_if_empty();
        }
    }
}

impl Service {
    pub(crate) fn new(run_dir: PathBuf, options: Option<Any>, publisher: Publisher) -> Self {
        Self {
            run_dir,
            options,
            publisher,
            sandbox: Mutex::new(None),
            pid: Arc::default(),
            has_sandbox: AtomicBool::new(false),
            done: Notify::new(),
        }
    }

    /// The sandbox, started for this container if it is the pod's first. What the container's annotations ask for is checked in any case.
    pub(crate) async fn sandbox_for(
        &self,
        id: &str,
        bundle: &Bundle,
        options: Option<&Any>,
    ) -> ttrpc::Result<Arc<Sandbox>> {
        let config = Config::load(options, &bundle.annotations()).map_err(status::of_config)?;
        let size = bundle.size(&config).map_err(status::of_config)?;
        let cgroup = bundle.cgroup().to_owned();
        self.start(id, Wish { netns: bundle.netns(), cgroup, size, config }).await
    }

    /// The sandbox, started if it is not there.
    pub(crate) async fn start(&self, id: &str, wish: Wish) -> ttrpc::Result<Arc<Sandbox>> {
        let mut place = self.sandbox.lock().await;
        if let Some(sandbox) = place.as_ref() {
            return Ok(Arc::clone(sandbox));
        }
        let Wish { netns, cgroup, size, config } = wish;
        let mut parts = Parts::locate().map_err(|error| status::of_pod(error.into()))?;
        parts.kernel = config.kernel.unwrap_or(parts.kernel);
        parts.initramfs = config.initramfs.unwrap_or(parts.initramfs);
        if let Some(level) = &config.log_level {
            crate::log::set_level(level);
        }
        // A guest's own name is seen by nobody but its kernel's log.
        let hostname = id.chars().filter(char::is_ascii_alphanumeric).take(12).collect();
        let spec = SandboxSpec {
            hostname,
            run_dir: self.run_dir.clone(),
            vcpus: size.vcpus,
            mem_mib: size.mem_mib,
            netns,
            kernel_args: Vec::new(),
            namespace: self.publisher.namespace().to_owned(),
            boot_timeout_ms: config.boot_timeout_ms,
            cgroup,
        };
        tracing::info!(id, vcpus = size.vcpus, mem_mib = size.mem_mib, "starting the machine");
        let sandbox = Sandbox::start(spec, &parts, self.sink()).await.map_err(status::of_pod)?;
        self.pid.store(sandbox.pid(), Ordering::SeqCst);
        if config.metrics
            && let Err(error) = crate::metrics::serve(Arc::downgrade(&sandbox), &self.run_dir)
        {
            // A pod without metrics is better than none.
            tracing::warn!(%error, "no metrics");
        }
        *place = Some(Arc::clone(&sandbox));
        Ok(sandbox)
    }

    /// The sandbox, if there is one.
    pub(crate) async fn sandbox(&self) -> ttrpc::Result<Arc<Sandbox>> {
        let sandbox = self.sandbox.lock().await.clone();
        sandbox.ok_or_else(|| status::status(Code::NOT_FOUND, "the pod has no machine: not found"))
    }

    /// Process id of the machine, which stands for all processes in it; 0 when there is none.
    pub(crate) fn pid(&self) -> u32 {
        self.pid.load(Ordering::SeqCst)
    }

    /// Whether containers are left.
    pub(crate) async fn is_empty(&self) -> bool {
        self.sandbox.lock().await.as_ref().is_none_or(|sandbox| sandbox.containers().is_empty())
    }

    /// From now on the end of the last container is not the end of the pod.
    pub(crate) fn keep(&self) {
        self.has_sandbox.store(true, Ordering::SeqCst);
    }

    /// Whether it is.
    pub(crate) fn is_kept(&self) -> bool {
        self.has_sandbox.load(Ordering::SeqCst)
    }

    /// A watch over the making of a container: dropped before it is told the outcome, its caller has gone. containerd 1.6, started anew,
    /// knows nothing of a pod that it had just begun, so nobody would ever end a shim that has nothing else.
    pub(crate) fn caller(&self) -> Caller<'_> {
        Caller { service: self, answered: false }
    }

    /// Ends the shim if it has no container and makes none.
    fn finish_if_empty(&self) {
        let Ok(sandbox) = self.sandbox.try_lock() else { return };
        if !self.is_kept() && sandbox.as_ref().is_none_or(|sandbox| sandbox.containers().is_empty()) {
            tracing::info!("whoever asked for a container has gone, and there is no other");
            self.finish();
        }
    }

    /// The shim is to end.
    pub(crate) fn finish(&self) {
        self.done.notify_one();
    }

    /// Waits until it is to end.
    pub(crate) async fn done(&self) {
        self.done.notified().await;
    }

    /// Ends the machine.
    pub(crate) async fn end(&self) {
        let sandbox = self.sandbox.lock().await.take();
        if let Some(sandbox) = sandbox {
            sandbox.shutdown().await;
        }
    }

    fn sink(&self) -> EventSink {
        let (publisher, pid) = (self.publisher.clone(), Arc::clone(&self.pid));
        Arc::new(move |event| publish(&publisher, event, pid.load(Ordering::SeqCst)))
    }
}

fn publish(publisher: &Publisher, event: PodEvent, pid: u32) {
    match event {
        PodEvent::Started { container } => {
            let event = TaskStart { container_id: container, pid, ..Default::default() };
            publisher.publish("/tasks/start", &event);
        }
        PodEvent::ExecAdded { container, exec } => {
            let event = TaskExecAdded { container_id: container, exec_id: exec, ..Default::default() };
            publisher.publish("/tasks/exec-added", &event);
        }
        PodEvent::ExecStarted { container, exec } => {
            let event = TaskExecStarted { container_id: container, exec_id: exec, pid, ..Default::default() };
            publisher.publish("/tasks/exec-started", &event);
        }
        PodEvent::Exited { container, exec, exit } => {
            // The first process has its container's id.
            let id = if exec.is_empty() { container.clone() } else { exec };
            let event = TaskExit {
                container_id: container,
                id,
                pid,
                exit_status: exit.code,
                exited_at: encode::time(exit.at),
                ..Default::default()
            };
            publisher.publish("/tasks/exit", &event);
        }
        PodEvent::Oom { container } => {
            publisher.publish("/tasks/oom", &TaskOOM { container_id: container, ..Default::default() });
        }
        PodEvent::Paused { container } => {
            publisher.publish("/tasks/paused", &TaskPaused { container_id: container, ..Default::default() });
        }
        PodEvent::Resumed { container } => {
            publisher
                .publish("/tasks/resumed", &TaskResumed { container_id: container, ..Default::default() });
        }
    }
}
