//! What a pod consists of is killed at each stage of its life; the answers are right, and nothing is left.
#![expect(clippy::indexing_slicing, reason = "a panic is how a case fails")]

use hyper_tests::{Containerd, HANDLER, Pod, PodSpec, Release, Running, host, wait_for};
use serde_json::json;

/// How far a pod has come when somebody dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Stage {
    /// The machine boots.
    Booting,
    /// The pod is there, without a container.
    Empty,
    /// A container is made but not started; containerd's CRI plugin has not told the shim of it yet.
    Created,
    /// It runs.
    Running,
    /// Another process runs in it.
    Exec,
    /// It is being stopped, and takes its time.
    Stopping,
    /// The pod is being removed.
    Removing,
}

const STAGES: [Stage; 7] = [
    Stage::Booting,
    Stage::Empty,
    Stage::Created,
    Stage::Running,
    Stage::Exec,
    Stage::Stopping,
    Stage::Removing,
];

/// Who dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Machine,
    FileServer,
    /// With the agent its kernel dies: it is the first process of the guest.
    Agent,
    Shim,
    Containerd,
}

/// Deadlines of hyper's own in these cases, in those of a user: the processor is emulated.
const SCALE: u32 = 10;

/// Ignores the wish to end, and says so.
const STUBBORN: &str = "trap 'echo not yet' TERM; echo here; while true; do sleep 1; done";

fn kill(victim: Victim, containerd: &Containerd) {
    let name = match victim {
        Victim::Machine => "hyper-vmm",
        Victim::FileServer => "hyper-fs",
        Victim::Shim => "containerd-shim",
        Victim::Containerd => return containerd.kill(),
        Victim::Agent => return Pod::order_the_only_one("panic"),
    };
    host(&format!("pkill -9 -x {name}")).ok();
}

fn boots() -> bool {
    host("pgrep -x hyper-vmm && pgrep -x hyper-fs").done().code_is(0)
}

/// One case of the matrix.
fn killed(containerd: &Containerd, stage: Stage, victim: Victim) {
    let spec = PodSpec::new("victim");
    if stage == Stage::Booting {
        let request = Pod::request(containerd, HANDLER, &spec).start();
        wait_for("a machine that boots", || boots().then_some(()));
        kill(victim, containerd);
        let done = request.done();
        // The order may come when the agent serves already.
        let may_be_there = victim == Victim::Agent && done.code_is(0);
        assert!(may_be_there || !done.code_is(0), "{done:?}");
        if victim == Victim::Containerd {
            containerd.launch();
        }
        return;
    }
    let pod = Pod::run(containerd, HANDLER, &spec);
    let mut container = None;
    if stage >= Stage::Created {
        let id = pod.create("main", STUBBORN, &json!({}));
        if stage >= Stage::Running {
            pod.cri(&format!("start {id}")).ok();
            pod.logs("main", "here");
        }
        container = Some(id);
    }
    let main = container.as_deref().unwrap_or_default();
    let side = match stage {
        Stage::Exec => {
            let exec = pod.exec(main, "touch /began; sleep 1000").start();
            wait_for("the second process", || {
                pod.exec(main, "test -e /began").done().code_is(0).then_some(())
            });
            Some(exec)
        }
        Stage::Stopping => {
            let stop = pod.cri(&format!("stop {main} 600")).start();
            pod.logs("main", "not yet");
            Some(stop)
        }
        Stage::Removing => Some(pod.cri(&format!("stop-pod {}", pod.id)).start()),
        _ => None,
    };
    kill(victim, containerd);
    if victim == Victim::Containerd {
        containerd.launch();
        drop(side.map(Running::done));
        if stage != Stage::Removing {
            assert!(pod.is_ready(), "the pod has outlived containerd");
            if stage >= Stage::Running {
                pod.exec(main, "echo alive").ok().says("alive");
                assert_eq!(pod.status(main)["state"], "CONTAINER_RUNNING");
            }
        }
        return;
    }
    // What was asked for ends, one way or the other.
    drop(side.map(Running::done));
    if stage != Stage::Removing {
        if stage >= Stage::Running {
            let code = pod.exit_code(main);
            // Of a shim that is gone containerd says 255 itself, unless our own word for it comes first; with runc it is the same.
            let unknown = victim == Victim::Shim && code == 255;
            assert!(unknown || code == 137, "{code}");
        }
        wait_for("the pod not to be ready", || (!pod.is_ready()).then_some(()));
    }
}

