//! Spans to an OpenTelemetry collector, when one is configured: OTLP, protobuf over HTTP.
//!
//! ```text
//! call of containerd, with traceparent --parents--> span --layer--> queue (bounded) --thread--> collector
//!                               agent's steps --guest--> span -------^
//! ```
//! The thread is made before the shim's own enters the pod's network namespace: the collector is looked for in the host's. Who ends a span
//! never waits: what does not fit into the queue, and what the collector does not take, is dropped and counted. Without a collector there
//! is no thread, no layer and no queue.
//!
//! Files: `place` (where the collector is), `collector` (the HTTP client), `parents` (containerd's traces go on), `guest` (what agents did).

mod collector;
mod guest;
mod parents;
mod place;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use containerd_shim::Flags;
use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{Protocol, RetryPolicy, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::resource::EnvResourceDetector;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SdkTracer, SdkTracerProvider, SpanData, SpanExporter,
};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::FilterFn;
use tracing_subscriber::{Layer, Registry};

use self::collector::Collector;
use self::place::Place;

pub(crate) use self::parents::continued;
pub(crate) use self::place::check;

/// Most spans that wait for the collector: some hundred KiB. A pod's whole life is about a hundred.
const MAX_WAITING: usize = 1024;
/// Most spans in one request.
const MAX_BATCH: usize = 256;
/// Longest wait of a span for others to go with it.
const BATCH_DELAY: Duration = Duration::from_secs(2);
/// How long the last spans may take when the shim ends.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);
/// How long steps of guests that are on their way may take before that.
const SETTLE_LIMIT: Duration = Duration::from_secs(1);
/// Most events of one span; the SDK drops the rest and says how many.
const MAX_EVENTS: u32 = 64;
/// The span around all that the shim does: it lives as long as the pod, so it is for the log alone.
pub(crate) const POD: &str = "pod";

/// Annotations of containerd's CRI plugin, and what they are in OpenTelemetry's conventions.
const KUBERNETES: [(&str, &str); 4] = [
    ("io.kubernetes.cri.sandbox-name", "k8s.pod.name"),
    ("io.kubernetes.cri.sandbox-namespace", "k8s.namespace.name"),
    ("io.kubernetes.cri.sandbox-uid", "k8s.pod.uid"),
    ("io.containerd.cri.runtime-handler", "hyper.handler"),
];

/// The way to the collector.
#[derive(Debug)]
pub(crate) struct Tracing {
    provider: SdkTracerProvider,
    lost: Arc<AtomicU64>,
}

impl Tracing {
    /// Begins, if the configuration (`otlp_endpoint`) or the environment names a collector. Makes a thread.
    ///
    /// # Errors
    /// What of it cannot be used, in one line.
    pub(crate) fn start(
        wanted: Option<&str>,
        flags: &Flags,
        annotations: &BTreeMap<String, String>,
    ) -> Result<Option<Self>, String> {
        let Some(Place { url, .. }) = place::find(wanted, |name| std::env::var(name).ok())? else {
            return Ok(None);
        };
        let lost = Arc::<AtomicU64>::default();
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_http()
            .with_http_client(Collector)
            .with_endpoint(url)
            .with_protocol(Protocol::HttpBinary)
            // A batch that is not taken is dropped: those that follow must not wait for it.
            .with_retry_policy(RetryPolicy::disabled())
            .build()
            .map_err(|error| error.to_string())?;
        let config = BatchConfigBuilder::default()
            .with_max_queue_size(MAX_WAITING)
            .with_max_export_batch_size(MAX_BATCH)
            .with_scheduled_delay(BATCH_DELAY)
            .build();
        let exporter = Counted { exporter, lost: Arc::clone(&lost) };
        let processor = BatchSpanProcessor::builder(exporter).with_batch_config(config).build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_max_events_per_span(MAX_EVENTS)
            .with_resource(resource(flags, annotations))
            .build();
        guest::export_to(provider.tracer(crate::NAME));
        Ok(Some(Self { provider, lost }))
    }

    /// What takes spans from `tracing`. What is exported has nothing to do with the level of the log.
    pub(crate) fn layer(&self) -> impl Layer<Registry> + Send + Sync + 'static {
        let layer = tracing_opentelemetry::layer()
            .with_tracer::<SdkTracer>(self.provider.tracer(crate::NAME))
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false);
        let ours = FilterFn::new(|about| is_ours(about.target()) && about.name() != POD);
        layer.with_filter(ours.with_max_level_hint(LevelFilter::DEBUG))
    }

    /// Waits for what guests did, while the machine is there.
    pub(crate) async fn settle() {
        let lacking = hyper_sandbox::settle_guest_spans(SETTLE_LIMIT).await;
        if lacking > 0 {
            tracing::info!(lacking, "what guests did for some requests is not known");
        }
    }

    /// Sends what waits, at most [`FLUSH_LIMIT`]. To be called outside the runtime: it stands still.
    pub(crate) fn finish(self) {
        // What did not get through is counted, here and by the SDK.
        let flushed = self.provider.shutdown_with_timeout(FLUSH_LIMIT);
        let lost = self.lost.load(Ordering::Relaxed);
        if lost > 0 || flushed.is_err() {
            tracing::warn!(lost, ?flushed, "the collector has not taken all spans");
        }
    }
}

/// Whether spans and events of this module are exported.
fn is_ours(target: &str) -> bool {
    let name = target.split("::").next().unwrap_or_default();
    [env!("CARGO_CRATE_NAME"), "hyper_sandbox"].contains(&name)
}

/// Who speaks. The name of the service in our environment is that of containerd, which sets it for itself.
fn resource(flags: &Flags, annotations: &BTreeMap<String, String>) -> Resource {
    let pod = KUBERNETES.iter().filter_map(|(annotation, name)| {
        annotations.get(*annotation).map(|value| KeyValue::new(*name, value.clone()))
    });
    Resource::builder_empty()
        .with_detector(Box::new(EnvResourceDetector::new()))
        .with_attributes(pod)
        .with_attributes([
            KeyValue::new("service.name", crate::NAME),
            KeyValue::new("service.version", crate::VERSION),
            KeyValue::new("service.instance.id", flags.id.clone()),
            KeyValue::new("hyper.pod.id", flags.id.clone()),
            KeyValue::new("containerd.namespace", flags.namespace.clone()),
        ])
        .build()
}

/// Counts the spans that the collector has not taken.
#[derive(Debug)]
struct Counted<E> {
    exporter: E,
    lost: Arc<AtomicU64>,
}

impl<E: SpanExporter> SpanExporter for Counted<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let count = u64::try_from(batch.len()).unwrap_or(u64::MAX);
        if let Err(error) = self.exporter.export(batch).await {
            // Told once: a collector that is away is away for every batch.
            if self.lost.fetch_add(count, Ordering::Relaxed) == 0 {
                tracing::warn!(%error, "the collector does not take spans; further losses are counted");
            }
        }
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

#[cfg(test)]
mod tests;
