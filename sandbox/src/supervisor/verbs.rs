//! What is answered with one request to the agent.

use std::time::Duration;

use hyper_protocol::rpc::agent::{
    ContainerRef, PathStat as RpcPathStat, ProcessInfo, ResizeTerminalRequest, SignalProcessRequest,
    StatPathRequest, StatsResponse, UpdateContainerRequest,
};
use tokio::time::timeout;

use super::run::Run;
use super::shared::{Life, Shared};
use crate::clock::Timestamp;
use crate::config::ResourceConfig;
use crate::launch::{call, rpc_error, scaled_ms};
use crate::state::Status;
use crate::store::{ContainerStats, NetworkCounters, PathStat, Process};
use crate::stream::TerminalSize;
use crate::stream::wire::{Refusal, Reply, Request};
use crate::{SandboxError, oci};

const SIGKILL: u32 = 9;
/// How long a process may take to end after SIGKILL, before its machine is ended.
const KILL_MS: u64 = 10_000;

/// Requests that one RPC answers.
pub(super) async fn simple(shared: &Shared, request: Request) -> Result<Reply, Refusal> {
    let _busy = shared.busy().await;
    let run = shared.running()?;
    match request {
        Request::Kill { signal } => kill(shared, signal).await?,
        Request::Pause => pause(shared, &run).await?,
        Request::Unpause => unpause(shared, &run).await?,
        Request::Update { resources } => update(&run, &resources).await?,
        Request::Top => {
            let all = run.agent.rpc.list_processes(call(), &container_ref(&run)).await;
            let all = all.map_err(|error| refusal("ListProcesses", error))?;
            return Ok(Reply::Processes { processes: all.processes.into_iter().map(process).collect() });
        }
        Request::Stats => {
            let stats = run.agent.rpc.stats(call(), &container_ref(&run)).await;
            return Ok(Reply::Stats { stats: stats_of(stats.map_err(|error| refusal("Stats", error))?) });
        }
        Request::StatPath { path } => return Ok(Reply::Path { stat: stat_path(&run, &path).await? }),
        _ => return Err(Refusal::new("not understood")),
    }
    Ok(Reply::Done)
}

pub(super) fn refusal(call: &'static str, error: ttrpc::Error) -> Refusal {
    Refusal::new(rpc_error(call)(error).to_string())
}

pub(super) fn container_ref(run: &Run) -> ContainerRef {
    ContainerRef { container_id: run.container_id.clone(), ..Default::default() }
}

/// Sends a signal to the first process. A signal that is meant to end it keeps policies from starting it again.
pub(super) async fn kill(shared: &Shared, signal: u32) -> Result<(), Refusal> {
    let run = shared.running()?;
    if signal == SIGKILL || signal == run.config.stop_signal {
        shared.mark_stopped();
    }
    if signal == SIGKILL {
        shared.console().hurry();
    }
    Ok(run.signal("", signal).await?)
}

async fn pause(shared: &Shared, run: &Run) -> Result<(), Refusal> {
    if shared.status() == Status::Paused {
        return Err(Refusal::new(format!("container {} is already paused", shared.container().name())));
    }
    let done = run.agent.rpc.pause_container(call(), &container_ref(run)).await;
    done.map_err(|error| refusal("PauseContainer", error))?;
    shared.update(|state| {
        state.enter(Status::Paused);
    });
    Ok(())
}

async fn unpause(shared: &Shared, run: &Run) -> Result<(), Refusal> {
    if shared.status() != Status::Paused {
        return Err(Refusal::new(format!("container {} is not paused", shared.container().name())));
    }
    let done = run.agent.rpc.resume_container(call(), &container_ref(run)).await;
    done.map_err(|error| refusal("ResumeContainer", error))?;
    shared.update(|state| {
        state.enter(Status::Running);
    });
    Ok(())
}

async fn update(run: &Run, wish: &ResourceConfig) -> Result<(), Refusal> {
    let has = &run.config.resources;
    if wish.mem_mib > has.mem_mib {
        let message =
            format!("its machine has {} MiB: stop the container to give it more memory", has.mem_mib);
        return Err(Refusal::new(message));
    }
    if wish.vcpus() > has.vcpus() {
        let message = format!("its machine has {} vCPUs: stop the container to give it more", has.vcpus());
        return Err(Refusal::new(message));
    }
    let mut resources = oci::resources(wish, run.config.security.privileged);
    if let Some(all) = resources.as_object_mut() {
        // Device rules do not change.
        all.remove("devices");
        if wish.vcpus() < has.vcpus() && wish.cpus_milli.is_multiple_of(1000) {
            all.insert(
                "cpu".into(),
                serde_json::json!({ "quota": u64::from(wish.cpus_milli) * 100, "period": 100_000 }),
            );
        }
    }
    let request = UpdateContainerRequest {
        container_id: run.container_id.clone(),
        oci_resources: resources.to_string().into_bytes(),
        ..Default::default()
    };
    run.agent
        .rpc
        .update_container(call(), &request)
        .await
        .map_err(|error| refusal("UpdateContainer", error))?;
    Ok(())
}

