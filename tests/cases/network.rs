//! The bridge: published ports, names, addresses, the way out.

use std::net::Ipv4Addr;

use hyper_tests::{Container, Far, NameServer, arrived, detached, host, hyper, wait_for};

#[test]
pub(crate) fn nginx_answers_on_a_published_port() {
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
pub(crate) fn port_in_use_is_said_and_undone() {
    let _first = detached("-p 8081:80 @busybox sleep 1000");
    hyper("run --name second -p 8081:80 @busybox true").fails(125).complains(&["8081"]);
    hyper("rm -f second").ok();
    let listener = std::net::TcpListener::bind("0.0.0.0:8082").unwrap();
    hyper("run --rm -p 8082:80 @busybox true").fails(125).complains(&["8082"]);
    drop(listener);
    hyper("run --rm -p 8082:80 @busybox true").ok();
}

#[test]
pub(crate) fn containers_find_each_other_by_name() {
    let _server = Container::from(
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
    let _far = Far::new();
    hyper("run --rm @busybox sh -c")
        .arg("ping -c 1 -W 20 192.0.2.1 >/dev/null && echo reached")
        .ok()
        .says("reached");
}

/// What a connection says when a rule stops it.
pub(crate) const STOPPED: &str = "No route to host";

/// Tries a connection; see [`Far`] for who listens.
pub(crate) fn tries(container: &Container, to: &str, expected: &str) {
    let done = container.sh(&format!("nc -w 20 {to} </dev/null 2>&1 && echo open"));
    let text = done.done().text();
    assert!(text.contains(expected), "{to}: {text:?}, not {expected:?}");
}

#[test]
pub(crate) fn host_and_metadata_are_not_reached_unless_asked_for() {
    let _far = Far::new();
    let plain = detached("@busybox sleep 10000");
    let gateway = plain.field(".NetworkSettings.Gateway");
    tries(&plain, "192.0.2.1 80", arrived());
    tries(&plain, "169.254.169.254 80", STOPPED);
    for own in [gateway.as_str(), "192.0.2.254"] {
        tries(&plain, &format!("{own} 80"), STOPPED);
    }
    let named = detached("--add-host up:host-gateway @busybox sleep 10000");
    tries(&named, "up 80", arrived());
    tries(&named, "192.0.2.1 80", arrived());
    tries(&named, "169.254.169.254 80", STOPPED);
    let ruled = detached(
        "--network bridge,egress=any,egress=host:81/tcp,egress=169.254.169.254:80 @busybox sleep 10000",
    );
    tries(&ruled, &format!("{gateway} 81"), arrived());
    tries(&ruled, &format!("{gateway} 80"), STOPPED);
    tries(&ruled, "169.254.169.254 80", arrived());
    tries(&ruled, "169.254.169.254 81", STOPPED);
}

#[test]
pub(crate) fn rules_say_what_is_reached() {
    let _far = Far::new();
    let neighbour = detached("@busybox sleep 10000");
    let walled =
        detached("-p 8083:80 --network bridge,egress=192.0.2.1:80-81/tcp @busybox httpd -f -p 80 -h /etc");
    tries(&walled, "192.0.2.1 80", arrived());
    tries(&walled, "192.0.2.1 82", STOPPED);
    tries(&walled, "192.0.2.2 80", STOPPED);
    walled.sh("ping -c 1 -W 5 192.0.2.1").fails(1);
    // Others on the bridge are not met, either way.
    let (one, two) =
        (neighbour.field(".NetworkSettings.IPAddress"), walled.field(".NetworkSettings.IPAddress"));
    walled.sh(&format!("ping -c 1 -W 5 {one}")).fails(1);
    neighbour.sh(&format!("ping -c 1 -W 5 {two}")).fails(1);
    // What is published is served.
    host("curl -s --retry 20 --retry-connrefused --max-time 60 http://127.0.0.1:8083/hostname").ok();
    hyper("inspect --format")
        .args(&["{{json .NetworkSettings.Egress}}", &walled.id])
        .ok()
        .says(r#"["192.0.2.1:80-81/tcp"]"#);
    let wide = detached("--network bridge,egress=192.0.2.0/31 @busybox sleep 10000");
    tries(&wide, "192.0.2.1 80", arrived());
    tries(&wide, "192.0.2.2 80", STOPPED);
    let nothing = detached("--network bridge,egress=none @busybox sleep 10000");
    tries(&nothing, "192.0.2.1 80", STOPPED);
    // Whoever gets the address next has rules of its own.
    drop(walled);
    let next = detached("--network bridge,egress=any @busybox sleep 10000");
    assert_eq!(next.field(".NetworkSettings.IPAddress"), two);
    tries(&next, "192.0.2.2 80", arrived());
    next.sh(&format!("ping -c 1 -W 20 {one}")).ok();
}

#[test]
pub(crate) fn names_are_reached_once_they_are_asked_for() {
    let _far = Far::new();
    let server = NameServer::new(Ipv4Addr::new(192, 0, 2, 2));
    let flags = "--network bridge,egress=good.example:80,egress=*.wide.example";
    let walled = detached(&format!("--dns {} {flags} @busybox sleep 10000", server.address));
    tries(&walled, "192.0.2.2 80", STOPPED);
    walled.sh("nslookup -type=a bad.example").done().shows("NXDOMAIN");
    tries(&walled, "192.0.2.2 80", STOPPED);
    tries(&walled, "good.example 80", arrived());
    tries(&walled, "good.example 81", STOPPED);
    tries(&walled, "a.wide.example 81", arrived());
    tries(&walled, "192.0.2.1 80", STOPPED);
}

#[test]
pub(crate) fn nobody_takes_anothers_address() {
    let victim = detached("@busybox sleep 10000");
    let attacker = detached("--privileged @busybox sleep 10000");
    let own = attacker.field(".NetworkSettings.IPAddress");
    let (ip, mac) = (victim.field(".NetworkSettings.IPAddress"), victim.field(".NetworkSettings.MacAddress"));
    let gateway = victim.field(".NetworkSettings.Gateway");
    let witness = detached("@busybox sleep 10000");
    let known_as = |ip: &str| {
        witness
            .sh(&format!("ping -c 1 -W 5 {ip} >/dev/null; awk '$1 == \"{ip}\" {{ print $4 }}' /proc/net/arp"))
    };
    attacker.sh(&format!("ping -c 1 -W 20 {ip}")).ok();
    known_as(&ip).ok().says(&mac);
    // It says that it is the victim, and that it is the host.
    for taken in [&ip, &gateway] {
        // Nobody answers, which arping takes for a failure.
        let said = format!(
            "command -v arping || exit 1; arping -c 3 -A -I eth0 {taken}; arping -c 3 -U -s {taken} -I eth0 {taken}; true"
        );
        attacker.sh(&said).ok();
    }
    known_as(&ip).ok().says(&mac);
    // It sends with an address that nobody has.
    attacker.sh("ip addr add 10.120.99.99/16 dev eth0").ok();
    attacker.sh(&format!("ping -c 1 -W 5 -I 10.120.99.99 {ip}")).fails(1);
    attacker.sh(&format!("ping -c 1 -W 20 -I {own} {ip}")).ok();
    // It takes another hardware address.
    attacker
        .sh("ip link set eth0 down; ip link set eth0 address 02:48:00:00:00:01; ip link set eth0 up")
        .ok();
    attacker.sh(&format!("ping -c 1 -W 5 {ip}")).fails(1);
    attacker.sh(&format!("ip link set eth0 down; ip link set eth0 address {mac}; ip link set eth0 up")).ok();
    attacker.sh(&format!("ping -c 1 -W 5 {gateway}")).fails(1);
    victim.sh(&format!("ping -c 1 -W 20 {}", witness.field(".NetworkSettings.IPAddress"))).ok();
}

#[test]
fn rules_that_make_no_sense_are_refused() {
    let refused = |network: &str, why: &str| {
        hyper(&format!("run --rm --network {network} @busybox true")).fails(125).complains(&[why]);
    };
    refused("bridge,egress=1.2.3.4/8", "beyond its length");
    refused("bridge,alias=x", "egress=RULE");
    refused("none,egress=any", "--network none");
    refused("bridge,egress=any:70000", "1 to 65535");
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
