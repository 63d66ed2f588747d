//! nerdctl with this runtime: each container is a virtual machine.
#![expect(clippy::unwrap_used, reason = "a panic is how a case fails")]

use hyper_tests::{Nerdctl, Release, host, wait_for};

fn container_is_as_nerdctl_makes_them(release: Release) {
    let nerdctl = Nerdctl::start(release);
    nerdctl.container("--rm busybox sh -c").arg("uname -r; echo oops >&2; exit 7").fails(7).shows("-hyper");
    nerdctl.container("--rm -i busybox wc -c").stdin(vec![b'x'; 100_000]).ok().says("100000");
    nerdctl
        .on_terminal("--rm busybox sh -c 'tty; read line; echo got \\$line'", "a line\n")
        .ok()
        .shows("/dev/pts/0")
        .shows("got a line");

    let folder = nerdctl.containerd().scratch().join("volume");
    std::fs::create_dir(&folder).unwrap();
    let volume = format!("{folder}:/data");
    nerdctl.container("--rm -v").args(&[&volume, "busybox", "sh", "-c", "echo inside >/data/out"]).ok();
    assert_eq!(std::fs::read_to_string(format!("{folder}/out")).unwrap(), "inside\n");

    nerdctl.container("-d --name web -p 127.0.0.1:8098:80 busybox httpd -f -v -p 80 -h /etc").ok();
    wait_for("an answer", || {
        host("curl -sf --max-time 5 http://127.0.0.1:8098/passwd").done().code_is(0).then_some(())
    });
    nerdctl.run("exec web ip -4 addr show eth0").ok().shows("10.4.0.");
    // A container finds another by its name.
    nerdctl.container("--rm busybox wget -qO- http://web/passwd").ok().shows("root:");
    nerdctl.run("exec web kill -0 1").ok();
    nerdctl.run("pause web").ok();
    nerdctl.run("unpause web").ok();
    nerdctl.run("stats --no-stream --format {{.Name}} web").ok().says("web");
    wait_for("the request in the log", || {
        nerdctl.run("logs web").ok().error().contains("response:200").then_some(())
    });
    nerdctl.run("stop -t 1 web").ok().says("web");
    nerdctl.run("start web").ok();
    nerdctl.run("exec web true").ok();
    nerdctl.run("rm -f web").ok();
    nerdctl.containerd().leaves_nothing();
}

#[test]
fn container_of_containerd_one() {
    container_is_as_nerdctl_makes_them(Release::One);
}

#[test]
fn container_of_containerd_two() {
    container_is_as_nerdctl_makes_them(Release::Two);
}
