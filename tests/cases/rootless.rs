//! A user who is not root: the same verbs, the same walls, and nothing left.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use hyper_tests::{
    Container, Far, Run, User, as_user, detached, from_template, host, hyper, image, wait_for,
};

use crate::network::{STOPPED, tries};

/// Cases of root's, once more as a user who is not.
macro_rules! also_as_a_user {
    ($($module:ident::$case:ident),* $(,)?) => {
        $(
            #[test]
            fn $case() {
                as_user(crate::$module::$case);
            }
        )*
    };
}

also_as_a_user![
    jail::a_vmm_in_the_guests_hands_gets_nowhere,
    jail::doctor_shows_the_jail_of_each_process,
    jail::doctor_sees_a_process_without_a_jail,
    network::containers_find_each_other_by_name,
    network::host_and_metadata_are_not_reached_unless_asked_for,
    network::names_are_reached_once_they_are_asked_for,
    network::port_in_use_is_said_and_undone,
    network::rules_say_what_is_reached,
    terminal::shell_has_job_control,
];

/// How many processes of a user have this in their command line.
fn count(user: &User, what: &str) -> usize {
    host(&format!("pgrep -u {} -f '{what}'", user.id)).done().text().lines().count()
}

#[test]
fn verbs_do_what_they_do_for_root_and_leave_nothing() {
    as_user(|| {
        hyper("run --rm @busybox sh -c").arg("id -u; exit 3").fails(3).says("0");
        let web = detached("-p 8085:80 --name web @busybox httpd -f -p 80 -h /etc");
        host("curl -s --retry 20 --retry-connrefused --max-time 60 http://127.0.0.1:8085/hostname").ok();
        hyper("ps --format {{.Names}}").ok().says("web");
        web.sh("echo from exec; cat /etc/hostname").ok().shows("from exec");
        web.call("stop -t 1").ok();
        web.call("start").ok();
        web.sh("true").ok();
        hyper("cp web:/etc/hostname -").ok();
        web.call("rm -f").ok();
        hyper("run --rm -p 80:80 @busybox true").fails(125).complains(&["ip_unprivileged_port_start"]);
    })
    .is_gone();
}

#[test]
fn starts_from_a_template() {
    as_user(|| from_template(crate::run::exit_code_comes_back));
}

#[test]
fn what_is_shared_stays_the_users() {
    as_user(|| {
        let share = host("mktemp -d -p $HYPER_TEST_SCRATCH").ok().text();
        host(&format!(
            "chown 47110:47110 {share}; chmod 755 {share}; echo root >{share}/roots; chmod 600 {share}/roots"
        ))
        .ok();
        let script = "echo from the guest >/x/made; mkdir /x/dir; chmod 777 /x/dir; chown 1000 /x/made 2>&1; \
                      chown 0:0 /x/made && stat -c %u:%g /x/made; cat /x/roots 2>&1; \
                      su -s /bin/sh nobody -c 'echo by nobody >/x/dir/nobodys' && cat /x/dir/nobodys";
        hyper("run --rm -v")
            .args(&[&format!("{share}:/x"), &image("busybox"), "sh", "-c", script])
            .ok()
            .shows("/x/made: Operation not permitted")
            .shows("0:0")
            .shows("/x/roots': Permission denied")
            .shows("by nobody");
        for made in ["made", "dir", "dir/nobodys"] {
            let found = Path::new(&share).join(made).metadata().unwrap();
            assert_eq!((found.uid(), found.gid()), (47110, 47110), "{made}");
        }
    });
}

#[test]
fn an_address_that_the_host_gets_later_is_the_hosts() {
    as_user(|| {
        let _far = Far::new();
        let container = detached("@busybox sleep 1000");
        host("ip addr add 203.0.113.77/32 dev lo").ok();
        wait_for("the rules to know the new address", || {
            let done = container.sh("nc -w 20 203.0.113.77 80 </dev/null 2>&1").done();
            done.text().contains(STOPPED).then_some(())
        });
        host("ip addr del 203.0.113.77/32 dev lo").ok();
        // Through the host's own loopback, as everybody on the host: only who asks for the host.
        tries(&container, "192.0.0.1 22", STOPPED);
    });
}

