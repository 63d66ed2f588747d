//! The bridge: published ports, names, addresses, the way out.

use hyper_tests::{detached, host, hyper, wait_for};

#[test]
fn nginx_answers_on_a_published_port() {
    let container = detached("-p 8080:80 @nginx");
    let page = wait_for("nginx", || {
        let done = host("curl -s --max-time 20 http://127.0.0.1:8080/").done();
        done.text().contains("Welcome to nginx").then_some(done)
    });
    page.shows("<html>");
    container.call("port").ok().shows("80/tcp -> 0.0.0.0:8080");
    container.wait_for_log("GET / HTTP");
    container.call("stop").ok();
    host("curl -s --max-time 5 http://127.0.0.1:8080/").fails(7);
}

#[test]
fn port_in_use_is_said_and_undone() {
    let _first = detached("-p 8081:80 @busybox sleep 1000");
    hyper("run --name second -p 8081:80 @busybox true").fails(125).complains(&["8081"]);
    hyper("rm -f second").ok();
    let listener = std::net::TcpListener::bind("0.0.0.0:8082").unwrap();
    hyper("run --rm -p 8082:80 @busybox true").fails(125).complains(&["8082"]);
    drop(listener);
    hyper("run --rm -p 8082:80 @busybox true").ok();
}

#[test]
fn containers_find_each_other_by_name() {
    let _server = hyper_tests::Container::from(
        hyper("run -d --name server @busybox sh -c")
            .arg("mkdir /w; echo by name >/w/index.html; httpd -f -p 80 -h /w"),
    );
    hyper("run --rm @busybox sh -c")
        .arg("for i in $(seq 50); do wget -q -O - http://server/ && exit 0; sleep 0.2; done; exit 1")
        .ok()
        .says("by name");
}

#[test]
pub(crate) fn each_has_an_address_of_its_own() {
    let one = detached("@busybox sleep 1000");
    let two = detached("@busybox sleep 1000");
    let (first, second) = (one.field(".NetworkSettings.IPAddress"), two.field(".NetworkSettings.IPAddress"));
    assert!(!first.is_empty() && first != second, "{first} and {second}");
    one.sh("ip -4 addr show eth0").ok().shows(&first);
    two.sh(&format!("ping -c 1 -W 20 {first}")).ok();
}

#[test]
pub(crate) fn the_way_out_is_masqueraded() {
    host("ip link add far0 type dummy && ip addr add 192.0.2.1/24 dev far0 && ip link set far0 up").ok();
    hyper("run --rm @busybox sh -c")
        .arg("ping -c 1 -W 20 192.0.2.1 >/dev/null && echo reached")
        .ok()
        .says("reached");
    host("ip link del far0").ok();
}

#[test]
pub(crate) fn none_has_only_loopback() {
    hyper("run --rm --network none @busybox ls /sys/class/net").ok().says("lo");
    hyper("run --rm --network none @busybox ping -c 1 127.0.0.1").ok();
}

#[test]
fn resolver_is_set() {
    hyper("run --rm --dns 192.0.2.53 --dns-search example.org @busybox cat /etc/resolv.conf")
        .ok()
        .shows("nameserver")
        .shows("search example.org");
}
