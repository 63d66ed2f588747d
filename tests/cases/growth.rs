//! A pod's machine grows while it runs, and gives back what it no longer needs.

use hyper_tests::{Containerd, host, wait_for};

const MIB: u64 = 1 << 20;

/// Memory of the host that a machine's processes hold, MiB.
fn held_mib(containerd: &Containerd, id: &str) -> u64 {
    let script = format!("awk '/^Rss/ {{ print $2 }}' /proc/{}/smaps_rollup", containerd.pid(id));
    number(&host(&script).ok().text()) / 1024
}

fn number(text: &str) -> u64 {
    let number = text.trim().parse().unwrap_or(0);
    assert!(number > 0, "{text:?} is no number");
    number
}

/// What a command in a container prints.
fn inside(containerd: &Containerd, id: &str, script: &str) -> String {
    containerd.ctr(&format!("task exec --exec-id e{} {id} sh -c", unique())).arg(script).ok().text()
}

/// Memory that the guest has, MiB.
fn total_mib(containerd: &Containerd, id: &str) -> u64 {
    let script = "awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo";
    number(&inside(containerd, id, script))
}

fn unique() -> u32 {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

fn limits(cpus: u32, memory_mib: u64) -> String {
    let (quota, bytes) = (cpus * 100_000, memory_mib * MIB);
    format!(r#"{{"cpu":{{"quota":{quota},"period":100000}},"memory":{{"limit":{bytes}}}}}"#)
}

#[test]
fn an_update_brings_processors_and_takes_them_away() {
    let containerd = Containerd::start();
    containerd.run("-d --cpus 1 @busybox cpus sleep 1000").ok();
    let nproc = |expected: &str| {
        wait_for(&format!("{expected} processors"), || {
            (inside(&containerd, "cpus", "nproc").trim() == expected).then_some(())
        });
    };
    nproc("1");
    containerd.update("cpus", &limits(2, 128));
    nproc("2");
    // Both of them work.
    let busy = "for n in 1 2; do (i=0; while [ $i -lt 3000 ]; do i=$((i+1)); done) & done; wait; grep -c ^processor /proc/cpuinfo";
    assert_eq!(inside(&containerd, "cpus", busy).trim(), "2");
    containerd.update("cpus", &limits(1, 128));
    nproc("1");
    containerd.update("cpus", &limits(2, 128));
    nproc("2");
    containerd.ctr("task rm -f cpus").ok();
    containerd.leaves_nothing();
}

#[test]
fn an_update_brings_memory_that_can_be_used_and_gives_it_back() {
    let containerd = Containerd::start();
    let big = "--mount type=tmpfs,src=tmpfs,dst=/big,options=size=450m";
    containerd.run(&format!("-d --memory-limit 134217728 {big} @busybox grows sleep 1000")).ok();
    let (before, total_before) = (held_mib(&containerd, "grows"), total_mib(&containerd, "grows"));
    containerd.update("grows", &limits(1, 512));
    // Held all at once.
    let fill = "head -c 419430400 /dev/zero >/big/fill && wc -c </big/fill";
    assert_eq!(inside(&containerd, "grows", fill).trim(), "419430400");
    let full = held_mib(&containerd, "grows");
    assert!(full > before + 380, "{before} MiB before, {full} MiB when full");
    inside(&containerd, "grows", "rm /big/fill");
    containerd.update("grows", &limits(1, 128));
    wait_for("the guest to give memory up", || {
        (total_mib(&containerd, "grows") < total_before + 50).then_some(())
    });
    wait_for("the host to have it", || (held_mib(&containerd, "grows") < before + 100).then_some(()));
    containerd.ctr("task rm -f grows").ok();
    containerd.leaves_nothing();
}

#[test]
fn a_second_container_makes_its_pod_grow() {
    let containerd = Containerd::start();
    let pod = "--annotation io.kubernetes.cri.sandbox-id=pod";
    containerd.run(&format!("-d {pod} --memory-limit 134217728 --cpus 1 @busybox pod sleep 1000")).ok();
    let total = || total_mib(&containerd, "pod");
    let alone = total();
    containerd.run(&format!("-d {pod} --memory-limit 402653184 --cpus 1 @busybox second sleep 1000")).ok();
    let both = total();
    assert!(both >= alone + 384, "{alone} MiB alone, {both} MiB with a second container");
    wait_for("two processors", || (inside(&containerd, "second", "nproc").trim() == "2").then_some(()));
    containerd.ctr("task rm -f second").ok();
    wait_for("the machine to shrink", || (total() < alone + 100).then_some(()));
    containerd.ctr("task rm -f pod").ok();
    containerd.leaves_nothing();
}
