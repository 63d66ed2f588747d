//! One run: from the start of the machine to its end.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use hyper_protocol::rpc::agent::{ExitStatus, ProcessRef, SignalProcessRequest};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::boot::{self, Machine};
use super::shared::{Life, Shared};
use super::verbs::container_ref;
use crate::clock::Timestamp;
use crate::config::ContainerConfig;
use crate::launch::{Agent, Inputs, Levers, Steps, Stream, VmEnd, call, context, rpc_error, scaled_ms};
use crate::logs::{LogSource, LogWriter};
use crate::network::Link;
use crate::network::publish::Proxies;
use crate::state::{NetworkState, Status};
use crate::store::LOST_EXIT_CODE;
use crate::{SandboxError, StartError};

/// How long the last output may take to come when the process has ended.
const LAST_OUTPUT_MS: u64 = 5_000;
/// Exit code of a container that did not end by itself: as of one that was killed.
const KILLED_EXIT_CODE: u8 = LOST_EXIT_CODE;

/// Host ends of the streams of a process that is about to start.
#[derive(Debug, Default)]
pub(super) struct Streams {
    pub(super) stdin: Option<Stream>,
    pub(super) stdout: Option<Stream>,
    pub(super) stderr: Option<Stream>,
}

/// A running container, as conversations use it.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) agent: Arc<Agent>,
    pub(super) container_id: String,
    pub(super) config: ContainerConfig,
    pub(super) levers: Levers,
    /// What the machine was made of.
    pub(super) inputs: Inputs,
    execs: AtomicU64,
}

impl Run {
    /// The first process.
    pub(super) fn process(&self, process_id: &str) -> ProcessRef {
        ProcessRef {
            container_id: self.container_id.clone(),
            process_id: process_id.to_owned(),
            ..Default::default()
        }
    }

    /// An id for another process.
    pub(super) fn new_exec(&self) -> String {
        format!("exec-{}", self.execs.fetch_add(1, Ordering::Relaxed))
    }

    /// The number of the next such id.
    pub(super) fn next_exec(&self) -> u64 {
        self.execs.load(Ordering::Relaxed)
    }

    /// Sends a signal to a process.
    pub(super) async fn signal(&self, process_id: &str, signal: u32) -> Result<(), SandboxError> {
        let request = SignalProcessRequest {
            container_id: self.container_id.clone(),
            process_id: process_id.to_owned(),
            signal,
            ..Default::default()
        };
        self.agent.rpc.signal_process(call(), &request).await.map_err(rpc_error("SignalProcess"))?;
        Ok(())
    }
}

/// How a process ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Exit {
    code: u8,
    oom_killed: bool,
    error: String,
}

/// Starts the container and waits for its end; the machine is gone when this returns. Returns the exit code.
pub(super) async fn run_once(shared: &Arc<Shared>, restarts: u32) -> Result<u8, StartError> {
    let mut steps = Steps::begin();
    let container = shared.container();
    let mut machine = boot::machine(shared, &container, &mut steps).await?;
    let streams = boot::container(shared, &container, &mut machine).await?;
    steps.done("created");
    let run = Arc::new(Run {
        agent: Arc::clone(&machine.guest.agent),
        container_id: machine.saved.as_ref().map_or(&shared.id, |saved| &saved.guest_id).clone(),
        config: container.config().clone(),
        levers: machine.guest.levers(),
        inputs: machine.inputs.clone(),
        execs: AtomicU64::new(machine.saved.as_ref().map_or(1, |saved| saved.next_exec)),
    });
    let output = Output::begin(shared, streams, &container.dir()).await?;
    match machine.saved {
        None => start_process(&run, &machine).await?,
        Some(_) => go_on(&run, &machine).await?,
    }
    steps.done("started");
    let proxies = publish(shared, &mut machine, steps, restarts).await?;
    shared.set_run(Some(Arc::clone(&run)));
    shared.enter(Life::Running, None);

    let exit = wait(shared, &run, &machine).await;
    shared.set_run(None);
    output.end().await;
    drop((proxies, run));
    let Machine { guest, link, names, .. } = machine;
    if shared.wants_removal() {
        guest.discard().await;
    } else {
        guest.shutdown().await;
    }
    drop((link, names));
    shared.update(|state| {
        state.oom_killed = exit.oom_killed;
        state.end(Status::Exited, exit.code, exit.error.clone());
    });
    container.note_exit(exit.code, &exit.error);
    let console = shared.console();
    shared.renew_console();
    console.finish(exit.code, &exit.error).await;
    Ok(exit.code)
}

async fn start_process(run: &Run, machine: &Machine) -> Result<(), StartError> {
    let process = run.process("");
    let start = machine.guest.until_end(run.agent.rpc.start_process(call(), &process)).await;
    let started = start
        .map_err(SandboxError::Vm)?
        .map_err(|error| SandboxError::Vm(rpc_error("StartProcess")(error)))?;
    let args = run.config.process.args();
    check_started(started.exit_code, &started.error, args.first().map_or("", String::as_str))
}

/// Has the processes go on that were frozen when they were saved.
async fn go_on(run: &Run, machine: &Machine) -> Result<(), SandboxError> {
    let container = container_ref(run);
    let resumed = machine.guest.until_end(run.agent.rpc.resume_container(call(), &container)).await?;
    resumed.map(drop).map_err(|error| SandboxError::Vm(rpc_error("ResumeContainer")(error)))
}

