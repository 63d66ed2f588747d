//! What is done with containers and their processes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use hyper_protocol::rpc::agent::{
    ContainerRef, CreateContainerRequest, CreateProcessRequest, Mount, ProcessRef, ResizeTerminalRequest,
    SharedMemorySource, SignalProcessRequest, Stdio, mount,
};
use protobuf::MessageField;
use serde_json::Value;
use tokio::time::timeout;

use super::bays::BayDisk;
use super::growth::Claimed;
use super::hooks::{Hooks, Moment};
use super::io::{Ends, Input, StdioPaths};
use super::live::LiveMount;
use super::logger::Whose;
use super::mounts::RootMount;
use super::process::{Inner, Phase, Process, ProcessExit, ProcessStatus, Surroundings, watch_over};
use super::translate::{self, Translated, Volume};
use super::{PodError, PodEvent, Sandbox, held};
use crate::launch::{call, context, scaled_ms};
use crate::sockets::Offer;

/// How long making a container may take: the agent may copy what an image has at a volume's place.
const CREATE_MS: u64 = 60_000;
/// How long the end of a container that is deleted before it ran may take.
const DELETED_MS: u64 = 10_000;
/// Most processes of one container that were added and not deleted.
const MAX_EXECS: usize = 512;

/// A container, as a bundle has it.
#[derive(Debug, Clone, Default)]
pub struct BundleConfig {
    /// Its id.
    pub id: String,
    /// Directory of the bundle.
    pub bundle: PathBuf,
    /// Content of its `config.json`.
    pub config: Vec<u8>,
    /// What its root is made of; nothing: the directory that the specification names.
    pub rootfs: Vec<RootMount>,
    /// Streams of its first process.
    pub stdio: StdioPaths,
}

/// What is known of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerStatus {
    /// What it does.
    pub status: ProcessStatus,
    /// How it ended.
    pub exit: Option<ProcessExit>,
    /// Directory of the bundle.
    pub bundle: PathBuf,
    /// Its streams.
    pub stdio: StdioPaths,
}

/// A container.
#[derive(Debug)]
pub(super) struct PodContainer {
    pub(super) id: String,
    bundle: PathBuf,
    processes: Mutex<BTreeMap<String, Arc<Process>>>,
    pub(super) paused: Mutex<bool>,
    /// That it lacked memory was reported.
    pub(super) memory_told: AtomicBool,
    hooks: Hooks,
    /// Its root and volumes; undone with it.
    _mounts: Vec<Arc<LiveMount>>,
    /// Its disks, let go of with it.
    _disks: Vec<BayDisk>,
    /// Sockets of the host that it may connect to.
    _offers: Vec<Offer>,
}

impl PodContainer {
    fn process(&self, exec: &str) -> Result<Arc<Process>, PodError> {
        let process = held(&self.processes).get(exec).cloned();
        process.ok_or_else(|| PodError::NotFound(format!("process {exec} of container {}", self.id)))
    }

    /// Waits until all but the first process have ended, those that have begun.
    pub(super) async fn others_ended(&self) {
        let others: Vec<_> = held(&self.processes).values().filter(|p| !p.exec.is_empty()).cloned().collect();
        for other in others {
            if matches!(other.phase(), Phase::Running | Phase::Created) {
                // The sender lives as long as we hold it.
                let _ = other.exits().wait_for(Option::is_some).await;
            }
        }
    }
}

/// An id that is taken until the container is there, or given back.
struct Reservation<'a> {
    sandbox: &'a Sandbox,
    id: Option<String>,
}

impl Reservation<'_> {
    fn fill(mut self, container: &Arc<PodContainer>) {
        if let Some(id) = self.id.take() {
            held(&self.sandbox.containers).insert(id, Some(Arc::clone(container)));
        }
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            held(&self.sandbox.containers).remove(id);
        }
    }
}

