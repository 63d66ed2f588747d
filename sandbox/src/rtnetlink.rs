//! A small rtnetlink: requests encoded by hand, acknowledgements and dumps.
//!
//! A message is a header of 16 bytes (length, type, flags, sequence, port), a fixed part, and attributes of 4 bytes header (length,
//! type) and a value padded to 4 bytes; all in the machine's byte order.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::set_socket_timeout;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

const HEADER_BYTES: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_DUMP: u16 = 0x300;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const IFLA_ADDRESS: u16 = 1;
const IFF_UP: u32 = 1;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_MATCHALL_ACT: u16 = 2;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TCA_EGRESS_REDIR: u32 = 1;
const TC_ACT_STOLEN: u32 = 4;
const TC_H_INGRESS: u32 = 0xffff_fff1;
const INGRESS_HANDLE: u32 = 0xffff_0000;
const ETH_P_ALL: u16 = 3;
/// Longest answer to one read, bytes: the kernel's dumps come in pieces of at most 32 KiB.
const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// Most messages of one dump.
const MAX_MESSAGES: usize = 4096;
/// The kernel answers at once.
const ANSWER_LIMIT: std::time::Duration = std::time::Duration::from_secs(10);

/// A request that is being written.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Message {
    bytes: Vec<u8>,
}

impl Message {
    fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
        // Sequence 1 and port 0: one request at a time on a socket of its own.
        bytes.extend_from_slice(&1_u32.to_ne_bytes());
        bytes.extend_from_slice(&0_u32.to_ne_bytes());
        bytes.extend_from_slice(fixed);
        Self { bytes }
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.bytes.extend_from_slice(&attribute(kind, value));
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        if let Some(place) = self.bytes.get_mut(..4) {
            place.copy_from_slice(&length.to_ne_bytes());
        }
        self.bytes
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len().saturating_add(4)).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// `struct ifinfomsg`.
fn link(index: u32, flags: u32, change: u32) -> Vec<u8> {
    [0, index, flags, change].map(u32::to_ne_bytes).concat()
}

/// `struct tcmsg`.
fn traffic(index: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    [0, index, handle, parent, info].map(u32::to_ne_bytes).concat()
}

/// Options of a filter that sends every packet out of another interface.
fn redirect(to: u32) -> Vec<u8> {
    // struct tc_mirred: index, capab, action, refcnt, bindcnt, eaction, ifindex.
    let mirred = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to].map(u32::to_ne_bytes).concat();
    let action = [
        attribute(TCA_ACT_KIND, b"mirred\0"),
        attribute(TCA_ACT_OPTIONS, &attribute(TCA_MIRRED_PARMS, &mirred)),
    ]
    .concat();
    attribute(TCA_MATCHALL_ACT, &attribute(1, &action))
}

/// One message of a dump: its type, and what follows the header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) kind: u16,
    pub(crate) body: Vec<u8>,
}

impl Found {
    /// A number of the fixed part.
    pub(crate) fn u32(&self, at: usize) -> u32 {
        self.body.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_ne_bytes(*b))
    }

    /// As above.
    pub(crate) fn u16(&self, at: usize) -> u16 {
        self.body.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_ne_bytes(*b))
    }

    /// As above.
    pub(crate) fn u8(&self, at: usize) -> u8 {
        self.body.get(at).copied().unwrap_or_default()
    }

    /// The value of an attribute, after a fixed part of so many bytes.
    pub(crate) fn attribute(&self, fixed: usize, wanted: u16) -> Option<&[u8]> {
        let mut rest = self.body.get(fixed..)?;
        loop {
            let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
            let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?);
            let value = rest.get(4..length)?;
            if kind == wanted {
                return Some(value);
            }
            rest = rest.get(length.next_multiple_of(4)..)?;
        }
    }
}

/// A connection to the kernel's tables of the network namespace in which it was opened.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
}

