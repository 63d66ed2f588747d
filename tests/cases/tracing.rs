//! Spans to an OpenTelemetry collector: of containerd's calls, and of what guests do for them.
#![expect(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a case fails"
)]

use std::time::Duration;

use hyper_tests::{
    Collector, Containerd, HANDLER, Pod, PodSpec, Release, SANDBOX_HANDLER, Span, hanging_collector, note,
    wait_for,
};
use serde_json::json;

/// The program whose spans these are.
const SHIM: &str = "containerd-shim-hyper-v2";

fn named<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("no span {name} in {spans:#?}"))
}

/// From a span to the outermost of those that are known.
fn way_up<'a>(spans: &'a [Span], name: &str) -> Vec<&'a Span> {
    let mut way = vec![named(spans, name)];
    while let Some(parent) = spans.iter().find(|span| span.id == way.last().unwrap().parent) {
        way.push(parent);
    }
    way
}

/// Whether what the guest did lies within the call that it was done for, by parents and by time; names from the inside out.
fn leads(spans: &[Span], names: &[&str]) {
    let way = way_up(spans, names[0]);
    let found: Vec<_> = way.iter().map(|span| span.name.as_str()).collect();
    assert_eq!(found, names);
    for pair in way.windows(2) {
        let (inner, outer) = (pair[0], pair[1]);
        assert_eq!(inner.trace, outer.trace);
        assert!(
            inner.start <= inner.end && outer.start <= inner.start && inner.end <= outer.end,
            "{pair:#?}"
        );
    }
}

#[test]
fn spans_of_a_task_lead_into_its_guest() {
    let collector = Collector::start();
    let environment = format!("OTEL_EXPORTER_OTLP_ENDPOINT={}", collector.url);
    let containerd = Containerd::start_with_environment(Release::Two, &environment);
    containerd.run("--rm @busybox one true").ok();
    let spans = collector.wait_for("one", &["create", "start", "delete", "shutdown", "end processes"]);
    for span in &spans {
        let of = |key: &str| span.resource.get(key).map_or("", String::as_str);
        assert_eq!((span.service(), of("containerd.namespace")), (SHIM, "default"));
    }
    leads(&spans, &["clock and entropy", "guest", "Configure", "create"]);
    leads(
        &spans,
        &["mount the root", "child program", "make the first process", "guest", "CreateContainer", "create"],
    );
    leads(&spans, &["execute the program", "guest", "StartProcess", "start"]);
    leads(&spans, &["end processes", "guest", "DeleteContainer", "delete"]);
    // containerd has a collector too, and says in which of its spans it calls.
    let create = named(&spans, "create");
    let caller = wait_for("containerd's span", || {
        collector.spans().into_iter().find(|span| span.service() == "containerd" && span.id == create.parent)
    });
    assert_eq!(caller.trace, create.trace);
    containerd.leaves_nothing();
}

#[test]
fn spans_of_a_pod_lead_into_its_guest() {
    let collector = Collector::start();
    let environment = format!("OTEL_EXPORTER_OTLP_ENDPOINT={}", collector.url);
    let containerd = Containerd::start_for_pods_with(Release::Two, &environment);
    for (handler, name) in [(SANDBOX_HANDLER, "own"), (HANDLER, "paused")] {
        let pod = Pod::run(&containerd, handler, &PodSpec::new(name));
        let main = pod.start("main", "sleep 1000", &json!({}));
        pod.exec(&main, "true").ok();
        let id = pod.id.clone();
        pod.remove();
        let names = ["create", "start", "delete", "CreateProcess"];
        let spans = collector.wait_for(&id, &names);
        leads(&spans, &["make the process", "guest", "CreateProcess", "start"]);
        let first = if handler == HANDLER { "create" } else { "start_sandbox" };
        leads(&spans, &["network", "guest", "Configure", first]);
        leads(&spans, &["boot", first]);
        if handler == HANDLER {
            let of = |key: &str| named(&spans, "create").resource.get(key).cloned().unwrap_or_default();
            assert_eq!((of("k8s.pod.name"), of("k8s.pod.uid")), (name.to_owned(), format!("uid-{name}")));
        }
    }
    containerd.leaves_nothing();
}

#[test]
fn configuration_names_the_collector_and_the_level_of_the_log_is_no_matter() {
    let containerd = Containerd::start();
    let collector = Collector::start();
    let own = format!("otlp_endpoint = \"{}\"\nlog_level = \"error\"\n", collector.url);
    let own = containerd.scratch().file("own.toml", own);
    let run = |words: &str| containerd.run(&format!("--rm --runtime-config-path {own} {words}"));
    run("@busybox one true").ok();
    let spans = collector.wait_for("one", &["create", "mount the root", "delete"]);
    let first = way_up(&spans, "mount the root").pop().unwrap();
    assert_eq!((first.name.as_str(), first.parent.as_str()), ("create", ""), "this containerd has no traces");
    containerd.leaves_nothing();
}

#[test]
fn collectors_that_are_away_or_hang_change_nothing() {
    let containerd = Containerd::start();
    let run = |id: &str, endpoint: &str| {
        let own = containerd.scratch().file("own.toml", format!("otlp_endpoint = \"{endpoint}\"\n"));
        let run = containerd.run(&format!("--rm --runtime-config-path {own} @busybox {id} echo fine"));
        let done = run.ok().says("fine");
        // The last flush has a deadline of its own, within which the shim has gone.
        containerd.leaves_nothing();
        done.elapsed
    };
    // The first one warms up what the others find.
    run("warm", "");
    let (none, away, hanging) =
        (run("none", ""), run("away", "http://127.0.0.1:1"), run("hanging", &hanging_collector()));
    note(&format!(
        "a task without a collector, with one that is away, and one that hangs: {none:.1?}, {away:.1?}, {hanging:.1?}"
    ));
    let most = none * 2 + Duration::from_secs(10);
    assert!(away < most && hanging < most);
}
