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

use crate::bundle::pod_size;
use crate::config::{Config, is_ours};
use crate::service::{Service, Wish};
use crate::{encode, metrics, status};

/// States that containerd's CRI plugin knows.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";
/// Exit code of a sandbox that ended by itself.
const LOST: u32 = 137;

/// The service.
pub(crate) struct SandboxService {
    service: Arc<Service>,
    /// What was asked for, until it is started.
    wish: Mutex<Option<Wish>>,
    created: Timestamp,
}

impl SandboxService {
    pub(crate) fn new(service: Arc<Service>) -> Self {
        Self { service, wish: Mutex::new(None), created: Timestamp::now() }
    }

    fn wish(&self) -> std::sync::MutexGuard<'_, Option<Wish>> {
        self.wish.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Message of Kubernetes that containerd's CRI plugin hands over.
const POD_CONFIG: &str = "PodSandboxConfig";

/// The control group below the pod's own that its machine is counted in, from `linux.cgroup_parent` of the pod's configuration.
fn pod_cgroup(request: &CreateSandboxRequest) -> Result<String, protobuf::Error> {
    let Some(options) = request.options.as_ref().filter(|any| any.type_url.ends_with(POD_CONFIG)) else {
        return Ok(String::new());
    };
    // linux = 8, of which cgroup_parent = 1; both are length-delimited.
    let linux = field(&options.value, 8 << 3 | 2)?;
    let parent = String::from_utf8(field(&linux, 1 << 3 | 2)?).unwrap_or_default();
    let parent = parent.trim_end_matches('/');
    let id = &request.sandbox_id;
    Ok(match parent.rsplit('/').next() {
        None | Some("") => String::new(),
        Some(slice) if slice.ends_with(".slice") => format!("{slice}:hyper:{id}"),
        Some(_) => format!("{parent}/{id}"),
    })
}

/// The last value of a field with this tag; empty when there is none.
fn field(message: &[u8], tag: u32) -> Result<Vec<u8>, protobuf::Error> {
    let mut input = protobuf::CodedInputStream::from_bytes(message);
    let mut value = Vec::new();
    while let Some(found) = input.read_raw_tag_or_eof()? {
        if found == tag {
            value = input.read_bytes()?;
        } else {
            protobuf::rt::skip_field_for_tag(found, &mut input)?;
        }
    }
    Ok(value)
}

#[async_trait]
impl Sandbox for SandboxService {
    #[tracing::instrument(level = "debug", skip_all, fields(id = r.sandbox_id))]
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        r: CreateSandboxRequest,
    ) -> TtrpcResult<CreateSandboxResponse> {
        if r.netns_path.is_empty() {
            return Err(status::unimplemented("the host's network (hostNetwork)"));
        }
        let annotations = r.annotations.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        // containerd fills this place with the pod's configuration; those of the handler come with the start.
        let own = r.options.as_ref().filter(|any| is_ours(any)).or(self.service.options.as_ref());
        let config = Config::load(own, &annotations).map_err(status::of_config)?;
        let size = pod_size(&r.annotations, &config).map_err(status::of_config)?;
        let cgroup = pod_cgroup(&r).map_err(|error| status::of_config(error.into()))?;
        let mut wish = self.wish();
        if wish.is_some() {
            return Err(status::status(Code::ALREADY_EXISTS, "the sandbox: already exists"));
        }
        *wish = Some(Wish { netns: Some(PathBuf::from(&r.netns_path)), cgroup, size, config });
        self.service.keep();
        Ok(CreateSandboxResponse::new())
    }

    #[tracing::instrument(level = "debug", skip_all, fields(id = r.sandbox_id))]
    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        r: StartSandboxRequest,
    ) -> TtrpcResult<StartSandboxResponse> {
        let wish = self.wish().clone();
        let Some(wish) = wish else {
            return Err(status::status(Code::FAILED_PRECONDITION, "the sandbox was not created"));
        };
        self.service.start(&r.sandbox_id, wish).await?;
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

    #[tracing::instrument(level = "debug", skip_all)]
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

    #[tracing::instrument(level = "debug", skip_all)]
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

    #[tracing::instrument(level = "debug", skip_all, fields(id = r.sandbox_id))]
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

    #[tracing::instrument(level = "debug", skip_all)]
    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        _: ShutdownSandboxRequest,
    ) -> TtrpcResult<ShutdownSandboxResponse> {
        self.service.finish();
        Ok(ShutdownSandboxResponse::new())
    }

    #[tracing::instrument(level = "debug", skip_all, fields(id = r.sandbox_id))]
    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        r: SandboxMetricsRequest,
    ) -> TtrpcResult<SandboxMetricsResponse> {
        let sandbox = self.service.sandbox().await?;
        let sum = metrics::sum(&metrics::of_containers(&sandbox).await);
        let packed = encode::any(&encode::metrics(&sum));
        let packed = packed.map_err(|error| status::status(Code::INTERNAL, &error.to_string()))?;
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.id = r.sandbox_id;
        metric.timestamp = encode::time(Timestamp::now());
        metric.data = MessageField::some(packed);
        Ok(response)
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::well_known_types::any::Any;

    use super::*;

    #[test]
    fn pods_name_the_parent_of_their_cgroup() {
        let request = |parent: &str| {
            let length = |text: &[u8]| u8::try_from(text.len()).unwrap();
            let linux = [&[0x0a, length(parent.as_bytes())], parent.as_bytes()].concat();
            let value = [&[0x12, 1, b'h', 0x42, length(&linux)], linux.as_slice()].concat();
            let any = Any { type_url: "runtime.v1.PodSandboxConfig".into(), value, ..Any::default() };
            let options = MessageField::some(any);
            CreateSandboxRequest { sandbox_id: "s1".into(), options, ..CreateSandboxRequest::default() }
        };
        assert_eq!(pod_cgroup(&request("/kubepods/pod7")).unwrap(), "/kubepods/pod7/s1");
        assert_eq!(pod_cgroup(&request("/a.slice/a-pod7.slice")).unwrap(), "a-pod7.slice:hyper:s1");
        assert_eq!(pod_cgroup(&request("")).unwrap(), "");
        assert_eq!(pod_cgroup(&CreateSandboxRequest::default()).unwrap(), "");
        let mut cut = request("/kubepods");
        cut.options.mut_or_insert_default().value.pop();
        assert!(pod_cgroup(&cut).is_err());
    }
}
