//! Holes that others have had: each is tried on us, by what is at hand in a container or an image.

use hyper_tests::{Container, Done, Scratch, detached, host, hyper, image, note};

/// Makes an image whose one layer `script` writes to `layer.tar`, or with no layer at all, and runs it: with `true` of a program that it does not have.
fn run_of_layer(scratch: &Scratch, name: &str, script: &str) -> Done {
    let archive = host(&format!(
        "cd {} && rm -rf {name} && mkdir {name} && cd {name} && {script} && \
         if [ -e layer.tar ]; then sum='\"sha256:'$(sha256sum layer.tar | cut -d' ' -f1)'\"'; layer='\"layer.tar\"'; fi && \
         printf '{{\"os\":\"linux\",\"architecture\":\"amd64\",\"rootfs\":{{\"type\":\"layers\",\"diff_ids\":[%s]}}}}' \"$sum\" >config.json && \
         printf '[{{\"Config\":\"config.json\",\"RepoTags\":[\"{name}:1\"],\"Layers\":[%s]}}]' \"$layer\" >manifest.json && \
         tar -cf {name}.tar manifest.json config.json $(ls layer.tar 2>/dev/null) && echo $PWD/{name}.tar",
        scratch.path().display()
    ))
    .ok()
    .text();
    hyper("load -q -i").arg(&archive).ok();
    let done = hyper(&format!("run --rm {name}:1 /bin/true")).done();
    hyper(&format!("rmi {name}:1")).ok();
    done
}

/// CVE-2026-20613, CVE-2025-62518 and the like: an archive that writes outside of where it is unpacked. CVE-2026-24054: an image without layers.
#[test]
fn layers_that_climb_reach_nothing_of_the_host() {
    let scratch = Scratch::new();
    let wound = "/tmp/hyper-wound";
    host(&format!("rm -f {wound}")).ok();
    let tar = "tar -P -cf layer.tar --transform";
    let layers = [
        ("climbs", format!("echo x >evil && {tar} 's,^evil,../../../..{wound},' evil")),
        ("inside", format!("echo x >evil && {tar} 's,^evil,a/../../..{wound},' evil")),
        ("absolute", format!("echo x >evil && {tar} 's,^evil,{wound},' evil")),
        ("link", format!("echo x >evil && ln -s / up && {tar} 's,^evil,up{wound},' up evil")),
        (
            "climbing-link",
            format!("echo x >evil && ln -s ../../../.. up && {tar} 's,^evil,up{wound},' up evil"),
        ),
        ("hard-link", format!("echo x >a && ln a b && {tar} 'flags=h;s,^a,../../../..{wound},' a b")),
        ("device", "mknod disk b 254 0 && mknod mem c 1 1 && tar -cf layer.tar disk mem".to_owned()),
        ("layerless", "true".to_owned()),
    ];
    let count = layers.len();
    let mut refused = 0;
    for (name, script) in layers {
        let done = run_of_layer(&scratch, name, &script);
        // Either its layer is refused, or it lies inside of its root, which has no such program.
        assert!(done.code_is(125) || done.code_is(127), "{name}: {}", done.error());
        assert_eq!(done.error().lines().filter(|line| line.starts_with("hyper: ")).count(), 1, "{name}");
        refused += u32::from(done.code_is(125));
        host(&format!("! ls {wound}")).ok();
    }
    note(&format!("layers that climb: {count} tried, {refused} refused, none got out"));
}

/// Makes nodes of the guest's first disks in a container that may do everything in its machine.
const NODES: &str = "major=$(awk '$4 == \"vda\" { print $1 }' /proc/partitions); mknod /image b $major 0; mknod /layer b $major 16";

