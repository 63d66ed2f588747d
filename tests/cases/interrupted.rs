//! Every process of a container is killed in the middle of exec, stop and remove: the container is whole afterwards or gone, what was
//! acknowledged is there, and nothing is left behind. (A start is interrupted in `faults`.)

use std::time::{Duration, Instant};

use hyper_tests::{DEADLINE, Scratch, VICTIMS, host, hyper, image, left_over, note, wait_for};

/// What is under way, and whether the container is to be there afterwards.
const VERBS: [(&str, bool); 3] = [("exec", true), ("stop", true), ("rm -f", false)];
/// The moment: this part of the time that the verb takes when it is left alone.
const MOMENT: f64 = 0.4;
/// Least kills that must have met somebody, of all: near its end a verb may have ended its victim by itself.
const LEAST_MET: usize = 7;

/// What `exec` runs: it says when what it wrote is on the disk.
const EXEC: &str = "echo later >>/kept && sync && echo acknowledged && sleep 1";

/// A container with something on its disk that must not be lost.
struct Subject {
    id: String,
}

impl Subject {
    /// With flags of `run`.
    fn new(flags: &[&str]) -> Self {
        let script = "trap 'sleep 1; exit 3' TERM; [ -e /kept ] || echo first >/kept; sync; echo up; while :; do sleep 0.2; done";
        let run = hyper("run -d -m 64m").args(flags).args(&[&image("busybox"), "sh", "-c", script]);
        let id = run.ok().text();
        let subject = Self { id };
        wait_for("the container's first word", || {
            hyper("logs").arg(&subject.id).ok().text().contains("up").then_some(())
        });
        subject
    }

    /// The verb, not started yet.
    fn run(&self, verb: &str) -> hyper_tests::Run {
        let run = hyper(verb).arg(&self.id);
        if verb == "exec" { run.args(&["sh", "-c", EXEC]) } else { run }
    }

    fn status(&self) -> String {
        hyper("inspect --format {{.State.Status}}").arg(&self.id).done().text()
    }

    /// Brings it up if it is not up, and reads what it has. A stop whose command line was killed may still be under way.
    fn kept(&self, what: &str) -> String {
        wait_for(&format!("a container that is up: {what}"), || {
            let started = hyper("start").arg(&self.id).done();
            assert!(started.code_is(0), "{what}: it does not start: {started:?}");
            let read = hyper("exec").args(&[&self.id, "cat", "/kept"]).done();
            read.code_is(0).then(|| read.text())
        })
    }
}

/// How long a verb takes that is left alone.
fn calm(verb: &str) -> Duration {
    let subject = Subject::new(&[]);
    let start = Instant::now();
    subject.run(verb).ok();
    let calm = start.elapsed();
    drop(hyper("rm -f").arg(&subject.id).done());
    calm
}

/// One entry of the matrix; whether there was anybody to be killed.
fn interrupted(verb: &str, survives: bool, victim: (&str, &str), after: Duration) -> bool {
    let scratch = Scratch::new();
    let share = format!("{}:/shared", scratch.path().display());
    let flags: &[&str] = if victim.0 == "file server" { &["-v", &share] } else { &[] };
    let subject = Subject::new(flags);
    let what = format!("the {} killed {} ms into {verb}", victim.0, after.as_millis());
    let running = subject.run(verb).start();
    // The moment is what is varied: there is nothing to wait for.
    std::thread::sleep(after);
    let find = format!("cli={}; id={}; pids=$({}) && kill -KILL $pids", running.pid(), subject.id, victim.1);
    let met = host(&find).done().code_is(0);
    let done = running.done();
    assert!(done.elapsed < DEADLINE / 2, "{what}: it took {:?}", done.elapsed);
    let words = done.error();
    assert!(!words.contains("panicked") && words.lines().count() <= 2, "{what}: {words}");
    let acknowledged = done.text().contains("acknowledged");
    if survives {
        if victim.0 != "command line" && met {
            // Whoever looks sees that it has ended, or is told so.
            wait_for(&format!("the end: {what}"), || (subject.status() == "exited").then_some(()));
        }
        let kept = subject.kept(&what);
        assert!(kept.starts_with("first"), "{what}: {kept:?}");
        assert!(!acknowledged || kept.contains("later"), "{what}: {kept:?}");
    }
    let again = hyper("rm -f").arg(&subject.id).done();
    let gone = again.error().to_lowercase().contains("no such container");
    assert!(again.code_is(0) || gone && !survives, "{what}: {again:?}");
    assert_eq!(hyper("ps -aq").ok().text(), "", "{what}");
    wait_for(&format!("nothing left: {what}"), || left_over().is_empty().then_some(()));
    met
}

#[test]
fn every_process_is_killed_in_the_middle_of_exec_stop_and_remove() {
    hyper("run --rm -m 64m @busybox true").ok();
    let (mut met, mut tried) = (0, 0);
    for (verb, survives) in VERBS {
        let calm = calm(verb);
        for victim in VICTIMS {
            tried += 1;
            met += usize::from(interrupted(verb, survives, victim, calm.mul_f64(MOMENT)));
        }
    }
    note(&format!(
        "exec, stop, rm -f: {tried} kills tried, {met} met somebody; nothing acknowledged was lost, nothing was left"
    ));
    assert!(met >= LEAST_MET, "only {met} of {tried} met somebody");
    hyper("run --rm @busybox echo fine").ok().says("fine");
}
