//! Software that people run: a database, a cache, a script.

use hyper_tests::{Container, detached, hyper};

const POSTGRES: &str =
    "-e POSTGRES_HOST_AUTH_METHOD=trust -e POSTGRES_INITDB_ARGS=--no-sync -v pgdata:/var/lib/postgresql/data";

#[test]
fn postgres_keeps_its_data_over_stop_and_start() {
    let container = detached(&format!("-m 512m {POSTGRES} @postgres"));
    container.wait_for_log_within(700, "database system is ready to accept connections");
    let psql =
        |script: &str| hyper("exec -u postgres").args(&[&container.id, "sh", "-c", script]).within(600);
    psql("pgbench -i -s 1 -q postgres").ok();
    psql("pgbench -t 20 -c 2 postgres").ok().shows("number of failed transactions: 0");
    let count = psql("psql -At -c 'select count(*) from pgbench_history' postgres").ok();
    count.says("40");
    container.call("stop -t 60").ok();
    assert_eq!(container.field(".State.ExitCode"), "0");
    container.call("start").ok();
    hyper_tests::wait_for("postgres again", || {
        let done = psql("psql -At -c 'select count(*) from pgbench_history' postgres").done();
        (done.text() == "40").then_some(())
    });
    drop(container);
    hyper("volume rm -f pgdata").ok();
}

#[test]
fn redis_takes_its_benchmark() {
    let container = detached("@redis");
    container.wait_for_log("Ready to accept connections");
    container
        .sh("redis-benchmark -q -n 500 -c 5 -t set,get,incr,lpush")
        .within(600)
        .ok()
        .shows("requests per second");
    container.sh("redis-cli set key value && redis-cli get key").ok().shows("value");
    container.sh("stat -c %U /proc/1/exe /data; cat /proc/1/comm").ok().shows("redis");
}

#[test]
fn python_reads_input_and_returns_its_code() {
    let script = "import sys; words = sys.stdin.read().split(); print(len(words), words[-1]); sys.exit(17)";
    hyper("run --rm -i @python python3 -c")
        .arg(script)
        .stdin("some words on input")
        .fails(17)
        .says("4 input");
}

#[test]
fn python_computes_with_threads_and_sockets() {
    let script = "import socket, threading\n\
                  s = socket.create_server(('127.0.0.1', 0))\n\
                  def answer():\n    c, _ = s.accept(); c.sendall(c.recv(9).upper()); c.close()\n\
                  t = threading.Thread(target=answer); t.start()\n\
                  c = socket.create_connection(s.getsockname()); c.sendall(b'threads'); print(c.recv(9).decode()); t.join()\n";
    hyper("run --rm @python python3 -c").arg(script).ok().says("THREADS");
}

#[test]
fn debian_has_its_accounts_and_tools() {
    let container = Container::from(hyper("run -d @debian sleep 1000"));
    container
        .sh("id www-data && date -u +%Z && locale -a 2>/dev/null | head -1; awk 'BEGIN {print 6*7}'")
        .ok()
        .shows("42");
    container.sh("cat /etc/os-release").ok().shows("Debian");
}
