//! The log of what was done.

use hyper_tests::{Scratch, hyper};

#[test]
fn what_is_done_is_recorded_and_what_is_changed_is_seen() {
    let state = Scratch::new();
    let hyper = |words: &str| hyper(words).state(state.path());
    hyper("pull -q @busybox").ok();
    hyper("volume create data").ok();
    let id = hyper("run -d -m 64m --name web @busybox sleep 10000").ok().text();
    hyper("exec web true").ok();
    hyper("rm web").fails(1);
    hyper("stop -t 0 web").ok();
    hyper("rm web").ok();
    let shown =
        hyper("audit --no-trunc --format").arg("{{.Action}}|{{.Subject}}|{{.User}}|{{.Error}}").ok().text();
    let lines: Vec<&str> = shown.lines().collect();
    let mut expected: Vec<(&str, &str)> =
        vec![("volume create", "data"), ("container create", &id), ("container start", &id)];
    expected.extend([
        ("container exec", id.as_str()),
        ("container exit", &id),
        ("container stop", &id),
        ("container remove", &id),
    ]);
    for (action, subject) in expected {
        let start = format!("{action}|{subject}|0|");
        assert!(lines.iter().any(|line| *line == start), "{start} is not in\n{shown}");
    }
    let refused = format!("container remove|{id}|0|container web is running");
    assert!(lines.iter().any(|line| line.starts_with(&refused)), "{shown}");
    assert!(lines.iter().any(|line| line.starts_with("image pull|")), "{shown}");

    let whole = hyper("audit --verify").ok().text();
    assert!(whole.starts_with(&format!("records 1 to {}", lines.len())), "{whole}");
    let head = whole.split_whitespace().last().unwrap();
    hyper("volume rm data").ok();
    hyper("audit --verify --head").arg(head).ok();
    let path = state.path().join("data/audit.log");
    let log = std::fs::read_to_string(&path).unwrap();
    let first = log.split_inclusive('\n').next().unwrap();
    std::fs::write(&path, first).unwrap();
    hyper("audit --verify --head").arg(head).fails(1).complains(&["cut off"]);
    std::fs::write(&path, log.replacen("container exec", "container stop", 1)).unwrap();
    hyper("audit --verify").fails(1).complains(&["audit.log", "is no record"]);
    hyper("audit --verify --head 1:x").fails(1).complains(&["NUMBER:HASH"]);
}
