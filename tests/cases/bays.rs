//! Disks that come to a running pod: block devices of the host, and roots that are made of disks.

use hyper_tests::{Containerd, field, host, wait_for};

/// A loop device of the host on a file; let go of when dropped.
struct Loop {
    node: String,
}

impl Loop {
    fn on(file: &str, options: &str) -> Self {
        let script = format!("PATH=$PATH:/usr/sbin:/sbin losetup -f --show {options} {file}");
        Self { node: host(&script).ok().text().trim().to_owned() }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        drop(host(&format!("PATH=$PATH:/usr/sbin:/sbin losetup -d {}", self.node)).done());
    }
}

#[test]
fn a_block_device_of_the_host_is_one_of_the_container() {
    let containerd = Containerd::start();
    let file = containerd.scratch().file("disk", vec![b'h'; 8 << 20]);
    let disk = Loop::on(&file, "");
    containerd.run(&format!("-d --device {} @busybox raw sleep 1000", disk.node)).ok();
    let inside =
        |id: &str, script: &str| containerd.ctr(&format!("task exec --exec-id {id} raw sh -c")).arg(script);
    let node = &disk.node;
    inside("size", &format!("stat -c %F {node}; wc -c <{node}; head -c 4 {node}"))
        .ok()
        .shows("block special")
        .shows("8388608")
        .shows("hhhh");
    inside("write", &format!("echo from the guest | dd of={node} bs=4096 conv=notrunc,fsync")).ok();
    host(&format!("head -c 14 {node}")).ok().says("from the guest");
    containerd.ctr("task rm -f raw").ok();
    containerd.leaves_nothing();
    // Nothing holds it any more.
    host(&format!("PATH=$PATH:/usr/sbin:/sbin; losetup -d {node}; ! losetup {node} 2>/dev/null")).ok();
}

#[test]
fn a_read_only_device_stays_so() {
    let containerd = Containerd::start();
    let file = containerd.scratch().file("disk", vec![b'h'; 1 << 20]);
    let disk = Loop::on(&file, "-r");
    let script = format!("head -c 4 {0}; echo no | dd of={0} conv=notrunc,fsync && echo written", disk.node);
    let run =
        containerd.run(&format!("--rm --device {} @busybox fixed sh -c", disk.node)).arg(&script).done();
    assert!(run.text().contains("hhhh") && !run.text().contains("written"), "{}", run.text());
    containerd.leaves_nothing();
    assert_eq!(std::fs::read(&file).unwrap_or_default().first(), Some(&b'h'));
}

#[test]
fn a_pods_bays_are_used_again() {
    let containerd = Containerd::start();
    let file = containerd.scratch().file("disk", vec![b'h'; 1 << 20]);
    let disk = Loop::on(&file, "");
    let pod = "--annotation io.kubernetes.cri.sandbox-id=pod";
    containerd.run(&format!("-d {pod} @busybox pod sleep 1000")).ok();
    // More often than there are bays.
    for round in 0..10 {
        let run = format!("--rm {pod} --device {0} @busybox round{round} head -c 4 {0}", disk.node);
        containerd.run(&run).ok().says("hhhh");
    }
    containerd.ctr("task rm -f pod").ok();
    containerd.leaves_nothing();
}

/// An ext4 image with these files.
fn ext4(containerd: &Containerd, name: &str, folder: &str, size: &str) -> String {
    let image = containerd.scratch().join(name);
    host(&format!("PATH=$PATH:/usr/sbin:/sbin mkfs.ext4 -q -d {folder} {image} {size}")).ok();
    image
}

/// A mount of a root, as containerd describes it.
fn mount(kind: &str, source: &str, options: &[&str]) -> Vec<u8> {
    let options = options.iter().flat_map(|option| field(4, option));
    field(3, [field(1, kind), field(2, source), options.collect()].concat())
}