#[expect(clippy::print_stderr, reason = "libtest shows it with the failure")]
fn killed_at_each_stage(victim: Victim, release: Release) {
    let containerd = match victim {
        Victim::Agent => Containerd::start_sabotaged(release, SCALE),
        _ => Containerd::start_for_pods(release),
    };
    for stage in STAGES {
        eprintln!("{victim:?} killed when the pod was {stage:?}");
        killed(&containerd, stage, victim);
        Pod::remove_all(&containerd);
        containerd.leaves_nothing();
    }
    // Nothing has suffered.
    let pod = Pod::run(&containerd, HANDLER, &PodSpec::new("after"));
    let main = pod.start("main", "echo fine", &json!({}));
    assert_eq!(pod.exit_code(&main), 0);
    pod.remove();
    containerd.leaves_nothing();
}

#[test]
fn machine_killed_at_each_stage() {
    killed_at_each_stage(Victim::Machine, Release::Two);
}

#[test]
fn file_server_killed_at_each_stage() {
    killed_at_each_stage(Victim::FileServer, Release::Two);
}

#[test]
fn agent_killed_at_each_stage() {
    killed_at_each_stage(Victim::Agent, Release::Two);
}

#[test]
fn silent_agent_costs_its_pod_and_nobody_else() {
    // With the deadlines of a user it is a minute until a silent agent is given up.
    let containerd = Containerd::start_sabotaged(Release::Two, 1);
    let stages = ["empty", "running", "stopping"];
    let pods = stages.map(|name| Pod::run(&containerd, HANDLER, &PodSpec::new(name)));
    let neighbour = Pod::run(&containerd, HANDLER, &PodSpec::new("neighbour"));
    let mains: Vec<_> =
        pods.iter().skip(1).map(|pod| (pod, pod.start("main", STUBBORN, &json!({})))).collect();
    for (pod, _) in &mains {
        pod.logs("main", "here");
    }
    let (stopping, main) = &mains[1];
    let stop = stopping.cri(&format!("stop {main} 600")).start();
    stopping.logs("main", "not yet");
    for pod in &pods {
        pod.order("freeze");
    }
    // What is asked of it now ends with a word, and not never.
    let (running, main) = &mains[0];
    assert!(!running.exec(main, "true").done().code_is(0), "an agent that stands still has answered");
    for pod in &pods {
        wait_for("the pod not to be ready", || (!pod.is_ready()).then_some(()));
    }
    for (pod, main) in &mains {
        assert_eq!(pod.exit_code(main), 137);
    }
    drop(stop.done());
    let main = neighbour.start("main", "echo fine", &json!({}));
    assert_eq!(neighbour.exit_code(&main), 0);
    Pod::remove_all(&containerd);
    containerd.leaves_nothing();
}

#[test]
fn shim_killed_at_each_stage() {
    killed_at_each_stage(Victim::Shim, Release::Two);
}

#[test]
fn containerd_killed_at_each_stage() {
    killed_at_each_stage(Victim::Containerd, Release::Two);
}

/// What containerd 1.6 does not know of after its end, it never ends: the pod has to.
#[test]
fn containerd_one_killed_before_it_knows_its_pod() {
    let containerd = Containerd::start_for_pods(Release::One);
    killed(&containerd, Stage::Booting, Victim::Containerd);
    Pod::remove_all(&containerd);
    containerd.leaves_nothing();
}
