//! Machines that are cloned from a template: they do what booted ones do, are somebody of their own, and a bad template harms nobody.

use std::collections::HashSet;
use std::path::Path;

use hyper_tests::{Container, Done, Run, booted, cut, from_template, garble, hyper, templates, wait_for};

/// Cases of machines that boot, once more with machines that do not.
macro_rules! also_from_a_template {
    ($($module:ident::$case:ident),* $(,)?) => {
        $(
            #[test]
            fn $case() {
                from_template(crate::$module::$case);
            }
        )*
    };
}

also_from_a_template![
    run::exit_code_comes_back,
    run::output_and_error_stay_apart,
    run::missing_command_is_127,
    run::entry_and_user_and_folder_come_from_the_image,
    network::each_has_an_address_of_its_own,
    network::none_has_only_loopback,
    network::the_way_out_is_masqueraded,
    limits::clock_is_the_hosts,
    limits::uptime_is_the_machines,
    containers::writable_layer_survives_stop_and_start,
    containers::exec_runs_beside_and_returns_its_code,
    options::hostname_and_hosts,
];

/// A command that starts from a template or not at all.
fn cloned(words: &str) -> Run {
    hyper(words).env("HYPER_TEMPLATE", "always")
}

/// A command that does what it does without any switch.
fn plain(words: &str) -> Run {
    hyper(words).env("HYPER_TEMPLATE", "auto")
}

#[test]
fn the_first_start_makes_one_for_the_next() {
    let words = "-d -m 70m @busybox sleep 1000";
    let before = templates();
    let first = Container::from(plain(&format!("run {words}")));
    assert!(booted(&first), "there was none");
    wait_for("the template", || templates().iter().any(|path| !before.contains(path)).then_some(()));
    let second = Container::from(plain(&format!("run {words}")));
    assert!(!booted(&second));
    second.sh("cat /proc/sys/kernel/hostname").ok().says(&second.id[..12]);
    let third = Container::from(hyper(&format!("run {words}")).env("HYPER_TEMPLATE", "never"));
    assert!(booted(&third), "told not to use it");
}

/// What a clone is recognised by, one fact a line.
const FACTS: &str = "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; hostname; \
                     head -c 32 /dev/urandom | md5sum; cat /sys/class/net/eth0/address; hostname -i";

#[test]
fn clones_have_nothing_in_common() {
    let facts = |done: Done| done.text().lines().map(str::to_owned).collect::<Vec<_>>();
    let clones = [0, 1, 2].map(|_| Container::from(cloned("run -d @busybox sleep 1000")));
    let mut seen = HashSet::new();
    for clone in &clones {
        let own = facts(clone.sh(FACTS).ok());
        assert_eq!(own.len(), 6, "{own:?}");
        for fact in own {
            assert!(seen.insert(fact.clone()), "{fact} is another clone's too");
        }
    }
}

#[test]
fn ten_clones_at_once_all_answer() {
    cloned("run --rm -m 64m @busybox true").ok();
    let runs: Vec<_> = (0..10)
        .map(|number| {
            cloned("run --rm -m 64m @busybox sh -c")
                .arg(&format!("echo {number}; cat /proc/sys/kernel/random/uuid"))
                .within(600)
                .start()
        })
        .collect();
    let mut ids = HashSet::new();
    for (number, run) in runs.into_iter().enumerate() {
        let text = run.done().code(0).text();
        let (first, id) = text.split_once('\n').unwrap();
        assert_eq!(first, number.to_string());
        assert!(ids.insert(id.to_owned()), "{id} twice");
    }
}

/// Damages every template, runs a container that must not notice, and sees that there is a good one afterwards.
fn survives(damage: impl Fn(&Path)) {
    cloned("run --rm @busybox true").ok();
    let damaged = templates();
    for template in &damaged {
        damage(template);
    }
    let container = Container::from(plain("run -d @busybox sleep 1000"));
    assert!(booted(&container));
    container.sh("echo alive").ok().says("alive");
    drop(container);
    for template in damaged {
        // Those of other shapes are damaged yet; the next case must not meet them.
        drop(std::fs::remove_dir_all(template));
    }
    cloned("run --rm @busybox echo again").ok().says("again");
}

#[test]
fn a_garbled_state_boots_instead() {
    survives(|template| garble(&template.join("state")));
}

#[test]
fn a_cut_memory_boots_instead() {
    survives(|template| cut(&template.join("memory"), 1 << 20));
}

#[test]
fn memory_of_zeroes_boots_instead() {
    survives(|template| {
        let memory = template.join("memory");
        let bytes = std::fs::metadata(&memory).map_or(0, |data| data.len());
        cut(&memory, 0);
        cut(&memory, bytes);
    });
}

#[test]
fn what_cannot_be_cloned_boots_or_says_so() {
    let share = format!("run --rm -v {}:/data:ro @busybox ls /data", std::env::temp_dir().display());
    plain(&share).ok();
    hyper(&share).env("HYPER_TEMPLATE", "always").fails(125).complains(&["HYPER_TEMPLATE", "shares"]);
    hyper("run --rm @busybox true")
        .env("HYPER_TEMPLATE", "perhaps")
        .fails(125)
        .complains(&["auto, never or always"]);
}
