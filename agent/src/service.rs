//! The agent's RPC: every call is a few lines from its request to the part that does the work.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hyper_protocol::rpc::agent::{
    ArchiveRequest, ArchiveResponse, ConfigureNetworkRequest, ConfigureRequest, ConfigureResponse,
    ConnectPortRequest, ContainerRef, CreateContainerRequest, CreateContainerResponse, CreateProcessRequest,
    CreateProcessResponse, Empty, ExitStatus, ListProcessesResponse, NextEventsRequest, NextEventsResponse,
    PathStat, ProcessRef, RenewContainerRequest, ResizeTerminalRequest, SandboxEvent, SetClockRequest,
    SetProcessorsRequest, SignalProcessRequest, StartProcessResponse, StatPathRequest, StatsResponse,
    TakeSpansRequest, TakeSpansResponse, UnpackImageRequest, UnpackImageResponse, UpdateContainerRequest,
    sandbox_event,
};
use hyper_protocol::rpc::agent_ttrpc::Agent;
use ttrpc::r#async::TtrpcContext;

use crate::bays::{self, Disks};
use crate::cgroup::{self, Cgroup};
use crate::container::Container;
use crate::error::{AgentError, Tried};
use crate::events::Event;
use crate::net;
use crate::plan::{ArchivePlan, Plan, Report};
use crate::process::Process;
use crate::request;
use crate::sandbox::{self, Configured, Direction, Sandbox};
use crate::spec::{ResourceSpec, Spec};
use crate::stdio::Connections;
use crate::trace::Steps;
use crate::{processors, sysctl, unpack};

/// Highest signal number.
const MAX_SIGNAL: u32 = 64;
/// Most sysctls in one request.
const MAX_SYSCTLS: usize = 256;
/// Longest host name (`HOST_NAME_MAX`).
const MAX_HOSTNAME_BYTES: usize = 64;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct AgentService {
    sandbox: Arc<Sandbox>,
}

/// Removes a new container's cgroup unless the container was made.
struct CgroupGuard(Option<Cgroup>);

impl Drop for CgroupGuard {
    fn drop(&mut self) {
        let Some(cgroup) = self.0.take() else { return };
        tokio::spawn(async move {
            let removed = async {
                cgroup.kill()?;
                cgroup.until_empty().await?;
                cgroup.remove()
            };
            if let Err(error) = removed.await {
                crate::log::error(error.to_string());
            }
        });
    }
}

impl AgentService {
    /// A service for this sandbox.
    pub(crate) fn new(sandbox: Arc<Sandbox>) -> Self {
        Self { sandbox }
    }

    fn process(&self, container: &str, process: &str) -> Result<Arc<Process>, AgentError> {
        self.sandbox.container(container)?.process(process)
    }

    async fn set_up(&self, request: ConfigureRequest) -> Result<ConfigureResponse, AgentError> {
        let configured = self.sandbox.configure()?;
        let mut steps = Steps::default();
        steps.next("clock and entropy");
        sandbox::set_clock(request.time_unix_ns)?;
        sandbox::add_entropy(&request.entropy)?;
        let hostname = &request.hostname;
        check_hostname(hostname)?;
        if !hostname.is_empty() {
            rustix::system::sethostname(hostname.as_bytes())
                .tried(|| format!("set hostname {hostname:?}"))?;
        }
        if request.sysctls.len() > MAX_SYSCTLS {
            return Err(AgentError::limit("sysctls", MAX_SYSCTLS));
        }
        steps.next("sysctls");
        if configured == Configured::First {
            for (name, value) in sysctl::DEFAULTS {
                // A kernel built without one of these needs no default for it.
                let _ = sysctl::set(name, value);
            }
        }
        for (name, value) in &request.sysctls {
            sysctl::set(name, value)?;
        }
        steps.next("network");
        net::configure::apply(&request.interfaces, &request.routes)?;
        if request.dns_proxy && configured == Configured::First {
            net::dns::start().await?;
        }
        steps.next("cgroups and folders");
        self.sandbox.prepare()?;
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Ok(ConfigureResponse {
            protocol_version: hyper_protocol::PROTOCOL_VERSION.to_string(),
            kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
            mem_total_bytes: mem_total(&meminfo),
            cpus_online: cgroup::stats::online_cpus(),
            ..ConfigureResponse::default()
        })
    }

