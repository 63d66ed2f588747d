//! Pods under containerd: what their containers have in common, and where the host counts them.

use hyper_tests::{Containerd, host};

#[test]
fn shared_memory_is_as_large_as_asked() {
    let containerd = Containerd::start();
    containerd.run("--rm @busybox usual df -k /dev/shm").ok().shows(" 65536 ");
    let mount = "--mount type=tmpfs,src=shm,dst=/dev/shm,options=size=8m";
    containerd.run(&format!("--rm {mount} @busybox small df -k /dev/shm")).ok().shows(" 8192 ");
}

/// A tmpfs of 16 MiB, such as the CRI plugin makes for each pod.
struct HostShm(String);

impl HostShm {
    fn make(path: String) -> Self {
        host(&format!("mkdir {path} && mount -t tmpfs -o size=16m shm {path}")).ok();
        Self(path)
    }
}

impl Drop for HostShm {
    fn drop(&mut self) {
        drop(host(&format!("umount {}", self.0)).done());
    }
}

#[test]
fn containers_of_a_pod_share_memory_and_ipc() {
    let containerd = Containerd::start();
    let shm = HostShm::make(containerd.scratch().join("shm"));
    let mount = format!("--mount type=bind,src={},dst=/dev/shm,options=rbind:rw", shm.0);
    let pod = format!("--annotation io.kubernetes.cri.sandbox-id=pod {mount}");
    containerd.run(&format!("-d {pod} @busybox pod sleep 1000")).ok();
    let inside = "readlink /proc/self/ns/ipc";
    let ipc = containerd.ctr(&format!("task exec --exec-id e1 pod {inside}")).ok().text();
    let joins = format!("{pod} --with-ns ipc:/proc/{}/ns/ipc", containerd.pid("pod"));
    let script = format!("{inside}; df -k /dev/shm; echo from second >/dev/shm/word");
    containerd
        .run(&format!("--rm {joins} @busybox second sh -c"))
        .arg(&script)
        .ok()
        .shows(&ipc)
        .shows(" 16384 ");
    let script = format!("{inside}; cat /dev/shm/word");
    // One that does not join has its own IPC namespace; the memory is that of who names it.
    let own =
        containerd.run(&format!("--rm {pod} @busybox third sh -c")).arg(&script).ok().shows("from second");
    assert!(!own.text().contains(&ipc), "{}", own.text());
    assert!(!std::path::Path::new(&format!("{}/word", shm.0)).exists(), "it is the guest's memory");
    containerd.ctr("task rm -f pod").ok();
    containerd.leaves_nothing();
}

#[test]
fn machine_is_counted_in_the_cgroup_that_is_named() {
    let containerd = Containerd::start();
    for (wish, folder) in [
        ("/hypercase/pod", "/hypercase/pod"),
        ("hyper-case.slice:cri:pod", "/hyper.slice/hyper-case.slice/cri-pod.scope"),
    ] {
        containerd.run(&format!("-d --cgroup {wish} @busybox counted sleep 1000")).ok();
        let vmm = containerd.pid("counted");
        host(&format!("cat /proc/{vmm}/cgroup")).ok().shows(folder);
        host("cat /proc/$(pgrep -x hyper-fs)/cgroup").ok().shows(folder);
        let counted =
            host(&format!("cat $(find /sys/fs/cgroup -path '*{folder}/memory.current')")).ok().text();
        assert!(counted.trim().parse::<u64>().unwrap() > 16 << 20, "the guest's memory: {counted}");
        containerd.ctr("task rm -f counted").ok();
        containerd.ctr("container rm counted").ok();
        containerd.leaves_nothing();
        assert_eq!(host(&format!("find /sys/fs/cgroup -path '*{folder}'")).ok().text(), "");
    }
}

#[test]
fn killed_shim_leaves_no_cgroup() {
    let containerd = Containerd::start();
    containerd.run("-d --cgroup /hypercase/orphan @busybox orphan sleep 1000").ok();
    host("find /sys/fs/cgroup -path '*/hypercase/orphan'").ok().shows("orphan");
    host("pkill -9 -x containerd-shim").ok();
    containerd.leaves_nothing();
    assert_eq!(host("find /sys/fs/cgroup -path '*/hypercase/orphan'").ok().text(), "");
}

#[test]
fn cgroup_that_leads_out_is_refused() {
    let containerd = Containerd::start();
    let done = containerd.run("--rm --cgroup /../../etc @busybox out true").fails(1);
    assert!(done.error().contains("the cgroup \"/../../etc\""), "{}", done.error());
    containerd.leaves_nothing();
}
