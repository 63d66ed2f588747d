//! Flags of `hyper run` that change what the container sees.

use hyper_tests::{Scratch, answers_on, hyper, image};

#[test]
fn environment_from_flags_and_files() {
    let scratch = Scratch::new();
    let file = scratch.file("env", "# comment\nFROM_FILE=file\nBOTH=file\n");
    let script = "echo $FROM_FILE $BOTH $FLAG $TAKEN";
    hyper("run --rm -e FLAG=flag -e BOTH=flag -e TAKEN --env-file")
        .args(&[&file, &image("busybox"), "sh", "-c", script])
        .env("TAKEN", "taken")
        .ok()
        .says("file flag flag taken");
}

#[test]
fn working_directory_is_made() {
    hyper("run --rm -w /new/folder @busybox pwd").ok().says("/new/folder");
}

#[test]
fn user_by_name_and_by_number() {
    hyper("run --rm -u nobody @busybox id -u").ok().says("65534");
    hyper("run --rm -u 77:88 @busybox id").ok().says("uid=77 gid=88 groups=88");
}

#[test]
fn unknown_user_is_named() {
    hyper("run --rm -u stranger @busybox true").fails(125).complains(&["stranger"]);
}

#[test]
fn entrypoint_drops_the_images_command() {
    hyper("run --rm --entrypoint echo @user alone").ok().says("alone");
    hyper("run --rm --entrypoint pwd @user").ok().says("/srv/app");
}

#[test]
pub(crate) fn hostname_and_hosts() {
    let script = "hostname; grep -w other /etc/hosts; grep -cw named /etc/hosts";
    hyper("run --rm --hostname named --add-host other:10.9.8.7 @busybox sh -c")
        .arg(script)
        .ok()
        .shows("named\n10.9.8.7")
        .shows("other");
}

#[test]
fn folders_are_shared_both_ways() {
    let scratch = Scratch::new();
    scratch.file("in", "from the host");
    let volume = format!("{}:/data", scratch.path().display());
    let script = "cat /data/in; echo from the guest >/data/out; mkdir /data/sub; mv /data/out /data/sub/out";
    hyper("run --rm -v").args(&[&volume, &image("busybox"), "sh", "-c", script]).ok().says("from the host");
    assert_eq!(std::fs::read_to_string(scratch.join("sub/out")).unwrap(), "from the guest\n");
}

#[test]
fn read_only_share_refuses_writes() {
    let scratch = Scratch::new();
    let volume = format!("{}:/data:ro", scratch.path().display());
    let done = hyper("run --rm -v").args(&[&volume, &image("busybox"), "touch", "/data/x"]).fails(1);
    assert!(done.error().contains("Read-only"), "{}", done.error());
    assert!(!std::path::Path::new(&scratch.join("x")).exists());
}

#[test]
fn mount_flag_binds_and_misses() {
    let scratch = Scratch::new();
    scratch.file("in", "bound");
    let mount = format!("type=bind,source={},target=/data,readonly", scratch.path().display());
    hyper("run --rm --mount").args(&[&mount, &image("busybox"), "cat", "/data/in"]).ok().says("bound");
    let mount = "type=bind,source=/no/such/folder,target=/data";
    let done = hyper("run --rm --mount").args(&[mount, &image("busybox"), "true"]).fails(125);
    done.complains(&["/no/such/folder"]);
}

#[test]
fn single_file_is_shared() {
    let scratch = Scratch::new();
    let file = scratch.file("one", "one file");
    let volume = format!("{file}:/etc/one");
    hyper("run --rm -v").args(&[&volume, &image("busybox"), "cat", "/etc/one"]).ok().says("one file");
}

#[test]
fn sockets_of_the_host_are_reached() {
    let scratch = Scratch::new();
    let socket = scratch.join("api.sock");
    answers_on(&socket, "from the host");
    let script = "import socket\n\
        for _ in range(3):\n s = socket.socket(socket.AF_UNIX); s.connect('/run/api.sock'); s.send(b'GET / HTTP/1.0\\r\\n\\r\\n')\n \
        print(s.makefile().read().split('\\n')[-1])";
    let volume = format!("{socket}:/run/api.sock");
    let run = || hyper("run --rm -v").args(&[&volume, &image("python"), "python3", "-c", script]);
    run().ok().says("from the host\nfrom the host\nfrom the host");
    // As root, whose own socket it is, and as somebody who may not write to it.
    hyper("run --rm -u 77 -v")
        .args(&[&volume, &image("python"), "python3", "-c", script])
        .fails(1)
        .error()
        .contains("PermissionError")
        .then_some(())
        .unwrap();
}

