//! Pods in numbers: in a row without growth, at once, and how fast their network is.
#![expect(clippy::indexing_slicing, reason = "a panic is how a case fails")]

use hyper_tests::{Containerd, HANDLER, Pod, PodSpec, Release, host, image_name, note, wait_for};
use serde_json::{Value, json};

/// Pods in a row; growth of one each would be seen.
const PODS: u32 = 20;
/// After so many everything that is kept for good has been made.
const WARM: u32 = 5;
/// One in so many runs a container, beside the one that every pod has.
const WITH_CONTAINER: u32 = 5;
/// Largest growth of memory over the rest, KiB: containerd keeps a little of each pod, and so does the host's slab.
const MOST_MEMORY_KIB: i64 = 24 * 1024;

/// What the host has of things that could grow.
fn count(pid: u32) -> Vec<i64> {
    let script = format!(
        "wc -l </proc/mounts; ls /proc/{pid}/fd | wc -l; ls /proc | grep -c '^[0-9]'; ls /sys/class/net | wc -l; \
         find /sys/fs/cgroup -type d | wc -l; ls /run/containerd/s | wc -l; cat /proc/sys/fs/file-nr | cut -f1; \
         sync; echo 3 >/proc/sys/vm/drop_caches; sed -n 's/^MemAvailable: *\\([0-9]*\\).*/\\1/p' /proc/meminfo"
    );
    host(&script).ok().text().lines().map(|line| line.trim().parse().unwrap_or(-1)).collect()
}

const NAMES: [&str; 8] = [
    "mounts",
    "containerd's descriptors",
    "processes",
    "interfaces",
    "control groups",
    "sockets",
    "open files",
    "KiB of memory",
];

#[test]
fn pods_in_a_row_do_not_grow_the_host() {
    let containerd = Containerd::start_for_pods(Release::Two);
    let mut before = Vec::new();
    for number in 0..PODS {
        if number == WARM {
            before = count(containerd.daemon_pid());
        }
        let pod = Pod::run(&containerd, HANDLER, &PodSpec::new(&format!("row-{number}")));
        if number % WITH_CONTAINER == 0 {
            let main = pod.start("main", "echo row", &json!({}));
            assert_eq!(pod.exit_code(&main), 0);
        }
        pod.remove();
    }
    containerd.leaves_nothing();
    let after = count(containerd.daemon_pid());
    for (at, name) in NAMES.iter().enumerate() {
        let (before, after) = (before[at], after[at]);
        // The last one is what is left.
        let growth = if at == NAMES.len() - 1 { before - after } else { after - before };
        let most = match at {
            7 => MOST_MEMORY_KIB,
            // Kernel threads and connections come and go.
            1 | 2 | 6 => 16,
            _ => 0,
        };
        note(&format!("{} pods in a row: {name} {before} before, {after} after", PODS - WARM));
        assert!(growth <= most, "{name}: {before} before, {after} after");
    }
}

/// Resident memory, KiB, and descriptors of the only shim.
fn shim() -> (i64, i64) {
    let script = "pid=$(pgrep -x containerd-shim); sed -n 's/^VmRSS:[^0-9]*\\([0-9]*\\).*/\\1/p' /proc/$pid/status; \
                  ls /proc/$pid/fd | wc -l";
    let text = host(script).ok().text();
    let mut numbers = text.lines().map(|line| line.trim().parse().unwrap_or(-1));
    (numbers.next().unwrap_or(-1), numbers.next().unwrap_or(-1))
}

#[test]
fn containers_in_a_row_do_not_grow_the_shim() {
    let containerd = Containerd::start_for_pods(Release::Two);
    let pod = Pod::run(&containerd, HANDLER, &PodSpec::new("shim"));
    let mut before = (0, 0);
    for number in 0..PODS {
        if number == WARM {
            before = shim();
        }
        let main = pod.start("main", "echo row", &json!({}));
        assert_eq!(pod.exit_code(&main), 0);
        pod.cri(&format!("remove {main}")).ok();
    }
    let after = shim();
    note(&format!(
        "{} containers in one pod: the shim's memory {} KiB before, {} after; descriptors {} before, {} after",
        PODS - WARM,
        before.0,
        after.0,
        before.1,
        after.1
    ));
    assert!(after.1 <= before.1, "descriptors: {before:?} before, {after:?} after");
    assert!(after.0 <= before.0 + 2048, "memory: {before:?} before, {after:?} after");
    pod.remove();
    containerd.leaves_nothing();
}

#[test]
fn ten_pods_at_once() {
    let containerd = Containerd::start_for_pods(Release::Two);
    let specs: Vec<_> = (0..10).map(|number| PodSpec::new(&format!("at-once-{number}"))).collect();
    let requests: Vec<_> = specs.iter().map(|spec| Pod::requested(&containerd, HANDLER, spec)).collect();
    let pods: Vec<_> = requests.into_iter().map(|(run, pod)| pod.named(run.done().code(0).text())).collect();
    for (number, pod) in pods.iter().enumerate() {
        pod.start("main", &format!("echo number {number}; sleep 1000"), &json!({}));
    }
    for (number, pod) in pods.iter().enumerate() {
        pod.logs("main", &format!("number {number}"));
    }
    pods.into_iter().for_each(Pod::remove);
    containerd.leaves_nothing();
}

/// Bits a second that a pod of this handler receives from the host, and sends to it.
fn speed(containerd: &Containerd, handler: &str) -> [f64; 2] {
    let pod = Pod::run(containerd, handler, &PodSpec::new(&format!("speed-{handler}")));
    let image = json!({ "image": { "image": image_name("iperf3") }, "command": ["iperf3", "-s"] });
    pod.start("server", "", &image);
    let address = pod.address();
    let measured = ["", "-R"].map(|direction| {
        wait_for("a measurement", || {
            let done = host(&format!("iperf3 -J -t 5 -c {address} {direction}")).done();
            let report: Value = serde_json::from_str(&done.text()).ok()?;
            report["end"]["sum_received"]["bits_per_second"].as_f64().filter(|bits| *bits > 0.0)
        })
    });
    pod.remove();
    measured
}

#[test]
fn network_is_measured_beside_runcs() {
    // Debian's shim of runc is for this one.
    let containerd = Containerd::start_for_pods(Release::One);
    containerd.import("iperf3");
    let (ours, theirs) = (speed(&containerd, HANDLER), speed(&containerd, "runc"));
    for (at, name) in ["to the pod", "from the pod"].iter().enumerate() {
        let (ours, theirs) = (ours[at] / 1e6, theirs[at] / 1e6);
        note(&format!(
            "iperf3, 5 s {name}: hyper {ours:.0} Mbit/s, runc {theirs:.0} Mbit/s, ratio {:.2}",
            ours / theirs
        ));
    }
    containerd.leaves_nothing();
}
