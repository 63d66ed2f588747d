//! A sandbox in the calling process: one machine, several containers, each from an OCI bundle.
//!
//! ```text
//! Sandbox::start: network namespace -> live share -> machine (one file server, the interfaces of the namespace) -> agent
//!   create: rootfs and volumes appear in the live share -> CreateContainer        (Created)
//!   start:  the first one configures the network -> StartProcess                  (Running, event)
//!   end of a process, or of the machine: last output, then one exit event         (Stopped, event)
//!   delete: DeleteContainer, mounts undone
//! Sandbox::shutdown, or the end of this process: machine, file server, TAPs and mounts are gone
//! ```
//!
//! Nothing is written but the run directory: mounts are made in a mount namespace of this process ([`private_mounts`]), TAPs and the
//! machine live as long as their descriptors. Whoever calls owns the ids and the bundles.
//!
//! Files: `live` (what the guest sees of the host's files), `mounts` (rootfs), `translate` (OCI specification of the host to that of
//! the guest), `netns` (interfaces, TAPs, redirection), `loopback` (port-forward), `io` (FIFOs and files), `logger`,
//! `process`, `container`, `upkeep`, `cgroup` (the host's), `machine`, `growth` (how large it is while it runs), `bays` (disks that come and
//! go), `disks` (a root of disks), `devices` (block devices of the host), `hooks`, `error`.

mod bays;
mod cgroup;
mod container;
mod devices;
mod disks;
mod error;
mod growth;
mod hooks;
mod io;
mod live;
mod logger;
mod loopback;
mod machine;
mod mounts;
mod netns;
mod process;
mod translate;
mod upkeep;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hyper_protocol::rpc::agent::{NextEventsRequest, sandbox_event};
use tokio::sync::watch;
use tokio::time::timeout;

use self::bays::Bays;
use self::container::PodContainer;
use self::growth::Growth;
use self::live::LiveShare;
use self::loopback::Forwarding;
use self::machine::{Machine, Started};
use self::netns::{HostNetwork, PodNetwork};
use crate::clock::Timestamp;
use crate::dirs::Parts;
use crate::launch::{Agent, context, scaled_ms};
use crate::sockets::HostSockets;
use crate::trace::traced;

pub use self::container::{BundleConfig, ContainerStatus};
pub use self::error::PodError;
pub use self::growth::GUEST_MIB;
pub use self::io::StdioPaths;
pub use self::live::clean;
pub use self::mounts::{RootMount, private_mounts};
pub use self::process::{ProcessExit, ProcessStatus};
pub use self::translate::check;

/// How long the VMM may take to say how the machine ended, after the agent's connection broke.
const END_MS: u64 = 5_000;
/// How long one request for events waits; the next one follows at once.
const EVENTS_WAIT_MS: u32 = 20_000;
/// How much longer its answer may take.
const EVENTS_SLACK_MS: u64 = 10_000;
/// Least time between two answers: a guest must not fill the host's logs.
const EVENTS_PAUSE: std::time::Duration = std::time::Duration::from_millis(200);
/// Requests in a row that the agent may leave without an answer, and the pause between them.
const MAX_SILENT: u32 = 2;
const SILENT_PAUSE_MS: u64 = 1_000;

/// What a sandbox is made of.
#[derive(Debug, Clone)]
pub struct SandboxSpec {
    /// Host name of the guest itself; containers have their own.
    pub hostname: String,
    /// Where sockets, logs and the shared directory are made. What a dead sandbox left there is removed; it goes with the sandbox.
    pub run_dir: PathBuf,
    /// vCPUs at first; there are more while containers may use more.
    pub vcpus: u8,
    /// Memory that the guest has at first, MiB; the same goes for it.
    pub mem_mib: u32,
    /// The network namespace that is joined to the guest; `None`: a new one, for somebody to configure before the first start.
    pub netns: Option<PathBuf>,
    /// More words for the guest kernel's command line.
    pub kernel_args: Vec<String>,
    /// Control group of the host that VMM and file server are counted in, as `linux.cgroupsPath` has it; empty: that of this process.
    pub cgroup: String,
    /// containerd's namespace, for loggers.
    pub namespace: String,
    /// How long the guest may take until its agent serves, ms; `None`: the usual minute.
    pub boot_timeout_ms: Option<u32>,
}

