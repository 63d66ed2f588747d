//! Forks and snapshots of running containers: they go on where their source was, are somebody of their own, and harm nobody.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use hyper_tests::{
    Container, DEADLINE, Scratch, Terminal, VICTIMS, detached, from_fork, from_snapshot, given, host, hyper,
    left_over, wait_for,
};

use crate::limits::clock_of;

/// Cases of containers that were started, once more with containers that were not.
macro_rules! also {
    ($how:ident, $name:ident: $($module:ident::$case:ident),* $(,)?) => {
        mod $name {
            $(
                #[test]
                fn $case() {
                    super::$how(crate::$module::$case);
                }
            )*
        }
    };
}

also![from_fork, forked:
    containers::exec_runs_beside_and_returns_its_code,
    containers::kill_is_137,
    network::each_has_an_address_of_its_own,
];

also![from_snapshot, restored:
    containers::cp_goes_both_ways,
    containers::rm_refuses_what_runs,
    terminal::exec_has_a_terminal_too,
];

/// Answers each word that comes through /ask with how many there were; has an open file without a name, and a child.
const COUNTER: &str = "mkfifo /ask; exec 3<>/open; echo inside >&3; rm /open; echo disk >/kept; sleep 7777 & n=0; \
                       echo up; while read word </ask; do n=$((n+1)); echo $n $word; done";

fn counter(flags: &str) -> Container {
    let container = Container::from(hyper(&format!("run -d -m 64m {flags} @busybox sh -c")).arg(COUNTER));
    container.wait_for_log("up");
    container
}

/// Has a counter answer.
fn ask(container: &Container, word: &str, answer: &str) {
    container.sh(&format!("echo {word} >/ask")).ok();
    container.wait_for_log(answer);
}

/// Directories among the snapshots, half-made ones too.
fn kept() -> String {
    host("ls -A $HYPER_ROOT/snapshots 2>/dev/null; true").ok().text()
}

#[test]
fn a_fork_goes_on_where_its_source_was() {
    let source = counter("-p 8090:80 --tmpfs /memory --label kept=yes");
    ask(&source, "one", "1 one");
    source.sh("echo deep >/memory/file").ok();
    let fork = source.forked();
    ask(&fork, "two", "2 two");
    ask(&source, "other", "2 other");
    fork.logs().says("2 two");
    source.logs().says("up\n1 one\n2 other");
    fork.sh("cat /kept /memory/file /proc/1/fd/3").ok().says("disk\ndeep\ninside");
    fork.call("top").ok().shows("sleep 7777");
    fork.call("stats --no-stream").ok().shows(&fork.id[..12]);
    // What either does to its files is its own.
    fork.sh("echo mine >/kept").ok();
    source.sh("cat /kept").ok().says("disk");
    // The port stays with the source; names are their own; the rest is as it was.
    source.call("port").ok().shows("8090");
    fork.call("port").ok().says("");
    assert_ne!(fork.field(".Name"), source.field(".Name"));
    assert_eq!(fork.field(".Config.Labels.kept"), "yes");

    // One that stands still is forked too, and its forks run; so does a fork of a fork.
    fork.call("pause").ok();
    let text = hyper("fork -n 2").arg(&fork.id).ok().text();
    let forks: Vec<_> = text.lines().map(|id| Container { id: id.to_owned() }).collect();
    assert_eq!((forks.len(), fork.field(".State.Status").as_str()), (2, "paused"));
    for fork in &forks {
        ask(fork, "three", "3 three");
        fork.sh("cat /kept").ok().says("mine");
    }
    fork.call("unpause").ok();
    ask(&fork, "three", "3 three");

    // Started again, it is a container like any other, on the disk that it has.
    forks[0].sh("rm /ask").ok();
    forks[0].call("restart -t 0").ok();
    forks[0].wait_for_log("up");
    assert_eq!(kept(), "");
}

/// What a container is recognised by, one fact a line.
const FACTS: &str = "cat /proc/sys/kernel/random/boot_id /etc/machine-id; hostname; tail -n 1 /etc/hosts; \
                     head -c 32 /dev/urandom | md5sum; cat /sys/class/net/eth0/address";

