//! `/etc/hosts`, `/etc/hostname` and `/etc/resolv.conf` of a container.

use std::fmt::Write;
use std::net::IpAddr;

use hyper_protocol::rpc::agent::InjectedFile;

use crate::config::ContainerConfig;
use crate::network::resolv::{HostResolver, resolv_conf};

/// What is known only when the container is started.
#[derive(Debug)]
pub(crate) struct Facts<'a> {
    pub(crate) id: &'a str,
    /// Its address; `None` without network.
    pub(crate) ip: Option<IpAddr>,
    /// The host, as it sees it.
    pub(crate) gateway: Option<IpAddr>,
    /// What the host resolves names with.
    pub(crate) host: &'a HostResolver,
}

/// The files that the agent writes into the container's root.
pub(crate) fn injected_files(config: &ContainerConfig, facts: &Facts<'_>) -> Vec<InjectedFile> {
    let file = |path: &str, content: String| InjectedFile {
        path: path.to_owned(),
        content: content.into_bytes(),
        mode: 0o644,
        ..Default::default()
    };
    vec![
        file("/etc/hosts", hosts(config, facts)),
        file("/etc/hostname", format!("{}\n", config.hostname_for(facts.id))),
        file("/etc/resolv.conf", resolv_conf(config, facts.host)),
    ]
}

fn hosts(config: &ContainerConfig, facts: &Facts<'_>) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::\tip6-localnet\n\
         ff00::\tip6-mcastprefix\n\
         ff02::1\tip6-allnodes\n\
         ff02::2\tip6-allrouters\n",
    );
    for extra in &config.extra_hosts {
        // Without a network there is no way to the host, and no line.
        if let Some(address) = extra.address.or(facts.gateway) {
            let _ = writeln!(text, "{address}\t{}", extra.name);
        }
    }
    if let Some(ip) = facts.ip {
        let host = config.hostname_for(facts.id);
        let _ = match config.domainname.as_str() {
            "" => writeln!(text, "{ip}\t{host}"),
            domain => writeln!(text, "{ip}\t{host}.{domain} {host}"),
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::config;

    #[test]
    fn hosts_file() {
        let mut wish = config("c1");
        wish.hostname = "box".into();
        wish.domainname = "lan".into();
        wish.extra_hosts = vec!["db:10.0.0.9".parse().unwrap(), "up:host-gateway".parse().unwrap()];
        let host = HostResolver::default();
        let mut facts = Facts {
            id: "0123",
            ip: "10.120.0.2".parse().ok(),
            gateway: "10.120.0.1".parse().ok(),
            host: &host,
        };
        let text = hosts(&wish, &facts);
        assert!(text.starts_with("127.0.0.1\tlocalhost\n"));
        assert!(text.ends_with("10.0.0.9\tdb\n10.120.0.1\tup\n10.120.0.2\tbox.lan box\n"), "{text}");
        facts.ip = None;
        facts.gateway = None;
        assert!(hosts(&wish, &facts).ends_with("10.0.0.9\tdb\n"));
        let files = injected_files(&wish, &facts);
        assert_eq!(
            files.iter().map(|f| f.path.as_str()).collect::<Vec<_>>(),
            ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"]
        );
        assert_eq!(files[1].content, b"box\n");
    }
}