/// Docker's words for a command that could not be executed.
pub(super) fn check_started(exit_code: u32, error: &str, program: &str) -> Result<(), StartError> {
    if error.is_empty() {
        return Ok(());
    }
    let exit_code = if exit_code == 126 { 126 } else { 127 };
    Err(StartError::Command { exit_code, message: format!("exec: {program:?}: {error}") })
}

/// Ports are served, and the state says that it runs.
async fn publish(
    shared: &Shared,
    machine: &mut Machine,
    steps: Steps,
    restarts: u32,
) -> Result<Option<Proxies>, SandboxError> {
    let listeners = std::mem::take(&mut machine.listeners);
    let ports = listeners.resolved();
    let network: Option<NetworkState> = machine.link.as_ref().map(|link| link.state.clone());
    let serve = |link: &Link| listeners.serve(link.state.ip, &link.place);
    let proxies = machine.link.as_ref().map(serve).transpose()?;
    if let Some(network) = &network {
        let path = shared.container().dir().join("address");
        if let Err(error) = std::fs::write(&path, network.ip.to_string()) {
            tracing::debug!(%error, "the address is not remembered");
        }
    }
    let boot = steps.into_timeline(machine.guest.timeline().await);
    let pid = machine.guest.pid();
    shared.update(|state| {
        state.enter(Status::Running);
        state.pid = pid;
        state.error.clear();
        state.exit_code = 0;
        state.oom_killed = false;
        state.stopped_by_user = false;
        state.started = Timestamp::now();
        state.restart_count = restarts;
        state.network = network;
        state.ports = ports;
        state.boot = Some(boot);
    });
    Ok(proxies)
}

/// Waits for the end of the process, of the machine, or of our patience with them.
async fn wait(shared: &Shared, run: &Run, machine: &Machine) -> Exit {
    let process = run.process("");
    let forced = || Exit {
        code: KILLED_EXIT_CODE,
        error: "the process did not end when it was killed: its machine was ended".to_owned(),
        ..Default::default()
    };
    tokio::select! {
        biased;
        status = run.agent.rpc.wait_process(context(None), &process) => match status {
            Ok(status) => of_status(&status),
            Err(error) => {
                // The connection breaks before the VMM says how the machine ended.
                let limit = scaled_ms(LAST_OUTPUT_MS);
                match timeout(limit, machine.guest.ended()).await {
                    Ok(end) => of_end(&end),
                    Err(_) => Exit { code: KILLED_EXIT_CODE, error: rpc_error("WaitProcess")(error).to_string(), ..Default::default() },
                }
            }
        },
        end = machine.guest.ended() => of_end(&end),
        () = shared.force.notified() => forced(),
    }
}

fn of_status(status: &ExitStatus) -> Exit {
    let code = u8::try_from(status.exit_code).unwrap_or(u8::MAX);
    Exit { code, oom_killed: status.oom_killed, error: String::new() }
}

fn of_end(end: &VmEnd) -> Exit {
    Exit { code: KILLED_EXIT_CODE, oom_killed: false, error: end.message() }
}

/// Copying of the process's output, to the log and to clients.
#[derive(Debug)]
struct Output {
    pumps: JoinSet<()>,
    log: Option<Arc<Mutex<LogWriter>>>,
}

impl Output {
    async fn begin(shared: &Shared, streams: Streams, dir: &std::path::Path) -> Result<Self, SandboxError> {
        let log = LogWriter::open(dir).map_err(|source| SandboxError::io("open the log in", dir, source))?;
        let log = Arc::new(Mutex::new(log));
        let console = shared.console();
        console.open_stdin(streams.stdin).await;
        let mut pumps = JoinSet::new();
        for (stream, source) in [(streams.stdout, LogSource::Stdout), (streams.stderr, LogSource::Stderr)] {
            let Some(stream) = stream else { continue };
            let (console, log) = (Arc::clone(&console), Arc::clone(&log));
            pumps.spawn(async move { console.pump(stream, source, Some(&log)).await });
        }
        Ok(Self { pumps, log: Some(log) })
    }

    /// Waits for the last bytes, for a while.
    async fn end(mut self) {
        let all = async { while self.pumps.join_next().await.is_some() {} };
        if timeout(scaled_ms(LAST_OUTPUT_MS), all).await.is_err() {
            tracing::warn!("the last output did not come");
            self.pumps.abort_all();
        }
        if let Some(log) = self.log.take()
            && let Err(error) = log.lock().unwrap_or_else(PoisonError::into_inner).finish()
        {
            tracing::error!(%error, "output is not logged");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_that_cannot_be_executed() {
        assert!(check_started(0, "", "sh").is_ok());
        let missing = check_started(127, "executable file not found in $PATH", "nope").unwrap_err();
        assert_eq!(missing.exit_code(), 127);
        assert_eq!(missing.to_string(), "exec: \"nope\": executable file not found in $PATH");
        assert_eq!(check_started(126, "permission denied", "/etc/passwd").unwrap_err().exit_code(), 126);
    }

    #[test]
    fn ends_become_exits() {
        let status = ExitStatus { exit_code: 137, signal: 9, oom_killed: true, ..Default::default() };
        assert_eq!(of_status(&status), Exit { code: 137, oom_killed: true, error: String::new() });
        let crash =
            VmEnd::Crashed { what: "guest kernel crashed".into(), last_lines: vec!["Kernel panic".into()] };
        assert_eq!(of_end(&crash).error, "guest kernel crashed: Kernel panic");
        assert_eq!(of_end(&VmEnd::Lost).code, 137);
    }
}
