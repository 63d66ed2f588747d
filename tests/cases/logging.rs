//! Where the output of tasks goes besides FIFOs, and the runtime's configuration.
#![expect(clippy::unwrap_used, reason = "a panic is how a case fails")]

use std::fs;
use std::os::unix::fs::PermissionsExt;

use hyper_tests::{Containerd, host};

#[test]
fn output_is_appended_to_a_file() {
    let containerd = Containerd::start();
    let log = containerd.scratch().join("new/folder/log");
    for (id, words) in [("one", "out"), ("two", "again")] {
        let run = containerd.run(&format!("--rm --log-uri file://{log} @busybox {id} sh -c"));
        run.arg(&format!("echo {words}; echo err >&2")).ok().says("");
    }
    let mut lines: Vec<_> = fs::read_to_string(&log).unwrap().lines().map(str::to_owned).collect();
    lines.sort_unstable();
    assert_eq!(lines, ["again", "err", "err", "out"]);
}

/// Writes whose output it is and both streams to the file that its second argument names.
const LOGGER: &str =
    "#!/bin/bash\nexec 5>&-\n{ echo $CONTAINER_NAMESPACE $CONTAINER_ID $1; cat <&3; cat <&4; } >>$2\n";

fn program(containerd: &Containerd, name: &str, script: &str) -> String {
    let path = containerd.scratch().file(name, script);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn output_goes_to_a_log_program() {
    let containerd = Containerd::start();
    let logger = program(&containerd, "my logger", LOGGER).replace(' ', "%20");
    let log = containerd.scratch().join("taken");
    let script = "head -c 300000 /dev/zero | tr '\\0' x; echo; echo err >&2";
    let run = containerd.run(&format!("--rm --log-uri binary://{logger}?to={log} @busybox one sh -c"));
    run.arg(script).ok().says("");
    // The task is gone when its logger has ended.
    let text = fs::read_to_string(&log).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!((lines.len(), lines[0], lines[1].len(), lines[2]), (3, "default one to", 300_000, "err"));
    containerd.leaves_nothing();
}

#[test]
fn log_program_that_is_missing_is_named() {
    let containerd = Containerd::start();
    let done = containerd.run("--rm --log-uri binary:///no/such/logger @busybox one true").fails(1);
    assert!(done.error().contains("/no/such/logger"), "{}", done.error());
    containerd.leaves_nothing();
}

#[test]
fn handler_has_a_configuration() {
    let containerd = Containerd::start();
    let own = containerd.scratch().file("own.toml", "vcpus = 2\nallowed_annotations = [\"memory_mib\"]\n");
    let run = |words: &str| containerd.run(&format!("--rm --runtime-config-path {own} {words}"));
    run("@busybox two nproc").ok().says("2");
    let script = "awk '/MemTotal/ { print ($2 < 270000 && $2 > 200000) ? \"right\" : $2 }' /proc/meminfo";
    run("--annotation io.hyper.memory_mib=256 @busybox sized sh -c").arg(script).ok().says("right");
    for (annotation, words) in
        [("io.hyper.vcpus=1", "pods may not set it"), ("io.hyper.kernel=/x", "no such setting")]
    {
        let done = run(&format!("--annotation {annotation} @busybox refused true")).fails(1);
        assert!(done.error().contains(words) && done.error().contains("io.hyper."), "{}", done.error());
    }
    containerd.leaves_nothing();
}

#[test]
fn mistakes_in_a_configuration_are_told() {
    let containerd = Containerd::start();
    let own = containerd.scratch().file("own.toml", "cpus = 2\n");
    let done = containerd.run(&format!("--rm --runtime-config-path {own} @busybox one true")).fails(1);
    assert!(
        done.error().contains("own.toml") && done.error().contains("unknown field `cpus`"),
        "{}",
        done.error()
    );
    containerd.leaves_nothing();
}

#[test]
fn pods_have_metrics_when_they_are_wished() {
    let containerd = Containerd::start();
    let own = containerd.scratch().file("own.toml", "metrics = true\n");
    containerd.run(&format!("-d --runtime-config-path {own} @busybox counted sleep 1000")).ok();
    let ask = "curl -sf --unix-socket ${HYPER_RUN:-/run/hyper}/pods/*/metrics http://pod/metrics";
    let text = host(ask).ok();
    text.shows("hyper_containers 1\n").shows("hyper_container_processes{container=\"counted\"} 1");
    containerd.ctr("task rm -f counted").ok();
    containerd.leaves_nothing();
}
