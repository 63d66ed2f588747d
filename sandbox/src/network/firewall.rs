//! The way out: forwarding, and nftables' tables of our own: address translation, and what each container may connect to (`policy`).
//!
//! Nobody else's rules are touched. Connections from elsewhere to containers are dropped: the way in is a published port.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;

use super::policy::{self, Policy, SEAT_PREFIX, Seat};
use super::subnet::Subnet;
use super::{NetworkError, Place, own};
use crate::launch::scaled_ms;

/// How long `nft` may take.
const NFT_MS: u64 = 10_000;
/// Longest output of `nft` that is kept, bytes.
const MAX_OUTPUT_BYTES: usize = 64 * 1024;
const FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";

/// The tables of a bridge.
#[derive(Debug, Clone)]
pub(super) struct Firewall {
    bridge: String,
    subnet: Subnet,
    table: String,
    /// What leads from an address to its chains: out, in. Another network has others, so that a bridge which was made anew with another
    /// network is seen to be not served yet.
    maps: [String; 2],
    place: Place,
}

impl Firewall {
    pub(super) fn new(bridge: &str, subnet: Subnet, place: Place) -> Self {
        let table =
            if bridge == super::DEFAULT_BRIDGE { "hyper".to_owned() } else { format!("hyper_{bridge}") };
        let of_net = |way: &str| format!("{way}_of_{}_{}", Seat(subnet.gateway()), subnet.prefix_len());
        Self { bridge: bridge.to_owned(), subnet, table, maps: [of_net("out"), of_net("in")], place }
    }

    /// Turns forwarding on, and puts a container on its seat. The tables are made when they are not there.
    pub(super) async fn seat(&self, seat: Seat, policy: &Policy) -> Result<(), NetworkError> {
        self.place.within(|| enable_forwarding(Path::new(FORWARD))).map_err(NetworkError::place)??;
        let door = self.place.door().map(|address| policy::Door { address, gateway: self.subnet.gateway() });
        let own = policy::script(&self.table, &self.maps, seat, policy, door.as_ref());
        let own = format!("{}{own}", self.guarded()?);
        if self.nft(&own).await.is_ok() {
            return Ok(());
        }
        self.nft(&format!("{}{own}", self.script())).await
    }

    /// Lets the rules know of the addresses that the host has now.
    pub(super) async fn guard(&self) -> Result<(), NetworkError> {
        self.nft(&self.guarded()?).await
    }

    /// Where the host is elsewhere, its addresses are in a set; where it is here, the kernel knows them.
    fn guarded(&self) -> Result<String, NetworkError> {
        if self.place.door().is_none() {
            return Ok(String::new());
        }
        let failed = |source| NetworkError::Namespace { what: "ask for the host's addresses".into(), source };
        let all: Vec<String> = own::addresses().map_err(failed)?.iter().map(Ipv4Addr::to_string).collect();
        let set = format!("inet {} {}", self.table, policy::OWN_SET);
        Ok(format!("flush set {set}\nadd element {set} {{ {} }}\n", all.join(", ")))
    }

    /// Lets a container reach addresses that a name of its rules has, for so long.
    pub(super) async fn learn(
        &self,
        seat: Seat,
        addresses: &[(usize, Ipv4Addr)],
        time: Duration,
    ) -> Result<(), NetworkError> {
        let mut text = String::new();
        for (rule, address) in addresses {
            let element = format!("element inet {} {} {{ {address}", self.table, seat.names(*rule));
            let timeout = format!("timeout {}s", time.as_secs());
            // One that is there keeps its time, so it is taken out first; what is taken out has to be there.
            text.push_str(&format!(
                "add {element} {timeout} }}\ndelete {element} }}\nadd {element} {timeout} }}\n"
            ));
        }
        self.nft(&text).await
    }

