//! The network namespace of a pod, joined to the guest.
//!
//! ```text
//! CNI's veth eth0 --ingress, redirect--> TAP -- hyper-vmm -- guest's eth0, with eth0's hardware address, addresses, routes,
//!       ^----------redirect, ingress------/                  neighbours and MTU
//! ```
//! Each interface gets a TAP of its own. A namespace that is still empty when the machine starts gets one spare TAP: who configures it
//! later, before the first start, finds its interface joined then. The guest may send from the hardware address of its interface only, so
//! an interface that comes late takes over the spare's.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use hyper_protocol::rpc::agent::{ConfigureNetworkRequest, Interface, Neighbour, Route};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::PodError;
use super::loopback::Loopback;
use crate::launch::NetPlan;
use crate::network::{MTU, NetworkError, mac_text, make_tap};
use crate::rtnetlink::{Found, Socket};

/// Most interfaces of a pod: the machine has so many slots for devices, and needs some itself.
const MAX_INTERFACES: usize = 8;
const RTM_GETLINK: u16 = 18;
const RTM_GETADDR: u16 = 22;
const RTM_GETROUTE: u16 = 26;
const RTM_GETNEIGH: u16 = 30;
const LINK_BYTES: usize = 16;
const ADDRESS_BYTES: usize = 8;
const ROUTE_BYTES: usize = 12;
const NEIGHBOUR_BYTES: usize = 12;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTN_UNICAST: u8 = 1;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_KERNEL: u8 = 2;
const RTNH_F_ONLINK: u32 = 4;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;
/// `struct ifinfomsg.ifi_type` of Ethernet.
const ARPHRD_ETHER: u16 = 1;
/// What our TAPs are called.
const TAP_PREFIX: &str = "hytap";

/// An interface as whoever made the namespace left it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Link {
    index: u32,
    name: String,
    mac: [u8; 6],
    mtu: u32,
}

/// One of our TAPs, and what it is joined to.
#[derive(Debug)]
struct Tap {
    name: String,
    mac: [u8; 6],
    joined: Option<u32>,
}

/// The namespace and its TAPs.
#[derive(Debug)]
pub(super) struct PodNetwork {
    socket: Socket,
    taps: Vec<Tap>,
    /// The guest knows it.
    pub(super) configured: bool,
    /// Connections to the loopback of the namespace, until somebody serves them.
    pub(super) loopback: Option<Loopback>,
    pub(super) host: Arc<HostNetwork>,
}

fn refused(what: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    let what = what.into();
    move |source| NetworkError::Namespace { what, source }
}

/// The network namespace in which this program was started.
#[derive(Debug)]
pub(super) struct HostNetwork(File);

impl HostNetwork {
    /// That of this thread, now.
    pub(super) fn current() -> Result<Self, PodError> {
        let path = "/proc/thread-self/ns/net";
        File::open(path).map(Self).map_err(|source| PodError::io("open", path, source))
    }

    /// Does something in it, such as starting a program, and comes back.
    pub(super) fn within<T>(&self, what: impl FnOnce() -> T) -> Result<T, PodError> {
        let here = Self::current()?;
        self.go()?;
        let done = what();
        here.go()?;
        Ok(done)
    }

    fn go(&self) -> Result<(), PodError> {
        move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|errno| refused("change the network namespace")(errno.into()).into())
    }
}

/// Moves this thread into the namespace, or into a new one. What it starts from now on is in it.
#[expect(deprecated, reason = "the safe form; CLONE_FILES, which makes it unsafe, is not among the flags")]
fn enter(netns: Option<&Path>) -> Result<(), PodError> {
    match netns {
        Some(path) => {
            let file = File::open(path)
                .map_err(|source| PodError::io("open the network namespace", path, source))?;
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|errno| PodError::io("enter the network namespace", path, errno))
        }
        None => rustix::thread::unshare(UnshareFlags::NEWNET)
            .map_err(|errno| refused("make a network namespace")(errno.into()).into()),
    }
}

impl PodNetwork {
    /// Enters the namespace and makes a TAP for each of its interfaces.
    pub(super) fn enter(netns: Option<&Path>) -> Result<(Self, Vec<NetPlan>), PodError> {
        let host = Arc::new(HostNetwork::current()?);
        enter(netns)?;
        let socket = Socket::open().map_err(refused("ask for the interfaces of the pod"))?;
        let loopback = Loopback::take()
            .inspect_err(|error| tracing::warn!(%error, "there will be no port-forward"))
            .ok();
        let mut network = Self { socket, taps: Vec::new(), configured: false, loopback, host };
        let mut plans = Vec::new();
        let links = network.links()?;
        for link in &links {
            plans.push(network.add_tap(link.mac, u16::try_from(link.mtu).unwrap_or(u16::MAX))?);
        }
        if links.is_empty() {
            let mut mac = [0; 6];
            crate::store::random(&mut mac);
            // Locally administered, one receiver.
            mac[0] = (mac[0] & 0xfc) | 2;
            plans.push(network.add_tap(mac, MTU)?);
        }
        Ok((network, plans))
    }

