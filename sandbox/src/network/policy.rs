//! Where a container may connect to, in nftables' words.
//!
//! ```text
//! bridge hyper: a frame from a TAP has the hardware and IP address of its seat, or is dropped; who has rules meets nobody on the bridge
//! inet hyper:   out_<address>: what is forwarded, in_<address>: what is for the host; names_<address>_<rule>: addresses that a name has
//! ```
//!
//! Names of chains, sets and TAPs are made from the address, so what an earlier container left under it is replaced, and there is never
//! more of it than there are addresses. Without rules a container reaches everything but the host and cloud metadata.

use std::fmt::Write;
use std::net::Ipv4Addr;

use super::subnet::{mac_of, mac_text};
use crate::config::{ContainerConfig, EgressRule, EgressTarget, Protocol, mask};

/// Prefix of the names of TAPs on a bridge; the address follows.
pub(super) const SEAT_PREFIX: &str = "hys";
/// Where clouds tell machines their secrets: link-local addresses (RFC 3927), and those of Alibaba, Azure and Oracle beside them.
const METADATA: [(Ipv4Addr, u8); 4] = [
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(100, 100, 100, 200), 32),
    (Ipv4Addr::new(168, 63, 129, 16), 32),
    (Ipv4Addr::new(192, 0, 0, 192), 32),
];
/// What is answered: "administratively prohibited", at once, so that nobody waits.
const REJECT: &str = "reject with icmp type admin-prohibited";
/// The set of the host's addresses, where the host is elsewhere.
pub(super) const OWN_SET: &str = "own";
/// Most addresses that one name may have at a time.
const MOST_LEARNED: usize = 1024;

/// A container's way out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Policy {
    /// `None`: everything but the host and cloud metadata.
    rules: Option<Vec<EgressRule>>,
    /// The host, whatever the rules say of it.
    host: bool,
}

impl Policy {
    /// As the user wishes. A name for the host is a wish to reach it.
    pub(crate) fn of(config: &ContainerConfig) -> Self {
        let host = config.extra_hosts.iter().any(|extra| extra.address.is_none());
        Self { rules: config.egress.clone(), host }
    }

    fn rules(&self) -> &[EgressRule] {
        self.rules.as_deref().unwrap_or_default()
    }

    /// Whether it meets the other containers of its bridge.
    fn is_walled(&self) -> bool {
        self.rules.is_some() && !self.rules().contains(&EgressRule::all_of(EgressTarget::Any))
    }

    /// Whether it may ask for every name: when there are addresses that it cannot know of.
    pub(crate) fn asks_anything(&self) -> bool {
        self.rules.is_none() || self.rules().iter().any(|rule| rule.target == EgressTarget::Any)
    }

    /// Whether there are rules with names.
    pub(crate) fn has_names(&self) -> bool {
        self.rules().iter().any(|rule| matches!(rule.target, EgressTarget::Name(_)))
    }

    /// Numbers of the rules that have this name.
    pub(crate) fn rules_of(&self, name: &str) -> Vec<usize> {
        self.rules()
            .iter()
            .enumerate()
            .filter(|(_, rule)| rule.names(name))
            .map(|(number, _)| number)
            .collect()
    }
}

/// A place on the bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seat(pub(super) Ipv4Addr);

impl Seat {
    /// Name of the TAP.
    pub(super) fn tap(self) -> String {
        format!("{SEAT_PREFIX}{self}")
    }

    /// The set of addresses that the name of a rule has.
    pub(super) fn names(self, rule: usize) -> String {
        format!("names_{self}_{rule}")
    }
}

impl std::fmt::Display for Seat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:08x}", u32::from(self.0))
    }
}

fn is_metadata((address, len): (Ipv4Addr, u8)) -> bool {
    METADATA
        .iter()
        .any(|(net, net_len)| len >= *net_len && u32::from(address) & mask(*net_len) == u32::from(*net))
}

fn addresses((address, len): (Ipv4Addr, u8)) -> String {
    if len == 32 { address.to_string() } else { format!("{address}/{len}") }
}

/// What is to be matched of ports and protocol, with a space behind it.
fn ports(rule: &EgressRule) -> String {
    let range = rule
        .ports
        .map(|(first, last)| if first == last { first.to_string() } else { format!("{first}-{last}") });
    match (range, rule.protocol) {
        (None, None) => String::new(),
        (None, Some(protocol)) => format!("meta l4proto {protocol} "),
        (Some(range), None) => {
            format!("meta l4proto {{ {}, {} }} th dport {range} ", Protocol::Tcp, Protocol::Udp)
        }
        (Some(range), Some(protocol)) => format!("{protocol} dport {range} "),
    }
}

/// How the host is reached from a network namespace that is not its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Door {
    /// What leads to its loopback.
    pub(super) address: Ipv4Addr,
    /// What containers take for the host; it is translated to the door before the rules are asked.
    pub(super) gateway: Ipv4Addr,
}

