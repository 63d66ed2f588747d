//! Tests of the whole way of a span, and of what is left out.

use std::sync::Mutex;

use opentelemetry::trace::TraceContextExt;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::layer::SubscriberExt;

use super::*;

/// Spans that were exported.
#[derive(Debug, Clone, Default)]
pub(super) struct Kept(pub(super) Arc<Mutex<Vec<SpanData>>>);

impl SpanExporter for Kept {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().unwrap().extend(batch);
        Ok(())
    }
}

#[derive(Debug)]
struct Refusing;

impl SpanExporter for Refusing {
    async fn export(&self, _: Vec<SpanData>) -> OTelSdkResult {
        Err(opentelemetry_sdk::error::OTelSdkError::InternalFailure("no".into()))
    }
}

fn flags() -> Flags {
    Flags { id: "pod1".into(), namespace: "k8s.io".into(), ..Flags::default() }
}

#[test]
fn spans_are_exported_whatever_is_logged() {
    let kept = Kept::default();
    let provider = SdkTracerProvider::builder().with_simple_exporter(kept.clone()).build();
    let tracing = Tracing { provider, lost: Arc::default() };
    let subscriber = tracing_subscriber::registry().with(tracing.layer());
    tracing::subscriber::with_default(subscriber, || {
        let pod = tracing::info_span!("pod");
        let _pod = pod.enter();
        let call = tracing::debug_span!("create", id = "c1");
        assert!(call.context().span().span_context().is_valid());
        let _call = call.enter();
        tracing::info!("an event of it");
        drop(tracing::trace_span!("too much"));
        drop(tracing::info_span!(target: "h2", "of others"));
    });
    let spans = kept.0.lock().unwrap();
    let [create] = spans.as_slice() else { panic!("{spans:?}") };
    assert_eq!((&*create.name, create.events.len()), ("create", 1));
    assert_eq!(create.parent_span_id, opentelemetry::SpanId::INVALID, "the pod's span is for the log");
}

#[test]
fn resources_say_whose_spans_they_are() {
    let annotations = [("io.kubernetes.cri.sandbox-name", "web"), ("other", "x")];
    let annotations = annotations.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let resource = resource(&flags(), &annotations);
    let of = |name: &'static str| resource.get(&name.into()).map(|value| value.to_string());
    assert_eq!(of("service.name").unwrap(), "containerd-shim-hyper-v2");
    assert_eq!(of("hyper.pod.id").unwrap(), "pod1");
    assert_eq!(of("containerd.namespace").unwrap(), "k8s.io");
    assert_eq!(of("k8s.pod.name").unwrap(), "web");
    assert_eq!(of("k8s.pod.uid"), None);
}

#[test]
fn lost_spans_are_counted() {
    let lost = Arc::<AtomicU64>::default();
    let counted = Counted { exporter: Refusing, lost: Arc::clone(&lost) };
    let provider = SdkTracerProvider::builder().with_simple_exporter(counted).build();
    let tracer = provider.tracer("test");
    for _ in 0..3 {
        drop(opentelemetry::trace::Tracer::start(&tracer, "span"));
    }
    assert_eq!(lost.load(Ordering::Relaxed), 3);
}

#[test]
fn without_a_collector_there_is_nothing() {
    assert!(Tracing::start(Some(""), &flags(), &BTreeMap::new()).unwrap().is_none());
    assert!(Tracing::start(Some("https://x"), &flags(), &BTreeMap::new()).is_err());
}