    fn add_tap(&mut self, mac: [u8; 6], mtu: u16) -> Result<NetPlan, PodError> {
        let name = format!("{TAP_PREFIX}{}", self.taps.len());
        let tap = make_tap(&name, mtu)?;
        self.taps.push(Tap { name, mac, joined: None });
        Ok(NetPlan { tap, mac, mtu })
    }

    fn dump(&self, kind: u16, fixed: usize) -> Result<Vec<Found>, PodError> {
        Ok(self.socket.dump(kind, fixed).map_err(refused("read the tables of the pod's network"))?)
    }

    fn all_links(&self) -> Result<Vec<Link>, PodError> {
        Ok(self.dump(RTM_GETLINK, LINK_BYTES)?.iter().filter_map(link_of).collect())
    }

    /// Interfaces that are not ours.
    fn links(&self) -> Result<Vec<Link>, PodError> {
        let mut links = self.all_links()?;
        links.retain(|link| !link.name.starts_with(TAP_PREFIX));
        if links.len() > MAX_INTERFACES {
            return Err(PodError::Exhausted(format!("{} interfaces: at most {MAX_INTERFACES}", links.len())));
        }
        Ok(links)
    }

    /// Joins every interface to its TAP, and says what the guest is to be told.
    pub(super) fn join(&mut self) -> Result<ConfigureNetworkRequest, PodError> {
        let mut request = ConfigureNetworkRequest::new();
        let all = self.all_links()?;
        let links = self.links()?;
        let addresses = self.dump(RTM_GETADDR, ADDRESS_BYTES)?;
        let mut joined: Vec<Link> = Vec::new();
        for mut link in links {
            let same = self.taps.iter().position(|tap| tap.joined.is_none() && tap.mac == link.mac);
            let free = same.or_else(|| self.taps.iter().position(|tap| tap.joined.is_none()));
            let Some(tap) = free.and_then(|at| self.taps.get_mut(at)) else {
                return Err(PodError::State(format!(
                    "interface {} appeared after the pod's machine was started with others",
                    link.name
                )));
            };
            let Some(index) = all.iter().find(|one| one.name == tap.name).map(|one| one.index) else {
                return Err(PodError::State(format!("{} is gone", tap.name)));
            };
            if tap.mac != link.mac {
                link.mac = tap.mac;
                let what = format!("set the hardware address of {}", link.name);
                self.socket.set_mac(link.index, tap.mac).map_err(refused(what))?;
            }
            tap.joined = Some(link.index);
            let what = format!("join {} to the machine", link.name);
            let up = self.socket.up(index).and_then(|()| self.socket.up(link.index));
            up.and_then(|()| self.socket.redirect(link.index, index))
                .and_then(|()| self.socket.redirect(index, link.index))
                .map_err(refused(what))?;
            request.interfaces.push(Interface {
                mac: mac_text(link.mac),
                name: link.name.clone(),
                addresses: addresses.iter().filter_map(|found| address_of(found, link.index)).collect(),
                mtu: link.mtu.min(u32::from(u16::MAX)),
                ..Default::default()
            });
            joined.push(link);
        }
        let name = |index: u32| joined.iter().find(|link| link.index == index).map(|link| link.name.clone());
        let routes = self.dump(RTM_GETROUTE, ROUTE_BYTES)?;
        request.routes = routes.iter().filter_map(|found| route_of(found, &name)).collect();
        // What leads to a gateway comes before what goes through it.
        request.routes.sort_by_key(|route| !route.gateway.is_empty());
        let neighbours = self.dump(RTM_GETNEIGH, NEIGHBOUR_BYTES)?;
        request.neighbours = neighbours.iter().filter_map(|found| neighbour_of(found, &name)).collect();
        Ok(request)
    }
}

impl Drop for PodNetwork {
    fn drop(&mut self) {
        for joined in self.taps.iter().filter_map(|tap| tap.joined) {
            // The namespace, with its interfaces, may be gone already.
            if let Err(error) = self.socket.end_redirect(joined) {
                tracing::debug!(joined, %error, "the redirection stays");
            }
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes)).into_owned()
}

fn link_of(found: &Found) -> Option<Link> {
    if found.u16(2) != ARPHRD_ETHER {
        return None;
    }
    let mac = found.attribute(LINK_BYTES, IFLA_ADDRESS)?.try_into().ok()?;
    let name = text(found.attribute(LINK_BYTES, IFLA_IFNAME)?);
    let mtu = found.attribute(LINK_BYTES, IFLA_MTU)?.try_into().map(u32::from_ne_bytes).ok()?;
    Some(Link { index: found.u32(4), name, mac, mtu })
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// Addresses that the kernel makes itself, from the hardware address.
fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local() || v6.is_multicast())
}

/// An address of this interface, in CIDR notation.
fn address_of(found: &Found, index: u32) -> Option<String> {
    if found.u32(4) != index {
        return None;
    }
    let local =
        found.attribute(ADDRESS_BYTES, IFA_LOCAL).or_else(|| found.attribute(ADDRESS_BYTES, IFA_ADDRESS))?;
    let ip = ip(local).filter(|ip| !is_link_local(*ip))?;
    Some(format!("{ip}/{}", found.u8(1)))
}

