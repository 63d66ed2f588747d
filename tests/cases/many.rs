//! Many at once.

use hyper_tests::hyper;

#[test]
fn twenty_containers_run_at_once() {
    let started: Vec<_> = (0..20)
        .map(|number| {
            let script = format!("echo number {number}; sleep 1000");
            hyper(&format!("run -d -m 64m --name many-{number} @busybox sh -c"))
                .arg(&script)
                .within(1200)
                .start()
        })
        .collect();
    let ids: Vec<_> = started.into_iter().map(|run| run.done().code(0).text()).collect();
    let running = hyper("ps -q --no-trunc").ok().text();
    for (number, id) in ids.iter().enumerate() {
        assert!(running.contains(id), "many-{number} does not run");
        hyper("exec").args(&[id, "echo", "alive"]).ok().says("alive");
        hyper("logs").arg(id).ok().says(&format!("number {number}"));
    }
    let mut remove = hyper("rm -f").within(1200);
    for id in &ids {
        remove = remove.arg(id);
    }
    remove.ok();
    hyper("ps -aq").ok().says("");
}
