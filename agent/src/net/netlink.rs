//! A small rtnetlink: requests are encoded by hand, answers are acknowledgements only.
//!
//! A message is a header of 16 bytes (length, type, flags, sequence, port), a fixed part, and attributes of 4 bytes header (length,
//! type) and a value padded to 4 bytes; all in the machine's byte order.

use std::net::IpAddr;
use std::os::fd::OwnedFd;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::address::Cidr;

const HEADER_BYTES: usize = 16;
const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWNEIGH: u16 = 28;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const IFF_UP: u32 = 1;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_F_NODAD: u8 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTNH_F_ONLINK: u32 = 4;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;
const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// A request that is being written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    bytes: Vec<u8>,
}

impl Message {
    fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        // Sequence 1 and port 0: one request at a time on a socket of its own.
        bytes.extend_from_slice(&1_u32.to_ne_bytes());
        bytes.extend_from_slice(&0_u32.to_ne_bytes());
        bytes.extend_from_slice(fixed);
        Self { bytes }
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len().saturating_add(4)).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        if let Some(place) = self.bytes.get_mut(..4) {
            place.copy_from_slice(&length.to_ne_bytes());
        }
        self.bytes
    }

    fn link(index: u32, flags: u32, change: u32) -> Self {
        let mut fixed = vec![AF_UNSPEC, 0, 0, 0];
        fixed.extend_from_slice(&index.to_ne_bytes());
        fixed.extend_from_slice(&flags.to_ne_bytes());
        fixed.extend_from_slice(&change.to_ne_bytes());
        Self::new(RTM_NEWLINK, 0, &fixed)
    }

    /// Names an interface and sets its packet size; 0 leaves it.
    pub(super) fn name(index: u32, name: &str, mtu: u32) -> Self {
        let mut zero_ended = name.as_bytes().to_vec();
        zero_ended.push(0);
        let message = Self::link(index, 0, 0).attribute(IFLA_IFNAME, &zero_ended);
        if mtu == 0 { message } else { message.attribute(IFLA_MTU, &mtu.to_ne_bytes()) }
    }

    /// Sets the hardware address of an interface that is off.
    pub(super) fn hardware(index: u32, mac: [u8; 6]) -> Self {
        Self::link(index, 0, 0).attribute(IFLA_ADDRESS, &mac)
    }

    /// Switches an interface off.
    pub(super) fn down(index: u32) -> Self {
        Self::link(index, 0, IFF_UP)
    }

    /// Switches an interface on.
    pub(super) fn up(index: u32) -> Self {
        Self::link(index, IFF_UP, IFF_UP)
    }

    /// Adds an address to an interface.
    pub(super) fn address(index: u32, cidr: Cidr) -> Self {
        let (family, flags) = match cidr.address {
            IpAddr::V4(_) => (AF_INET, 0),
            // The host gave the address: looking for others that use it would only delay the first connection.
            IpAddr::V6(_) => (AF_INET6, IFA_F_NODAD),
        };
        let mut fixed = vec![family, cidr.prefix, flags, RT_SCOPE_UNIVERSE];
        fixed.extend_from_slice(&index.to_ne_bytes());
        let value = octets(cidr.address);
        let message = Self::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &fixed)
            .attribute(IFA_LOCAL, &value)
            .attribute(IFA_ADDRESS, &value);
        match broadcast(cidr) {
            Some(broadcast) => message.attribute(IFA_BROADCAST, &broadcast),
            None => message,
        }
    }

    /// Takes an address from an interface.
    pub(super) fn no_address(index: u32, cidr: Cidr) -> Self {
        let family = if cidr.address.is_ipv6() { AF_INET6 } else { AF_INET };
        let mut fixed = vec![family, cidr.prefix, 0, 0];
        fixed.extend_from_slice(&index.to_ne_bytes());
        Self::new(RTM_DELADDR, 0, &fixed).attribute(IFA_LOCAL, &octets(cidr.address))
    }

    /// Adds a permanent entry to the neighbour table.
    pub(super) fn neighbour(index: u32, address: IpAddr, mac: [u8; 6]) -> Self {
        let family = if address.is_ipv6() { AF_INET6 } else { AF_INET };
        let mut fixed = vec![family, 0, 0, 0];
        fixed.extend_from_slice(&index.to_ne_bytes());
        fixed.extend_from_slice(&NUD_PERMANENT.to_ne_bytes());
        fixed.extend_from_slice(&[0, 0]);
        Self::new(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &fixed)
            .attribute(NDA_DST, &octets(address))
            .attribute(NDA_LLADDR, &mac)
    }

    /// Adds a route; `destination` is `None` for the default one.
    pub(super) fn route(
        index: u32,
        destination: Option<Cidr>,
        gateway: Option<IpAddr>,
        (is_ipv6, on_link): (bool, bool),
    ) -> Self {
        let family = if is_ipv6 { AF_INET6 } else { AF_INET };
        let prefix = destination.map_or(0, |d| d.prefix);
        let scope = if gateway.is_some() || is_ipv6 { RT_SCOPE_UNIVERSE } else { RT_SCOPE_LINK };
        let mut fixed = vec![family, prefix, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, scope, RTN_UNICAST];
        let flags = if on_link { RTNH_F_ONLINK } else { 0 };
        fixed.extend_from_slice(&flags.to_ne_bytes());
        let mut message = Self::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &fixed);
        if let Some(destination) = destination {
            message = message.attribute(RTA_DST, &octets(destination.address));
        }
        if let Some(gateway) = gateway {
            message = message.attribute(RTA_GATEWAY, &octets(gateway));
        }
        message.attribute(RTA_OIF, &index.to_ne_bytes())
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn broadcast(cidr: Cidr) -> Option<[u8; 4]> {
    match cidr.address {
        IpAddr::V4(v4) if cidr.prefix < 31 => {
            let host = u32::MAX.checked_shr(cidr.prefix.into()).unwrap_or_default();
            Some((u32::from_be_bytes(v4.octets()) | host).to_be_bytes())
        }
        _ => None,
    }
}

