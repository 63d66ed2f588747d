//! The life of a pod by the administrators' own client.
#![expect(clippy::unwrap_used, reason = "a panic is how a case fails")]

use hyper_tests::{Containerd, Crictl, HANDLER, Release, SANDBOX_HANDLER, host, wait_for};

fn pod_goes_through_its_life(release: Release, handler: &str) {
    let containerd = Containerd::start_for_pods(release);
    let crictl = Crictl::of(&containerd);
    let volume = containerd.scratch().join("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(format!("{volume}/config"), "from the host\n").unwrap();
    let mounts = format!(
        r#","mounts":[{{"container_path":"/data","host_path":"{volume}"}},
            {{"container_path":"/fixed","host_path":"{volume}","readonly":true}}]"#
    );
    let pod = crictl.pod(
        handler,
        &format!(
            r#"{{"metadata":{{"name":"life","namespace":"default","uid":"1","attempt":0}},"hostname":"life",
                "log_directory":"{}","linux":{{}}}}"#,
            crictl.log_folder().display()
        ),
    );

    let web = crictl.start(
        &pod,
        "web",
        "echo serving; echo oops >&2; httpd -f -p 127.0.0.1:8080 -h /data",
        &mounts,
    );
    let side = crictl.start(&pod, "side", "echo beside >/data/out; sleep 1000", &mounts);
    let cat = crictl.start(&pod, "cat", "while read line; do echo got $line; done", r#","stdin":true"#);
    let listed = crictl.run("ps -q").ok().text();
    assert!([&web, &side, &cat].iter().all(|id| listed.contains(id.as_str())), "{listed}");
    crictl.run("pods -q --state ready").ok().says(&pod.0);

    // Volumes: both containers see the host's folder, nobody writes where it is read-only.
    crictl.run(&format!("exec {side} wget -qO- http://127.0.0.1:8080/config")).ok().says("from the host");
    wait_for("the file on the host", || std::fs::read_to_string(format!("{volume}/out")).ok());
    crictl.run(&format!("exec {web} touch /fixed/no")).fails(1);

    // Commands: streamed, at once, with input, on a terminal, with a code.
    crictl.run(&format!("exec -s {web} cat /data/out")).ok().says("beside");
    crictl.run(&format!("exec -i {side} wc -c")).stdin(vec![b'x'; 100_000]).ok().says("100000");
    crictl.on_terminal(&format!("exec -it {web} sh"), "tty\nexit\n").ok().shows("/dev/pts/");
    let failed = crictl.run(&format!("exec {web} sh -c")).arg("exit 4").fails(1).error();
    assert!(failed.contains("exit code 4"), "{failed}");

    crictl.run(&format!("logs {web}")).ok().shows("serving");
    let errors = crictl.run(&format!("logs -s stderr {web}")).ok();
    assert!(errors.text().contains("oops") || errors.error().contains("oops"), "{errors:?}");
    let attached = crictl.run(&format!("attach -i {cat}")).stdin("a line\n").start();
    wait_for("the line in the log", || {
        crictl.run(&format!("logs {cat}")).ok().text().contains("got a line").then_some(())
    });
    drop(attached);

    let forward = crictl.run(&format!("port-forward {} 18080:8080", pod.0)).start();
    let text = wait_for("an answer", || {
        let done = host("curl -sf --max-time 20 http://127.0.0.1:18080/out").done();
        done.code_is(0).then(|| done.text())
    });
    assert_eq!(text, "beside");
    forward.signal("INT");
    drop(forward.done());

    let stats = crictl.run(&format!("stats -o json --id {web}")).ok().text();
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    let used = stats.pointer("/stats/0/memory/workingSetBytes/value").and_then(|value| value.as_str());
    assert!(used.is_some_and(|used| used.parse::<u64>().unwrap() > 0), "{stats}");
    crictl.run(&format!("update --memory 33554432 {cat}")).ok();
    crictl.run(&format!("exec -s {cat} cat /sys/fs/cgroup/memory.max")).ok().says("33554432");

    crictl.run(&format!("stop -t 0 {cat}")).ok();
    crictl.run(&format!("inspect {cat}")).ok().shows("CONTAINER_EXITED").shows("137");
    crictl.run(&format!("rm {cat}")).ok();
    crictl.run(&format!("rm -f {side}")).ok();
    crictl.run(&format!("stopp {}", pod.0)).ok();
    crictl.run(&format!("rmp {}", pod.0)).ok();
    crictl.run("pods -q").ok().says("");
    containerd.leaves_nothing();
}

#[test]
fn pod_of_containerd_one() {
    pod_goes_through_its_life(Release::One, HANDLER);
}

#[test]
fn pod_of_containerd_two() {
    pod_goes_through_its_life(Release::Two, HANDLER);
}

#[test]
fn pod_of_the_sandbox_api() {
    pod_goes_through_its_life(Release::Two, SANDBOX_HANDLER);
}