    async fn make_container(&self, mut request: CreateContainerRequest) -> Result<u32, AgentError> {
        let mut spec = Spec::parse(&request.oci_spec)?;
        let id = request.container_id.clone();
        let reservation = self.sandbox.reserve(&id)?;
        self.sandbox.prepare()?;
        let mut steps = Steps::default();
        steps.next("bind disks");
        let wishes = std::mem::take(&mut request.disks);
        let bound = tokio::task::spawn_blocking(move || Disks::bind(&wishes)).await;
        let disks = bound.map_err(|_| AgentError::state("the thread that binds disks has ended"))??;
        bays::add_devices(&mut spec, &request.block_devices)?;
        steps.next("make the cgroup");
        let cgroup = Cgroup::create(&id, &spec.linux.resources)?;
        let mut guard = CgroupGuard(Some(cgroup.clone()));
        let devices = request::device_rules(&spec);
        let ids = [request.stdio.stdin, request.stdio.stdout, request.stdio.stderr];
        let shared_pids = match request.pid_namespace_of.as_str() {
            "" => None,
            other => Some(self.sandbox.container(other)?),
        };
        let shared_ipc = match request.ipc_namespace_of.as_str() {
            "" => None,
            other => Some(self.sandbox.container(other)?),
        };
        let plan = request::create_plan(request, spec, &cgroup)?;
        steps.next("mount shares");
        self.sandbox.mount_shares(request::shares(&plan)).await?;
        self.sandbox.mount_memory(request::shared_memory(&plan)).await?;
        let sockets = self.sandbox.sockets.stand_in(&plan)?;
        steps.next("claim streams");
        let connections = Connections::claim(&self.sandbox.streams, ids).await?;
        steps.next("make the first process");
        let surroundings = (cgroup, shared_pids.as_deref(), shared_ipc.as_deref());
        let container =
            Container::create(&id, &self.sandbox.reaper, plan, connections, sockets, surroundings).await?;
        steps.next("fence devices");
        // Only now: until here its first process has opened disks, which the program to come must not.
        container.cgroup().allow_devices(&devices)?;
        container.watch_memory(&self.sandbox.events);
        let pid = pid_of(&container)?;
        guard.0 = None;
        self.sandbox.disks.keep(&id, disks);
        reservation.fill(container);
        Ok(pid)
    }

    async fn make_process(&self, request: CreateProcessRequest) -> Result<u32, AgentError> {
        let container = self.sandbox.container(&request.container_id)?;
        let id = request.process_id.clone();
        let ids = [request.stdio.stdin, request.stdio.stdout, request.stdio.stderr];
        let plan = request::process_plan(request, &container)?;
        container.can_run()?;
        let mut steps = Steps::default();
        steps.next("claim streams");
        let connections = Connections::claim(&self.sandbox.streams, ids).await?;
        steps.next("make the process");
        let process = container.add_process(&self.sandbox.reaper, &id, plan, connections).await?;
        Ok(process.pid().as_raw_nonzero().get().unsigned_abs())
    }

    async fn renew(&self, request: RenewContainerRequest) -> Result<(), AgentError> {
        let container = self.sandbox.container(&request.container_id)?;
        check_hostname(&request.hostname)?;
        let files = request::files(request.files)?;
        container.renew(&self.sandbox.reaper, request.hostname, files).await?;
        let ids = [request.stdio.stdin, request.stdio.stdout, request.stdio.stderr];
        let connections = Connections::claim(&self.sandbox.streams, ids).await?;
        container.first()?.lines().take(connections).await;
        Ok(())
    }

    async fn begin(&self, process: ProcessRef) -> Result<StartProcessResponse, AgentError> {
        let process = self.process(&process.container_id, &process.process_id)?;
        let failure = process.start().await?;
        let (exit_code, error) = failure.unwrap_or_default();
        Ok(StartProcessResponse {
            pid: process.pid().as_raw_nonzero().get().unsigned_abs(),
            exit_code,
            error,
            ..StartProcessResponse::default()
        })
    }

    fn send_signal(&self, request: &SignalProcessRequest) -> Result<(), AgentError> {
        if request.signal == 0 || request.signal > MAX_SIGNAL {
            return Err(AgentError::invalid(format!("there is no signal {}", request.signal)));
        }
        let signal = i32::try_from(request.signal).unwrap_or_default();
        let container = self.sandbox.container(&request.container_id)?;
        if !request.all {
            return container.process(&request.process_id)?.signal(signal);
        }
        if signal == libc::SIGKILL { container.cgroup().kill() } else { container.cgroup().signal(signal) }
    }