/// A connection to the kernel's routing tables.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
}

impl Socket {
    /// Opens one.
    ///
    /// # Errors
    /// What `socket` answers.
    pub(super) fn open() -> Result<Self, rustix::io::Errno> {
        let fd = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // Protocol 0 of this family is NETLINK_ROUTE.
            None,
        )?;
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self { fd })
    }

    /// Sends a request and waits for the kernel's answer, which it gives before the request returns.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(super) fn request(&self, message: Message) -> Result<(), rustix::io::Errno> {
        let bytes = message.finish();
        rustix::net::send(&self.fd, &bytes, SendFlags::empty())?;
        let mut answer = [0; 4096];
        let (n, _) = rustix::net::recv(&self.fd, &mut answer, RecvFlags::empty())?;
        acknowledged(answer.get(..n).unwrap_or_default())
    }
}

/// Reads an acknowledgement: a header and the negative error number.
fn acknowledged(answer: &[u8]) -> Result<(), rustix::io::Errno> {
    let kind = answer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes);
    let code =
        answer.get(HEADER_BYTES..HEADER_BYTES + 4).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => {
            Err(rustix::io::Errno::from_raw_os_error(code.checked_neg().unwrap_or(libc::EPROTO)))
        }
        _ => Err(rustix::io::Errno::PROTO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_request_is_laid_out_as_the_kernel_reads_it() {
        let bytes = Message::name(3, "eth0", 1500).finish();
        assert_eq!(bytes.len(), 16 + 16 + 12 + 8);
        assert_eq!(bytes[..4], 52_u32.to_ne_bytes());
        assert_eq!(bytes[4..6], RTM_NEWLINK.to_ne_bytes());
        assert_eq!(bytes[6..8], (NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        assert_eq!(bytes[20..24], 3_u32.to_ne_bytes());
        assert_eq!(bytes[32..34], 9_u16.to_ne_bytes());
        assert_eq!(&bytes[36..41], b"eth0\0");
        assert_eq!(bytes[41..44], [0; 3], "padding");
        assert_eq!(bytes[48..52], 1500_u32.to_ne_bytes());
        let up = Message::up(1).finish();
        assert_eq!(
            (up.len(), &up[24..28], &up[28..32]),
            (32, &1_u32.to_ne_bytes()[..], &1_u32.to_ne_bytes()[..])
        );
    }

    #[test]
    fn addresses_carry_their_broadcast() {
        let v4 = Message::address(2, Cidr::parse("10.1.2.3/20").unwrap()).finish();
        assert_eq!(v4[16..20], [AF_INET, 20, 0, 0]);
        assert!(v4.windows(4).any(|w| w == [10, 1, 15, 255]));
        let v6 = Message::address(2, Cidr::parse("fd00::1/64").unwrap()).finish();
        assert_eq!(v6[16..20], [AF_INET6, 64, IFA_F_NODAD, 0]);
        assert_eq!(v6.len(), 24 + 2 * 20);
        assert_eq!(broadcast(Cidr::parse("10.0.0.1/32").unwrap()), None);
        assert_eq!(broadcast(Cidr::parse("10.0.0.1/0").unwrap()), Some([255; 4]));
    }

    #[test]
    fn routes_with_and_without_a_gateway() {
        let gateway = "10.0.0.1".parse().ok();
        let default = Message::route(2, None, gateway, (false, false)).finish();
        assert_eq!(
            default[16..24],
            [AF_INET, 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, RT_SCOPE_UNIVERSE, RTN_UNICAST]
        );
        assert_eq!(default.len(), 28 + 8 + 8);
        let link =
            Message::route(2, Some(Cidr::parse("10.9.0.0/16").unwrap()), None, (false, false)).finish();
        assert_eq!((link[17], link[22]), (16, RT_SCOPE_LINK));
        let direct = Message::route(2, None, gateway, (false, true)).finish();
        assert_eq!(direct[24..28], RTNH_F_ONLINK.to_ne_bytes());
        let neighbour = Message::neighbour(2, "10.0.0.1".parse().unwrap(), [2, 0, 0, 0, 0, 9]).finish();
        assert_eq!((neighbour.len(), neighbour[24]), (28 + 8 + 12, 0x80));
    }

    #[test]
    fn answers_are_read_and_nonsense_is_an_error() {
        let mut answer = vec![0; 36];
        answer[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        assert_eq!(acknowledged(&answer), Ok(()));
        answer[16..20].copy_from_slice(&(-17_i32).to_ne_bytes());
        assert_eq!(acknowledged(&answer), Err(rustix::io::Errno::EXIST));
        assert_eq!(acknowledged(&[]), Err(rustix::io::Errno::PROTO));
        assert_eq!(acknowledged(&[0; 36]), Err(rustix::io::Errno::PROTO));
    }

    #[test]
    fn the_kernel_answers() {
        // Nobody has this interface: the request is understood and refused.
        let refused = Socket::open().unwrap().request(Message::up(0x7fff_0000));
        assert!(matches!(refused, Err(rustix::io::Errno::NODEV | rustix::io::Errno::PERM)), "{refused:?}");
    }
}