/// Something that happened to a container, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodEvent {
    /// The first process of a container runs.
    Started {
        /// The container.
        container: String,
    },
    /// A further process is known.
    ExecAdded {
        /// The container.
        container: String,
        /// The process.
        exec: String,
    },
    /// It runs.
    ExecStarted {
        /// The container.
        container: String,
        /// The process.
        exec: String,
    },
    /// A process has ended; an empty `exec` is the container's first.
    Exited {
        /// The container.
        container: String,
        /// The process.
        exec: String,
        /// How.
        exit: ProcessExit,
    },
    /// The kernel has killed a process of the container for want of memory.
    Oom {
        /// The container.
        container: String,
    },
    /// Its processes stand still.
    Paused {
        /// The container.
        container: String,
    },
    /// They go on.
    Resumed {
        /// The container.
        container: String,
    },
}

/// Where events go; called in their order, must not block.
pub type EventSink = Arc<dyn Fn(PodEvent) + Send + Sync>;

/// One machine and its containers. Start and use it on the thread that lives as long as the process: its network namespace changes, and
/// the machine dies with it.
pub struct Sandbox {
    machine: Machine,
    agent: Arc<Agent>,
    growth: Arc<Growth>,
    bays: Arc<Bays>,
    live: LiveShare,
    sockets: HostSockets,
    host: Arc<HostNetwork>,
    network: tokio::sync::Mutex<PodNetwork>,
    containers: Mutex<BTreeMap<String, Option<Arc<PodContainer>>>>,
    events: EventSink,
    /// Host name of the pod.
    hostname: Mutex<String>,
    /// The namespace's loopback is the guest's, if the host's kernel can do that.
    _forwarding: Option<Forwarding>,
    namespace: String,
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox").field("machine", &self.machine).finish_non_exhaustive()
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sandbox {
    /// Starts the machine; returns when its agent serves.
    ///
    /// # Errors
    /// A part that is missing, a namespace that cannot be entered, or a machine that does not come up; nothing is left then.
    pub async fn start(spec: SandboxSpec, parts: &Parts, events: EventSink) -> Result<Arc<Self>, PodError> {
        let Started { machine, agent, live, mut network, growth, bays, sockets } =
            Machine::start(&spec, parts).await?;
        let forwarding = network.loopback.take().and_then(|loopback| {
            loopback
                .serve(&agent)
                .inspect_err(|error| tracing::warn!(%error, "there will be no port-forward"))
                .ok()
        });
        let sandbox = Arc::new(Self {
            machine,
            agent,
            growth: Arc::new(growth),
            bays: Arc::new(bays),
            live,
            sockets,
            host: Arc::clone(&network.host),
            network: tokio::sync::Mutex::new(network),
            containers: Mutex::new(BTreeMap::new()),
            events,
            hostname: Mutex::default(),
            _forwarding: forwarding,
            namespace: spec.namespace,
        });
        tokio::spawn(watch_memory(Arc::downgrade(&sandbox)));
        Ok(sandbox)
    }

    /// Process id of the machine, which is in the network namespace that the guest is joined to.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.machine.pid()
    }

    /// Waits until the machine has ended, and says how.
    pub async fn ended(&self) -> String {
        until_ended(self.machine.ended()).await
    }

    /// Whether the agent answers.
    ///
    /// # Errors
    /// It does not, or the machine has ended.
    pub async fn ping(&self) -> Result<(), PodError> {
        let mut request = NextEventsRequest::new();
        request.timeout_ms = 0;
        let events =
            self.call("NextEvents", self.agent.rpc.next_events(crate::launch::call(), &request)).await?;
        self.report_memory(events.events);
        Ok(())
    }