    /// What makes the tables, or makes them right; containers on their seats are left there. One transaction.
    fn script(&self) -> String {
        let Self { bridge, subnet, table, maps: [out, inward], place } = self;
        let door = place.door().map_or_else(String::new, |door| {
            let own = policy::OWN_SET;
            format!(
                "add set inet {table} {own} {{ type ipv4_addr; }}\n\
                 add chain inet {table} prerouting {{ type nat hook prerouting priority dstnat; policy accept; }}\n\
                 flush chain inet {table} prerouting\n\
                 add rule inet {table} prerouting iifname \"{bridge}\" ip daddr {} dnat ip to {door}\n",
                subnet.gateway()
            )
        });
        let text = format!(
            "add table bridge hyper\n\
             add set bridge hyper seats {{ type ifname . ether_addr . ipv4_addr; }}\n\
             add set bridge hyper walled {{ type ifname; }}\n\
             add chain bridge hyper seated {{ type filter hook prerouting priority -300; policy accept; }}\n\
             add chain bridge hyper between {{ type filter hook forward priority 0; policy accept; }}\n\
             flush chain bridge hyper seated\n\
             flush chain bridge hyper between\n\
             table bridge hyper {{\n\
             \tchain seated {{\n\
             \t\tiifname != \"{SEAT_PREFIX}*\" accept\n\
             \t\tiifname . ether saddr . arp saddr ip @seats iifname . arp saddr ether . arp saddr ip @seats accept\n\
             \t\tiifname . ether saddr . ip saddr @seats accept\n\
             \t\tdrop\n\
             \t}}\n\
             \tchain between {{\n\
             \t\tiifname @walled drop\n\
             \t\toifname @walled drop\n\
             \t}}\n\
             }}\n\
             add table inet {table}\n\
             add map inet {table} {out} {{ type ipv4_addr : verdict; }}\n\
             add map inet {table} {inward} {{ type ipv4_addr : verdict; }}\n\
             add chain inet {table} postrouting {{ type nat hook postrouting priority srcnat; policy accept; }}\n\
             add chain inet {table} forward {{ type filter hook forward priority filter; policy accept; }}\n\
             add chain inet {table} input {{ type filter hook input priority filter; policy accept; }}\n\
             flush chain inet {table} postrouting\n\
             flush chain inet {table} forward\n\
             flush chain inet {table} input\n\
             table inet {table} {{\n\
             \tchain postrouting {{\n\
             \t\tip saddr {subnet} oifname != \"{bridge}\" masquerade\n\
             \t}}\n\
             \tchain forward {{\n\
             \t\toifname \"{bridge}\" iifname != \"{bridge}\" ct state established,related accept\n\
             \t\toifname \"{bridge}\" iifname != \"{bridge}\" drop\n\
             \t\tiifname \"{bridge}\" ct state established,related accept\n\
             \t\tiifname \"{bridge}\" ip saddr vmap @{out}\n\
             \t}}\n\
             \tchain input {{\n\
             \t\tiifname \"{bridge}\" ct state established,related accept\n\
             \t\tiifname \"{bridge}\" ip saddr vmap @{inward}\n\
             \t}}\n\
             }}\n"
        );
        text + &door
    }

    /// Has `nft` carry out a script where the bridge is: all of it or nothing.
    async fn nft(&self, script: &str) -> Result<(), NetworkError> {
        nft(script, &self.place).await
    }
}

fn enable_forwarding(path: &Path) -> Result<(), NetworkError> {
    let on = std::fs::read_to_string(path).is_ok_and(|value| value.trim() == "1");
    if on {
        return Ok(());
    }
    std::fs::write(path, "1").map_err(|source| NetworkError::Forwarding { path: path.to_owned(), source })
}

async fn nft(script: &str, place: &Place) -> Result<(), NetworkError> {
    let var = std::env::var_os("PATH").unwrap_or_default().to_string_lossy().into_owned();
    let mut command = tokio::process::Command::new("nft");
    command
        .args(["-f", "-"])
        .env("PATH", format!("{var}:/usr/sbin:/sbin"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    place.send(&mut command);
    let failed = |message: String| NetworkError::Nft { message };
    let mut child = match command.spawn() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(NetworkError::NoNft),
        child => child.map_err(|error| failed(error.to_string()))?,
    };
    let run = async {
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(script.as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(scaled_ms(NFT_MS), run).await;
    let output =
        output.map_err(|_| failed("it takes too long".into()))?.map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = output.stderr.get(..MAX_OUTPUT_BYTES).unwrap_or(&output.stderr);
    let stderr = String::from_utf8_lossy(stderr);
    Err(failed(stderr.lines().next().map_or_else(|| output.status.to_string(), str::to_owned)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn script_names_bridge_and_subnet() {
        let text =
            |bridge: &str, subnet: &str| Firewall::new(bridge, subnet.parse().unwrap(), Place::Host).script();
        let usual = text("hyper0", "10.120.0.0/16");
        assert!(usual.contains("table inet hyper {"));
        assert!(usual.contains("ip saddr 10.120.0.0/16 oifname != \"hyper0\" masquerade"));
        assert!(usual.contains("iifname \"hyper0\" ip saddr vmap @out_of_0a780001_16"), "{usual}");
        let other = text("br7", "10.1.0.0/24");
        assert!(other.contains("table inet hyper_br7 {") && other.contains("table bridge hyper {"));
    }

    #[test]
    fn forwarding_is_turned_on_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ip_forward");
        std::fs::write(&path, "0\n").unwrap();
        enable_forwarding(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1");
        std::fs::write(&path, "1\n").unwrap();
        enable_forwarding(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\n", "left alone");
        assert!(enable_forwarding(&dir.path().join("no/such")).is_err());
    }
}