/// What is forwarded: first what was named by its address alone, be it the host's or a cloud's metadata, then none of those, then the rest.
fn out_rules(seat: Seat, policy: &Policy, door: Option<&Door>) -> Vec<String> {
    let mut explicit = Vec::new();
    let mut rest = Vec::new();
    let mut guarded: Vec<String> = METADATA.iter().map(|net| addresses(*net)).collect();
    if let Some(door) = door {
        explicit.extend(door_rules(policy, door));
        guarded.push(door.address.to_string());
    }
    for (number, rule) in policy.rules().iter().enumerate() {
        let ports = ports(rule);
        match &rule.target {
            EgressTarget::Any => rest.push(format!("{ports}accept")),
            EgressTarget::Host => {}
            EgressTarget::Net(address, len) => {
                let alone = is_metadata((*address, *len)) || *len == 32;
                let list = if alone { &mut explicit } else { &mut rest };
                list.push(format!("ip daddr {} {ports}accept", addresses((*address, *len))));
            }
            EgressTarget::Name(_) => rest.push(format!("ip daddr @{} {ports}accept", seat.names(number))),
        }
    }
    explicit.push(format!("ip daddr {{ {} }} {REJECT}", guarded.join(", ")));
    if door.is_some() {
        explicit.push(format!("ip daddr @{OWN_SET} {REJECT}"));
    }
    explicit.append(&mut rest);
    if policy.rules.is_some() {
        explicit.push(REJECT.to_owned());
    }
    explicit
}

/// What is for a host that is elsewhere: its name among the rules, or the address that containers know it by.
fn door_rules(policy: &Policy, door: &Door) -> Vec<String> {
    let to = format!("ip daddr {}", door.address);
    let all = policy.host.then(|| format!("{to} accept"));
    let named = policy.rules().iter().filter(|rule| match rule.target {
        EgressTarget::Host => true,
        EgressTarget::Net(address, len) => (address, len) == (door.gateway, 32),
        _ => false,
    });
    all.into_iter().chain(named.map(|rule| format!("{to} {}accept", ports(rule)))).collect()
}

/// What is for the host: its name among the rules, or one of its addresses alone.
fn in_rules(policy: &Policy) -> Vec<String> {
    let mut lines = Vec::new();
    if policy.host {
        lines.push("accept".to_owned());
    }
    for rule in policy.rules() {
        match &rule.target {
            EgressTarget::Host => lines.push(format!("{}accept", ports(rule))),
            EgressTarget::Net(address, 32) => lines.push(format!("ip daddr {address} {}accept", ports(rule))),
            _ => {}
        }
    }
    lines.push(REJECT.to_owned());
    lines
}

