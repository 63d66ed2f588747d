//! Interfaces and routes as the supervisor wants them.

use std::net::IpAddr;

use hyper_protocol::rpc::agent::{Interface, Neighbour, Route};

use super::address::{Cidr, check_name, octets_of, parse_ip, parse_mac};
use super::netlink::{Message, Socket};
use crate::error::{AgentError, Tried};

/// Most interfaces, addresses on each, and routes.
const MAX_ENTRIES: usize = 64;
/// Index of the loopback in a fresh network namespace.
const LOOPBACK: u32 = 1;

/// Switches the loopback on.
///
/// # Errors
/// What the kernel answers.
pub(crate) fn loopback() -> Result<(), AgentError> {
    let socket = Socket::open().tried(|| "open a netlink socket".to_owned())?;
    socket.request(Message::up(LOOPBACK)).tried(|| "switch the loopback on".to_owned())
}

/// Names interfaces, gives them addresses, switches them on, then sets routes.
///
/// # Errors
/// The first thing that is wrong or that the kernel refuses.
pub(crate) fn apply(interfaces: &[Interface], routes: &[Route]) -> Result<(), AgentError> {
    if interfaces.is_empty() && routes.is_empty() {
        return Ok(());
    }
    if interfaces.len() > MAX_ENTRIES || routes.len() > MAX_ENTRIES {
        return Err(AgentError::limit("interfaces and routes", MAX_ENTRIES));
    }
    let socket = Socket::open().tried(|| "open a netlink socket".to_owned())?;
    for interface in interfaces {
        set_interface(&socket, interface)?;
    }
    for route in routes {
        set_route(&socket, route)?;
    }
    Ok(())
}

/// As [`apply`], with permanent neighbours after the routes.
///
/// # Errors
/// The first thing that is wrong or that the kernel refuses.
pub(crate) fn apply_all(
    interfaces: &[Interface],
    routes: &[Route],
    neighbours: &[Neighbour],
) -> Result<(), AgentError> {
    apply(interfaces, routes)?;
    if neighbours.len() > MAX_ENTRIES {
        return Err(AgentError::limit("neighbours", MAX_ENTRIES));
    }
    let socket = Socket::open().tried(|| "open a netlink socket".to_owned())?;
    for neighbour in neighbours {
        let index = index_by_name(&neighbour.interface)?;
        let (address, mac) = (parse_ip(&neighbour.address)?, parse_mac(&neighbour.mac)?);
        socket
            .request(Message::neighbour(index, address, octets_of(&mac)))
            .tried(|| format!("add neighbour {address} {mac}"))?;
    }
    Ok(())
}

fn set_interface(socket: &Socket, interface: &Interface) -> Result<(), AgentError> {
    let name = &interface.name;
    check_name(name)?;
    if interface.addresses.len().max(interface.found_addresses.len()) > MAX_ENTRIES {
        return Err(AgentError::limit("addresses of an interface", MAX_ENTRIES));
    }
    let mac = parse_mac(&interface.mac)?;
    let index = if interface.found_mac.is_empty() {
        index_of(&mac)?
    } else {
        // Whoever may change hardware addresses in the sandbox may have done so.
        let index = index_of(&parse_mac(&interface.found_mac)?).or_else(|_| index_by_name(name))?;
        let tried = || format!("free interface {} of what it was", interface.found_mac);
        socket.request(Message::down(index)).tried(tried)?;
        for address in &interface.found_addresses {
            match socket.request(Message::no_address(index, Cidr::parse(address)?)) {
                // It has lost it by itself, as IPv6's are when the interface goes off.
                Ok(()) | Err(rustix::io::Errno::ADDRNOTAVAIL) => {}
                Err(errno) => return Err(errno).tried(tried),
            }
        }
        socket
            .request(Message::hardware(index, octets_of(&mac)))
            .tried(|| format!("give interface {} the address {mac}", interface.found_mac))?;
        index
    };
    socket
        .request(Message::name(index, name, interface.mtu))
        .tried(|| format!("name interface {} {name} with mtu {}", interface.mac, interface.mtu))?;
    for address in &interface.addresses {
        socket
            .request(Message::address(index, Cidr::parse(address)?))
            .tried(|| format!("add address {address} to {name}"))?;
    }
    socket.request(Message::up(index)).tried(|| format!("switch {name} on"))
}

fn set_route(socket: &Socket, route: &Route) -> Result<(), AgentError> {
    let name = &route.interface;
    let index = index_by_name(name)?;
    let gateway: Option<IpAddr> =
        if route.gateway.is_empty() { None } else { Some(parse_ip(&route.gateway)?) };
    let destination =
        if route.destination.is_empty() { None } else { Some(Cidr::parse(&route.destination)?) };
    let family = destination.map(|d| d.address).or(gateway);
    let Some(family) = family else {
        return Err(AgentError::invalid("a default route needs a gateway"));
    };
    if gateway.is_some_and(|g| g.is_ipv6() != family.is_ipv6()) {
        return Err(AgentError::invalid(format!("route to {} by {}", route.destination, route.gateway)));
    }
    socket
        .request(Message::route(index, destination, gateway, (family.is_ipv6(), route.on_link)))
        .tried(|| format!("add route to {:?} by {:?} on {name}", route.destination, route.gateway))
}

fn index_by_name(name: &str) -> Result<u32, AgentError> {
    check_name(name)?;
    read_index(format!("/sys/class/net/{name}/ifindex"))
        .ok_or_else(|| AgentError::not_found(format!("no interface {name}")))
}

/// The index of the interface with this hardware address.
fn index_of(mac: &str) -> Result<u32, AgentError> {
    let tried = || "list interfaces".to_owned();
    for entry in std::fs::read_dir("/sys/class/net").tried(tried)? {
        let path = entry.tried(tried)?.path();
        let address = std::fs::read_to_string(path.join("address")).unwrap_or_default();
        if address.trim() == mac
            && let Some(index) = read_index(path.join("ifindex"))
        {
            return Ok(index);
        }
    }
    Err(AgentError::not_found(format!("no interface with hardware address {mac}")))
}

fn read_index(path: impl AsRef<std::path::Path>) -> Option<u32> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}
