//! A running machine with an agent that serves.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper_protocol::DOORBELL_PORT;
use hyper_protocol::rpc::agent::{ConfigureRequest, ConfigureResponse, Empty, SetClockRequest};
use hyper_vmm_spec::control::{Reply, Request, Timeline};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::time::{ClockId, clock_gettime};
use tokio::process::Child;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::agent::{self, Agent};
use super::callers::Callers;
use super::child::{keep, last_words, spawn};
use super::control::{self, Control, VmEnd};
use super::file_server::FileServer;
use super::levers::Levers;
use super::plan::{Assembled, GuestPlan, Sockets, assemble, vsock_path};
use super::{VmError, scaled_ms};
use crate::dirs::Parts;
use crate::state::BootTimeline;

/// How long the VMM may take to build the machine.
const BUILD_MS: u64 = 30_000;
/// How long the guest may take to end in order: it writes its disks back.
const SHUTDOWN_MS: u64 = 10_000;
/// How long the VMM may take to end when it is asked.
const END_MS: u64 = 2_000;
/// How much later than its file server's end the machine's own may be heard of.
const ECHO_MS: u64 = 200;
/// Bytes of entropy that a guest is given.
const ENTROPY_BYTES: usize = 64;
/// How far a guest's clock may be behind: the guest gets the time between question and answer, so it is off by less than both took.
const CLOCK_ERROR: Duration = Duration::from_millis(40);
/// How often the clock is set when the host is too busy for that.
const CLOCK_TRIES: usize = 5;

/// Takes down how long each step of a start takes; each is logged.
#[derive(Debug)]
pub(crate) struct Steps {
    timeline: BootTimeline,
}

fn monotonic_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or_default() * 1_000_000
        + u64::try_from(now.tv_nsec).unwrap_or_default() / 1000
}

impl Steps {
    pub(crate) fn begin() -> Self {
        Self { timeline: BootTimeline { began_us: monotonic_us(), ..Default::default() } }
    }

    /// A step has ended.
    pub(crate) fn done(&mut self, step: &str) {
        let elapsed_us = monotonic_us().saturating_sub(self.timeline.began_us);
        tracing::debug!(step, elapsed_us, "start");
        self.timeline.steps.push((step.to_owned(), elapsed_us));
    }

    pub(crate) fn into_timeline(mut self, vmm: Timeline) -> BootTimeline {
        self.timeline.vmm = vmm;
        self.timeline
    }
}

/// A running machine. Dropping it ends the machine at once; [`Guest::shutdown`] ends it in order.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) agent: Arc<Agent>,
    booted: Booted,
}

/// A machine whose agent serves and has not been spoken to.
#[derive(Debug)]
pub(super) struct Booted {
    control: Arc<Control>,
    vmm: Child,
    file_server: Option<FileServer>,
    logs: Vec<JoinHandle<()>>,
    /// Slots of the bays.
    bays: Vec<u32>,
    _vsock_name: SocketName,
}

/// The name of a socket; gone when this is dropped.
#[derive(Debug)]
struct SocketName(PathBuf);