#[test]
fn named_volume_outlives_its_container() {
    hyper("run --rm -v kept:/data @busybox sh -c").arg("echo kept >/data/file").ok();
    hyper("run --rm -v kept:/data @busybox cat /data/file").ok().says("kept");
    hyper("volume rm kept").ok();
    hyper("run --rm -v kept:/data @busybox ls /data").ok().says("");
    hyper("volume rm kept").ok();
}

#[test]
fn root_is_read_only_on_request() {
    let script = "touch /x 2>&1; touch /tmp/y && echo tmp";
    let done = hyper("run --rm --read-only --tmpfs /tmp @busybox sh -c").arg(script).ok();
    assert!(done.text().contains("Read-only") && done.text().ends_with("tmp"), "{}", done.text());
}

#[test]
fn tmpfs_has_its_size() {
    hyper("run --rm --tmpfs /t:size=4m,mode=700 @busybox sh -c")
        .arg("df -k /t | tail -1 | awk '{print $2}'; stat -c %a /t")
        .ok()
        .says("4096\n700");
}

#[test]
fn capabilities_are_dockers() {
    let bits = "CapEff:\t";
    hyper("run --rm @busybox grep CapEff /proc/self/status").ok().says(&format!("{bits}00000000a80425fb"));
    hyper("run --rm --cap-drop ALL @busybox grep CapEff /proc/self/status")
        .ok()
        .says(&format!("{bits}0000000000000000"));
    hyper("run --rm --cap-drop ALL --cap-add NET_ADMIN @busybox grep CapEff /proc/self/status")
        .ok()
        .says(&format!("{bits}0000000000001000"));
}

#[test]
fn seccomp_is_on_and_kernel_files_are_masked() {
    let script = "grep Seccomp: /proc/self/status; wc -c </proc/interrupts; echo 1 >/proc/sys/kernel/sysrq";
    let done = hyper("run --rm @busybox sh -c").arg(script).fails(1).shows("Seccomp:\t2");
    assert!(done.text().ends_with('0') && done.error().contains("Read-only"), "{done:?}");
}

#[test]
fn limits_of_processes_and_files() {
    hyper("run --rm --ulimit nofile=123:456 @busybox sh -c")
        .arg("ulimit -Sn; ulimit -Hn")
        .ok()
        .says("123\n456");
    hyper("run --rm --pids-limit 33 @busybox cat /sys/fs/cgroup/pids.max").ok().says("33");
}

#[test]
fn init_reaps_and_is_first() {
    let script = "cat /proc/1/comm; (sleep 0.1 &); sleep 1; grep -l '^State:.Z' /proc/[0-9]*/status | wc -l";
    let done = hyper("run --rm --init @busybox sh -c").arg(script).done();
    assert!(!done.text().starts_with("sh\n") && done.text().ends_with("\n0"), "{}", done.text());
}

#[test]
fn labels_are_kept() {
    let done = hyper("create -l a=b -l c @busybox").ok();
    let id = done.text();
    hyper("inspect --format").args(&["{{.Config.Labels.a}}", &id]).ok().says("b");
    hyper("rm").arg(&id).ok();
}

#[test]
fn sysctls_of_the_container() {
    hyper("run --rm --sysctl net.ipv4.ip_unprivileged_port_start=80 @busybox cat")
        .arg("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        .ok()
        .says("80");
}

#[test]
fn bad_values_are_125() {
    for flags in [
        "-m 1",
        "-m lots",
        "--cpus none",
        "-p 99999:80",
        "-v relative:/x:zz",
        "--network no-such",
        "--ulimit x=y",
    ] {
        hyper(&format!("run --rm {flags} @busybox true")).fails(125).complains(&[]);
    }
}
