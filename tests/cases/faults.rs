//! Everything that can go wrong is said in a line and leaves nothing behind.

use hyper_tests::{Scratch, VICTIMS, detached, given, host, hyper, image, left_over, note, wait_for};

/// How far a start has come, as the host sees it, and the command that says so. `$id` is the container's.
const STEPS: [(&str, &str); 6] = [
    ("recorded", "true"),
    ("supervised", "pgrep -f \"supervise $id\""),
    ("on the network", "ip -o link | grep -o 'hys[0-9a-f]\\{8\\}'"),
    ("with a file server", "pgrep -x hyper-fs"),
    ("with a machine", "pgrep -x hyper-vmm"),
    ("running", "grep '\"status\": *\"running\"' $folder/state.json"),
];

/// Kills the victim as soon as the start has come that far; says whether there was one.
fn kill_at(step: &str, victim: &str, cli: u32) -> bool {
    let script = format!(
        "cli={cli}; until folder=$(ls -d $HYPER_ROOT/containers/[0-9a-f]*) && [ -e $folder/config.json ]; do :; done 2>/dev/null; \
         id=${{folder##*/}}; until {step} >/dev/null 2>&1; do [ -e /proc/$cli/exe ] || break; done; \
         pids=$({victim}) && kill -KILL $pids"
    );
    host(&script).done().code_is(0)
}

#[expect(clippy::print_stdout, reason = "libtest keeps it and shows it with the failure")]
fn show(left: &str) {
    if !left.is_empty() {
        println!("left: {left}");
    }
}

#[test]
fn kill_at_each_step_of_a_start_leaves_nothing() {
    hyper("run --rm @busybox true").ok();
    let scratch = Scratch::new();
    let mut killed = 0;
    for (step, reached) in STEPS {
        for (victim, find) in VICTIMS {
            let name = format!("matrix-{killed}");
            let share = format!("{}:/shared", scratch.path().display());
            let run = hyper(&format!("run --name {name}"))
                .args(&["-v", &share, &image("busybox"), "sleep", "1000"])
                .start();
            let struck = kill_at(reached, find, run.pid());
            if !struck {
                // Not there yet at this step: the start goes on, and is ended here.
                hyper("rm -f").arg(&name).ok();
                drop(run.done());
                continue;
            }
            killed += 1;
            let what = format!("the {victim} killed when the start was {step}");
            if victim != "command line" {
                let done = run.done();
                assert!(!done.code_is(0), "{what}: {done:?}");
                done.complains(&[]);
            }
            let removed = hyper("rm -f").arg(&name).done();
            assert!(removed.code_is(0), "{what}: {removed:?}");
            wait_for(&format!("nothing left: {what}"), || {
                let left = left_over();
                // Shown when the case fails.
                show(&left);
                left.is_empty().then_some(())
            });
        }
    }
    note(&format!(
        "start: {} kills tried, {killed} met somebody; each was said, and nothing was left",
        STEPS.len() * VICTIMS.len()
    ));
    assert!(killed >= 15, "only {killed} were killed in time");
    assert_eq!(hyper("ps -aq").ok().text(), "");
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
