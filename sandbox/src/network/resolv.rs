//! `/etc/resolv.conf`: the host's is read, the container's is made.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::config::{ContainerConfig, NetworkMode};

/// Where the agent's name server listens in the container.
const PROXY: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 11));
/// Most name servers that are asked (glibc's `MAXNS`).
const MAX_SERVERS: usize = 3;
/// Most search domains.
const MAX_SEARCH: usize = 32;
/// Port of name servers.
const DNS_PORT: u16 = 53;

/// What the host resolves names with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct HostResolver {
    pub(crate) servers: Vec<IpAddr>,
    pub(crate) search: Vec<String>,
    pub(crate) options: Vec<String>,
}

impl HostResolver {
    /// The host's `/etc/resolv.conf`; empty if there is none.
    pub(crate) fn of_host() -> Self {
        Self::parse(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default())
    }

    pub(crate) fn parse(text: &str) -> Self {
        let mut found = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    // A zone (fe80::1%eth0) cannot be kept in an address.
                    let address: Option<IpAddr> =
                        words.next().and_then(|word| word.split('%').next()?.parse().ok());
                    found.servers.extend(address);
                }
                Some("search" | "domain") => {
                    found.search = words.map(str::to_owned).take(MAX_SEARCH).collect()
                }
                Some("options") => found.options.extend(words.map(str::to_owned).take(MAX_SEARCH)),
                _ => {}
            }
        }
        found.servers.truncate(MAX_SERVERS);
        found
    }
}

/// The servers that a container's questions are forwarded to.
pub(crate) fn upstreams(config: &ContainerConfig, host: &HostResolver) -> Vec<SocketAddr> {
    let servers = if config.dns.is_empty() { &host.servers } else { &config.dns };
    servers.iter().take(MAX_SERVERS).map(|ip| SocketAddr::new(*ip, DNS_PORT)).collect()
}

/// A container's `/etc/resolv.conf`.
pub(crate) fn resolv_conf(config: &ContainerConfig, host: &HostResolver) -> String {
    let mut text = String::new();
    if config.network == NetworkMode::Bridge {
        text.push_str(&format!("nameserver {PROXY}\n"));
    }
    let search = if config.dns_search.is_empty() { &host.search } else { &config.dns_search };
    let search: Vec<&str> = search.iter().map(String::as_str).filter(|domain| *domain != ".").collect();
    if !search.is_empty() {
        text.push_str(&format!("search {}\n", search.join(" ")));
    }
    let options = if config.dns_options.is_empty() { &host.options } else { &config.dns_options };
    // edns0 and trust-ad of the host's resolver mean nothing to ours.
    let options: Vec<&str> =
        options.iter().map(String::as_str).filter(|o| !matches!(*o, "edns0" | "trust-ad")).collect();
    if !options.is_empty() {
        text.push_str(&format!("options {}\n", options.join(" ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "# comment\nnameserver 127.0.0.53\nnameserver fe80::1%eth0\nnameserver nonsense\n\
        search example.org lan\noptions edns0 trust-ad ndots:2\n";

    #[test]
    fn host_is_read() {
        let host = HostResolver::parse(HOST);
        assert_eq!(host.servers, ["127.0.0.53".parse::<IpAddr>().unwrap(), "fe80::1".parse().unwrap()]);
        assert_eq!(host.search, ["example.org", "lan"]);
        assert_eq!(HostResolver::parse(""), HostResolver::default());
    }

    #[test]
    fn container_asks_the_proxy() {
        let host = HostResolver::parse(HOST);
        let mut config = ContainerConfig::default();
        let text = resolv_conf(&config, &host);
        assert_eq!(text, "nameserver 127.0.0.11\nsearch example.org lan\noptions ndots:2\n");
        assert_eq!(upstreams(&config, &host)[0], "127.0.0.53:53".parse().unwrap());
        config.dns = vec!["9.9.9.9".parse().unwrap()];
        config.dns_search = vec![".".into()];
        assert_eq!(upstreams(&config, &host), ["9.9.9.9:53".parse().unwrap()]);
        config.network = NetworkMode::None;
        assert_eq!(resolv_conf(&config, &host), "options ndots:2\n");
    }
}
