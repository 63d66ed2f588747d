//! Addresses of the host, for rules of a network namespace that is not the host's: there they are like any other address, and the kernel
//! does not tell them apart.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use super::firewall::Firewall;
use crate::rtnetlink::Socket;
use crate::sys::watch_readable;

const RTM_GETADDR: u16 = 22;
/// Length of `struct ifaddrmsg`, bytes.
const ADDRESS_BYTES: usize = 8;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// Multicast group of changes to IPv4 addresses (linux/rtnetlink.h).
const RTMGRP_IPV4_IFADDR: u32 = 0x10;
/// What an announcement is read into; what it says does not matter.
const ANNOUNCEMENT_BYTES: usize = 8192;

/// The IPv4 addresses of the network namespace of this thread, in order.
pub(super) fn addresses() -> io::Result<Vec<Ipv4Addr>> {
    let found = Socket::open()?.dump(RTM_GETADDR, ADDRESS_BYTES)?;
    let address = |kind| {
        move |found: &crate::rtnetlink::Found| -> Option<Ipv4Addr> {
            let bytes: [u8; 4] = found.attribute(ADDRESS_BYTES, kind)?.try_into().ok()?;
            Some(bytes.into())
        }
    };
    // On a link between two, the address alone is the other side's.
    let mut all: Vec<Ipv4Addr> = found
        .iter()
        .filter_map(|one| address(IFA_LOCAL)(one).or_else(|| address(IFA_ADDRESS)(one)))
        .collect();
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

/// Follows changes to the host's addresses; ends when it is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    task: JoinHandle<()>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watch {
    /// From now on the rules know of each change.
    pub(super) fn start(firewall: Firewall) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, RTMGRP_IPV4_IFADDR))?;
        let socket = watch_readable(socket)?;
        Ok(Self { task: tokio::spawn(async move { follow(&socket, &firewall).await }) })
    }
}

async fn follow(socket: &AsyncFd<OwnedFd>, firewall: &Firewall) {
    let mut buffer = vec![0; ANNOUNCEMENT_BYTES];
    while let Ok(mut ready) = socket.readable().await {
        loop {
            match rustix::net::recv(socket, buffer.as_mut_slice(), RecvFlags::empty()) {
                // So many at once that some are lost: there was a change all the same.
                Ok(_) | Err(Errno::INTR | Errno::NOBUFS) => {}
                Err(Errno::WOULDBLOCK) => break,
                Err(error) => {
                    tracing::warn!(%error, "changes to the host's addresses are not followed");
                    return;
                }
            }
        }
        ready.clear_ready();
        if let Err(error) = firewall.guard().await {
            tracing::warn!(%error, "the rules do not know a new address of the host");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_among_them() {
        assert!(addresses().unwrap().contains(&Ipv4Addr::LOCALHOST));
    }
}
