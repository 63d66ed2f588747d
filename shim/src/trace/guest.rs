//! What agents did, as spans below those of the requests to them.

use std::sync::OnceLock;

use hyper_sandbox::{Export, GuestSpan};
use opentelemetry::trace::{SpanBuilder, TraceContextExt, Tracer};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::trace::SdkTracer;
use tracing_opentelemetry::OpenTelemetrySpanExt;

static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Exports by this tracer what guests do, from now on.
pub(super) fn export_to(tracer: SdkTracer) {
    if TRACER.set(tracer).is_ok() {
        hyper_sandbox::trace_guests(below);
    }
}

/// The way to export what is below a span, if that is exported.
fn below(span: &tracing::Span) -> Option<Export> {
    let tracer = TRACER.get()?;
    let context = span.context();
    if !context.span().span_context().is_sampled() {
        return None;
    }
    Some(Box::new(move |spans| export(tracer, &context, spans)))
}

fn export(tracer: &SdkTracer, request: &Context, spans: Vec<GuestSpan>) {
    // Each is the context of those below it; they are ended together, for a parent comes first.
    let mut contexts: Vec<(Context, std::time::SystemTime)> = Vec::with_capacity(spans.len());
    for span in spans {
        let parent =
            span.parent.and_then(|index| contexts.get(index)).map_or(request, |(context, _)| context);
        let attributes = vec![KeyValue::new("hyper.guest", true)];
        let builder =
            SpanBuilder::from_name(span.name).with_start_time(span.start).with_attributes(attributes);
        let started = tracer.build_with_context(builder, parent);
        contexts.push((parent.with_span(started), span.end));
    }
    for (context, end) in contexts {
        context.span().end_with_timestamp(end);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use opentelemetry::trace::TracerProvider;
    use opentelemetry_sdk::trace::SdkTracerProvider;

    use super::super::tests::Kept;
    use super::*;

    #[test]
    fn steps_lie_below_their_request() {
        let kept = Kept::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(kept.clone()).build();
        let tracer = provider.tracer("test");
        let request = Context::new().with_span(tracer.start("request"));
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let step = |name: &str, start, end, parent| GuestSpan {
            name: name.into(),
            start: at(start),
            end: at(end),
            parent,
        };
        export(&tracer, &request, vec![step("guest", 1, 9, None), step("inner", 2, 3, Some(0))]);
        let spans = kept.0.lock().unwrap();
        let [guest, inner] = spans.as_slice() else { panic!("{spans:?}") };
        assert_eq!((guest.start_time, guest.end_time, &*guest.name), (at(1), at(9), "guest"));
        assert_eq!(guest.parent_span_id, request.span().span_context().span_id());
        assert_eq!((inner.parent_span_id, inner.end_time), (guest.span_context.span_id(), at(3)));
        assert_eq!(inner.span_context.trace_id(), request.span().span_context().trace_id());
    }
}