/// Makes a second container in the pod of `pod`, with its specification and a root of these mounts, and starts it.
fn start_beside(containerd: &Containerd, pod: &str, id: &str, root: &[Vec<u8>]) {
    let bundle = containerd.scratch().join(id);
    host(&format!("mkdir -p {bundle}/rootfs && cp {}/config.json {bundle}/", containerd.bundle(pod))).ok();
    containerd.call(pod, "Create", &[&[field(1, id), field(2, bundle)][..], root].concat());
    containerd.call(pod, "Start", &[field(1, id)]);
}

fn end_beside(containerd: &Containerd, pod: &str, id: &str) {
    let sigkill = vec![3 << 3, 9];
    containerd.call(pod, "Kill", &[field(1, id), sigkill]);
    containerd.call(pod, "Wait", &[field(1, id)]);
    containerd.call(pod, "Delete", &[field(1, id)]);
}

#[test]
fn roots_are_made_of_disks_in_the_guest() {
    let containerd = Containerd::start();
    let base = containerd.scratch().join("base");
    std::fs::create_dir(&base).unwrap_or_default();
    containerd.ctr(&format!("image mount @busybox {base}")).ok();
    let layer = containerd.scratch().join("layer");
    host(&format!("mkdir -p {layer} && echo from the disk >{layer}/mark")).ok();
    let lower = ext4(&containerd, "lower.img", &base, "64M");
    let top = ext4(&containerd, "top.img", &layer, "16M");
    let empty = containerd.scratch().join("empty");
    host(&format!("mkdir {empty}")).ok();
    let rw = ext4(&containerd, "rw.img", &empty, "64M");
    containerd.ctr(&format!("image unmount {base}")).ok();

    let out = containerd.scratch().join("out");
    std::fs::create_dir(&out).unwrap_or_default();
    let script = "cat /mark >/out/mark; grep ' / ' /proc/mounts >/out/root; echo yes >/kept; cat /kept >/out/kept; \
                  touch /out/done; sleep 1000";
    let pod = format!(
        "-d --annotation io.kubernetes.cri.sandbox-id=pod --mount type=bind,src={out},dst=/out,options=rbind:rw @busybox pod sh -c"
    );
    containerd.run(&pod).arg(script).ok();
    let said = |name: &str| std::fs::read_to_string(format!("{out}/{name}")).unwrap_or_default();
    let done = || {
        wait_for("the container to be done", || {
            std::fs::remove_file(format!("{out}/done")).is_ok().then_some(())
        });
    };
    done();
    assert!(said("root").contains("virtiofs"), "{}", said("root"));

    start_beside(
        &containerd,
        "pod",
        "layers",
        &[
            mount("ext4", &rw, &["rw", "loop"]),
            mount("ext4", &top, &["ro", "loop"]),
            mount("ext4", &lower, &["ro", "loop"]),
            mount(
                "format/mkdir/overlay",
                "overlay",
                &[
                    "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                    "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
                    "workdir={{ mount 0 }}/work",
                    "upperdir={{ mount 0 }}/upper",
                    "lowerdir={{ overlay 1 2 }}",
                ],
            ),
        ],
    );
    done();
    assert_eq!((said("mark").trim(), said("kept").trim()), ("from the disk", "yes"));
    assert!(said("root").contains("overlay"), "{}", said("root"));
    assert!(
        !host("cat /proc/mounts; PATH=$PATH:/sbin losetup -a").ok().text().contains(".img"),
        "not on the host"
    );
    end_beside(&containerd, "pod", "layers");
    // What was written is on the disk.
    host(&format!("PATH=$PATH:/usr/sbin:/sbin debugfs -R 'cat /upper/kept' {rw} 2>/dev/null"))
        .ok()
        .says("yes");

    start_beside(&containerd, "pod", "single", &[mount("ext4", &lower, &["rw", "loop"])]);
    done();
    assert!(said("root").contains("ext4"), "{}", said("root"));
    end_beside(&containerd, "pod", "single");
    containerd.ctr("task rm -f pod").ok();
    containerd.leaves_nothing();
}