impl Socket {
    /// Opens one.
    pub(crate) fn open() -> io::Result<Self> {
        // Protocol 0 of this family is NETLINK_ROUTE.
        let fd =
            rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, 0))?;
        set_socket_timeout(&fd, rustix::net::sockopt::Timeout::Recv, Some(ANSWER_LIMIT))?;
        Ok(Self { fd })
    }

    /// All entries of a table: `RTM_GETLINK` and the like, with a fixed part of so many bytes.
    pub(crate) fn dump(&self, kind: u16, fixed: usize) -> io::Result<Vec<Found>> {
        let request = Message::new(kind, NLM_F_DUMP, &vec![0; fixed]).finish();
        rustix::net::send(&self.fd, &request, SendFlags::empty())?;
        let mut all = Vec::new();
        let mut answer = vec![0; MAX_ANSWER_BYTES];
        while all.len() < MAX_MESSAGES {
            let (length, _) = rustix::net::recv(&self.fd, answer.as_mut_slice(), RecvFlags::empty())?;
            if split(answer.get(..length).unwrap_or_default(), &mut all)? {
                return Ok(all);
            }
        }
        Err(io::Error::other("the kernel's table is too long"))
    }

    fn request(&self, message: Message) -> io::Result<()> {
        let mut bytes = message.finish();
        // With an acknowledgement.
        if let Some(flags) = bytes.get_mut(6) {
            *flags |= u8::try_from(NLM_F_ACK).unwrap_or_default();
        }
        rustix::net::send(&self.fd, &bytes, SendFlags::empty())?;
        let mut answer = vec![0; MAX_ANSWER_BYTES];
        let (length, _) = rustix::net::recv(&self.fd, answer.as_mut_slice(), RecvFlags::empty())?;
        split(answer.get(..length).unwrap_or_default(), &mut Vec::new()).map(|_| ())
    }

    /// Switches an interface on.
    pub(crate) fn up(&self, index: u32) -> io::Result<()> {
        self.request(Message::new(RTM_NEWLINK, 0, &link(index, IFF_UP, IFF_UP)))
    }

    /// Gives an interface another hardware address.
    pub(crate) fn set_mac(&self, index: u32, mac: [u8; 6]) -> io::Result<()> {
        self.request(Message::new(RTM_NEWLINK, 0, &link(index, 0, 0)).attribute(IFLA_ADDRESS, &mac))
    }

    /// Sends all that arrives at one interface out of another one.
    pub(crate) fn redirect(&self, from: u32, to: u32) -> io::Result<()> {
        let qdisc = traffic(from, INGRESS_HANDLE, TC_H_INGRESS, 0);
        let made = self.request(
            Message::new(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &qdisc).attribute(TCA_KIND, b"ingress\0"),
        );
        match made {
            // Another qdisc of this kind, such as that of a shim that has died: with its filters it goes.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.end_redirect(from)?;
                self.request(
                    Message::new(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &qdisc)
                        .attribute(TCA_KIND, b"ingress\0"),
                )?;
            }
            other => other?,
        }
        let info = 1 << 16 | u32::from(ETH_P_ALL.to_be());
        let filter = traffic(from, 0, INGRESS_HANDLE, info);
        let filter = Message::new(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, &filter)
            .attribute(TCA_KIND, b"matchall\0")
            .attribute(TCA_OPTIONS, &redirect(to));
        self.request(filter)
    }

    /// Undoes [`Socket::redirect`].
    pub(crate) fn end_redirect(&self, from: u32) -> io::Result<()> {
        let qdisc = traffic(from, INGRESS_HANDLE, TC_H_INGRESS, 0);
        self.request(Message::new(RTM_DELQDISC, 0, &qdisc).attribute(TCA_KIND, b"ingress\0"))
    }
}

/// Takes an answer apart; true at its end.
fn split(mut answer: &[u8], all: &mut Vec<Found>) -> io::Result<bool> {
    while answer.len() >= HEADER_BYTES {
        let bad = || io::Error::from(io::ErrorKind::InvalidData);
        let length = answer.first_chunk().map_or(0, |b| u32::from_ne_bytes(*b));
        let length = usize::try_from(length).map_err(|_| bad())?;
        let kind = answer.get(4..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_ne_bytes(*b));
        let body = answer.get(HEADER_BYTES..length).ok_or_else(bad)?;
        match kind {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let code = body.first_chunk().map_or(libc::EPROTO, |b| i32::from_ne_bytes(*b));
                return match code {
                    0 => Ok(true),
                    code => Err(io::Error::from_raw_os_error(code.checked_neg().unwrap_or(libc::EPROTO))),
                };
            }
            _ => all.push(Found { kind, body: body.to_vec() }),
        }
        answer = answer.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_laid_out_as_the_kernel_reads_them() {
        let options = redirect(7);
        // matchall's action list, action 1, kind and options, parameters.
        assert_eq!(options[2..4], TCA_MATCHALL_ACT.to_ne_bytes());
        assert_eq!(options[6..8], 1_u16.to_ne_bytes());
        assert_eq!(&options[12..19], b"mirred\0");
        assert_eq!(options.len(), 4 + 4 + 12 + 4 + 4 + 28);
        assert_eq!(options[options.len() - 4..], 7_u32.to_ne_bytes());
        assert_eq!(traffic(3, 0, INGRESS_HANDLE, 1).len(), 20);
        assert_eq!(link(1, 0, 0).len(), 16);
    }

    #[test]
    fn dumps_are_taken_apart_and_nonsense_is_an_error() {
        let one = Message::new(RTM_NEWLINK, 0, &link(5, 0, 0)).attribute(3, b"eth0\0").finish();
        let done = Message::new(NLMSG_DONE, 0, &[0; 4]).finish();
        let mut all = Vec::new();
        assert!(!split(&one, &mut all).unwrap());
        assert!(split(&done, &mut all).unwrap());
        assert_eq!((all[0].u32(4), all[0].attribute(16, 3)), (5, Some(&b"eth0\0"[..])));
        assert_eq!(all[0].attribute(16, 9), None);
        let mut short = one.clone();
        short[0] = 200;
        assert!(split(&short, &mut all).is_err());
        let broken = Found { kind: 0, body: vec![0, 0, 0, 0] };
        assert_eq!(broken.attribute(0, 1), None, "a length of 0 does not go round in circles");
    }

    #[test]
    fn the_kernel_answers() {
        let socket = Socket::open().unwrap();
        let links = socket.dump(18, 16).unwrap();
        assert!(links.iter().any(|link| link.attribute(16, 3) == Some(b"lo\0")));
        assert!(socket.up(0x7fff_0000).is_err());
    }
}
