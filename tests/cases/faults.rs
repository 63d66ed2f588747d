//! Everything that can go wrong is said in a line and leaves nothing behind.

use std::time::Duration;

use hyper_tests::{Scratch, detached, given, host, hyper, wait_for};

/// What of ours is left in the machine: processes, taps, mounts.
fn left_over() -> String {
    host("pgrep -a 'hyper-vmm|hyper-fs'; ip -o link | grep -o 'hyper-[0-9a-f]*\\|htap[^:]*'; grep -c /hyper/containers/ /proc/mounts | grep -v ^0; true")
        .ok()
        .text()
}

#[test]
fn kill_at_each_step_of_a_start_leaves_nothing() {
    hyper("run --rm @busybox true").ok();
    for step in 0..12 {
        let run = hyper(&format!("run --rm --name step-{step} @busybox true")).start();
        std::thread::sleep(Duration::from_millis(step * 300));
        run.signal("KILL");
        drop(run.done());
    }
    hyper("ps -a").ok();
    // What was past its start ends by itself; the rest is cleaned up by the next command.
    wait_for("the end of all", || {
        hyper("ps -aq").ok();
        let names = hyper("ps -q").ok().text();
        names.is_empty().then_some(())
    });
    for step in 0..12 {
        drop(hyper(&format!("rm -f step-{step}")).done());
    }
    wait_for("nothing left", || left_over().is_empty().then_some(()));
    hyper("run --rm @busybox echo fine").ok().says("fine");
}

#[test]
fn killed_machine_is_reported() {
    let container = detached("@busybox sleep 1000");
    host("pkill -KILL -x hyper-vmm").ok();
    wait_for("the end", || (container.field(".State.Status") == "exited").then_some(()));
    assert_ne!(container.field(".State.ExitCode"), "0");
    container.call("start").ok();
    container.sh("echo again").ok().says("again");
}

#[test]
fn killed_supervisor_is_cleaned_up_by_the_next_command() {
    let container = detached("@busybox sleep 1000");
    host(&format!("pkill -KILL -f 'supervise {}'", container.id)).ok();
    wait_for("the end", || (container.field(".State.Status") == "exited").then_some(()));
    wait_for("nothing left", || left_over().is_empty().then_some(()));
    container.call("start").ok();
    container.sh("echo again").ok().says("again");
}

#[test]
fn corrupt_kernel_is_said() {
    let scratch = Scratch::new();
    let prefix = given("HYPER_TEST_PREFIX");
    let parts = scratch.path().display();
    host(&format!(
        "cp {0}/libexec/hyper/* {0}/share/hyper/initramfs.cpio {parts}/; echo broken >{parts}/vmlinux",
        prefix.display()
    ))
    .ok();
    let done = hyper("run --rm @busybox true").env("HYPER_PARTS", scratch.path()).fails(125);
    done.complains(&["kernel"]);
}

#[test]
fn guest_panic_ends_the_machine_and_is_reported() {
    hyper("run --privileged --rm @busybox sh -c")
        .arg("echo c >/proc/sysrq-trigger; sleep 1000")
        .fails(137)
        .complains(&["guest kernel crashed", "panic"]);
}

#[test]
fn doctor_knows_this_machine() {
    hyper("doctor").ok();
    hyper("doctor --quiet").ok().says("");
}