    async fn archive(
        &self,
        request: ArchiveRequest,
        direction: Direction,
    ) -> Result<ArchiveResponse, AgentError> {
        let container = self.sandbox.container(&request.container_id)?;
        let plan = ArchivePlan {
            mount_namespace: -1,
            path: request.path,
            strict: request.strict,
            follow_symlink: request.follow_symlink,
            keep_owner: request.keep_owner,
        };
        let kind = match direction {
            Direction::Out => Plan::ReadArchive,
            Direction::In => Plan::WriteArchive,
        };
        let stream = Some((request.stream, direction));
        match self.sandbox.archive(&container, kind, plan, stream).await? {
            Report::Archived { bytes } => Ok(ArchiveResponse { bytes, ..ArchiveResponse::default() }),
            other => Err(unexpected(&other)),
        }
    }

    async fn stat(&self, request: StatPathRequest) -> Result<PathStat, AgentError> {
        let container = self.sandbox.container(&request.container_id)?;
        let plan = ArchivePlan {
            mount_namespace: -1,
            path: request.path,
            strict: false,
            follow_symlink: false,
            keep_owner: false,
        };
        match self.sandbox.archive(&container, Plan::StatPath, plan, None).await? {
            Report::Stat { name, size, mode, mtime_unix_ns, link_target } => {
                Ok(PathStat { name, size, mode, mtime_unix_ns, link_target, ..PathStat::default() })
            }
            other => Err(unexpected(&other)),
        }
    }
}

fn check_hostname(hostname: &str) -> Result<(), AgentError> {
    if hostname.len() > MAX_HOSTNAME_BYTES {
        return Err(AgentError::limit("bytes of a host name", MAX_HOSTNAME_BYTES));
    }
    Ok(())
}

fn unexpected(report: &Report) -> AgentError {
    AgentError::state(format!("a child program reported {report:?}"))
}

fn pid_of(container: &Container) -> Result<u32, AgentError> {
    Ok(container.first()?.pid().as_raw_nonzero().get().unsigned_abs())
}

fn mem_total(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib: u64 =
        line.and_then(|l| l.split_ascii_whitespace().next()).and_then(|n| n.parse().ok()).unwrap_or_default();
    kib.saturating_mul(1024)
}

fn event(event: Event) -> SandboxEvent {
    let Event::Oom { container_id } = event;
    SandboxEvent { kind: sandbox_event::Kind::OOM.into(), container_id, ..SandboxEvent::default() }
}

fn done(result: Result<(), AgentError>) -> ttrpc::Result<Empty> {
    result?;
    Ok(Empty::default())
}

#[async_trait]
impl Agent for AgentService {
    async fn configure(&self, c: &TtrpcContext, r: ConfigureRequest) -> ttrpc::Result<ConfigureResponse> {
        Ok(self.sandbox.traces.record(c, "Configure", self.set_up(r)).await?)
    }

    async fn set_clock(&self, _: &TtrpcContext, r: SetClockRequest) -> ttrpc::Result<Empty> {
        done(sandbox::set_clock(r.time_unix_ns))
    }

    async fn configure_network(&self, c: &TtrpcContext, r: ConfigureNetworkRequest) -> ttrpc::Result<Empty> {
        let apply = async { net::configure::apply_all(&r.interfaces, &r.routes, &r.neighbours) };
        done(self.sandbox.traces.record(c, "ConfigureNetwork", apply).await)
    }

    async fn create_container(
        &self,
        c: &TtrpcContext,
        r: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let make = self.make_container(r);
        let pid = self.sandbox.traces.record(c, "CreateContainer", make).await?;
        Ok(CreateContainerResponse { pid, ..CreateContainerResponse::default() })
    }

    async fn create_process(
        &self,
        c: &TtrpcContext,
        r: CreateProcessRequest,
    ) -> ttrpc::Result<CreateProcessResponse> {
        let pid = self.sandbox.traces.record(c, "CreateProcess", self.make_process(r)).await?;
        Ok(CreateProcessResponse { pid, ..CreateProcessResponse::default() })
    }

    async fn start_process(&self, c: &TtrpcContext, r: ProcessRef) -> ttrpc::Result<StartProcessResponse> {
        Ok(self.sandbox.traces.record(c, "StartProcess", self.begin(r)).await?)
    }

    async fn wait_process(&self, _: &TtrpcContext, r: ProcessRef) -> ttrpc::Result<ExitStatus> {
        let ended = self.process(&r.container_id, &r.process_id)?.wait().await?;
        Ok(ExitStatus {
            exit_code: ended.exit.code,
            signal: ended.exit.signal,
            oom_killed: ended.oom_killed,
            exited_at_unix_ns: ended.exit.at_unix_ns,
            ..ExitStatus::default()
        })
    }

    async fn signal_process(&self, _: &TtrpcContext, r: SignalProcessRequest) -> ttrpc::Result<Empty> {
        done(self.send_signal(&r))
    }

