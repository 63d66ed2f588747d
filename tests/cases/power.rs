//! The power fails at every moment of what the store is asked for: what is left is what was there before or after, and goes on from there.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;

use hyper_tests::power::{CALLS, Disk, Op, VIEWS, View, recorded};
use hyper_tests::{Run, Scratch, host, hyper, image, note};

/// What is asked for, one after the other. `@busybox` is that image; each is whole or was not.
const VERBS: [&str; 11] = [
    "pull -q @busybox",
    "tag @busybox kept:1",
    "volume create v1",
    "create -m 64m --name one @busybox sh -c date>/written;sync",
    "create -m 64m --name two -v v1:/v @busybox true",
    "rename one three",
    "start -a three",
    "rm two",
    "volume rm v1",
    "rmi kept:1",
    "rm three",
];
/// What is asked to see what is there, and how it is to be printed.
const QUESTIONS: [(&str, &str); 3] = [
    ("ps -a --no-trunc", "{{.ID}} {{.Names}}"),
    ("images --no-trunc", "{{.Repository}}:{{.Tag}} {{.ID}}"),
    ("volume ls", "{{.Name}}"),
];
/// Least states of the disk that must have been looked at, of all.
const LEAST_STATES: usize = 100;

/// State that is kept in memory: nothing of it is to depend on a disk.
struct Store(Scratch);

impl Store {
    fn new() -> Self {
        let place = Scratch::new();
        host(&format!("mount -t tmpfs none {}", place.path().display())).ok();
        Self(place)
    }

    fn data(&self) -> PathBuf {
        self.0.path().join("data")
    }

    fn hyper(&self, words: &str) -> Run {
        hyper(words).state(self.0.path()).env("HYPER_TEMPLATE", "never")
    }

    /// Makes of it what the power left.
    fn become_that(&self, disk: &Disk, view: View) -> Result<(), String> {
        for folder in ["data", "run"] {
            host(&format!("rm -rf {}", self.0.join(folder))).ok();
        }
        disk.make(view, &self.data()).map_err(|error| error.to_string())
    }

    /// What a user sees; nobody is told of anything that is damaged.
    fn seen(&self, with_audit: bool) -> Result<String, String> {
        let mut all = String::new();
        for (words, format) in QUESTIONS {
            let done = self.hyper(words).args(&["--format", format]).done();
            let said = done.error();
            // That is to be told; that anything is damaged is not.
            let wrong = said.lines().find(|line| !line.contains("its supervisor was killed"));
            if !done.code_is(0) || wrong.is_some() {
                return Err(format!("{words}: {said}"));
            }
            done.text().lines().for_each(|line| all.push_str(&format!("{words} {line}\n")));
        }
        if with_audit {
            let audit = self.hyper("audit --verify").done();
            if !audit.code_is(0) {
                return Err(audit.error());
            }
        }
        Ok(all)
    }

    /// All that is there can be removed, and then nothing is.
    fn is_removable(&self, seen: &str) -> Result<(), String> {
        let of = |question: &str| -> Vec<String> {
            let lines = seen.lines().filter_map(|line| line.strip_prefix(question));
            lines.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
        };
        let (containers, volumes) = (of(QUESTIONS[0].0), of(QUESTIONS[2].0));
        for (verb, what, folder) in [("rm -f", containers, "containers"), ("volume rm", volumes, "volumes")] {
            if !what.is_empty() {
                let names: Vec<&str> = what.iter().map(String::as_str).collect();
                let done = self.hyper(verb).args(&names).done();
                if !done.code_is(0) {
                    return Err(format!("{verb} {what:?}: {}", done.error()));
                }
            }
            let left = fs::read_dir(self.data().join(folder)).map_or(0, Iterator::count);
            if left > 0 {
                return Err(format!("{left} left in {folder}"));
            }
        }
        Ok(())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        drop(host(&format!("umount -l {}", self.0.path().display())).done());
    }
}