impl Drop for SocketName {
    fn drop(&mut self) {
        // The directory may be gone, with all that was in it.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A listening socket for the VMM, which has no path to make one at.
fn listen(path: PathBuf) -> io::Result<(OwnedFd, SocketName)> {
    let listener = std::os::unix::net::UnixListener::bind(&path)?;
    Ok((listener.into(), SocketName(path)))
}

impl Booted {
    /// Boots a machine, or has it go on from a template, until its agent serves.
    pub(super) async fn new(mut plan: GuestPlan, parts: &Parts, steps: &mut Steps) -> Result<Self, VmError> {
        let descriptor = |what| move |source: io::Error| VmError::Descriptor { what, source };
        let (run_dir, log_dir) = (plan.run_dir.clone(), plan.log_dir.clone());
        let limit = scaled_ms(plan.boot_ms);
        let cgroups = std::mem::take(&mut plan.cgroups);
        // Where engines look for a pod's network.
        let network: &[&OsStr] = if plan.in_pod { &[OsStr::new(hyper_jail::vmm::POD_NETWORK)] } else { &[] };
        let mut bell = None;
        // Whoever was saved with its agent serving does not ring again.
        if plan.template.is_none() {
            let (callers, port) =
                Callers::of_port(DOORBELL_PORT).map_err(descriptor("the doorbell's socket"))?;
            plan.host_ports.push(port);
            bell = Some(callers);
        }
        let (vsock, vsock_name) = listen(vsock_path(&run_dir)).map_err(descriptor("the vsock socket"))?;
        let mut logs = Vec::new();
        let (console_out, console_in) =
            pipe_with(PipeFlags::CLOEXEC).map_err(|e| descriptor("a pipe")(e.into()))?;
        let console_log = log_dir.join("console.log");
        let console =
            tokio::net::unix::pipe::Receiver::from_owned_fd(console_out).map_err(descriptor("a pipe"))?;
        logs.push(keep(console, &console_log));

        let (mut file_server, mut share) = (None, None);
        if !plan.shares.is_empty() {
            let (server, log, socket) = FileServer::start(parts, &plan.shares, &run_dir, &log_dir, &cgroups)?;
            logs.push(log);
            file_server = Some(server);
            share = Some(socket);
            steps.done("file-server");
        }
        let sockets = Sockets { vsock, serial: console_in, share };
        let assembled = assemble(plan, parts, sockets)?;
        let (control, far) = control::pair().map_err(descriptor("the control socket"))?;
        let (vmm, log) = spawn("hyper-vmm", &parts.vmm, network, far, &log_dir.join("vmm.log"), &cgroups)?;
        logs.push(log);
        steps.done("vmm-spawned");
        let (control, bays) = (Arc::new(control), assembled.bays.clone());
        let mut booted = Self { control, vmm, file_server, logs, bays, _vsock_name: vsock_name };
        let up = async {
            booted.build(assembled, &log_dir).await?;
            steps.done("vmm-built");
            if let Some(bell) = bell {
                let ended = ended(&booted.control, booted.file_server.as_ref());
                wait_for_doorbell(&bell, ended, &console_log, limit).await?;
                steps.done("doorbell");
            }
            Ok(())
        };
        match up.await {
            Ok(()) => Ok(booted),
            Err(error) => {
                booted.kill().await;
                Err(error)
            }
        }
    }

    /// Has the VMM build the machine.
    async fn build(&self, assembled: Assembled, log_dir: &Path) -> Result<(), VmError> {
        let spec = assembled.spec.clone();
        let request = match assembled.snapshot {
            Some(snapshot) => Request::Restore { spec, snapshot },
            None => Request::Boot { spec },
        };
        let built = self.control.request(&request, &assembled.fds(), scaled_ms(BUILD_MS)).await;
        match built {
            Ok(_) => Ok(()),
            Err(error) => Err(explain(error, &self.control, log_dir).await),
        }
    }

    /// What changes the machine while it runs.
    pub(super) fn levers(&self) -> Levers {
        Levers::new(&self.control)
    }

    /// Ends it by force, and waits for that.
    pub(super) async fn kill(&mut self) {
        match timeout(scaled_ms(END_MS), self.vmm.kill()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "a process cannot be killed"),
            Err(_) => tracing::warn!("a process that was killed does not end"),
        }
    }
}

impl Guest {
    /// Starts a machine and waits until its agent serves.
    pub(crate) async fn start(plan: GuestPlan, parts: &Parts, steps: &mut Steps) -> Result<Self, VmError> {
        let vsock = vsock_path(&plan.run_dir);
        let mut booted = Booted::new(plan, parts, steps).await?;
        match Agent::connect(&vsock).await {
            Ok(agent) => {
                steps.done("rpc");
                Ok(Self { agent: Arc::new(agent), booted })
            }
            Err(error) => {
                booted.kill().await;
                Err(error)
            }
        }
    }

    /// Gives the guest its clock, entropy and network.
    pub(crate) async fn configure(
        &self,
        mut request: ConfigureRequest,
    ) -> Result<ConfigureResponse, VmError> {
        request.entropy = vec![0; ENTROPY_BYTES];
        crate::store::random(&mut request.entropy);
        let sent = Instant::now();
        request.time_unix_ns = crate::clock::Timestamp::now().unix_ns();
        let configure = self.agent.rpc.configure(agent::call(), &request);
        let configure = crate::trace::traced(&self.agent, "Configure", configure);
        let configured = self.until_end(configure).await?.map_err(agent::rpc_error("Configure"))?;
        if sent.elapsed() > CLOCK_ERROR {
            self.set_clock().await?;
        }
        Ok(configured)
    }

    /// Sets the guest's clock until it cannot be off by more than [`CLOCK_ERROR`], or as often as makes sense.
    async fn set_clock(&self) -> Result<(), VmError> {
        for _ in 0..CLOCK_TRIES {
            let sent = Instant::now();
            let time_unix_ns = crate::clock::Timestamp::now().unix_ns();
            let request = SetClockRequest { time_unix_ns, ..SetClockRequest::default() };
            let set = self.agent.rpc.set_clock(agent::call(), &request);
            self.until_end(set).await?.map_err(agent::rpc_error("SetClock"))?;
            if sent.elapsed() <= CLOCK_ERROR {
                return Ok(());
            }
        }
        tracing::warn!("the guest's clock may be off by more than {} ms", CLOCK_ERROR.as_millis());
        Ok(())
    }