/// Sets the size of a process's terminal.
pub(super) async fn resize(run: &Run, process_id: &str, size: TerminalSize) -> Result<(), SandboxError> {
    let request = ResizeTerminalRequest {
        container_id: run.container_id.clone(),
        process_id: process_id.to_owned(),
        rows: u32::from(size.rows),
        cols: u32::from(size.cols),
        ..Default::default()
    };
    run.agent.rpc.resize_terminal(call(), &request).await.map_err(rpc_error("ResizeTerminal"))?;
    Ok(())
}

/// What a path in the container is.
pub(super) async fn stat_path(run: &Run, path: &str) -> Result<PathStat, Refusal> {
    let request = StatPathRequest {
        container_id: run.container_id.clone(),
        path: path.to_owned(),
        ..Default::default()
    };
    let stat = run.agent.rpc.stat_path(call(), &request).await.map_err(|error| refusal("StatPath", error))?;
    let RpcPathStat { name, size, mode, mtime_unix_ns, link_target, .. } = stat;
    Ok(PathStat { name, size, mode, mtime: Timestamp::from_unix_ns(mtime_unix_ns), link_target })
}

/// Ends the container: stop signal, SIGKILL after a while, and at last its machine. Returns when it is over.
pub(super) async fn stop(shared: &Shared, timeout_s: Option<u32>) {
    if timeout_s == Some(0) {
        shared.abandon_start();
    }
    let mut phase = shared.phase();
    let ready = phase.wait_for(|phase| phase.life != Life::Starting).await.is_ok();
    shared.mark_stopped();
    let over = async |limit: Option<Duration>| {
        let mut phase = shared.phase();
        let over = phase.wait_for(|phase| phase.life == Life::Over);
        match limit {
            Some(limit) => timeout(limit, over).await.is_ok(),
            None => over.await.is_ok(),
        }
    };
    let Some(run) = shared.running().ok().filter(|_| ready) else {
        // It is being ended, or is on its way to run again.
        shared.abandon_start();
        over(None).await;
        return;
    };
    let busy = shared.busy().await;
    if shared.status() == Status::Paused
        && let Err(refusal) = unpause(shared, &run).await
    {
        tracing::warn!(message = refusal.message, "not thawed");
    }
    let patience_s = timeout_s.unwrap_or(run.config.stop_timeout_s);
    if patience_s > 0 {
        // Signals that cannot be sent are no matter: SIGKILL follows.
        let _ = run.signal("", run.config.stop_signal).await;
        drop(busy);
        shared.console().hurry();
        if over(Some(Duration::from_secs(u64::from(patience_s)))).await {
            return;
        }
    }
    shared.console().hurry();
    let request = SignalProcessRequest {
        container_id: run.container_id.clone(),
        signal: SIGKILL,
        all: true,
        ..Default::default()
    };
    let _ = run.agent.rpc.signal_process(call(), &request).await;
    drop(run);
    if !over(Some(scaled_ms(KILL_MS))).await {
        shared.force.notify_one();
        over(None).await;
    }
}

fn process(info: ProcessInfo) -> Process {
    Process {
        pid: info.pid,
        ppid: info.ppid,
        uid: info.uid,
        user: info.user,
        cpu_ms: info.cpu_ms,
        started: Timestamp::from_unix_ns(info.started_unix_ns),
        tty: info.tty,
        command: info.command,
    }
}

/// A sample in our words.
pub(crate) fn stats_of(stats: StatsResponse) -> ContainerStats {
    let counters = |net: hyper_protocol::rpc::agent::NetworkStats| NetworkCounters {
        name: net.name,
        rx_bytes: net.rx_bytes,
        rx_packets: net.rx_packets,
        rx_errors: net.rx_errors,
        rx_dropped: net.rx_dropped,
        tx_bytes: net.tx_bytes,
        tx_packets: net.tx_packets,
        tx_errors: net.tx_errors,
        tx_dropped: net.tx_dropped,
    };
    let sampled = i64::try_from(stats.sampled_at_unix_ns).unwrap_or(i64::MAX);
    ContainerStats {
        sampled: Timestamp::from_unix_ns(sampled),
        cpu_usage_ns: stats.cpu_usage_ns,
        cpu_user_ns: stats.cpu_user_ns,
        cpu_system_ns: stats.cpu_system_ns,
        cpus: stats.cpus,
        memory_usage_bytes: stats.memory_usage_bytes,
        memory_inactive_file_bytes: stats.memory_inactive_file_bytes,
        memory_limit_bytes: stats.memory_limit_bytes,
        pids: stats.pids,
        pids_limit: stats.pids_limit,
        block_read_bytes: stats.block_read_bytes,
        block_write_bytes: stats.block_write_bytes,
        networks: stats.networks.into_iter().map(counters).collect(),
        oom_kills: stats.oom_kills,
    }
}
