//! Calls to the host's kernel fail, one at a time, wherever a start makes them: what comes of it is the container's output or one line, the
//! right exit code, and nothing that is left. And what happens when the host's disk is full or slow.

use std::time::Duration;

use hyper_tests::{Done, Run, Scratch, host, hyper, image, left_over, note, wait_for};

/// Which calls fail, with what, and which of them: the nth of every thread of every process of a start, the command line's and the
/// supervisor's, the VMM's and the programs' that they run.
const FAULTS: [(&str, &str, &[u32]); 13] = [
    ("openat", "EMFILE", &[10, 20, 40]),
    ("openat", "EIO", &[5, 15, 25]),
    ("mkdir,mkdirat", "ENOSPC", &[2, 4]),
    ("rename,renameat,renameat2", "EIO", &[1, 3]),
    ("ftruncate,fallocate", "ENOSPC", &[1, 2]),
    ("fsync,fdatasync", "EIO", &[1, 2]),
    ("pwrite64", "ENOSPC", &[1, 2]),
    ("socket,socketpair", "EMFILE", &[1, 2, 5, 8]),
    ("pipe2,memfd_create,eventfd2,epoll_create1", "EMFILE", &[1, 2, 3, 5]),
    ("mmap", "ENOMEM", &[30, 45]),
    ("clone,clone3,vfork", "EAGAIN", &[1, 2, 3]),
    ("ioctl", "EIO", &[1, 3, 10]),
    ("unlink,unlinkat,rmdir", "EIO", &[1, 2, 3]),
];
/// Least faults that must have been felt, of all: some calls may fail without harm.
const LEAST_FELT: usize = 16;
/// Longest time that a start with a fault may take. The lab's processor is emulated, and each call is looked at.
const LONGEST: Duration = Duration::from_secs(90);

/// A `hyper run` under `strace`, which does something to calls.
fn tampered(calls: &str, what: &str) -> Run {
    let hyper = hyper_tests::given("HYPER_TEST_PREFIX").join("bin/hyper");
    let trace = format!("trace={calls}");
    let inject = format!("inject={calls}:{what}");
    let image = image("busybox");
    host("exec strace -f --seccomp-bpf -qq -o /dev/null \"$@\"").args(&[
        "strace",
        "-e",
        &trace,
        "-e",
        &inject,
        &hyper.to_string_lossy(),
        "run",
        "--rm",
        "-m",
        "64m",
        &image,
        "echo",
        "fine",
    ])
}

/// Whether it failed; then it said so as it should.
fn failed_well(done: &Done, what: &str) -> bool {
    assert!(done.elapsed < LONGEST, "{what}: it took {:?}", done.elapsed);
    let errors = done.error();
    assert!(!errors.contains("panicked"), "{what}: {errors}");
    let lines = errors.lines().filter(|line| line.starts_with("hyper: ")).count();
    if done.code_is(0) {
        // What is left of a container that has done its work is said, and is no failure of the work.
        assert!(lines <= 1 && done.text() == "fine", "{what}: {done:?}: {errors}");
        return false;
    }
    assert!(done.code_is(125) && lines == 1, "{what}: {done:?}: {errors}");
    true
}

#[test]
fn a_call_that_fails_is_a_line_and_leaves_nothing() {
    hyper("run --rm -m 64m @busybox true").ok();
    let (mut tried, mut felt) = (0, 0);
    for (calls, error, places) in FAULTS {
        for place in places {
            let what = format!("{calls} number {place} fails with {error}");
            tried += 1;
            let done = tampered(calls, &format!("error={error}:when={place}")).done();
            felt += usize::from(failed_well(&done, &what));
            // What could not be removed because of the fault is removed by the next command.
            let known = hyper("ps -aq").ok().text();
            for id in known.lines() {
                hyper("rm -f").arg(id).ok();
            }
            wait_for(&format!("nothing left: {what}"), || left_over().is_empty().then_some(()));
        }
    }
    note(&format!(
        "failing calls: {tried} tried, {felt} felt; each was one line and code 125, and nothing was left"
    ));
    assert!(felt >= LEAST_FELT, "only {felt} of {tried} were felt");
    hyper("run --rm -m 64m @busybox echo fine").ok().says("fine");
}

#[test]
fn a_slow_disk_is_waited_for() {
    hyper("run --rm -m 64m @busybox true").ok();
    for (calls, delay) in [("fsync,fdatasync", "1s"), ("pwrite64,pread64", "20ms")] {
        let done = tampered(calls, &format!("delay_enter={delay}")).done();
        assert!(!failed_well(&done, calls), "{calls}: {done:?}");
    }
}

/// A file system of this size for a case's state.
struct SmallDisk(Scratch);

impl SmallDisk {
    fn new(mib: u32) -> Self {
        let place = Scratch::new();
        host(&format!("mount -t tmpfs -o size={mib}m none {}", place.path().display())).ok();
        Self(place)
    }

    fn hyper(&self, words: &str) -> Run {
        hyper(words).state(self.0.path())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(host(&format!("umount -l {}", self.0.path().display())).done());
    }
}

#[test]
fn a_full_disk_of_the_host_is_said_and_mended() {
    let disk = SmallDisk::new(64);
    disk.hyper("run --rm -m 64m @busybox true").ok();
    let fill = disk.0.path().join("fill").display().to_string();
    host(&format!("head -c 1G /dev/zero >{fill}; true")).ok();
    disk.hyper("run --rm -m 64m @busybox true").fails(125).complains(&["space"]);
    assert_eq!(disk.hyper("ps -aq").ok().text(), "", "nothing is half made");
    host(&format!("rm {fill}")).ok();
    // A guest that writes more than the host has gets an error of its disk; it can be ended and started again.
    let id = disk.hyper("run -d -m 64m @busybox sleep 10000").ok().text();
    let writing =
        disk.hyper("exec").args(&[&id, "sh", "-c", "dd if=/dev/zero of=/big bs=1M count=200; sync"]);
    let written = writing.done();
    assert!(!written.error().is_empty() && !written.error().contains("panicked"), "{written:?}");
    disk.hyper("rm -f").arg(&id).ok();
    disk.hyper("run --rm -m 64m @busybox echo fine").ok().says("fine");
    wait_for("nothing left", || left_over().is_empty().then_some(()));
}