impl Sandbox {
    fn reserve(&self, id: &str) -> Result<Reservation<'_>, PodError> {
        let mut containers = held(&self.containers);
        if containers.contains_key(id) {
            return Err(PodError::Exists(format!("container {id}")));
        }
        containers.insert(id.to_owned(), None);
        Ok(Reservation { sandbox: self, id: Some(id.to_owned()) })
    }

    /// What the loggers of a process are told; `id` is that of the process, or of the container for its first one.
    fn whose<'a>(&'a self, id: &'a str) -> Whose<'a> {
        Whose { id, namespace: &self.namespace, host: &self.host }
    }

    fn around(&self) -> Surroundings {
        Surroundings {
            agent: Arc::clone(&self.agent),
            ended: self.machine.ended(),
            events: Arc::clone(&self.events),
        }
    }

    /// Makes a container and its first process, ready to start. `announce` is called when it is there, before its end can be reported.
    ///
    /// # Errors
    /// The id is taken, the specification asks for what cannot be had, or something of it failed; nothing is left then.
    pub async fn create(&self, wish: BundleConfig, announce: impl FnOnce()) -> Result<(), PodError> {
        let reservation = self.reserve(&wish.id)?;
        let pod_hostname = held(&self.hostname).clone();
        let translated = translate::container(&wish.config, &wish.bundle, &pod_hostname)?;
        let ends = Ends::open(&wish.stdio)?;
        let claimed = Claimed::new(&self.growth, &wish.id, translated.claim);
        self.fit_or_warn().await;
        let mut request = CreateContainerRequest { container_id: wish.id.clone(), ..Default::default() };
        let mut mounts = Vec::new();
        let mut disks = self.add_root(&wish, &translated, &mut request, &mut mounts).await?;
        for device in &translated.devices {
            let disk = self.attach_device(device).await?;
            request.block_devices.push(device.in_guest(&disk));
            disks.push(disk);
        }
        request.disks = disks.iter().map(BayDisk::attached).collect();
        let offers = self.add_volumes(&translated, &mut request, &mut mounts)?;
        if let Some(other) = translated.pid_namespace_of.filter(|other| *other != wish.id)
            && held(&self.containers).contains_key(&other)
        {
            request.pid_namespace_of = other;
        }
        if let Some(other) = translated.ipc_namespace_of.filter(|other| *other != wish.id)
            && held(&self.containers).contains_key(&other)
        {
            request.ipc_namespace_of = other;
        }
        let size = translated.size;
        let mut stdio = sized(size);
        let mut pumps = ends.connect(&self.agent, &mut stdio, self.whose(&wish.id)).await?;
        request.stdio = MessageField::some(stdio);
        request.oci_spec = translated.oci;
        let program = program(request.oci_spec.as_slice(), "/process/args/0");
        let limit = context(Some(scaled_ms(CREATE_MS)));
        self.call("CreateContainer", self.agent.rpc.create_container(limit, &request)).await?;
        let about = (wish.id.as_str(), self.pid(), wish.bundle.as_path());
        if let Err(error) = translated.hooks.run(Moment::Create, about, &self.host).await {
            let request = reference(&wish.id);
            // What was made is undone; the hook's words are what is told.
            let _ = self.call("DeleteContainer", self.agent.rpc.delete_container(call(), &request)).await;
            return Err(error);
        }
        let inner = Inner {
            phase: Phase::Created,
            ends: None,
            wish: None,
            input: std::mem::take(&mut pumps.input),
            size,
        };
        let process = Process::new("", program, wish.stdio, inner);
        let container = Arc::new(PodContainer {
            id: wish.id,
            bundle: wish.bundle,
            processes: Mutex::new(BTreeMap::from([(String::new(), Arc::clone(&process))])),
            paused: Mutex::new(false),
            memory_told: AtomicBool::new(false),
            hooks: translated.hooks,
            _mounts: mounts,
            _disks: disks,
            _offers: offers,
        });
        // The first one is the pod's sandbox, whose host name its containers have.
        if pod_hostname.is_empty() {
            held(&self.hostname).clone_from(&translated.hostname);
        }
        announce();
        tokio::spawn(watch_over(self.around(), Arc::clone(&container), process, pumps));
        claimed.keep();
        reservation.fill(&container);
        Ok(())
    }

    fn add_volumes(
        &self,
        translated: &Translated,
        request: &mut CreateContainerRequest,
        mounts: &mut Vec<Arc<LiveMount>>,
    ) -> Result<Vec<Offer>, PodError> {
        let mut offers = Vec::new();
        for volume in &translated.volumes {
            let (source, destination, read_only) = match volume {
                Volume::Memory { source, destination, read_only } => {
                    (source.clone(), destination, *read_only)
                }
                Volume::Shared { source, size_bytes, destination, read_only } => {
                    let name = self.live.memory_name(source);
                    let shared = SharedMemorySource { name, size_bytes: *size_bytes, ..Default::default() };
                    (mount::Source::SharedMemory(shared), destination, *read_only)
                }
                Volume::Bind { source, destination, read_only } => {
                    let fail = |error| PodError::io("share", source, error);
                    let source = match self.sockets.offer(source).map_err(fail)? {
                        Some(offer) => {
                            let socket = offer.source();
                            offers.push(offer);
                            mount::Source::Socket(socket)
                        }
                        None => {
                            let bound = self.live.bind(source, *read_only)?;
                            let share = bound.source();
                            mounts.push(bound);
                            mount::Source::Share(share)
                        }
                    };
                    (source, destination, *read_only)
                }
            };
            request.mounts.push(Mount {
                destination: destination.clone(),
                source: Some(source),
                read_only,
                ..Default::default()
            });
        }
        Ok(offers)
    }

    /// Adds a process, to be started later. `process` is an OCI process object, JSON.
    ///
    /// # Errors
    /// No such container, the id is taken, or it is no process.
    pub fn exec(&self, id: &str, exec: &str, process: &[u8], stdio: StdioPaths) -> Result<(), PodError> {
        let container = self.container(id)?;
        if exec.is_empty() {
            return Err(PodError::Invalid("a process needs an id".into()));
        }
        if container.process("")?.phase() == Phase::Stopped {
            return Err(PodError::State(format!("container {id} is not running")));
        }
        let wish: Value = serde_json::from_slice(process)
            .map_err(|error| PodError::Invalid(format!("the process of {exec}: {error}")))?;
        let ends = Ends::open(&stdio)?;
        let (_, size) = translate::console(&wish);
        let inner = Inner {
            phase: Phase::Added,
            ends: Some(ends),
            wish: Some(process.to_vec()),
            input: Input::default(),
            size,
        };
        let added = Process::new(exec, program(process, "/args/0"), stdio, inner);
        {
            let mut processes = held(&container.processes);
            if processes.contains_key(exec) {
                return Err(PodError::Exists(format!("process {exec} of container {id}")));
            }
            if processes.len() > MAX_EXECS {
                return Err(PodError::Exhausted(format!("processes of container {id}: at most {MAX_EXECS}")));
            }
            processes.insert(exec.to_owned(), added);
        }
        (self.events)(PodEvent::ExecAdded { container: id.to_owned(), exec: exec.to_owned() });
        Ok(())
    }

    /// Starts a process; an empty `exec` is the first. The network is joined before the first start of all.
    ///
    /// # Errors
    /// No such process, it was started before, or its command cannot be executed.
    pub async fn start_process(&self, id: &str, exec: &str) -> Result<(), PodError> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        let _gate = process.gate.lock().await;
        match process.phase() {
            Phase::Created => {}
            Phase::Added => {
                let made = self.create_process(&container, &process).await;
                made.inspect_err(|_| process.inner().phase = Phase::Failed)?;
            }
            Phase::Running | Phase::Failed | Phase::Stopped => {
                return Err(PodError::State(format!("process {exec} of container {id} was started already")));
            }
        }
        if exec.is_empty() {
            self.join_network().await?;
        }
        let request =
            ProcessRef { container_id: id.to_owned(), process_id: exec.to_owned(), ..Default::default() };
        let started = self.call("StartProcess", self.agent.rpc.start_process(call(), &request)).await?;
        if !started.error.is_empty() {
            process.inner().phase = Phase::Failed;
            return Err(PodError::Invalid(format!("exec: {:?}: {}", process.program, started.error)));
        }
        {
            let mut inner = process.inner();
            inner.phase = Phase::Running;
            inner.input.begin();
        }
        if exec.is_empty() {
            let about = (id, self.pid(), container.bundle.as_path());
            // It runs: a hook that fails is told, no more (runtime specification, lifecycle step 8).
            if let Err(error) = container.hooks.run(Moment::Started, about, &self.host).await {
                tracing::warn!(id, %error, "poststart");
            }
        }
        let (container, exec) = (id.to_owned(), exec.to_owned());
        let event = match exec.as_str() {
            "" => PodEvent::Started { container },
            _ => PodEvent::ExecStarted { container, exec },
        };
        (self.events)(event);
        Ok(())
    }

    async fn create_process(
        &self,
        container: &Arc<PodContainer>,
        process: &Arc<Process>,
    ) -> Result<(), PodError> {
        let (ends, wish, size) = {
            let mut inner = process.inner();
            (inner.ends.take().unwrap_or_default(), inner.wish.take().unwrap_or_default(), inner.size)
        };
        let mut stdio = sized(size);
        let mut pumps = ends.connect(&self.agent, &mut stdio, self.whose(&process.exec)).await?;
        let request = CreateProcessRequest {
            container_id: container.id.clone(),
            process_id: process.exec.clone(),
            oci_process: wish,
            stdio: MessageField::some(stdio),
            ..Default::default()
        };
        self.call("CreateProcess", self.agent.rpc.create_process(call(), &request)).await?;
        {
            let mut inner = process.inner();
            inner.phase = Phase::Created;
            inner.input = std::mem::take(&mut pumps.input);
        }
        tokio::spawn(watch_over(self.around(), Arc::clone(container), Arc::clone(process), pumps));
        Ok(())
    }

    /// Gives the guest the network as it is now, once.
    async fn join_network(&self) -> Result<(), PodError> {
        let mut network = self.network.lock().await;
        if network.configured {
            return Ok(());
        }
        let request = network.join()?;
        self.call("ConfigureNetwork", self.agent.rpc.configure_network(call(), &request)).await?;
        // One that is still empty may be configured before the next container starts.
        network.configured = !request.interfaces.is_empty();
        Ok(())
    }

    /// Sends a signal to a process or, with `all`, to every process of the container.
    ///
    /// # Errors
    /// No such process, or it has ended already: both are "not found".
    pub async fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<(), PodError> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        match process.phase() {
            Phase::Stopped if !all => return Err(PodError::NotFound("the process has ended already".into())),
            Phase::Added => {
                return Err(PodError::State(format!("process {exec} of container {id} was not started")));
            }
            _ => {}
        }
        let request = SignalProcessRequest {
            container_id: id.to_owned(),
            process_id: exec.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        match self.call("SignalProcess", self.agent.rpc.signal_process(call(), &request)).await {
            Err(PodError::State(message)) => Err(PodError::NotFound(message)),
            Err(PodError::Ended(_)) => Err(PodError::NotFound("the process has ended already".into())),
            other => other.map(drop),
        }
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// No such process, or it has no terminal.
    pub async fn resize(&self, id: &str, exec: &str, rows: u32, cols: u32) -> Result<(), PodError> {
        let process = self.container(id)?.process(exec)?;
        let phase = {
            let mut inner = process.inner();
            inner.size = Some((rows, cols));
            inner.phase
        };
        if matches!(phase, Phase::Added | Phase::Stopped) {
            return Ok(());
        }
        let request = ResizeTerminalRequest {
            container_id: id.to_owned(),
            process_id: exec.to_owned(),
            rows,
            cols,
            ..Default::default()
        };
        self.call("ResizeTerminal", self.agent.rpc.resize_terminal(call(), &request)).await.map(drop)
    }

    /// Ends standard input, after what is still in the FIFO.
    ///
    /// # Errors
    /// No such process.
    pub fn close_stdin(&self, id: &str, exec: &str) -> Result<(), PodError> {
        let process = self.container(id)?.process(exec)?;
        let mut inner = process.inner();
        inner.input.close();
        if let Some(ends) = &mut inner.ends {
            ends.close_stdin();
        }
        Ok(())
    }

    /// What a process does.
    ///
    /// # Errors
    /// No such process.
    pub fn status(&self, id: &str, exec: &str) -> Result<ContainerStatus, PodError> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        let status = match process.phase() {
            Phase::Added | Phase::Created => ProcessStatus::Created,
            Phase::Running if *held(&container.paused) => ProcessStatus::Paused,
            Phase::Running => ProcessStatus::Running,
            Phase::Failed | Phase::Stopped => ProcessStatus::Stopped,
        };
        let (bundle, stdio) = (container.bundle.clone(), process.paths.clone());
        Ok(ContainerStatus { status, exit: process.exit(), bundle, stdio })
    }

    /// Waits for the end of a process.
    ///
    /// # Errors
    /// No such process, or it is deleted meanwhile.
    pub async fn wait(&self, id: &str, exec: &str) -> Result<ProcessExit, PodError> {
        let gone = || PodError::NotFound(format!("process {exec} of container {id}"));
        // Only the receiver is kept: a process that is deleted wakes those who wait for it.
        let mut exits = self.container(id)?.process(exec)?.exits();
        let exit = exits.wait_for(Option::is_some).await.map_err(|_| gone())?;
        exit.ok_or_else(gone)
    }

    /// Forgets a process that has ended or never ran; with the first one goes the container.
    ///
    /// # Errors
    /// No such process, or it runs.
    pub async fn delete(&self, id: &str, exec: &str) -> Result<ProcessExit, PodError> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        let never = ProcessExit { code: 0, at: super::now() };
        if process.phase() == Phase::Running {
            return Err(PodError::State(format!(
                "container {id}: process {exec:?} is running: kill it first"
            )));
        }
        if !exec.is_empty() {
            process.until_logged().await;
            held(&container.processes).remove(exec);
            return Ok(process.exit().unwrap_or(never));
        }
        let request = reference(id);
        match self.call("DeleteContainer", self.agent.rpc.delete_container(call(), &request)).await {
            Ok(_) | Err(PodError::Ended(_) | PodError::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
        let mut exits = process.exits();
        let ended = timeout(scaled_ms(DELETED_MS), exits.wait_for(Option::is_some)).await;
        let exit = ended.ok().and_then(|exit| *exit.ok()?).unwrap_or(never);
        process.until_logged().await;
        held(&self.containers).remove(id);
        self.give_up(id).await;
        let about = (id, 0, container.bundle.as_path());
        if let Err(error) = container.hooks.run(Moment::Stopped, about, &self.host).await {
            tracing::warn!(id, %error, "poststop");
        }
        Ok(exit)
    }
}

pub(super) fn reference(id: &str) -> ContainerRef {
    ContainerRef { container_id: id.to_owned(), ..Default::default() }
}

fn sized(size: Option<(u32, u32)>) -> Stdio {
    let (rows, cols) = size.unwrap_or((24, 80));
    Stdio { rows, cols, ..Default::default() }
}

/// The command's first word, for messages.
fn program(json: &[u8], pointer: &str) -> String {
    let value: Value = serde_json::from_slice(json).unwrap_or_default();
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}