#[test]
fn forks_have_nothing_in_common() {
    let script = "mkfifo /ask; echo 0123456789abcdef0123456789abcdef >/etc/machine-id; cat /proc/sys/kernel/random/boot_id >/dev/null; \
                  echo up; while read word </ask; do head -c 32 /dev/urandom | md5sum; done";
    let source = Container::from(hyper("run -d -m 128m @debian bash -c").arg(script));
    source.wait_for_log("up");
    let text = hyper("fork -n 2").arg(&source.id).ok().text();
    let forks: Vec<_> = text.lines().map(|id| Container { id: id.to_owned() }).collect();
    for fork in &forks {
        fork.logs().says("");
        clock_of(hyper("exec -i").args(&[&fork.id, "bash", "-c"]));
        fork.sh("cat /etc/hostname").ok().says(&fork.id[..12]);
    }
    let mut seen = HashSet::new();
    for container in forks.iter().chain([&source]) {
        let facts = container.sh(FACTS);
        container.sh("echo go >/ask").ok();
        // A process that was there before has fresh random numbers, too.
        let random = wait_for("random numbers", || {
            container.logs().text().lines().find(|line| line.ends_with('-')).map(str::to_owned)
        });
        let facts = facts.ok().text();
        assert_eq!(facts.lines().count(), 6, "{facts}");
        for fact in facts.lines().chain([random.as_str()]) {
            assert!(seen.insert(fact.to_owned()), "{fact} is another's too");
        }
    }
    // Each is reached at its own address: somebody there says that nobody listens.
    for fork in &forks {
        let address = fork.field(".NetworkSettings.IPAddress");
        let tried =
            source.call("exec").args(&["bash", "-c", &format!("echo >/dev/tcp/{address}/9")]).fails(1);
        assert!(tried.error().contains("refused"), "{}", tried.error());
    }
}

#[test]
fn input_and_output_and_a_terminal_go_on() {
    // Numbers without end: none is lost or doubled, here or there.
    let source = Container::from(
        hyper("run -d -m 64m @busybox sh -c")
            .arg("i=0; while :; do i=$((i+1)); echo $i; [ $((i%50)) != 0 ] || sleep 0.1; done"),
    );
    source.wait_for_log("100\n");
    let fork = source.forked();
    let first = wait_for("output of the fork", || {
        fork.logs().text().lines().next().and_then(|line| line.parse::<u64>().ok())
    });
    fork.wait_for_log(&format!("{}\n", first + 100));
    source.wait_for_log(&format!("{}\n", first + 100));
    for (container, first) in [(&source, 1), (&fork, first)] {
        container.call("kill").ok();
        assert_eq!(container.wait(), "137");
        let text = container.logs().text();
        for (number, line) in (first..).zip(text.lines()) {
            assert_eq!(line, number.to_string(), "of {}", text.lines().count());
        }
    }
    assert!(first > 1, "it begins at the fork");

    // What was attached stays with the source, where it goes on; in the fork its processes are gone.
    let source = Container::from(hyper("run -dit -m 64m @busybox sh"));
    let mut fork = None;
    hyper("exec -i").args(&[&source.id, "sh", "-c", "sleep 4444 & exec cat"]).talking(|say| {
        assert_eq!(say("one"), "one");
        fork = Some(source.forked());
        assert_eq!(say("two"), "two");
    });
    let fork = fork.unwrap();
    let processes = fork.call("top").ok().text();
    assert!(!processes.contains("4444") && !processes.contains("cat"), "{processes}");
    fork.sh("echo another").ok().says("another");
    // Each has a terminal of its own.
    for (container, word) in [(&source, "source"), (&fork, "fork")] {
        let terminal = Terminal::start(&format!("attach {}", container.id));
        terminal.resize(100, 30);
        terminal.enter(&format!(
            "until stty size | grep -x '30 100'; do sleep 0.1; done; echo this is {word} | tr a-z A-Z"
        ));
        let screen = terminal.wait_for(&format!("THIS IS {}", word.to_uppercase()));
        assert_eq!(screen.matches("THIS IS").count(), 1, "{screen}");
    }
    // Standard input without a terminal.
    let source = Container::from(
        hyper("run -di -m 64m @busybox sh -c").arg("while read line; do echo got $line; done; echo ended"),
    );
    let fork = source.forked();
    let typed = fork.call("attach").stdin("to the fork\n").start();
    fork.wait_for_log("got to the fork");
    drop(typed);
    source.logs().says("");
}

