//! The Task service, versions 2 and 3: every call is a few lines from its request to the sandbox.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest,
    WaitResponse,
};
use containerd_shim_protos::events::task::{TaskCreate, TaskDelete, TaskIO};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc::r#async::TtrpcContext;
use containerd_shim_protos::ttrpc::{Code, Result as TtrpcResult};
use hyper_sandbox::Dirs;
use hyper_sandbox::audit::AuditLog;
use hyper_sandbox::pod::{BundleConfig, PodError, StdioPaths};

use crate::bundle::Bundle;
use crate::service::Service;
use crate::{encode, status};

/// Version that Connect answers with: of the Task API.
const VERSION: &str = "2";

/// The service.
pub(crate) struct TaskService(pub(crate) Arc<Service>);

impl TaskService {
    async fn make(&self, request: CreateTaskRequest) -> TtrpcResult<CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            return Err(status::unimplemented("restoring a checkpoint"));
        }
        let dir = PathBuf::from(&request.bundle);
        let bundle = Bundle::read(&dir).map_err(status::of_bundle)?;
        hyper_sandbox::pod::check(&bundle.json, &dir).map_err(status::of_pod)?;
        let sandbox = self.0.sandbox_for(&request.id, &bundle, request.options.as_ref()).await?;
        let pid = self.0.pid();
        let wish = BundleConfig {
            id: request.id.clone(),
            bundle: dir,
            config: bundle.json,
            rootfs: request.rootfs.iter().map(encode::root_mount).collect(),
            stdio: StdioPaths {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
            },
        };
        let id = request.id.clone();
        let announce = || self.0.publisher.publish("/tasks/create", &created(request, pid));
        let made = sandbox.create(wish, announce).await;
        noted("task create", &id, "", made).map_err(status::of_pod)?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn describe(&self, request: StateRequest) -> TtrpcResult<StateResponse> {
        let sandbox = self.0.sandbox().await?;
        let found = sandbox.status(&request.id, &request.exec_id).map_err(status::of_pod)?;
        let mut answer = StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: found.bundle.display().to_string(),
            pid: self.0.pid(),
            status: encode::task_status(found.status),
            stdin: found.stdio.stdin,
            stdout: found.stdio.stdout,
            stderr: found.stdio.stderr,
            terminal: found.stdio.terminal,
            ..Default::default()
        };
        if let Some(exit) = found.exit {
            answer.exit_status = exit.code;
            answer.exited_at = encode::time(exit.at);
        }
        Ok(answer)
    }

    async fn remove(&self, request: DeleteRequest) -> TtrpcResult<DeleteResponse> {
        let sandbox = self.0.sandbox().await?;
        let exit = sandbox.delete(&request.id, &request.exec_id).await;
        let code = exit.as_ref().map_or_else(|_| String::new(), |exit| format!("code {}", exit.code));
        let detail = [request.exec_id.as_str(), &code].join(" ");
        let exit = noted("task delete", &request.id, detail.trim(), exit).map_err(status::of_pod)?;
        let pid = self.0.pid();
        if request.exec_id.is_empty() {
            let event = TaskDelete {
                container_id: request.id,
                pid,
                exit_status: exit.code,
                exited_at: encode::time(exit.at),
                ..Default::default()
            };
            self.0.publisher.publish("/tasks/delete", &event);
        }
        Ok(DeleteResponse {
            pid,
            exit_status: exit.code,
            exited_at: encode::time(exit.at),
            ..Default::default()
        })
    }
}

fn created(request: CreateTaskRequest, pid: u32) -> TaskCreate {
    TaskCreate {
        container_id: request.id,
        bundle: request.bundle,
        rootfs: request.rootfs,
        io: MessageField::some(TaskIO {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
            ..Default::default()
        }),
        checkpoint: request.checkpoint,
        pid,
        ..Default::default()
    }
}

/// Puts what was done to a container, or to a process of it, into the audit log.
fn noted<T>(action: &str, id: &str, detail: &str, outcome: Result<T, PodError>) -> Result<T, PodError> {
    AuditLog::of(&Dirs::from_env()).note(action, id, detail, outcome)
}

fn done(result: Result<(), PodError>) -> TtrpcResult<Empty> {
    result.map(|()| Empty::new()).map_err(status::of_pod)
}

#[async_trait]
impl Task for TaskService {
    #[tracing::instrument(level = "debug", skip_all, fields(id = r.id))]
    async fn state(&self, _: &TtrpcContext, r: StateRequest) -> TtrpcResult<StateResponse> {
        self.describe(r).await
    }

    #[tracing::instrument(level = "debug", skip_all, fields(id = r.id))]
    async fn create(&self, _: &TtrpcContext, r: CreateTaskRequest) -> TtrpcResult<CreateTaskResponse> {
        let (id, caller) = (r.id.clone(), self.0.caller());
        let made = self.make(r).await;
        caller.answered();
        made.inspect_err(|error| tracing::warn!(id, %error, "create"))
    }

    #[tracing::instrument(level = "debug", skip_all, fields(id = r.id))]
    async fn start(&self, _: &TtrpcContext, r: StartRequest) -> TtrpcResult<StartResponse> {
        let sandbox = self.0.sandbox().await?;
        let started = sandbox.start_process(&r.id, &r.exec_id).await;
        noted("task start", &r.id, &r.exec_id, started)
            .inspect_err(|error| tracing::warn!(r.id, r.exec_id, %error, "start"))
            .map_err(status::of_pod)?;
        Ok(StartResponse { pid: self.0.pid(), ..Default::default() })
    }

