//! What one container does to itself is not felt next door, and the host holds.

use std::time::Instant;

use hyper_tests::{Container, detached, host, hyper, note, wait_for};

/// How much longer the neighbour may take to answer. The lab has one processor, which two machines share then; the rest is the host's own work.
const MOST_SLOWER: f64 = 8.0;
/// Answers of which the median counts.
const ANSWERS: usize = 7;
/// How many processes the host may have more, and MiB of memory less, than the machine of the attacker accounts for.
const MOST_PROCESSES: u64 = 6;
const MOST_MIB: u64 = 96;
/// Processor time of the attacker's machine after which its attack is under way, seconds.
const UNDER_WAY_S: u64 = 3;

/// For what floods the host, and what reaches it meanwhile.
const HOST_TOO: &str = "--network bridge,egress=any,egress=host";

/// What the host has.
#[derive(Debug, Clone, Copy)]
struct Host {
    processes: u64,
    available_mib: u64,
    disk_free_mib: u64,
}

impl Host {
    fn now() -> Self {
        let text = host(
            "ls /proc | grep -c '^[0-9]'; awk '/^MemAvailable/ { print int($2 / 1024) }' /proc/meminfo; \
             df -m --output=avail /var/lib/hyper | tail -1",
        )
        .ok()
        .text();
        let [processes, available_mib, disk_free_mib] = numbers(&text);
        Self { processes, available_mib, disk_free_mib }
    }
}

/// The numbers of a text, one in each line.
fn numbers<const N: usize>(text: &str) -> [u64; N] {
    let found: Vec<u64> = text.lines().filter_map(|line| line.trim().parse().ok()).collect();
    let found = <[u64; N]>::try_from(found);
    assert!(found.is_ok(), "not {N} numbers: {text:?}");
    found.unwrap_or([0; N])
}

