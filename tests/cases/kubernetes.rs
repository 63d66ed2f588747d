//! Pods through the Container Runtime Interface, as a kubelet asks for them, with containerd 1.6 and 2.
#![expect(clippy::indexing_slicing, clippy::unwrap_used, reason = "a panic is how a case fails")]

use hyper_tests::{
    CONFIGURED_HANDLERS, Containerd, HANDLER, Pod, PodSpec, Release, SANDBOX_HANDLER, answers_on, host,
    wait_for,
};
use serde_json::json;

fn pod_goes_through_its_life(release: Release, handler: &str) {
    let containerd = Containerd::start_for_pods(release);
    let volume = containerd.scratch().join("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(format!("{volume}/config"), "from the host\n").unwrap();
    let shared = json!({ "mounts": [
        { "containerPath": "/data", "hostPath": volume },
        { "containerPath": "/fixed", "hostPath": volume, "readonly": true },
    ] });
    let pod = Pod::run(&containerd, handler, &PodSpec::new("life"));

    // An init container, then two that run side by side.
    let init = pod.start("init", "cat /fixed/config; echo prepared >/data/out; exit 3", &shared);
    assert_eq!(pod.exit_code(&init), 3);
    pod.logs("init", "stdout F from the host");
    let web = pod.start("web", "echo serving; echo oops >&2; httpd -f -p 127.0.0.1:8080 -h /data", &shared);
    let reader = json!({ "stdin": true, "linux": { "resources": { "memoryLimitInBytes": "67108864" } } });
    let cat = pod.start("cat", "while read line; do echo got $line; done", &reader);
    pod.logs("web", "stdout F serving");
    pod.logs("web", "stderr F oops");

    // Both see the pod's network; code and streams of a command are its own.
    pod.exec(&cat, "wget -qO- http://127.0.0.1:8080/out").ok().says("prepared");
    let failed = pod.exec(&web, "echo to stderr >&2; exit 4").fails(4);
    assert_eq!(failed.error(), "to stderr");
    pod.exec(&web, "touch /fixed/no").fails(1);
    pod.cri(&format!("exec {cat} wc -c")).stdin(vec![b'x'; 100_000]).ok().says("100000");
    pod.cri_on_terminal(&format!("exec-tty {web} tty")).ok().shows("/dev/pts/");
    let attached = pod.cri(&format!("attach {cat}")).stdin("a line\n").start();
    pod.logs("cat", "got a line");
    drop(attached);

    let stats = pod.cri(&format!("stats {web}")).ok().text();
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    let used = stats["memory"]["workingSetBytes"]["value"].as_str().unwrap_or("0").parse::<u64>().unwrap();
    assert!(used > 0, "{stats}");
    let limits = containerd.scratch().file("limits.json", r#"{"memoryLimitInBytes":"33554432"}"#);
    pod.cri(&format!("update {cat} {limits}")).ok();
    pod.exec(&cat, "cat /sys/fs/cgroup/memory.max").ok().says("33554432");

    // A container that has ended is made anew in the living pod.
    pod.cri(&format!("stop {cat} 0")).ok();
    assert_eq!(pod.exit_code(&cat), 137);
    pod.cri(&format!("remove {cat}")).ok();
    let again = pod.start("cat", "echo again; sleep 1000", &json!({}));
    pod.logs("cat", "again");
    assert_eq!(pod.status(&again)["state"], "CONTAINER_RUNNING");
    pod.remove();
    containerd.leaves_nothing();
}

#[test]
fn pod_of_containerd_one_goes_through_its_life() {
    pod_goes_through_its_life(Release::One, HANDLER);
}

#[test]
fn pod_of_containerd_two_goes_through_its_life() {
    pod_goes_through_its_life(Release::Two, HANDLER);
}

#[test]
fn pod_of_the_sandbox_api_goes_through_its_life() {
    pod_goes_through_its_life(Release::Two, SANDBOX_HANDLER);
}

#[test]
fn handlers_of_the_sandbox_api_have_a_configuration() {
    let containerd = Containerd::start_for_pods(Release::Two);
    containerd.scratch().file("own.toml", "vcpus = 2\nmemory_mib = 256\n");
    let [by_file, inline] = CONFIGURED_HANDLERS;
    for (handler, memory) in [(by_file, "256"), (inline, "512")] {
        let pod = Pod::run(&containerd, handler, &PodSpec::new(handler));
        let main = pod.start("main", "sleep 1000", &json!({}));
        pod.exec(&main, "nproc").ok().says("2");
        // What the kernel keeps for itself is allowed for, more or less.
        let size =
            "awk '/MemTotal/ { print ($2 < N * 1055 && $2 > N * 820) ? \"right\" : $2 }' /proc/meminfo";
        pod.exec(&main, &size.replace('N', memory)).ok().says("right");
        pod.remove();
    }
    // What is wrong with it is told when the pod is made.
    containerd.scratch().file("own.toml", "cpus = 2\n");
    let done = Pod::request(&containerd, by_file, &PodSpec::new("wrong")).fails(125);
    assert!(done.error().contains("unknown field `cpus`"), "{}", done.error());
    Pod::remove_all(&containerd);
    containerd.leaves_nothing();
}

#[test]
fn two_pods_talk() {
    let containerd = Containerd::start_for_pods(Release::Two);
    let server = Pod::run(&containerd, HANDLER, &PodSpec::new("server"));
    let client = Pod::run(&containerd, HANDLER, &PodSpec::new("client"));
    server.start("web", "httpd -f -p 80 -h /etc", &json!({}));
    let address = server.address();
    let asking = client.start("ask", "sleep 1000", &json!({}));
    wait_for("an answer", || {
        let script = format!("wget -qO- http://{address}/passwd");
        client.exec(&asking, &script).done().text().starts_with("root:").then_some(())
    });
    host(&format!("curl -sf http://{address}/passwd")).ok().shows("root:");
    client.remove();
    server.remove();
    containerd.leaves_nothing();
}

#[test]
fn ports_are_forwarded_to_the_pods_loopback() {
    let containerd = Containerd::start_for_pods(Release::Two);
    let pod = Pod::run(&containerd, HANDLER, &PodSpec::new("forward"));
    pod.start("web", "httpd -f -p 127.0.0.1:8080 -h /etc", &json!({}));
    let forward = pod.cri(&format!("port-forward {} 18080:8080", pod.id)).start();
    let fetch = "curl -sf --max-time 20 http://127.0.0.1:18080/passwd";
    let text = wait_for("an answer", || {
        let done = host(fetch).done();
        done.code_is(0).then(|| done.text())
    });
    assert!(text.starts_with("root:"), "{text}");
    forward.signal("INT");
    forward.done().code(0);
    pod.remove();
    containerd.leaves_nothing();
}

#[test]
fn sockets_of_the_host_are_reached() {
    let containerd = Containerd::start_for_pods(Release::Two);
    let (socket, tools) = (containerd.scratch().join("api.sock"), containerd.scratch().join("tools"));
    answers_on(&socket, "from the host");
    // The image has no program for such sockets.
    host(&format!("mkdir {tools}; cp /usr/bin/curl $(ldd /usr/bin/curl | grep -o '/[^ ]*') {tools}")).ok();
    let mounts = json!({ "mounts": [
        { "containerPath": "/run/api.sock", "hostPath": socket },
        { "containerPath": "/tools", "hostPath": tools, "readonly": true },
    ] });
    let pod = Pod::run(&containerd, HANDLER, &PodSpec::new("socket"));
    let one = pod.start("one", "sleep 1000", &mounts);
    let curl = "/tools/ld-linux-x86-64.so.2 --library-path /tools /tools/curl -s --max-time 30";
    let ask = format!("{curl} --unix-socket /run/api.sock http://localhost/");
    pod.exec(&one, &ask).ok().says("from the host");
    // Many at a time, and one after the other.
    pod.exec(&one, &format!("for n in $(seq 20); do {ask} & done; wait"))
        .ok()
        .says(&"from the host".repeat(20));
    pod.exec(&one, "stat -c %F /run/api.sock").ok().says("socket");
    // Another container of the pod has no such thing unless it is given it.
    let other = pod.start("other", "sleep 1000", &json!({}));
    pod.exec(&other, "test -e /run/api.sock").fails(1);
    // What the name leads to later is not what the container was given.
    host(&format!("rm {socket}; ln -s {} {socket}", containerd.scratch().join("sock"))).ok();
    pod.exec(&one, &ask).ok().says("from the host");
    pod.remove();
    containerd.leaves_nothing();
}
