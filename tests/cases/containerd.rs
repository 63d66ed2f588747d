//! containerd 1.6 with this runtime: each `ctr run` is a virtual machine. `containerd2` does a part of it with containerd 2.

use hyper_tests::{Containerd, Release, host, image_name, wait_for};

#[test]
fn run_prints_and_returns_the_code() {
    runs(Release::One);
}

/// Output and code of a task.
pub(crate) fn runs(release: Release) {
    let containerd = Containerd::start_as(release);
    containerd.run("--rm @busybox one sh -c").arg("echo hello; exit 7").fails(7).says("hello");
    containerd.run("--rm @busybox two sh -c").arg("uname -r; mount").ok().shows("on / type virtiofs");
    containerd.leaves_nothing();
}

#[test]
fn input_reaches_the_process_and_ends() {
    let containerd = Containerd::start();
    containerd.run("--rm @busybox cat wc -c").stdin(vec![b'x'; 300_000]).ok().says("300000");
}

#[test]
fn task_goes_through_its_life() {
    lives(Release::One);
}

/// Every verb that a task has.
pub(crate) fn lives(release: Release) {
    let containerd = Containerd::start_as(release);
    containerd.run("-d @busybox life sleep 1000").ok();
    assert_eq!(containerd.status("life"), "RUNNING");
    containerd.ctr("task exec --exec-id e1 life sh -c").arg("echo inside; exit 3").fails(3).says("inside");
    containerd.ctr("task exec --exec-id e2 life head -c 7").stdin("through").ok().says("through");
    containerd.ctr("task ps life").ok().shows("1");
    containerd.ctr("task pause life").ok();
    assert_eq!(containerd.status("life"), "PAUSED");
    containerd.ctr("task resume life").ok();
    containerd.ctr("task metrics life").ok().shows("usage");
    containerd.ctr("task kill --signal SIGKILL life").ok();
    containerd.wait_for_status("life", "STOPPED");
    // Idempotent, as with runc: a task that has ended is not found.
    containerd.ctr("task kill life").fails(1);
    containerd.ctr("task rm life").ok();
    containerd.ctr("container rm life").ok();
    containerd.leaves_nothing();
}

#[test]
fn events_come_in_order() {
    tells(Release::One);
}

/// The events of a task.
pub(crate) fn tells(release: Release) {
    let containerd = Containerd::start_as(release);
    let events = containerd.events();
    containerd.run("-d @busybox order sleep 1000").ok();
    containerd.ctr("task exec --exec-id e1 order true").ok();
    containerd.ctr("task pause order").ok();
    containerd.ctr("task resume order").ok();
    containerd.ctr("task kill -s SIGKILL order").ok();
    containerd.wait_for_status("order", "STOPPED");
    containerd.ctr("task rm order").ok();
    let seen = wait_for("the last event", || {
        let text = events.text();
        text.contains("/tasks/delete").then_some(text)
    });
    let topics: Vec<_> = seen
        .lines()
        .filter_map(|line| line.split_whitespace().find_map(|word| word.strip_prefix("/tasks/")))
        .collect();
    let wanted =
        ["create", "start", "exec-added", "exec-started", "exit", "paused", "resumed", "exit", "delete"];
    assert_eq!(topics, wanted, "{seen}");
}

#[test]
fn missing_program_is_said() {
    let containerd = Containerd::start();
    let done = containerd.run("--rm @busybox none no-such-program").fails(1);
    assert!(done.error().contains("executable file not found in $PATH"), "{}", done.error());
    containerd.leaves_nothing();
}

#[test]
fn hosts_network_is_refused_in_words() {
    let containerd = Containerd::start();
    let done = containerd.run("--rm --net-host @busybox hosts true").fails(1);
    assert!(done.error().contains("hostNetwork"), "{}", done.error());
    containerd.leaves_nothing();
}

#[test]
fn volumes_are_shared_and_read_only_is_kept() {
    let containerd = Containerd::start();
    let folder = containerd.scratch().join("volume");
    std::fs::create_dir(&folder).unwrap();
    let file = containerd.scratch().file("single", "one file");
    let mounts = [
        "--mount".to_owned(),
        format!("type=bind,src={folder},dst=/data,options=rbind:rw"),
        "--mount".to_owned(),
        format!("type=bind,src={folder},dst=/fixed,options=rbind:ro"),
        "--mount".to_owned(),
        format!("type=bind,src={file},dst=/etc/single,options=rbind:ro"),
    ];
    let mounts: Vec<_> = mounts.iter().map(String::as_str).collect();
    let script = "echo from the guest >/data/out; cat /etc/single; touch /fixed/no 2>&1; cat /fixed/out";
    let run =
        containerd.run("--rm").args(&mounts).args(&[&image_name("busybox"), "volumes", "sh", "-c", script]);
    run.ok().shows("one file").shows("Read-only").shows("from the guest");
    assert_eq!(std::fs::read_to_string(format!("{folder}/out")).unwrap(), "from the guest\n");
    assert!(!std::path::Path::new(&format!("{folder}/no")).exists());
    containerd.leaves_nothing();
    assert!(std::path::Path::new(&format!("{folder}/out")).exists(), "the host's files stay");
}

