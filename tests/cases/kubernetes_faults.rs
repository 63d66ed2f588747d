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

/// Ignores the wish to end, and says so.
const STUBBORN: &str = "trap 'echo not yet' TERM; echo here; while true; do sleep 1; done";

fn kill(victim: Victim, containerd: &Containerd, container: Option<(&Pod<'_>, &str)>) {
    let name = match (victim, container) {
        (Victim::Machine, _) => "hyper-vmm",
        (Victim::FileServer, _) => "hyper-fs",
        (Victim::Shim, _) => "containerd-shim",
        (Victim::Containerd, _) => return containerd.kill(),
        (Victim::Agent, Some((pod, id))) => {
            // The answer never comes.
            drop(pod.exec(id, "echo c >/proc/sysrq-trigger").done());
            return;
        }
        (Victim::Agent, None) => return,
    };
    host(&format!("pkill -9 -x {name}")).ok();
}

fn boots() -> bool {
    host("pgrep -x hyper-vmm && pgrep -x hyper-fs").done().code_is(0)
}

/// One case of the matrix.
fn killed(containerd: &Containerd, stage: Stage, victim: Victim) {
    let spec = PodSpec::new("victim").with("/linux/securityContext", "privileged", json!(true));
    if stage == Stage::Booting {
        let request = Pod::request(containerd, HANDLER, &spec).start();
        wait_for("a machine that boots", || boots().then_some(()));
        kill(victim, containerd, None);
        let done = request.done();
        assert!(!done.code_is(0), "{done:?}");
        if victim == Victim::Containerd {
            containerd.launch();
        }
        return;
    }
    let pod = Pod::run(containerd, HANDLER, &spec);
    let mut container = None;
    if stage >= Stage::Created {
        let privileged = json!({ "linux": { "securityContext": { "privileged": true } } });
        let id = pod.create("main", STUBBORN, &privileged);
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
    kill(victim, containerd, container.as_deref().map(|id| (&pod, id)));
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
fn killed_at_each_stage(victim: Victim, stages: &[Stage]) {
    let containerd = Containerd::start_for_pods(Release::Two);
    for &stage in stages {
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
    killed_at_each_stage(Victim::Machine, &STAGES);
}

#[test]
fn file_server_killed_at_each_stage() {
    killed_at_each_stage(Victim::FileServer, &STAGES);
}

#[test]
fn agent_killed_at_each_stage_in_which_it_can_be_reached() {
    killed_at_each_stage(Victim::Agent, &[Stage::Running, Stage::Exec, Stage::Stopping]);
}

#[test]
fn shim_killed_at_each_stage() {
    killed_at_each_stage(Victim::Shim, &STAGES);
}

#[test]
fn containerd_killed_at_each_stage() {
    killed_at_each_stage(Victim::Containerd, &STAGES);
}