/// A route that the guest's kernel does not make itself from the addresses.
fn route_of(found: &Found, name: &impl Fn(u32) -> Option<String>) -> Option<Route> {
    let (prefix, table, protocol, kind) = (found.u8(1), found.u8(4), found.u8(5), found.u8(7));
    if table != RT_TABLE_MAIN || kind != RTN_UNICAST || protocol == RTPROT_KERNEL {
        return None;
    }
    let interface = name(found.attribute(ROUTE_BYTES, RTA_OIF)?.try_into().map(u32::from_ne_bytes).ok()?)?;
    let destination = found.attribute(ROUTE_BYTES, RTA_DST).and_then(ip);
    if destination.is_some_and(is_link_local) {
        return None;
    }
    let gateway = found.attribute(ROUTE_BYTES, RTA_GATEWAY).and_then(ip);
    let family_default = if i32::from(found.u8(0)) == libc::AF_INET6 { "::/0" } else { "0.0.0.0/0" };
    let destination = match (destination, gateway) {
        (Some(ip), _) => format!("{ip}/{prefix}"),
        (None, Some(_)) => String::new(),
        (None, None) => family_default.to_owned(),
    };
    Some(Route {
        destination,
        gateway: gateway.map(|ip| ip.to_string()).unwrap_or_default(),
        interface,
        on_link: found.u32(8) & RTNH_F_ONLINK != 0,
        ..Default::default()
    })
}

fn neighbour_of(found: &Found, name: &impl Fn(u32) -> Option<String>) -> Option<Neighbour> {
    if found.u16(8) & NUD_PERMANENT == 0 {
        return None;
    }
    let interface = name(found.u32(4))?;
    let address = found.attribute(NEIGHBOUR_BYTES, NDA_DST).and_then(ip)?;
    let mac = found.attribute(NEIGHBOUR_BYTES, NDA_LLADDR)?.try_into().ok()?;
    let address = (!address.is_multicast()).then(|| address.to_string())?;
    Some(Neighbour { address, mac: mac_text(mac), interface, ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(fixed: &[u8], attributes: &[(u16, &[u8])]) -> Found {
        let mut body = fixed.to_vec();
        for (kind, value) in attributes {
            body.extend_from_slice(&u16::try_from(value.len() + 4).unwrap().to_ne_bytes());
            body.extend_from_slice(&kind.to_ne_bytes());
            body.extend_from_slice(value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        Found { kind: 0, body }
    }

    #[test]
    fn interfaces_and_addresses_are_read() {
        let mut fixed = [0; 16];
        fixed[2..4].copy_from_slice(&ARPHRD_ETHER.to_ne_bytes());
        fixed[4..8].copy_from_slice(&3_u32.to_ne_bytes());
        let eth = found(&fixed, &[(1, &[2, 0, 0, 0, 0, 7]), (3, b"eth0\0"), (4, &1450_u32.to_ne_bytes())]);
        let link = link_of(&eth).unwrap();
        assert_eq!((link.index, link.name.as_str(), link.mtu), (3, "eth0", 1450));
        let mut fixed = [0; 8];
        fixed[1] = 24;
        fixed[4..8].copy_from_slice(&3_u32.to_ne_bytes());
        let address = found(&fixed, &[(1, &[10, 0, 0, 9]), (2, &[10, 0, 0, 2])]);
        assert_eq!(address_of(&address, 3).as_deref(), Some("10.0.0.2/24"));
        assert_eq!(address_of(&address, 4), None);
        let own = found(&fixed, &[(1, &[0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])]);
        assert_eq!(address_of(&own, 3), None);
    }

    #[test]
    fn routes_that_the_guest_makes_itself_are_left_out() {
        let name = |index| (index == 3).then(|| "eth0".to_owned());
        let oif = 3_u32.to_ne_bytes();
        let fixed = |prefix, protocol| [2, prefix, 0, 0, RT_TABLE_MAIN, protocol, 0, RTN_UNICAST, 0, 0, 0, 0];
        let default = found(&fixed(0, 3), &[(5, &[10, 0, 0, 1]), (4, &oif)]);
        let route = route_of(&default, &name).unwrap();
        assert_eq!((route.destination.as_str(), route.gateway.as_str()), ("", "10.0.0.1"));
        let connected = found(&fixed(24, RTPROT_KERNEL), &[(1, &[10, 0, 0, 0]), (4, &oif)]);
        assert_eq!(route_of(&connected, &name), None);
        let direct = found(&fixed(32, 3), &[(1, &[169, 254, 1, 1]), (4, &oif)]);
        assert_eq!(route_of(&direct, &name).unwrap().destination, "169.254.1.1/32");
        let elsewhere = found(&fixed(0, 3), &[(5, &[10, 0, 0, 1]), (4, &9_u32.to_ne_bytes())]);
        assert_eq!(route_of(&elsewhere, &name), None);
    }
}
