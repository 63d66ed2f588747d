//! `hyper run` in the foreground: output, input, exit codes, signals.

use hyper_tests::{Scratch, checksum, hyper, noise, wait_for};

#[test]
fn uname_shows_the_guests_kernel() {
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let done = hyper("run --rm @busybox uname -a").ok().shows("Linux").shows("x86_64");
    assert!(!done.text().contains(host.trim()), "the host's kernel: {}", done.text());
}

#[test]
fn command_of_the_image_is_the_default() {
    hyper("run --rm -i @busybox").stdin("echo from $0\n").ok().says("from sh");
}

#[test]
pub(crate) fn exit_code_comes_back() {
    hyper("run --rm @busybox sh -c").arg("exit 42").fails(42);
}

#[test]
pub(crate) fn output_and_error_stay_apart() {
    let done = hyper("run --rm @busybox sh -c").arg("echo out; echo err >&2").ok().says("out");
    assert_eq!(done.error(), "err");
}

#[test]
pub(crate) fn missing_command_is_127() {
    hyper("run --rm @busybox no-such-command").fails(127).complains(&["no-such-command"]);
}

#[test]
fn command_without_x_is_126() {
    hyper("run --rm @busybox /etc/passwd").fails(126).complains(&["/etc/passwd"]);
}

#[test]
fn unknown_image_is_125() {
    hyper("run --rm @no-such-image true").fails(125);
}

#[test]
fn unknown_flag_is_125() {
    hyper("run --no-such-flag @busybox").fails(125).complains(&["--no-such-flag"]);
    hyper("run --rm --no-such-flag @busybox").fails(125).complains(&["unknown flag", "--no-such-flag"]);
}

#[test]
fn malformed_reference_is_125() {
    hyper("run --rm library/UPPER true").fails(125).complains(&["reference"]);
}

#[test]
fn twenty_mebibytes_go_through_cat() {
    let bytes = noise(20 << 20);
    let done = hyper("run --rm -i @busybox cat").stdin(bytes.clone()).within(300).ok();
    assert_eq!(done.stdout.len(), bytes.len());
    assert_eq!(checksum(&done.stdout), checksum(&bytes));
}

#[test]
fn output_goes_on_after_input_ended() {
    hyper("run --rm -i @busybox sh -c").arg("cat; echo end").stdin("line\n").ok().says("line\nend");
}

#[test]
fn without_i_input_is_empty() {
    hyper("run --rm @busybox cat").stdin("not for it").ok().says("");
}

#[test]
fn a_signal_ends_it_with_128_and_its_number() {
    let done = hyper("run --rm @busybox sh -c").arg("sh -c 'kill -SEGV $$'; exit $?").done();
    done.code(139);
}

#[test]
fn signals_are_passed_on() {
    let name = "signalled";
    let run = hyper("run --rm --name signalled @busybox sh -c")
        .arg("trap 'echo caught; exit 7' TERM; echo ready; while :; do sleep 1; done")
        .start();
    wait_for("the container", || hyper("logs").arg(name).done().text().contains("ready").then_some(()));
    run.signal("TERM");
    run.done().code(7).says("ready\ncaught");
}

#[test]
fn rm_leaves_nothing() {
    hyper("run --rm --name left-over @busybox true").ok();
    assert!(!hyper("ps -a --format {{.Names}}").ok().text().contains("left-over"));
}

#[test]
fn cidfile_has_the_id_and_is_not_overwritten() {
    let scratch = Scratch::new();
    let file = scratch.join("id");
    hyper("run --rm --cidfile").args(&[&file, &hyper_tests::image("busybox"), "true"]).ok();
    assert_eq!(std::fs::read_to_string(&file).unwrap().trim().len(), 64);
    hyper("run --rm --cidfile").args(&[&file, &hyper_tests::image("busybox"), "true"]).fails(125);
}

#[test]
pub(crate) fn entry_and_user_and_folder_come_from_the_image() {
    let done = hyper("run --rm @user").ok().shows("default words").shows("uid=1234(app) gid=1235(app)");
    let text = done.text();
    assert!(text.contains("4321(extra)"), "{text}");
    assert!(text.lines().any(|line| line == "/srv/app"), "{text}");
    assert!(text.contains("COLOUR=green") && text.contains("HOME=/srv/app"), "{text}");
}

#[test]
fn words_replace_the_images_command_only() {
    hyper("run --rm @user other").ok().shows("other ").shows("uid=1234(app)");
}