/// Median milliseconds until the neighbour has answered.
fn answer_ms(neighbour: &Container) -> f64 {
    let mut times: Vec<f64> = (0..ANSWERS)
        .map(|_| {
            let start = Instant::now();
            neighbour.sh("echo here").ok().says("here");
            start.elapsed().as_secs_f64() * 1000.0
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times.get(ANSWERS / 2).copied().unwrap_or(f64::INFINITY)
}

/// Processor time that a process has had, seconds.
fn busy_s(pid: &str) -> u64 {
    let ticks = host(&format!("awk '{{ print $14 + $15 }}' /proc/{pid}/stat; getconf CLK_TCK")).ok().text();
    let [ticks, each_second] = numbers(&ticks);
    ticks / each_second
}

/// An attack beside a neighbour: what it does to the neighbour's answers and to the host is noted, and is not much.
struct Attack {
    neighbour: Container,
    attacker: Container,
    calm_ms: f64,
    before: Host,
}

impl Attack {
    /// Starts the attacker with these flags and this script, after the neighbour's calm answers. It attacks when it is told to.
    fn prepare(flags: &str, script: &str) -> Self {
        let neighbour = detached(&format!("-m 64m {HOST_TOO} @busybox sleep 10000"));
        let script = format!("until [ -e /go ]; do sleep 0.1; done; {script}");
        let attacker = Container::from(hyper(&format!("run -d {flags} @busybox sh -c")).arg(&script));
        let calm_ms = answer_ms(&neighbour);
        Self { neighbour, attacker, calm_ms, before: Host::now() }
    }

    fn go(&self) {
        self.attacker.sh("touch /go").ok();
    }

    fn wait_until_busy(&self) {
        let pid = self.attacker.field(".State.Pid");
        let before = busy_s(&pid);
        wait_for("the attack", || (busy_s(&pid) >= before + UNDER_WAY_S).then_some(()));
    }

    /// The neighbour answers, the host holds. `mem_mib` is what the attacker may have.
    fn felt(&self, name: &str, mem_mib: u64) {
        let ms = answer_ms(&self.neighbour);
        let now = Host::now();
        let slower = ms / self.calm_ms;
        let processes = now.processes.saturating_sub(self.before.processes);
        let mib = self.before.available_mib.saturating_sub(now.available_mib);
        note(&format!(
            "{name}: the neighbour answers in {ms:.0} ms instead of {:.0} ({slower:.1} times as long), the host has {processes} more processes \
             and {mib} MiB less memory",
            self.calm_ms
        ));
        assert!(slower <= MOST_SLOWER, "{name}: {slower} times as long");
        assert!(processes <= MOST_PROCESSES, "{name}: {processes} more processes");
        assert!(mib <= mem_mib + MOST_MIB, "{name}: {mib} MiB less memory");
    }
}

#[test]
fn a_fork_bomb_stays_in_its_machine() {
    let attack = Attack::prepare("-m 64m", "bomb() { bomb | bomb & }; bomb; sleep 10000");
    attack.go();
    attack.wait_until_busy();
    attack.felt("fork bomb", 64);
    // It can be ended, whatever state its guest is in.
    hyper("rm -f").arg(&attack.attacker.id).ok();
    attack.neighbour.sh("echo here").ok().says("here");
}

#[test]
fn a_fork_bomb_meets_the_limit_of_processes() {
    let script = "i=0; while [ $i -lt 200 ]; do sleep 10000 & i=$((i + 1)); done; echo all";
    let done = hyper("run --rm --pids-limit 32 @busybox sh -c").arg(script).done();
    assert!(done.error().contains("fork"), "{}", done.error());
}

#[test]
fn a_memory_hog_stays_in_its_machine() {
    let attack = Attack::prepare("-m 128m", "while true; do tail /dev/zero; done");
    attack.go();
    attack.wait_until_busy();
    attack.felt("memory hog", 128);
}

#[test]
fn a_full_disk_is_its_own() {
    let attack = Attack::prepare(
        "-m 64m --storage-opt size=64m",
        "dd if=/dev/zero of=/full bs=1M; echo ended; sleep 10000",
    );
    attack.go();
    attack.attacker.wait_for_log("ended");
    attack.felt("full disk", 64);
    assert!(attack.attacker.logs().error().contains("No space left"), "{}", attack.attacker.logs().error());
    let taken = attack.before.disk_free_mib.saturating_sub(Host::now().disk_free_mib);
    note(&format!("full disk of 64 MiB: {taken} MiB of the host's taken"));
    assert!(taken <= 80, "{taken} MiB taken for a layer of 64");
    attack
        .neighbour
        .sh("dd if=/dev/zero of=/mine bs=1M count=8 2>/dev/null && wc -c </mine")
        .ok()
        .says("8388608");
}

#[test]
fn a_flood_of_packets_stops_nobody() {
    let gateway = "$(ip route | awk '/default/ { print $3 }')";
    let script = format!(
        "while true; do dd if=/dev/zero bs=1400 count=100000 2>/dev/null | nc -u -w 1 {gateway} 9; done"
    );
    let attack = Attack::prepare(&format!("-m 64m {HOST_TOO}"), &script);
    attack.go();
    attack.wait_until_busy();
    attack.felt("flood of packets", 64);
    // The neighbour's own network still carries.
    attack
        .neighbour
        .sh(&format!("ping -c 3 -w 30 {gateway} >/dev/null && echo reached"))
        .ok()
        .says("reached");
}

#[test]
fn a_crashed_kernel_is_alone() {
    let attack = Attack::prepare("-m 64m --privileged", "echo c >/proc/sysrq-trigger; sleep 10000");
    attack.go();
    assert_eq!(attack.attacker.wait(), "137");
    attack.felt("crashed kernel", 0);
}

#[test]
fn a_busy_guest_does_not_hold_up_the_command_line() {
    let attack =
        Attack::prepare("-m 64m --cpus 2", "for i in 1 2 3 4; do while true; do :; done & done; sleep 10000");
    attack.go();
    attack.wait_until_busy();
    attack.felt("busy loops", 64);
    // It has to be ended against its will, too: nothing waits for a guest for long.
    let start = Instant::now();
    attack.attacker.call("stop -t 1").ok();
    note(&format!("busy loops: stopped after {:.1} s", start.elapsed().as_secs_f32()));
}
