//! Containers that live without the command line: the verbs besides `run`.

use hyper_tests::{Container, Scratch, detached, hyper, wait_for};

#[test]
fn detached_container_goes_through_its_life() {
    let container = detached("--name life @busybox sh -c true");
    assert_eq!(container.id.len(), 64);
    assert_eq!(container.wait(), "0");
    assert_eq!(container.field(".State.Status"), "exited");
    container.call("start").ok();
    assert_eq!(container.wait(), "0");
    container.call("rm").ok();
    container.call("inspect").fails(1);
}

#[test]
fn names_and_short_ids_find_it() {
    let container = detached("--name findable @busybox sleep 1000");
    for name in ["findable", &container.id[..12], &container.id[..4]] {
        hyper("inspect --format {{.Id}}").arg(name).ok().says(&container.id);
    }
    hyper("run --name findable @busybox true").fails(125).complains(&["findable", "in use"]);
    hyper("inspect no-such").fails(1).complains(&["no such", "no-such"]);
}

#[test]
fn logs_have_both_streams_and_follow() {
    let container =
        Container::from(hyper("run -d @busybox sh -c").arg("echo one; echo two >&2; sleep 2; echo three"));
    let done = container.call("logs -f").ok().says("one\nthree");
    assert_eq!(done.error(), "two");
    container.call("logs --tail 1").ok().says("three");
    container.call("logs -t").ok().shows("T");
}

#[test]
fn stop_asks_first_and_kills_then() {
    let container = Container::from(
        hyper("run -d @busybox sh -c").arg("trap 'exit 9' TERM; echo ready; while :; do sleep 1; done"),
    );
    container.wait_for_log("ready");
    container.call("stop").ok();
    assert_eq!(container.field(".State.ExitCode"), "9");
    let stubborn = Container::from(
        hyper("run -d @busybox sh -c").arg("trap '' TERM; echo ready; while :; do sleep 1; done"),
    );
    stubborn.wait_for_log("ready");
    stubborn.call("stop -t 2").ok();
    assert_eq!(stubborn.field(".State.ExitCode"), "137");
}

#[test]
fn stop_signal_is_the_containers() {
    let container = Container::from(
        hyper("run -d --stop-signal USR1 @busybox sh -c")
            .arg("trap 'exit 5' USR1; echo ready; while :; do sleep 1; done"),
    );
    container.wait_for_log("ready");
    container.call("stop").ok();
    assert_eq!(container.field(".State.ExitCode"), "5");
}

#[test]
pub(crate) fn kill_is_137() {
    let container = detached("@busybox sleep 1000");
    container.call("kill").ok();
    assert_eq!(container.wait(), "137");
}

#[test]
pub(crate) fn exec_runs_beside_and_returns_its_code() {
    let container = detached("@busybox sleep 1000");
    container.sh("echo beside; exit 3").fails(3).says("beside");
    hyper("exec -i").args(&[&container.id, "cat"]).stdin("input").ok().says("input");
    hyper("exec -w /tmp -e A=b -u nobody")
        .args(&[&container.id, "sh", "-c", "pwd; echo $A; id -u"])
        .ok()
        .says("/tmp\nb\n65534");
    hyper("exec").args(&[&container.id, "no-such"]).fails(127);
    container.call("stop -t 1").ok();
    container.sh("true").fails(1);
}

#[test]
pub(crate) fn writable_layer_survives_stop_and_start() {
    let container = Container::from(hyper("run -d @busybox sh -c").arg("echo again >>/kept; wc -l </kept"));
    assert_eq!(container.wait(), "0");
    container.call("start -a").ok().shows("2");
}

#[test]
fn restart_policy_brings_it_back() {
    let container =
        Container::from(hyper("run -d --restart on-failure:2 @busybox sh -c").arg("echo try; exit 1"));
    wait_for("three tries", || (container.logs().text().lines().count() == 3).then_some(()));
    wait_for("the end", || (container.field(".State.Status") == "exited").then_some(()));
    assert_eq!(container.field(".RestartCount"), "2");
}

#[test]
pub(crate) fn cp_goes_both_ways() {
    let scratch = Scratch::new();
    let file = scratch.file("file", "copied");
    let container = detached("@busybox sleep 1000");
    hyper("cp").args(&[&file, &format!("{}:/tmp/there", container.id)]).ok();
    container.sh("cat /tmp/there").ok().says("copied");
    hyper("cp").args(&[&format!("{}:/tmp/there", container.id), &scratch.join("back")]).ok();
    assert_eq!(std::fs::read_to_string(scratch.join("back")).unwrap(), "copied");
}

#[test]
fn ps_rename_top_stats_and_port() {
    let container = detached("--name old-name @busybox sleep 1234");
    hyper("rename old-name new-name").ok();
    hyper("ps --format {{.Names}}").ok().shows("new-name");
    hyper("ps --format json").ok().shows("\"new-name\"");
    container.call("top").ok().shows("sleep 1234");
    container.call("stats --no-stream").ok().shows("new-name");
    container.call("port").ok().says("");
}

#[test]
fn attach_gets_the_output() {
    let container = Container::from(hyper("run -d @busybox sh -c").arg("sleep 5; echo late; exit 4"));
    container.call("attach").fails(4).says("late");
}

#[test]
fn create_then_start_attached() {
    let container = Container::from(hyper("create -i @busybox sh -c").arg("cat; exit 6"));
    assert_eq!(container.field(".State.Status"), "created");
    container.call("start -a -i").stdin("typed").fails(6).says("typed");
}

#[test]
pub(crate) fn rm_refuses_what_runs() {
    let container = detached("@busybox sleep 1000");
    container.call("rm").fails(1).complains(&["running"]);
    container.call("rm -f").ok();
}
