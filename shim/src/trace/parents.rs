//! Traces of containerd go on here: its requests carry W3C's trace context (`traceparent`, `tracestate`) as metadata.

use std::collections::HashMap;

use async_trait::async_trait;
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::r#async::{MethodHandler, Service, TtrpcContext};
use opentelemetry::context::FutureExt;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;

/// Longest value of metadata that is looked at: `tracestate` has at most 512 bytes (Trace Context, 3.3.1.5).
const MAX_VALUE_BYTES: usize = 1024;

/// Services whose spans are part of their callers' traces.
pub(crate) fn continued(services: HashMap<String, Service>) -> HashMap<String, Service> {
    let each = services.into_iter().map(|(name, Service { methods, streams })| {
        let methods = methods.into_iter().map(|(name, handler)| {
            let handler: Box<dyn MethodHandler + Send + Sync> = Box::new(Continued(handler));
            (name, handler)
        });
        (name, Service { methods: methods.collect(), streams })
    });
    each.collect()
}

/// A method within its caller's trace.
struct Continued(Box<dyn MethodHandler + Send + Sync>);

#[async_trait]
impl MethodHandler for Continued {
    async fn handler(
        &self,
        context: TtrpcContext,
        request: ttrpc::Request,
    ) -> ttrpc::Result<ttrpc::Response> {
        let parent = TraceContextPropagator::new().extract(&Metadata(&context.metadata));
        if !parent.span().span_context().is_valid() {
            return self.0.handler(context, request).await;
        }
        // The span of the call is the first one that is made in it.
        self.0.handler(context, request).with_context(parent).await
    }
}

struct Metadata<'a>(&'a HashMap<String, Vec<String>>);

impl Extractor for Metadata<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.first().map(String::as_str).filter(|value| value.len() <= MAX_VALUE_BYTES)
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::ttrpc::MessageHeader;
    use opentelemetry::Context;

    use super::*;

    /// Answers with the trace that it is called in.
    struct Asked;

    #[async_trait]
    impl MethodHandler for Asked {
        async fn handler(&self, _: TtrpcContext, _: ttrpc::Request) -> ttrpc::Result<ttrpc::Response> {
            tokio::task::yield_now().await;
            let trace = Context::current().span().span_context().trace_id().to_string();
            Ok(ttrpc::Response { payload: trace.into_bytes(), ..ttrpc::Response::default() })
        }
    }

    async fn trace(metadata: &[(&str, &str)]) -> String {
        let methods = HashMap::from([("Create".to_owned(), Box::new(Asked) as _)]);
        let service = Service { methods, streams: HashMap::new() };
        let services = continued(HashMap::from([("Task".to_owned(), service)]));
        let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), vec![(*value).to_owned()]));
        let context =
            TtrpcContext { mh: MessageHeader::default(), metadata: metadata.collect(), timeout_nano: 0 };
        let answer = services["Task"].methods["Create"].handler(context, ttrpc::Request::default()).await;
        String::from_utf8(answer.unwrap().payload).unwrap()
    }

    #[tokio::test]
    async fn calls_are_in_their_callers_trace() {
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(trace(&[("traceparent", parent)]).await, "0af7651916cd43dd8448eb211c80319c");
        let none = "0".repeat(32);
        assert_eq!(trace(&[]).await, none);
        assert_eq!(trace(&[("traceparent", "00-xyz")]).await, none);
        assert_eq!(trace(&[("traceparent", &format!("{parent}{}", "-0".repeat(1000)))]).await, none);
    }
}
