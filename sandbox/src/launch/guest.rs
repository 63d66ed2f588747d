//! A running machine with an agent that serves.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper_protocol::DOORBELL_PORT;
use hyper_protocol::rpc::agent::{ConfigureRequest, ConfigureResponse, Empty};
use hyper_vmm_spec::control::{Reply, Request, Timeline};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::time::{ClockId, clock_gettime};
use tokio::net::UnixListener;
use tokio::process::Child;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::agent::{self, Agent};
use super::child::{keep, last_words, spawn};
use super::control::{self, Control, VmEnd};
use super::file_server::FileServer;
use super::levers::Levers;
use super::plan::{GuestPlan, assemble, port_path, vsock_path};
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
    control: Arc<Control>,
    vmm: Child,
    file_server: Option<FileServer>,
    logs: Vec<JoinHandle<()>>,
    /// Slots of the bays.
    bays: Vec<u32>,
}

impl Guest {
    /// Starts a machine and waits until its agent serves.
    pub(crate) async fn start(
        mut plan: GuestPlan,
        parts: &Parts,
        steps: &mut Steps,
    ) -> Result<Self, VmError> {
        let descriptor = |what| move |source: io::Error| VmError::Descriptor { what, source };
        let (run_dir, log_dir) = (plan.run_dir.clone(), plan.log_dir.clone());
        let limit = scaled_ms(plan.boot_ms);
        let cgroups = std::mem::take(&mut plan.cgroups);
        let bell = UnixListener::bind(port_path(&run_dir, DOORBELL_PORT))
            .map_err(descriptor("the doorbell's socket"))?;
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
        let assembled = assemble(plan, parts, console_in, share)?;
        let (control, far) = control::pair().map_err(descriptor("the control socket"))?;
        let (vmm, log) = spawn("hyper-vmm", &parts.vmm, &[], far, &log_dir.join("vmm.log"), &cgroups)?;
        logs.push(log);
        steps.done("vmm-spawned");
        let boot = Request::Boot { spec: assembled.spec.clone() };
        let built = control.request(&boot, &assembled.fds(), scaled_ms(BUILD_MS)).await;
        if let Err(error) = built {
            return Err(explain(error, &control, &log_dir).await);
        }
        let bays = assembled.bays.clone();
        drop(assembled);
        steps.done("vmm-built");
        wait_for_doorbell(&bell, ended(&control, file_server.as_ref()), &console_log, limit).await?;
        steps.done("doorbell");
        let agent = Agent::connect(&vsock_path(&run_dir)).await?;
        steps.done("rpc");
        Ok(Self { agent: Arc::new(agent), control: Arc::new(control), vmm, file_server, logs, bays })
    }

    /// Gives the guest its clock, entropy and network.
    pub(crate) async fn configure(
        &self,
        mut request: ConfigureRequest,
    ) -> Result<ConfigureResponse, VmError> {
        request.entropy = vec![0; ENTROPY_BYTES];
        crate::store::random(&mut request.entropy);
        request.time_unix_ns = crate::clock::Timestamp::now().unix_ns();
        let configure = self.agent.rpc.configure(agent::call(), &request);
        self.until_end(configure).await?.map_err(agent::rpc_error("Configure"))
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
        ended(&self.control, self.file_server.as_ref()).await
    }

    /// Process id of the VMM; 0 when it has ended.
    pub(crate) fn pid(&self) -> u32 {
        self.vmm.id().unwrap_or_default()
    }

    /// What changes the machine while it runs.
    pub(crate) fn levers(&self) -> Levers {
        Levers::new(&self.control)
    }

    /// Slots of the bays, by which the guest knows them; bay n is the nth.
    pub(crate) fn bays(&self) -> &[u32] {
        &self.bays
    }

    /// When the VMM reached each step of the boot.
    pub(crate) async fn timeline(&self) -> Timeline {
        match self.control.request(&Request::State, &[], scaled_ms(END_MS)).await {
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
            self.control.ended().await
        };
        // A guest whose shares do not answer cannot write them back.
        let unserved = self.file_server.as_ref().is_some_and(FileServer::is_gone);
        if unserved || timeout(scaled_ms(SHUTDOWN_MS), orderly).await.is_err() {
            tracing::warn!("the guest does not end in order");
            let _ = self.control.request(&Request::Shutdown, &[], scaled_ms(END_MS)).await;
        }
        end(&mut self.vmm).await;
        if let Some(server) = &mut self.file_server {
            server.end(scaled_ms(END_MS)).await;
        }
        for log in &mut self.logs {
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

impl Drop for Guest {
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
    bell: &UnixListener,
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
