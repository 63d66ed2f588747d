//! A VMM that is in the guest's hands gets nowhere.

use std::io;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use hyper_tests::{Container, Scratch, detached, given, host, hyper, image, note};

/// Who listens on the host for the stand-in, see `tests/stand-in/src/attempts/network.rs`.
#[derive(Debug)]
struct Host {
    _networks: [TcpListener; 2],
    _sockets: [UnixListener; 2],
}

const PATH: &str = "/run/hyper-stand-in.sock";

impl Host {
    fn listen() -> io::Result<Self> {
        let name = SocketAddr::from_abstract_name("hyper-stand-in")?;
        Ok(Self {
            _networks: [TcpListener::bind("127.0.0.1:47113")?, TcpListener::bind("[::1]:47113")?],
            _sockets: [UnixListener::bind_addr(&name)?, UnixListener::bind(PATH)?],
        })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(std::fs::remove_file(PATH));
    }
}

fn stand_in() -> String {
    given("HYPER_TEST_STAND_IN").display().to_string()
}

/// The line that counts the attempts of a variant, as `(tried, refused, ended, got out, left to the filter)`.
fn count(log: &str, variant: &str) -> Option<[u32; 5]> {
    let line = log.lines().find(|line| line.starts_with(variant) && line.contains(" got out"))?;
    let numbers: Vec<u32> = line.split([' ', ';']).filter_map(|word| word.parse().ok()).collect();
    numbers.try_into().ok()
}

#[test]
pub(crate) fn a_vmm_in_the_guests_hands_gets_nowhere() {
    let _host = Host::listen().unwrap();
    let scratch = Scratch::new();
    let prefix = given("HYPER_TEST_PREFIX");
    let parts = scratch.path().display();
    host(&format!(
        "cp {0}/libexec/hyper/* {0}/share/hyper/* {parts}/; cp {1} {parts}/hyper-vmm",
        prefix.display(),
        stand_in()
    ))
    .ok();
    // The image is made before, by the VMM itself.
    hyper("run --rm @busybox true").ok();
    hyper("run --name stand-in @busybox true").env("HYPER_PARTS", scratch.path()).within(600).fails(125);
    let log = host("cat $HYPER_ROOT/containers/*/vmm.log").ok().text();
    hyper("rm -f stand-in").ok();
    let escapes: Vec<_> = log.lines().filter(|line| line.contains("OUT:")).collect();
    assert!(escapes.is_empty(), "{escapes:#?}");
    assert!(!log.contains(" 0 writable files"), "no disk was handed over");

    let [tried, refused, ended, out, left] = count(&log, "bare").unwrap();
    assert!(tried >= 110 && refused == tried && ended == 0 && out == 0, "{log}");
    note(&format!(
        "jail without filters: {tried} attempts, all refused; {left} more are left to the filters"
    ));
    for thread in ["events", "vcpu", "disk"] {
        let [all, refused, ended, out, none] = count(&log, thread).unwrap();
        assert!(all == tried + left && refused + ended == all && out == 0 && none == 0, "{log}");
        assert!(ended > refused, "{thread}: the filter ends most of them: {log}");
        note(&format!(
            "jail with the filter of {thread}: {all} attempts, {refused} refused, {ended} ended by it"
        ));
    }
}

#[test]
fn what_is_refused_inside_works_outside() {
    let _host = Host::listen().unwrap();
    let done = host(&format!("exec {} outside", stand_in())).within(300).done();
    let text = done.error();
    assert!(!text.contains("DOES NOT WORK"), "{text}");
    let line = text.lines().find(|line| line.starts_with("outside: ")).unwrap();
    let numbers: Vec<u32> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
    assert!(numbers[0] >= 80 && numbers[0] == numbers[1], "{line}");
    note(&format!("the same without a jail: {} that do no harm were tried, and worked", numbers[0]));
}

/// What `doctor --jail` says of a container, and whether it is content.
fn doctor(container: &Container) -> (bool, Vec<serde_json::Value>) {
    let done = hyper("doctor --format json --jail").arg(&container.id).done();
    let text = done.text();
    let rows: Vec<_> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert!(rows.len() > 10 || !done.code_is(0), "{done:?}");
    (done.code_is(0), rows)
}

#[test]
pub(crate) fn doctor_shows_the_jail_of_each_process() {
    let scratch = Scratch::new();
    let share = format!("{}:/shared", scratch.path().display());
    let container = Container::from(hyper("run -d -v").args(&[&share, &image("busybox"), "sleep", "1000"]));
    let (content, rows) = doctor(&container);
    assert!(content, "{rows:#?}");
    for program in ["hyper-vmm", "hyper-fs"] {
        assert!(rows.iter().any(|row| row["Process"] == program), "{program}: {rows:#?}");
    }
    let found = |layer: &str| {
        let row = rows.iter().find(|row| row["Process"] == "hyper-vmm" && row["Layer"] == layer);
        row.unwrap_or_else(|| panic!("no {layer} in {rows:#?}"))["Found"].as_str().unwrap().to_owned()
    };
    assert_eq!(found("namespaces"), "own mnt pid net ipc uts cgroup user");
    assert_eq!(found("capabilities, bounding"), "0000000000000000");
    assert!(
        found("filters of system calls").contains("1 vcpu0 with 2"),
        "{}",
        found("filters of system calls")
    );
    let memory = found("guest memory in dumps");
    assert!(!memory.starts_with("0 ") && memory.ends_with("are left out"), "{memory}");
    assert!(found("root").starts_with("0 entries, ro,"), "{}", found("root"));
    hyper("doctor --jail").arg(&container.id).ok().shows("no id is mapped").shows("PROCESS");
    container.call("stop -t 0").ok();
    hyper("doctor --jail").arg(&container.id).fails(1).complains(&["start it first"]);
}

#[test]
fn two_vmms_share_no_user() {
    let containers = [(); 2].map(|()| detached("@busybox sleep 1000"));
    let users = containers.each_ref().map(|container| {
        let pid = container.field(".State.Pid");
        host(&format!("awk '/^Uid:/ {{ print $3 }}' /proc/{pid}/status")).ok().text()
    });
    assert_ne!(users[0], users[1]);
    assert!(users.iter().all(|user| user.parse::<u32>().unwrap() >= 0x7000_0000), "{users:?}");
}

#[test]
pub(crate) fn doctor_sees_a_process_without_a_jail() {
    let container = detached("@busybox sleep 1000");
    let pid = container.field(".State.Pid");
    // A limit is the one layer that can be taken away from outside.
    host(&format!("prlimit --pid {pid} --core=unlimited:unlimited")).ok();
    let (content, rows) = doctor(&container);
    let broken: Vec<_> = rows.iter().filter(|row| row["Verdict"] != "ok").collect();
    assert!(!content && broken.len() == 1 && broken[0]["Layer"] == "limits", "{rows:#?}");
}