    async fn resize_terminal(&self, _: &TtrpcContext, r: ResizeTerminalRequest) -> ttrpc::Result<Empty> {
        let process = self.process(&r.container_id, &r.process_id)?;
        done(process.resize(request::sized(r.rows, r.cols)))
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        r: ContainerRef,
    ) -> ttrpc::Result<ListProcessesResponse> {
        let processes = crate::listing::list(&*self.sandbox.container(&r.container_id)?)?;
        Ok(ListProcessesResponse { processes, ..ListProcessesResponse::default() })
    }

    async fn stats(&self, _: &TtrpcContext, r: ContainerRef) -> ttrpc::Result<StatsResponse> {
        Ok(self.sandbox.container(&r.container_id)?.cgroup().stats())
    }

    async fn pause_container(&self, _: &TtrpcContext, r: ContainerRef) -> ttrpc::Result<Empty> {
        done(self.sandbox.container(&r.container_id)?.set_paused(true).await)
    }

    async fn resume_container(&self, _: &TtrpcContext, r: ContainerRef) -> ttrpc::Result<Empty> {
        done(self.sandbox.container(&r.container_id)?.set_paused(false).await)
    }

    async fn update_container(&self, _: &TtrpcContext, r: UpdateContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.sandbox.container(&r.container_id)?;
        let resources = ResourceSpec::parse(&r.oci_resources)?;
        done(container.cgroup().apply(&resources))
    }

    async fn set_processors(&self, _: &TtrpcContext, r: SetProcessorsRequest) -> ttrpc::Result<Empty> {
        // The kernel waits for each of them.
        let set = tokio::task::spawn_blocking(move || processors::set_online(r.online)).await;
        done(set.unwrap_or_else(|_| Err(AgentError::state("the thread has ended"))))
    }

    async fn renew_container(&self, _: &TtrpcContext, r: RenewContainerRequest) -> ttrpc::Result<Empty> {
        done(self.renew(r).await)
    }

    async fn delete_container(&self, c: &TtrpcContext, r: ContainerRef) -> ttrpc::Result<Empty> {
        let delete = self.sandbox.delete(&r.container_id);
        done(self.sandbox.traces.record(c, "DeleteContainer", delete).await)
    }

    async fn read_archive(&self, _: &TtrpcContext, r: ArchiveRequest) -> ttrpc::Result<ArchiveResponse> {
        Ok(self.archive(r, Direction::Out).await?)
    }

    async fn write_archive(&self, _: &TtrpcContext, r: ArchiveRequest) -> ttrpc::Result<ArchiveResponse> {
        Ok(self.archive(r, Direction::In).await?)
    }

    async fn stat_path(&self, _: &TtrpcContext, r: StatPathRequest) -> ttrpc::Result<PathStat> {
        Ok(self.stat(r).await?)
    }

    async fn unpack_image(
        &self,
        _: &TtrpcContext,
        r: UnpackImageRequest,
    ) -> ttrpc::Result<UnpackImageResponse> {
        Ok(unpack::run(&self.sandbox.streams, r).await?)
    }

    async fn connect_port(&self, _: &TtrpcContext, r: ConnectPortRequest) -> ttrpc::Result<Empty> {
        done(self.sandbox.loopback.connect(&self.sandbox.streams, &r).await)
    }

    async fn next_events(&self, _: &TtrpcContext, r: NextEventsRequest) -> ttrpc::Result<NextEventsResponse> {
        let events = self.sandbox.events.next(Duration::from_millis(r.timeout_ms.into())).await;
        let events = events.into_iter().map(event).collect();
        Ok(NextEventsResponse { events, ..NextEventsResponse::default() })
    }

    async fn take_spans(&self, _: &TtrpcContext, r: TakeSpansRequest) -> ttrpc::Result<TakeSpansResponse> {
        let spans = self.sandbox.traces.take(r.trace, &r.call);
        Ok(TakeSpansResponse { spans, ..TakeSpansResponse::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.sandbox.stop_all().await;
        self.sandbox.end.notify_one();
        Ok(Empty::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_bytes() {
        assert_eq!(mem_total("MemTotal:         123456 kB\nMemFree: 1 kB\n"), 123_456 * 1024);
        assert_eq!(mem_total(""), 0);
    }

    #[test]
    fn signals_are_bounded() {
        let service = AgentService::new(Arc::default());
        for signal in [0, 65, u32::MAX] {
            let request = SignalProcessRequest {
                container_id: "a".to_owned(),
                signal,
                ..SignalProcessRequest::default()
            };
            assert_eq!(service.send_signal(&request).unwrap_err().kind(), crate::error::ErrorKind::Invalid);
        }
    }
}
