//! What a container sees of its machine agrees with what it was given.

use hyper_tests::{Container, Run, hyper, note};

/// Total memory in MiB as the guest's kernel says it.
const TOTAL: &str = "awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo";

#[test]
fn memory_is_what_m_says() {
    for (flag, asked) in [("256m", 256_u64), ("1g", 1024)] {
        let script = format!("{TOTAL}; free -m | awk '/^Mem/ {{print $2}}'");
        let text = hyper(&format!("run --rm -m {flag} @debian sh -c")).arg(&script).ok().text();
        let seen: Vec<u64> = text.lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(seen.len(), 2);
        for value in seen {
            assert!(asked.abs_diff(value) <= 2 + asked / 50, "-m {flag} shows {value} MiB");
        }
    }
}

#[test]
fn processors_are_what_cpus_says() {
    for (flag, count) in [("1", "1"), ("2", "2"), ("1.5", "2")] {
        hyper(&format!("run --rm --cpus {flag} @busybox nproc")).ok().says(count);
        let script = "grep -c ^processor /proc/cpuinfo";
        hyper(&format!("run --rm --cpus {flag} @busybox sh -c")).arg(script).ok().says(count);
    }
}

#[test]
fn fraction_of_a_processor_is_a_quota() {
    hyper("run --rm --cpus 0.5 @busybox cat /sys/fs/cgroup/cpu.max").ok().says("50000 100000");
}

#[test]
pub(crate) fn uptime_is_the_machines() {
    let text = hyper("run --rm @debian cut -d. -f1 /proc/uptime").ok().text();
    assert!(text.parse::<u64>().unwrap() < 60, "up for {text} s");
    hyper("run --rm @debian uptime").ok().shows("load average");
}

/// How far the clock of a guest may be from the host's, ms.
const CLOCK_ERROR_MS: f64 = 50.0;

#[test]
pub(crate) fn clock_is_the_hosts() {
    clock_of(hyper("run --rm -i @debian bash -c"));
}

/// Asks the clock of a guest by a command that runs a script in its bash.
pub(crate) fn clock_of(bash: Run) {
    let now_ms = || {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        since.map_or(f64::NAN, |now| now.as_secs_f64() * 1000.0)
    };
    // The guest reads its clock between the question and the answer; so each bounds the error from both sides, and all of them together do.
    let (mut least, mut most) = (f64::NEG_INFINITY, f64::INFINITY);
    let script = "while read line; do echo $EPOCHREALTIME; done";
    bash.arg(script).talking(|ask| {
        for _ in 0..200 {
            let before = now_ms();
            let answer = ask("?");
            let after = now_ms();
            let guest = answer.parse::<f64>().map_or(f64::NAN, |seconds| seconds * 1000.0);
            assert!(guest.is_finite(), "{answer:?}");
            (least, most) = (least.max(guest - after), most.min(guest - before));
        }
    });
    note(&format!("clock of the guest: ahead of the host's by {least:.1} to {most:.1} ms"));
    assert!(least >= -CLOCK_ERROR_MS && most <= CLOCK_ERROR_MS, "{least} to {most} ms");
}

#[test]
fn disk_free_shows_the_containers_root() {
    let text = hyper("run --rm @debian df -P /").ok().text();
    let line = text.lines().last().unwrap().to_owned();
    assert!(line.ends_with(" /"), "{text}");
    let size: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(size > 1 << 20, "root of {size} KiB");
}

#[test]
fn sockets_are_listed() {
    hyper("run --rm --network none @debian ss -H -l -n -t").ok().says("");
    let script = "python3 -c 'import socket, subprocess; s = socket.create_server((\"\", 99)); \
                  subprocess.run([\"ss\", \"-H\", \"-l\", \"-n\", \"-t\"])'";
    hyper("run --rm --network none @python sh -c").arg(script).ok().shows(":99");
}

#[test]
fn out_of_memory_is_137_and_said() {
    let container = Container::from(
        hyper("run -d -m 128m @busybox sh -c").arg("tail -c 1000m /dev/zero | cat >/dev/null; kill -9 $$"),
    );
    let eater = Container::from(hyper("run -d -m 128m @busybox tail /dev/zero"));
    assert_eq!(eater.wait(), "137");
    assert_eq!(eater.field(".State.OOMKilled"), "true");
    drop(container);
}

#[test]
fn cgroup_shows_the_limits() {
    hyper("run --rm -m 256m @busybox cat /sys/fs/cgroup/memory.max").ok().says("268435456");
}