/// Runs it and says what it did to the store.
fn watched(store: &Store, words: &str) -> Result<Vec<Op>, String> {
    let log = Scratch::new();
    let log = log.join("log");
    let program = hyper_tests::given("HYPER_TEST_PREFIX").join("bin/hyper");
    let mut command =
        host("exec strace -f --seccomp-bpf -qq -y -xx -s 16777216 -o \"$0\" -e \"trace=$1\" \"${@:2}\"")
            .args(&[&log, CALLS, &program.to_string_lossy()])
            .state(store.0.path())
            .env("HYPER_TEMPLATE", "never");
    let (plain, script) = words.split_once(" sh -c ").unwrap_or((words, ""));
    for word in plain.split_whitespace() {
        command = command.arg(&word.strip_prefix('@').map_or_else(|| word.to_owned(), image));
    }
    if !script.is_empty() {
        command = command.args(&["sh", "-c", script]);
    }
    command.ok();
    let log = fs::read_to_string(&log).map_err(|error| error.to_string())?;
    recorded(&log, &store.data())
}

/// Looks at what the power may have left, unless that has been looked at.
struct Cuts<'a> {
    scratch: &'a Store,
    known: HashSet<String>,
    states: usize,
    faults: Vec<String>,
}

impl Cuts<'_> {
    fn look(&mut self, disk: &Disk, verb: &str, op: &str, right: &[&String]) {
        for view in VIEWS {
            if !self.known.insert(disk.state(view)) {
                continue;
            }
            self.states += 1;
            let seen =
                self.scratch.become_that(disk, view).and_then(|()| self.scratch.seen(view == View::All));
            let well = seen.and_then(|seen| {
                if right.contains(&&seen) {
                    self.scratch.is_removable(&seen)
                } else {
                    Err(format!("seen is\n{seen}"))
                }
            });
            if let Err(why) = well {
                self.faults.push(format!("{verb}: power cut ({view:?}) after {op}: {why}"));
            }
        }
    }
}

#[test]
fn a_power_cut_at_any_moment_leaves_what_was_before_or_after() {
    let (store, scratch) = (Store::new(), Store::new());
    fs::create_dir(store.data()).unwrap();
    let mut cuts = Cuts { scratch: &scratch, known: HashSet::new(), states: 0, faults: Vec::new() };
    let mut disk = Disk::default();
    let mut before = scratch.seen(true).unwrap();
    let mut ops = 0;
    let mut started = None;
    for verb in VERBS {
        let done = watched(&store, verb).unwrap();
        // It is asked elsewhere, because what is asked may write as well.
        let mut whole = disk.clone();
        done.iter().try_for_each(|op| whole.apply(op)).unwrap();
        scratch.become_that(&whole, View::All).unwrap();
        let after = scratch.seen(true).unwrap();
        let right = [&before, &after];
        ops += done.len();
        for (at, op) in done.iter().enumerate() {
            let is_next =
                |n: Option<usize>| n.and_then(|n| done.get(n)).is_some_and(|other| other.continues(op));
            // In the middle of a long file, or what the guest does with its disk: that is between the guest and its file system.
            // What containers and their keepers say has no bearing on what is there; that of the audit log has.
            let said = ["console.log", "log.json", "supervisor.log", "vmm.log", "rw.img"]
                .iter()
                .any(|end| op.is_in(end));
            if said || (is_next(at.checked_sub(1)) && is_next(Some(at + 1))) {
                disk.apply(op).unwrap();
                continue;
            }
            let name = op.to_string();
            if let Some(half) = op.torn() {
                let mut disk = disk.clone();
                disk.apply(&half).unwrap();
                cuts.look(&disk, verb, &format!("half of {name}"), &right);
            }
            disk.apply(op).unwrap();
            cuts.look(&disk, verb, &name, &right);
        }
        // It was acknowledged.
        cuts.known.clear();
        cuts.look(&disk, verb, "its end", &[&after]);
        before = after;
        if verb.starts_with("start") {
            started = Some(disk.clone());
        }
    }
    assert_eq!(store.seen(true).as_ref(), Ok(&before), "the record is not what happened");
    let states = cuts.states;
    assert!(cuts.faults.is_empty(), "{} faults:\n{}", cuts.faults.len(), cuts.faults.join("\n"));
    note(&format!(
        "power cuts: {} verbs, {ops} changes, {states} states of the disk; each was what had been before or after",
        VERBS.len()
    ));
    assert!(states >= LEAST_STATES, "only {states} states");
    goes_on(&scratch, &started.unwrap());
}

/// A container whose disk was made before the cut starts after it, and has what it had synced.
fn goes_on(scratch: &Store, disk: &Disk) {
    for view in VIEWS {
        assert_eq!(scratch.become_that(disk, view), Ok(()));
        scratch.hyper("start -a three").ok();
    }
}