#[test]
fn many_first_ones_have_one_keeper_and_users_are_strangers() {
    let (one, two) = (User::new(0), User::new(1));
    one.is_gone();
    two.is_gone();
    let run = |user: &User, words: &[&str]| user.hyper().args(words);
    let busybox = image("busybox");
    // Together, before there is anything: image, disk, namespaces.
    let first: Vec<_> =
        (0..3).map(|_| run(&one, &["run", "--rm", &busybox, "true"]).within(600).start()).collect();
    first.into_iter().for_each(|running| drop(running.done().code(0)));
    let start = |user: &User, name: &str| {
        run(user, &["run", "-d", "--name", name, &busybox, "sleep", "1000"]).within(600).ok();
        run(user, &["inspect", "--format", "{{.NetworkSettings.IPAddress}}", name]).ok().text()
    };
    let known = [start(&one, "known"), start(&one, "too")];
    assert_eq!((count(&one, "hyper keep$"), count(&one, "pasta")), (1, 1));
    let other = start(&two, "other");
    run(&two, &["ps", "-aq", "--format", "{{.Names}}"]).ok().says("other");
    // Both users have the same network, and not each other's.
    let ip = known.iter().find(|ip| **ip != other).unwrap();
    run(&one, &["exec", "known", "ping", "-c", "1", "-W", "20", ip]).ok();
    run(&two, &["exec", "other", "sh", "-c", &format!("nslookup known || ping -c 1 -W 5 {ip}")]).fails(1);
    run(&one, &["rm", "-f", "too"]).ok();
    // One who dies takes the way out along; what runs can be seen and stopped, and the next has a new one.
    host(&format!("pkill -KILL -u {} -f 'hyper keep$'", one.id)).ok();
    wait_for("the end of the way out", || (count(&one, "pasta") == 0).then_some(()));
    run(&one, &["exec", "known", "true"]).ok();
    run(&one, &["rm", "-f", "known"]).ok();
    run(&one, &["run", "--rm", &busybox, "true"]).ok();
    run(&two, &["rm", "-f", "other"]).ok();
    one.is_gone();
    two.is_gone();
}

#[test]
fn what_is_missing_is_said() {
    let user = User::new(0);
    user.is_gone();
    let busybox = image("busybox");
    let program = user.program();
    let doctor = |groups: &str| user.runs(&program, groups).arg("doctor").done().text();
    let told = doctor("");
    assert!(told.contains("FAIL  kvm") && told.contains("usermod -aG kvm"), "{told}");
    let told = doctor("kvm");
    assert!(told.contains("ok    namespaces") && told.contains("ok    way out"), "{told}");
    let refused = |run: Run, parts: &[&str]| {
        drop(run.args(&["run", "--rm", &busybox, "true"]).fails(125).complains(parts))
    };

    host("sysctl -qw user.max_user_namespaces=0").ok();
    let told = doctor("kvm");
    refused(user.hyper(), &["user namespace", "user.max_user_namespaces=10000"]);
    host("sysctl -qw user.max_user_namespaces=10000").ok();
    assert!(told.contains("FAIL  namespaces"), "{told}");

    host("mv /usr/bin/pasta /usr/bin/pasta.gone").ok();
    user.is_gone();
    let told = doctor("kvm");
    refused(user.hyper(), &["install the package passt"]);
    user.hyper().args(&["run", "--rm", "--network", "none", &busybox, "true"]).ok();
    host("mv /usr/bin/pasta.gone /usr/bin/pasta").ok();
    assert!(told.contains("warn  way out"), "{told}");

    let run_dir = format!("/tmp/hyper-{}", user.id);
    host(&format!("mkdir -m 777 {run_dir}")).ok();
    refused(user.hyper().without("XDG_RUNTIME_DIR"), &["not safe to use", "somebody else"]);
    host(&format!("rmdir {run_dir}")).ok();
    user.hyper().without("XDG_RUNTIME_DIR").args(&["run", "--rm", &busybox, "true"]).ok();
    host(&format!("stat -c %a:%u {run_dir}")).ok().says(&format!("700:{}", user.id));
    let container = Container::from(hyper("run -d @busybox sleep 1000"));
    assert!(user.hyper().args(&["ps", "-q"]).ok().text().is_empty(), "root's are not this user's");
    drop(container);
}
