//! Debian's Docker with this runtime: each container is a virtual machine.

use hyper_tests::{Docker, host, wait_for};

#[test]
fn run_prints_and_returns_the_code() {
    let docker = Docker::start();
    docker.run("--rm busybox sh -c").arg("uname -r; exit 7").fails(7).shows("-hyper");
    docker.leaves_nothing();
}

#[test]
fn network_and_ports_are_dockers() {
    let docker = Docker::start();
    docker.run("-d --name web -p 127.0.0.1:8099:80 busybox httpd -f -p 80 -h /etc").ok();
    wait_for("an answer", || {
        host("curl -sf --max-time 5 http://127.0.0.1:8099/passwd").done().code_is(0).then_some(())
    });
    docker.docker("exec web ip -4 addr show eth0").ok().shows("172.17.");
    docker.docker("rm -f web").ok();
    docker.leaves_nothing();
}

#[test]
fn volumes_are_shared() {
    let docker = Docker::start();
    let folder = docker.scratch().join("volume");
    std::fs::create_dir(&folder).unwrap();
    let volume = format!("{folder}:/data");
    docker.run("--rm -v").args(&[&volume, "busybox", "sh", "-c", "echo inside >/data/out"]).ok();
    assert_eq!(std::fs::read_to_string(format!("{folder}/out")).unwrap(), "inside\n");
}

#[test]
fn terminal_is_the_users() {
    let docker = Docker::start();
    let script = format!(
        "script -qec \"/usr/bin/docker --host unix://{}/sock run --rm -it --runtime io.containerd.hyper.v2 busybox sh -c 'tty; stty size; read line; echo got \\$line'\" /dev/null",
        docker.scratch().path().display()
    );
    host(&script).stdin("a line\n").ok().shows("/dev/pts/0").shows("got a line");
}