    /// Ends a machine whose disks are about to be removed: what it has not written yet is of no use. Only shares outlive it.
    pub(crate) async fn discard(self) {
        if self.booted.file_server.is_some() { self.shutdown().await } else { self.kill().await }
    }

    /// Ends the machine by force, and waits for that.
    pub(super) async fn kill(mut self) {
        self.booted.kill().await;
    }

    /// Waits for something, or for the unexpected end of the machine.
    pub(crate) async fn until_end<T>(&self, what: impl Future<Output = T>) -> Result<T, VmError> {
        tokio::select! {
            biased;
            done = what => Ok(done),
            end = self.ended() => Err(VmError::Ended(end.message())),
        }
    }

    /// Waits until the machine has ended, or cannot be left running.
    pub(crate) async fn ended(&self) -> VmEnd {
        ended(&self.booted.control, self.booted.file_server.as_ref()).await
    }

    /// Process id of the VMM; 0 when it has ended.
    pub(crate) fn pid(&self) -> u32 {
        self.booted.vmm.id().unwrap_or_default()
    }

    /// What changes the machine while it runs.
    pub(crate) fn levers(&self) -> Levers {
        self.booted.levers()
    }

    /// Slots of the bays, by which the guest knows them; bay n is the nth.
    pub(crate) fn bays(&self) -> &[u32] {
        &self.booted.bays
    }

    /// When the VMM reached each step of the boot.
    pub(crate) async fn timeline(&self) -> Timeline {
        match self.booted.control.request(&Request::State, &[], scaled_ms(END_MS)).await {
            Ok(Reply::State { timeline, .. }) => timeline,
            _ => Timeline::default(),
        }
    }

    /// Ends the machine: in order if the guest can, else by force.
    pub(crate) async fn shutdown(mut self) {
        let orderly = async {
            let asked = self.agent.rpc.shutdown(agent::call(), &Empty::new()).await;
            if let Err(error) = asked {
                tracing::debug!(%error, "the agent did not answer Shutdown");
            }
            self.agent.hang_up();
            self.booted.control.ended().await
        };
        // A guest whose shares do not answer cannot write them back.
        let unserved = self.booted.file_server.as_ref().is_some_and(FileServer::is_gone);
        if unserved || timeout(scaled_ms(SHUTDOWN_MS), orderly).await.is_err() {
            tracing::warn!("the guest does not end in order");
            let _ = self.booted.control.request(&Request::Shutdown, &[], scaled_ms(END_MS)).await;
        }
        end(&mut self.booted.vmm).await;
        if let Some(server) = &mut self.booted.file_server {
            server.end(scaled_ms(END_MS)).await;
        }
        for log in &mut self.booted.logs {
            // The writers have gone; what they wrote last is still read.
            let _ = timeout(Duration::from_millis(500), log).await;
        }
    }
}

async fn end(child: &mut Child) {
    if timeout(scaled_ms(END_MS), child.wait()).await.is_err()
        && let Err(error) = child.kill().await
    {
        tracing::warn!(%error, "a process cannot be killed");
    }
}

impl Drop for Booted {
    fn drop(&mut self) {
        for log in &self.logs {
            log.abort();
        }
    }
}

/// A VMM that broke off says why on its standard error.
async fn explain(error: VmError, control: &Control, log_dir: &Path) -> VmError {
    if !matches!(error, VmError::Control(_)) {
        return error;
    }
    let _ = timeout(scaled_ms(END_MS), control.ended()).await;
    let words = last_words(&log_dir.join("vmm.log"));
    VmError::Ended(format!("hyper-vmm could not build the machine ({error}); its last words: {words}"))
}

/// Waits until the machine has ended, or its file server has without it.
async fn ended(control: &Control, file_server: Option<&FileServer>) -> VmEnd {
    let Some(server) = file_server else { return control.ended().await };
    tokio::select! {
        biased;
        end = control.ended() => end,
        // It ends with the machine, too, and that may be heard of first.
        () = server.gone() => timeout(scaled_ms(ECHO_MS), control.ended()).await.unwrap_or(VmEnd::Unserved),
    }
}

async fn wait_for_doorbell(
    bell: &Callers,
    ended: impl Future<Output = VmEnd>,
    console: &Path,
    limit: Duration,
) -> Result<(), VmError> {
    tokio::select! {
        biased;
        bell = agent::doorbell(bell) => {
            let bell = bell?;
            tracing::debug!(build = bell.build, "agent");
            Ok(())
        }
        end = ended => Err(VmError::Ended(end.message())),
        () = tokio::time::sleep(limit) => Err(VmError::NoDoorbell {
            limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
            last_words: last_words(console),
        }),
    }
}
