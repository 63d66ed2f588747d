//! `hyper bench` measures what it says, of every contender, and leaves nothing behind.

use hyper_tests::{Scratch, host, hyper};

#[test]
fn every_contender_is_measured_and_nothing_is_left() {
    let scratch = Scratch::new();
    let (json, html) = (scratch.join("bench.json"), scratch.join("bench.html"));
    let few = "--runs 2 --warm-up 0 --at-once 2 --idle 1 --only run,exec,at-once,memory";
    let table = hyper(&format!("bench --image @busybox {few} --json {json} --html {html}")).ok().text();
    let report: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    let measured = report["measurements"].as_array().unwrap();
    // Run, exec, two at once, memory of all processes, and of the VMM alone.
    assert_eq!(measured.len(), 5, "{table}");
    for measurement in measured {
        let name = measurement["name"].as_str().unwrap();
        assert!(table.contains(name), "{name} in {table}");
        let contenders = measurement["contenders"].as_array().unwrap();
        let names: Vec<_> =
            contenders.iter().filter_map(|contender| contender["contender"].as_str()).collect();
        assert_eq!(names[..2], ["hyper, template", "hyper, booted"], "{table}");
        assert!(name.contains("VMM") || names.contains(&"runc"), "runc beside hyper in {name}: {table}");
        for contender in contenders {
            let samples = contender["samples"].as_array().unwrap();
            assert!(samples.iter().all(|sample| sample.as_f64().unwrap() > 0.0), "{name}: {samples:?}");
        }
    }
    let page = std::fs::read_to_string(html).unwrap();
    assert!(page.contains("<svg") && page.trim_end().ends_with("</html>"));
    hyper("ps -aq").ok().says("");
    host("runc list -q").ok().says("");
}

#[test]
fn what_cannot_be_measured_is_told_in_a_line() {
    hyper("bench --image no-such-image.invalid/x --only run --runs 1").fails(1).complains(&["no-such-image"]);
    hyper("bench --only nothing")
        .fails(125)
        .complains(&["possible values: boot, run, exec, at-once, memory"]);
}