#[test]
fn snapshots_are_made_listed_run_and_removed() {
    let source = counter("--name saved");
    ask(&source, "one", "1 one");
    let uptime =
        |container: &Container| container.sh("cut -d. -f1 /proc/uptime").ok().text().parse::<f64>().unwrap();
    let (up, began) = (uptime(&source), Instant::now());
    hyper("snapshot create saved first").ok().says("first");
    let saved = Instant::now();
    hyper("snapshot create saved first").fails(1).complains(&["first", "already"]);
    let made_up = hyper("snapshot create saved").ok().text();
    hyper("snapshot ls").ok().shows("saved").shows(&made_up);
    hyper("snapshot ls --format {{.Name}}:{{.Container}}").ok().shows("first:saved");
    hyper("snapshot rm")
        .args(&[&made_up, "no-such"])
        .fails(1)
        .says(&made_up)
        .complains(&["no such snapshot", "no-such"]);
    hyper("snapshot ls -q").ok().says("first");
    ask(&source, "later", "2 later");
    hyper("rm -f saved").ok();

    // It holds the image, and what is in a tenant's memory nobody else reads.
    hyper("rmi @busybox").fails(1).complains(&["snapshot first"]);
    host("find $HYPER_ROOT/snapshots -perm /077 -print -quit").ok().says("");

    let run = Instant::now();
    let one =
        Container::from(hyper("run -d -p 8091:80 --hostname named --label more=1 --from-snapshot first"));
    let (now, elapsed) = (uptime(&one), began.elapsed() - (run - saved));
    assert!(now - up <= elapsed.as_secs_f64() + 1.0, "{up} s, then {now} s: time does not stand still");
    ask(&one, "two", "2 two");
    one.logs().says("2 two");
    one.sh("hostname; cat /etc/hostname").ok().says("named\nnamed");
    one.sh("mkdir /www; echo page >/www/index.html; httpd -p 80 -h /www").ok();
    wait_for("the page", || {
        host("curl -sS -m 10 http://127.0.0.1:8091/").done().text().contains("page").then_some(())
    });
    // In the foreground, and removed afterwards.
    let foreground = hyper("run --rm --name other --from-snapshot first").start();
    let other = wait_for("the other one", || {
        let found = hyper("inspect --format {{.Id}} other").done();
        found.code_is(0).then(|| Container { id: found.text() })
    });
    wait_for("that it runs", || (other.field(".State.Status") == "running").then_some(()));
    other.sh("echo three >/ask").ok();
    other.wait_for_log("2 three");
    other.call("kill").ok();
    foreground.done().code(137).says("2 three");
    other.call("inspect").fails(1);
    hyper("snapshot rm first").ok();
    ask(&one, "still", "3 still");
    assert_eq!(kept(), "");
}

#[test]
fn what_cannot_be_says_so() {
    let scratch = Scratch::new();
    let source = detached("-m 64m @busybox sleep 1000");
    hyper("fork no-such").fails(1).complains(&["no such container", "no-such"]);
    hyper("fork -n 0").arg(&source.id).fails(125).complains(&["0", "1..=64"]);
    for bad in ["-n", ".x", "a/b", "x"] {
        let done = hyper("snapshot create").args(&[&source.id, "--", bad]).done();
        assert!(done.code_is(1), "{bad}: {done:?}");
        done.complains(&["snapshot", bad]);
    }
    hyper("snapshot create").args(&[&source.id, "plain"]).ok();
    for (words, parts) in [
        ("--from-snapshot no-such", ["no such snapshot", "no-such"]),
        ("--from-snapshot plain busybox", ["--from-snapshot", "cannot be used"]),
        ("--from-snapshot plain -e A=b", ["--from-snapshot", "--env"]),
        ("--from-snapshot plain -m 65m", ["64 mib", "-m"]),
        ("--from-snapshot plain -t", ["without a terminal", "-t"]),
        ("--from-snapshot plain -i", ["without standard input", "-i"]),
        ("--from-snapshot plain --network none", ["with a network", "--network"]),
        ("", ["image", "required"]),
    ] {
        hyper(&format!("run {words}")).fails(125).complains(&parts);
    }
    // Other parts than those that it was saved with.
    let parts = scratch.path().display();
    host(&format!("cp {0}/libexec/hyper/* {0}/share/hyper/* {parts}/", given("HYPER_TEST_PREFIX").display()))
        .ok();
    hyper("run -d --from-snapshot plain")
        .env("HYPER_PARTS", scratch.path())
        .fails(125)
        .complains(&["plain", "cannot go on"]);
    hyper("snapshot rm plain").ok();
    source.call("kill").ok();
    assert_eq!(source.wait(), "137");
    source.call("fork").fails(1).complains(&["must be running"]);
    for (flags, why) in
        [(format!("-v {parts}:/data:ro"), "shares"), ("-v fork-volume:/data".to_owned(), "volume at /data")]
    {
        let container = detached(&format!("-m 64m {flags} @busybox sleep 1000"));
        container.call("fork").fails(1).complains(&["cannot be saved", why]);
        container.sh("echo unharmed").ok().says("unharmed");
    }
    hyper("volume rm fork-volume").ok();
    assert_eq!((kept().as_str(), hyper("ps -aq --no-trunc").ok().text()), ("", source.id.clone()));
}