/// What puts a container with this policy on its seat, whoever had it before; one transaction. `table` is that of the bridge.
pub(super) fn script(
    table: &str,
    maps: &[String; 2],
    seat: Seat,
    policy: &Policy,
    door: Option<&Door>,
) -> String {
    let (tap, mac) = (seat.tap(), mac_text(mac_of(seat.0)));
    let mut text = format!(
        "add element bridge hyper seats {{ \"{tap}\" . {mac} . {} }}\n\
         add element bridge hyper walled {{ \"{tap}\" }}\n",
        seat.0
    );
    if !policy.is_walled() {
        let _ = writeln!(text, "delete element bridge hyper walled {{ \"{tap}\" }}");
    }
    for (number, rule) in policy.rules().iter().enumerate() {
        if matches!(rule.target, EgressTarget::Name(_)) {
            let set = seat.names(number);
            let _ = writeln!(
                text,
                "add set inet {table} {set} {{ type ipv4_addr; size {MOST_LEARNED}; timeout 1h; }}\n\
                 flush set inet {table} {set}"
            );
        }
    }
    let chains = [("out", out_rules(seat, policy, door)), ("in", in_rules(policy))];
    for ((way, rules), map) in chains.into_iter().zip(maps) {
        let chain = format!("{way}_{seat}");
        let _ = writeln!(text, "add chain inet {table} {chain}\nflush chain inet {table} {chain}");
        for rule in rules {
            let _ = writeln!(text, "add rule inet {table} {chain} {rule}");
        }
        let _ = writeln!(text, "add element inet {table} {map} {{ {} : jump {chain} }}", seat.0);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEAT: Seat = Seat(Ipv4Addr::new(10, 120, 0, 2));

    fn policy(rules: &[&str]) -> Policy {
        Policy { rules: Some(rules.iter().map(|rule| rule.parse().unwrap()).collect()), host: false }
    }

    fn text(policy: &Policy) -> String {
        script("hyper", &["ways_out".into(), "ways_in".into()], SEAT, policy, None)
    }

    fn elsewhere(rules: Option<&[&str]>) -> Vec<String> {
        let rules = rules.map(|rules| rules.iter().map(|rule| rule.parse().unwrap()).collect());
        let door = Door { address: Ipv4Addr::new(192, 0, 0, 1), gateway: Ipv4Addr::new(10, 120, 0, 1) };
        out_rules(SEAT, &Policy { rules, host: false }, Some(&door))
    }

    #[test]
    fn a_host_that_is_elsewhere_is_reached_by_its_door_when_it_is_named() {
        let guards = |rules: &[String]| {
            let door = rules.iter().position(|rule| rule.contains("192.0.0.1 }") && rule.ends_with(REJECT));
            let own = rules.iter().position(|rule| rule == &format!("ip daddr @own {REJECT}"));
            assert!(door.is_some() && own == door.map(|at| at + 1), "{rules:?}");
            door.unwrap()
        };
        assert_eq!(guards(&elsewhere(None)), 0);
        let named = elsewhere(Some(&["any", "host:5432/tcp", "10.120.0.1:22/tcp", "192.0.2.254:80/tcp"]));
        let place = |text: &str| named.iter().position(|rule| rule == text).unwrap();
        assert!(place("ip daddr 192.0.0.1 tcp dport 5432 accept") < guards(&named));
        assert!(place("ip daddr 192.0.0.1 tcp dport 22 accept") < guards(&named));
        assert!(place("ip daddr 192.0.2.254 tcp dport 80 accept") < guards(&named));
        assert!(place("accept") > guards(&named), "not everything");
        let wide = elsewhere(Some(&["192.0.2.0/24"]));
        assert!(wide.iter().position(|rule| rule == "ip daddr 192.0.2.0/24 accept").unwrap() > guards(&wide));
    }

    #[test]
    fn without_rules_all_but_host_and_metadata() {
        let text = text(&Policy::default());
        assert!(text.contains("seats { \"hys0a780002\" . 02:48:0a:78:00:02 . 10.120.0.2 }"), "{text}");
        assert!(text.contains("delete element bridge hyper walled"));
        let guarded = "169.254.0.0/16, 100.100.100.200, 168.63.129.16, 192.0.0.192";
        assert!(text.contains(&format!("out_0a780002 ip daddr {{ {guarded} }} {REJECT}\n")), "{text}");
        assert!(!text.contains(&format!("out_0a780002 {REJECT}")));
        assert!(text.contains(&format!("in_0a780002 {REJECT}")));
        assert!(Policy::default().asks_anything());
    }

    #[test]
    fn rules_are_all_that_is_allowed() {
        let policy = policy(&["192.0.2.0/24:443/tcp", "*.example.org:80-90", "host:8080"]);
        let text = text(&policy);
        assert!(!text.contains("delete element"), "walled");
        assert!(text.contains("out_0a780002 ip daddr 192.0.2.0/24 tcp dport 443 accept\n"), "{text}");
        let ports = "meta l4proto { tcp, udp } th dport";
        assert!(text.contains(&format!("out_0a780002 ip daddr @names_0a780002_1 {ports} 80-90 accept\n")));
        assert!(text.contains(&format!("in_0a780002 {ports} 8080 accept\n")));
        assert!(text.contains(&format!("out_0a780002 {REJECT}\n")));
        assert!(!policy.asks_anything());
        assert_eq!(policy.rules_of("www.example.org"), [1]);
        assert!(policy.rules_of("example.org").is_empty());
    }

    #[test]
    fn nothing_is_nothing() {
        let text = text(&policy(&[]));
        assert!(!text.contains("accept") && text.contains(&format!("out_0a780002 {REJECT}\n")), "{text}");
    }

    #[test]
    fn metadata_is_reached_only_by_name_of_its_address() {
        let at = |rules: &[&str], what: &str| {
            let text = text(&policy(rules));
            text.lines().position(|line| line.contains("out_0a780002") && line.contains(what))
        };
        assert!(at(&["169.254.169.254:80"], "169.254.169.254 ") < at(&["169.254.169.254:80"], "{ 169"));
        assert!(
            at(&["169.0.0.0/8"], "169.0.0.0/8") > at(&["169.0.0.0/8"], "{ 169"),
            "a wider one is not enough"
        );
        assert!(at(&["any"], "02 accept") > at(&["any"], "{ 169"));
    }

    #[test]
    fn host_is_reached_when_it_is_named() {
        assert!(in_rules(&policy(&["any"])) == [REJECT]);
        assert!(in_rules(&policy(&["10.0.0.0/8"])) == [REJECT]);
        assert_eq!(in_rules(&policy(&["10.120.0.1:22/tcp"]))[0], "ip daddr 10.120.0.1 tcp dport 22 accept");
        let mut config = ContainerConfig::default();
        config.extra_hosts.push("up:host-gateway".parse().unwrap());
        assert_eq!(in_rules(&Policy::of(&config))[0], "accept");
    }
}