    #[tracing::instrument(level = "debug", skip_all, fields(id = r.id))]
    async fn delete(&self, _: &TtrpcContext, r: DeleteRequest) -> TtrpcResult<DeleteResponse> {
        self.remove(r).await
    }

    #[tracing::instrument(level = "debug", skip_all, fields(id = r.id))]
    async fn pids(&self, _: &TtrpcContext, r: PidsRequest) -> TtrpcResult<PidsResponse> {
        let pids = self.0.sandbox().await?.pids(&r.id).await.map_err(status::of_pod)?;
        let processes = pids.into_iter().map(|pid| ProcessInfo { pid, ..Default::default() }).collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    #[tracing::instrument(level = "debug", skip_all, fields(id = r.id))]
    async fn pause(&self, _: &TtrpcContext, r: PauseRequest) -> TtrpcResult<Empty> {
        done(noted("task pause", &r.id, "", self.0.sandbox().await?.pause(&r.id).await))
    }

    #[tracing::instrument(level = "debug", skip_all, fields(id = r.id))]
    async fn resume(&self, _: &TtrpcContext, r: ResumeRequest) -> TtrpcResult<Empty> {
        done(noted("task resume", &r.id, "", self.0.sandbox().await?.resume(&r.id).await))
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> TtrpcResult<Empty> {
        Err(status::unimplemented("checkpoint"))
    }

    #[tracing::instrument(level = "debug", skip_all, fields(id = r.id))]
    async fn kill(&self, _: &TtrpcContext, r: KillRequest) -> TtrpcResult<Empty> {
        let killed = self.0.sandbox().await?.kill(&r.id, &r.exec_id, r.signal, r.all).await;
        done(noted("task kill", &r.id, format!("{} signal {}", r.exec_id, r.signal).trim(), killed))
    }

    #[tracing::instrument(level = "debug", skip_all, fields(id = r.id))]
    async fn exec(&self, _: &TtrpcContext, r: ExecProcessRequest) -> TtrpcResult<Empty> {
        let paths = StdioPaths { stdin: r.stdin, stdout: r.stdout, stderr: r.stderr, terminal: r.terminal };
        // The specification is JSON in an Any, by containerd's custom.
        let process = r.spec.into_option().unwrap_or_default().value;
        let made = self.0.sandbox().await?.exec(&r.id, &r.exec_id, &process, paths);
        done(noted("task exec", &r.id, &r.exec_id, made))
    }

    #[tracing::instrument(level = "debug", skip_all, fields(id = r.id))]
    async fn resize_pty(&self, _: &TtrpcContext, r: ResizePtyRequest) -> TtrpcResult<Empty> {
        done(self.0.sandbox().await?.resize(&r.id, &r.exec_id, r.height, r.width).await)
    }

    #[tracing::instrument(level = "debug", skip_all, fields(id = r.id))]
    async fn close_io(&self, _: &TtrpcContext, r: CloseIORequest) -> TtrpcResult<Empty> {
        let sandbox = self.0.sandbox().await?;
        if r.stdin {
            return done(sandbox.close_stdin(&r.id, &r.exec_id));
        }
        done(sandbox.status(&r.id, &r.exec_id).map(drop))
    }

    #[tracing::instrument(level = "debug", skip_all, fields(id = r.id))]
    async fn update(&self, _: &TtrpcContext, r: UpdateTaskRequest) -> TtrpcResult<Empty> {
        let Some(resources) = r.resources.into_option() else {
            return Err(status::status(Code::INVALID_ARGUMENT, "an update without resources"));
        };
        let updated = self.0.sandbox().await?.update(&r.id, &resources.value).await;
        done(noted("task update", &r.id, "", updated))
    }

    #[tracing::instrument(level = "debug", skip_all, fields(id = r.id))]
    async fn wait(&self, _: &TtrpcContext, r: WaitRequest) -> TtrpcResult<WaitResponse> {
        let sandbox = self.0.sandbox().await?;
        let exit = sandbox.wait(&r.id, &r.exec_id).await.map_err(status::of_pod)?;
        Ok(WaitResponse { exit_status: exit.code, exited_at: encode::time(exit.at), ..Default::default() })
    }

    #[tracing::instrument(level = "debug", skip_all, fields(id = r.id))]
    async fn stats(&self, _: &TtrpcContext, r: StatsRequest) -> TtrpcResult<StatsResponse> {
        let stats = self.0.sandbox().await?.stats(&r.id).await.map_err(status::of_pod)?;
        let packed = encode::any(&encode::metrics(&stats));
        let packed = packed.map_err(|error| status::status(Code::INTERNAL, &error.to_string()))?;
        Ok(StatsResponse { stats: MessageField::some(packed), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> TtrpcResult<ConnectResponse> {
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.0.pid(),
            version: VERSION.to_owned(),
            ..Default::default()
        })
    }

    #[tracing::instrument(level = "debug", skip_all, fields(id = r.id))]
    async fn shutdown(&self, _: &TtrpcContext, r: ShutdownRequest) -> TtrpcResult<Empty> {
        // Each container's client asks for it; the last one means it.
        if !self.0.is_kept() && self.0.is_empty().await {
            tracing::info!(r.id, "shutdown");
            self.0.finish();
        }
        Ok(Empty::new())
    }
}