/// CVE-2026-24834: a guest writes to what is shared with others for reading.
#[test]
fn an_image_is_not_written_to() {
    let sum = "sha256sum /bin/busybox | cut -c 1-64";
    let before = hyper("run --rm @busybox sh -c").arg(sum).ok().text();
    let script = format!(
        "{NODES}; dd if=/dev/zero of=/image bs=4096 count=16 conv=fsync; blockdev --setrw /image; \
                          dd if=/dev/zero of=/image bs=4096 count=16 conv=fsync"
    );
    let done = hyper("run --rm --privileged @busybox sh -c").arg(&script).done();
    assert!(!done.code_is(0), "it could write");
    // Its own layer it may ruin, but not while it is mounted.
    let script = format!("{NODES}; dd if=/dev/zero of=/layer bs=4096 count=1 conv=fsync");
    let done = hyper("run --rm --privileged @busybox sh -c").arg(&script).fails(1);
    assert!(done.error().contains("busy"), "{}", done.error());
    hyper("run --rm @busybox sh -c").arg(sum).ok().says(&before);
}

/// CVE-2026-46695: what is read-only is so in the guest alone.
#[test]
fn a_read_only_share_stays_so_for_the_guests_root() {
    let scratch = Scratch::new();
    scratch.file("kept", "as it was");
    let volume = format!("{}:/data:ro", scratch.path().display());
    let script = "mount -o remount,rw /data; mount -o remount,rw,bind /data; umount /data; mkdir /again; mount -t virtiofs hyper /again; \
                  for place in /data /again /again/*; do echo x >$place/kept; echo x >$place/new; rm $place/kept; ln -s / $place/up; done; \
                  nsenter -t 1 -m sh -c 'find / -xdev -name kept'; true";
    let done = hyper("run --rm --privileged -v").args(&[&volume, &image("busybox"), "sh", "-c", script]).ok();
    host(&format!("cd {} && ls -A && cat kept", scratch.path().display())).ok().says("kept\nas it was");
    assert!(done.error().contains("Read-only") || done.error().contains("Permission"), "{}", done.error());
}

/// CVE-2026-47243: links that a guest makes in a share lead where the guest is, not where the host is.
#[test]
fn links_in_a_share_lead_nowhere_on_the_host() {
    let scratch = Scratch::new();
    let secret = Scratch::new();
    let secret = secret.file("secret", "of the host");
    let volume = format!("{}:/data", scratch.path().display());
    let script = format!(
        "cd /data; ln -s {secret} absolute; ln -s ../../../../../../../..{secret} climbing; ln -s / root; cat absolute climbing root{secret}; \
         echo x >absolute; mkdir folder; mv root folder/; cat folder/root{secret}; ls folder/root/proc/1/root{secret}; true"
    );
    let done =
        hyper("run --rm --privileged -v").args(&[&volume, &image("busybox"), "sh", "-c", &script]).ok();
    assert!(!done.text().contains("of the host"), "{}", done.text());
    host(&format!("cat {secret}")).ok().says("of the host");
}

/// Of crun with libkrun: `exec` ran on the host.
#[test]
fn exec_runs_in_the_guest() {
    let container = detached("@busybox sleep 10000");
    let boot = "/proc/sys/kernel/random/boot_id";
    let ours = host(&format!("cat {boot}")).ok().text();
    let guests = container.sh(&format!("cat {boot}")).ok().text();
    assert_ne!(ours, guests);
    container.sh("echo x >/tmp/hyper-exec").ok();
    host("! ls /tmp/hyper-exec").ok();
}

/// Of Kata's agent: a guest that says that it knows fewer capabilities was given more.
#[test]
fn capabilities_do_not_depend_on_what_the_guest_says() {
    let container = Container::from(hyper("run -d --cap-drop ALL @busybox sleep 10000"));
    let sets = "awk '/^Cap/ { print $2 }' /proc/self/status | sort -u";
    container.sh(sets).ok().says("0000000000000000");
    let done = container.sh("echo 1 >/proc/sys/kernel/cap_last_cap").done();
    assert!(!done.code_is(0), "it is writable");
    container.sh("mount -t tmpfs none /mnt").fails(1);
}
