//! The Sandbox service (containerd 2): the pod's machine without a pause container.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox;
use containerd_shim_protos::ttrpc::r#async::TtrpcContext;
use containerd_shim_protos::ttrpc::{Code, Result as TtrpcResult};
use containerd_shim_protos::types::platform::Platform;
use hyper_sandbox::Timestamp;

use crate::bundle::{SHARES, Size, size};
use crate::service::Service;
use crate::{encode, status};

/// States that containerd's CRI plugin knows.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";
/// Exit code of a sandbox that ended by itself.
const LOST: u32 = 137;

/// The service.
pub(crate) struct SandboxService {
    service: Arc<Service>,
    wish: Mutex<Option<Wish>>,
    created: Timestamp,
}

/// What was asked for, until it is started.
#[derive(Debug, Clone)]
struct Wish {
    netns: Option<PathBuf>,
    size: Size,
}

impl SandboxService {
    pub(crate) fn new(service: Arc<Service>) -> Self {
        Self { service, wish: Mutex::new(None), created: Timestamp::now() }
    }

    fn wish(&self) -> std::sync::MutexGuard<'_, Option<Wish>> {
        self.wish.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The size that a pod's annotations ask for.
fn wished_size(request: &CreateSandboxRequest) -> Size {
    let number = |name: &str| request.annotations.get(name).and_then(|text| text.parse::<i64>().ok());
    let quota = number("io.kubernetes.cri.sandbox-cpu-quota").filter(|quota| *quota > 0);
    let memory = number("io.kubernetes.cri.sandbox-memory").filter(|bytes| *bytes > 0);
    let shares = number("io.kubernetes.cri.sandbox-cpu-shares").map(|shares| (shares, SHARES));
    size(memory, quota.zip(number("io.kubernetes.cri.sandbox-cpu-period")).or(shares))
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        r: CreateSandboxRequest,
    ) -> TtrpcResult<CreateSandboxResponse> {
        if r.netns_path.is_empty() {
            return Err(status::unimplemented("the host's network (hostNetwork)"));
        }
        let mut wish = self.wish();
        if wish.is_some() {
            return Err(status::status(Code::ALREADY_EXISTS, "the sandbox: already exists"));
        }
        *wish = Some(Wish { netns: Some(PathBuf::from(&r.netns_path)), size: wished_size(&r) });
        self.service.keep();
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        r: StartSandboxRequest,
    ) -> TtrpcResult<StartSandboxResponse> {
        let wish = self.wish().clone();
        let Some(wish) = wish else {
            return Err(status::status(Code::FAILED_PRECONDITION, "the sandbox was not created"));
        };
        self.service.start(&r.sandbox_id, wish.netns, wish.size).await?;
        Ok(StartSandboxResponse {
            pid: self.service.pid(),
            created_at: encode::time(self.created),
            ..Default::default()
        })
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> TtrpcResult<PlatformResponse> {
        let platform =
            Platform { os: "linux".to_owned(), architecture: "amd64".to_owned(), ..Default::default() };
        Ok(PlatformResponse { platform: MessageField::some(platform), ..Default::default() })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        _: StopSandboxRequest,
    ) -> TtrpcResult<StopSandboxResponse> {
        // One that never came up is stopped.
        if let Ok(sandbox) = self.service.sandbox().await {
            sandbox.shutdown().await;
        }
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        _: WaitSandboxRequest,
    ) -> TtrpcResult<WaitSandboxResponse> {
        let sandbox = self.service.sandbox().await?;
        let end = sandbox.ended().await;
        tracing::info!(end, "the sandbox has ended");
        Ok(WaitSandboxResponse {
            exit_status: LOST,
            exited_at: encode::time(Timestamp::now()),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        r: SandboxStatusRequest,
    ) -> TtrpcResult<SandboxStatusResponse> {
        let alive = match self.service.sandbox().await {
            Ok(sandbox) => sandbox.ping().await.is_ok(),
            Err(_) => false,
        };
        Ok(SandboxStatusResponse {
            sandbox_id: r.sandbox_id,
            pid: self.service.pid(),
            state: if alive { READY } else { NOT_READY }.to_owned(),
            created_at: encode::time(self.created),
            ..Default::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, _: PingRequest) -> TtrpcResult<PingResponse> {
        self.service.sandbox().await?.ping().await.map_err(status::of_pod)?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        _: ShutdownSandboxRequest,
    ) -> TtrpcResult<ShutdownSandboxResponse> {
        self.service.finish();
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        _: SandboxMetricsRequest,
    ) -> TtrpcResult<SandboxMetricsResponse> {
        Err(status::unimplemented("metrics of a sandbox"))
    }
}