    /// Ends the machine: by force when no container is left, for then nothing is left to be written; else in order if the guest can.
    /// Containers that still run are reported as killed.
    pub async fn shutdown(&self) {
        let orderly = !held(&self.containers).is_empty();
        self.machine.stop(orderly).await;
    }

    /// Ids of all containers.
    #[must_use]
    pub fn containers(&self) -> Vec<String> {
        held(&self.containers).keys().cloned().collect()
    }

    fn container(&self, id: &str) -> Result<Arc<PodContainer>, PodError> {
        let known = held(&self.containers).get(id).cloned();
        match known {
            Some(Some(container)) => Ok(container),
            // As runc's shim says it: those who ask early ask again when it is not found, and give up for any other reason.
            Some(None) => Err(PodError::NotFound(format!("container {id}, which is still being made"))),
            None => Err(PodError::NotFound(format!("container {id}"))),
        }
    }

    /// The answer to a request, unless the machine ends first.
    async fn call<T>(
        &self,
        call: &'static str,
        answer: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, PodError> {
        let answer = traced(&self.agent, call, answer);
        let answer = tokio::select! {
            biased;
            end = self.ended() => return Err(PodError::Ended(end)),
            answer = answer => answer,
        };
        match answer {
            Err(error) if !matches!(error, ttrpc::Error::RpcStatus(_)) => {
                // The connection breaks before the VMM says how the machine ended.
                match timeout(scaled_ms(END_MS), self.ended()).await {
                    Ok(end) => Err(PodError::Ended(end)),
                    Err(_) => Err(PodError::of_agent(call, error)),
                }
            }
            answer => answer.map_err(|error| PodError::of_agent(call, error)),
        }
    }

    fn report_memory(&self, events: Vec<hyper_protocol::rpc::agent::SandboxEvent>) {
        // One of a kind says it all, however many a guest sends.
        let mut told = BTreeSet::new();
        for event in events {
            if !told.insert(event.container_id.clone()) {
                continue;
            }
            let known = held(&self.containers).get(&event.container_id).cloned().flatten();
            if let Some(container) = known
                && event.kind.enum_value() == Ok(sandbox_event::Kind::OOM)
            {
                container.memory_told.store(true, Ordering::SeqCst);
                (self.events)(PodEvent::Oom { container: event.container_id });
            }
        }
    }
}

async fn until_ended(mut ended: watch::Receiver<Option<String>>) -> String {
    match ended.wait_for(Option::is_some).await {
        Ok(end) => end.clone().unwrap_or_default(),
        Err(_) => "the virtual machine has ended".to_owned(),
    }
}

/// Asks for the guest's events until the machine ends. An agent that does not answer cannot be asked for the end of anything: its machine
/// is ended.
async fn watch_memory(sandbox: std::sync::Weak<Sandbox>) {
    let request = NextEventsRequest { timeout_ms: EVENTS_WAIT_MS, ..Default::default() };
    let mut silent = 0;
    loop {
        let Some(agent) = sandbox.upgrade().map(|sandbox| Arc::clone(&sandbox.agent)) else { return };
        let limit = std::time::Duration::from_millis(EVENTS_WAIT_MS.into()) + scaled_ms(EVENTS_SLACK_MS);
        let answer = agent.rpc.next_events(context(Some(limit)), &request).await;
        drop(agent);
        let Some(sandbox) = sandbox.upgrade() else { return };
        match answer {
            Ok(answer) => {
                silent = 0;
                sandbox.report_memory(answer.events);
                drop(sandbox);
                tokio::time::sleep(EVENTS_PAUSE).await;
            }
            Err(error) => {
                // The connection breaks before the VMM says how the machine ended.
                if timeout(scaled_ms(END_MS), sandbox.ended()).await.is_ok() {
                    return;
                }
                tracing::warn!(%error, "the agent does not answer");
                silent += 1;
                if silent == MAX_SILENT {
                    sandbox.machine.stop(false).await;
                    return;
                }
                drop(sandbox);
                tokio::time::sleep(scaled_ms(SILENT_PAUSE_MS)).await;
            }
        }
    }
}

fn now() -> Timestamp {
    Timestamp::now()
}