#[test]
fn pods_network_is_that_of_cni() {
    let containerd = Containerd::start();
    let cni = Cni::add("podnet");
    let run = "--rm --with-ns network:/var/run/netns/podnet @busybox net sh -c";
    let script = "ip -4 addr show eth0; ip route; ping -c 2 -W 20 10.88.7.1";
    let done = containerd.run(run).arg(script).ok();
    done.shows(&cni.address).shows("default via 10.88.7.1").shows("2 packets received");
    containerd.leaves_nothing();
}

/// A namespace that CNI's bridge plugin has configured.
struct Cni {
    name: String,
    address: String,
}

const CONF: &str = r#"{"cniVersion":"0.4.0","name":"case","type":"bridge","bridge":"cnicase","isGateway":true,
    "ipam":{"type":"host-local","subnet":"10.88.7.0/24","routes":[{"dst":"0.0.0.0/0"}]}}"#;

impl Cni {
    fn call(name: &str, verb: &str) -> hyper_tests::Run {
        let script = format!(
            "CNI_COMMAND={verb} CNI_CONTAINERID={name} CNI_NETNS=/var/run/netns/{name} CNI_IFNAME=eth0 \
             CNI_PATH=/usr/lib/cni PATH=$PATH:/usr/sbin:/sbin /usr/lib/cni/bridge"
        );
        host(&script).stdin(CONF)
    }

    fn add(name: &str) -> Self {
        host(&format!("PATH=$PATH:/sbin ip netns add {name}")).ok();
        let text = Self::call(name, "ADD").ok().text();
        let address = text.split('"').find(|word| word.starts_with("10.88.7.") && word.contains('/'));
        Self { name: name.to_owned(), address: address.unwrap_or_default().to_owned() }
    }
}

impl Drop for Cni {
    fn drop(&mut self) {
        drop(Self::call(&self.name, "DEL").done());
        drop(host(&format!("PATH=$PATH:/sbin ip netns del {}", self.name)).done());
    }
}

#[test]
fn containers_of_a_pod_share_a_machine() {
    let containerd = Containerd::start();
    let pod = "--annotation io.kubernetes.cri.sandbox-id=pod";
    containerd.run(&format!("-d {pod} @busybox pod sleep 1000")).ok();
    containerd.run(&format!("-d {pod} @busybox second sleep 1000")).ok();
    assert_eq!(containerd.pid("pod"), containerd.pid("second"));
    containerd.run(&format!("--rm {pod} @busybox third echo third")).ok().says("third");
    containerd.ctr("task rm -f second").ok();
    containerd.ctr("container rm second").ok();
    containerd.run(&format!("--rm {pod} @busybox second echo again")).ok().says("again");
    containerd.ctr("task rm -f pod").ok();
    containerd.leaves_nothing();
}

#[test]
fn want_of_memory_is_an_event() {
    let containerd = Containerd::start();
    let events = containerd.events();
    // More than the container may have, less than its machine has: nobody is refused it before it is touched.
    let script = "head -c 50000000 /dev/zero | tail -c 40000000 | wc -c; sleep 3";
    let done = containerd.run("--rm --memory-limit 16777216 @busybox hungry sh -c").arg(script).done();
    assert!(!done.text().contains("40000000"), "{}", done.text());
    wait_for("the event", || events.text().contains("/tasks/oom").then_some(()));
}

#[test]
fn killed_machine_is_an_exit() {
    let containerd = Containerd::start();
    containerd.run("-d @busybox victim sleep 1000").ok();
    host(&format!("kill -9 {}", containerd.pid("victim"))).ok();
    containerd.wait_for_status("victim", "STOPPED");
    containerd.ctr("task rm victim").ok();
    containerd.ctr("container rm victim").ok();
    containerd.leaves_nothing();
}

#[test]
fn killed_shim_is_cleaned_up() {
    let containerd = Containerd::start();
    containerd.run("-d @busybox orphan sleep 1000").ok();
    host("pkill -9 -x containerd-shim").ok();
    wait_for("the task to be gone", || {
        matches!(containerd.status("orphan").as_str(), "" | "STOPPED" | "UNKNOWN").then_some(())
    });
    containerd.leaves_nothing();
}

#[test]
fn containerd_comes_back_to_running_pods() {
    let containerd = Containerd::start();
    containerd.run("-d @busybox stays sleep 1000").ok();
    containerd.restart();
    assert_eq!(containerd.status("stays"), "RUNNING");
    containerd.ctr("task exec --exec-id e1 stays echo still here").ok().says("still here");
    containerd.ctr("task rm -f stays").ok();
    containerd.leaves_nothing();
}
