//! Roots of the EROFS snapshotter of containerd 2: disks of the guest, none of which the host mounts.

use hyper_tests::{Containerd, host};

/// Brings an image of the fixtures into the EROFS snapshotter.
fn import_erofs(containerd: &Containerd, name: &str) {
    let archive = hyper_tests::fixtures().join(format!("archives/{name}.tar"));
    let import = containerd.ctr("image import --local --snapshotter erofs --base-name");
    import.arg(&format!("docker.io/library/{name}")).arg(&archive.to_string_lossy()).within(600).ok();
}

#[test]
fn a_hundred_layers_are_one_disk() {
    let containerd = Containerd::start_with_erofs("");
    import_erofs(&containerd, "layers");
    let script = "cat /top; ls /layers | wc -l; grep ' / ' /proc/mounts | tr : '\\n' | wc -l; ls /sys/block | grep -c vd; \
                  echo new >/top; cat /top; echo more >/layers/5; cat /layers/5 /layers/6";
    containerd
        .run("--rm --snapshotter erofs @layers many sh -c")
        .arg(script)
        .ok()
        .says("99\n98\n100\n1\nnew\nmore\n6");
    // A pod has few bays; each container takes one.
    let pod = "--annotation io.kubernetes.cri.sandbox-id=first";
    containerd.run(&format!("-d {pod} --snapshotter erofs @layers first sleep 1000")).ok();
    for number in 2..=6 {
        let run = format!("-d {pod} --snapshotter erofs @layers c{number} sh -c");
        containerd.run(&run).arg("echo mine >/top; sleep 1000").ok();
    }
    containerd.ctr("task exec --exec-id look first cat /top").ok().says("99");
    containerd.ctr("task exec --exec-id look c6 cat /top").ok().says("mine");
    // What is said at the start of the shim counts more than what `-info` says.
    let bootstrap = format!("cat {}/bootstrap.json", containerd.bundle("first"));
    host(&bootstrap).ok().shows("containerd.types.MountCapabilities");
    let host = host("cat /proc/mounts; PATH=$PATH:/sbin losetup -a").ok().text();
    assert!(!host.contains("erofs"), "not on the host: {host}");
    for id in ["c2", "c3", "c4", "c5", "c6", "first"] {
        containerd.ctr(&format!("task rm -f {id}")).ok();
    }
    containerd.leaves_nothing();
}

#[test]
fn what_is_written_is_a_disk_of_the_snapshotter() {
    let containerd = Containerd::start_with_erofs("64M");
    import_erofs(&containerd, "busybox");
    let root = "df -k / | tail -n 1 | awk '$2 > 40000 && $2 < 66000 { print \"bounded\" }'; echo kept >/kept";
    containerd.run("-d --snapshotter erofs @busybox one sleep 1000").ok();
    containerd.ctr("task exec --exec-id root one sh -c").arg(root).ok().says("bounded");
    containerd.ctr("task rm -f one").ok();
    // The same container, started again, has what it wrote.
    containerd.ctr("task start -d one").ok();
    containerd.ctr("task exec --exec-id again one cat /kept").ok().says("kept");
    containerd.ctr("task rm -f one").ok();
    containerd.leaves_nothing();
}