#[test]
fn what_comes_during_a_save_waits_for_it() {
    let source = counter("");
    let clone = |id: String| Container { id };
    for verb in ["exec", "stop -t 0", "rm -f"] {
        let save = hyper("fork").arg(&source.id).start();
        wait_for("a save", || (!kept().is_empty()).then_some(()));
        let done = match verb {
            "exec" => source.sh("echo fine").ok().says("fine"),
            verb => source.call(verb).ok(),
        };
        assert!(done.elapsed < DEADLINE, "{verb}");
        let saved = save.done();
        // The save may have come too late for one that was stopped.
        assert!(
            saved.code_is(0) || verb != "exec" && saved.error().lines().count() == 1,
            "{verb}: {saved:?}"
        );
        if saved.code_is(0) {
            ask(&clone(saved.text()), "asked", "1 asked");
        }
        if verb.starts_with("stop") {
            source.sh("true").fails(1);
            source.call("start").ok();
        }
    }
    hyper("ps -aq").ok().says("");
    assert_eq!(kept(), "");
}

#[test]
fn killed_in_the_middle_there_is_the_source_or_nothing() {
    // A clone that is left alone tells how long it takes.
    let source = counter("");
    let began = Instant::now();
    drop(source.forked());
    let calm: Duration = began.elapsed();
    drop(source);
    for (victim, part) in [(VICTIMS[0], 0.3), (VICTIMS[1], 0.3), (VICTIMS[3], 0.3), (VICTIMS[3], 0.6)] {
        let what = format!("the {} killed after {part} of a fork", victim.0);
        let source = counter("");
        let fork = hyper("fork").arg(&source.id).start();
        // The moment is what is varied: there is nothing to wait for.
        std::thread::sleep(calm.mul_f64(part));
        drop(
            host(&format!("cli={}; id={}; pids=$({}) && kill -KILL $pids", fork.pid(), source.id, victim.1))
                .done(),
        );
        let done = fork.done();
        assert!(done.elapsed < DEADLINE / 2, "{what}: {:?}", done.elapsed);
        assert!(!done.error().contains("panicked") && done.error().lines().count() <= 1, "{what}: {done:?}");
        if victim.0 == "command line" {
            ask(&source, "unharmed", "1 unharmed");
        } else {
            wait_for(&what, || (source.field(".State.Status") == "exited" || done.code_is(0)).then_some(()));
        }
        // The next command cleans up; a command line that was killed may have made its clone.
        wait_for(&format!("nothing half made: {what}"), || {
            hyper("ps -q").ok();
            kept().is_empty().then_some(())
        });
        let ids = hyper("ps -aq --no-trunc").ok().text();
        let others: Vec<_> = ids.lines().filter(|id| *id != source.id).collect();
        assert!(others.is_empty() || done.code_is(0) || victim.0 == "command line", "{what}: {ids}");
        for id in others {
            drop(Container { id: id.to_owned() });
        }
        drop(source);
        wait_for(&format!("nothing left: {what}"), || left_over().is_empty().then_some(()));
    }
}
