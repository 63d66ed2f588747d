//! The bridge and the TAPs, by ioctls: no program is started.

use std::fs::OpenOptions;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::NetworkError;
use super::subnet::{Subnet, mac_of};
use crate::sys::{IfIoctl, IfReq, bridge_create, ioctl_ifreq, tap_set_header, tap_set_offloads};

const TUN_PATH: &str = "/dev/net/tun";
/// Length of virtio's header with `num_buffers`, bytes.
const VNET_HEADER_BYTES: libc::c_int = 12;
/// Maximum transmission unit of the bridge and of containers, bytes.
pub(crate) const MTU: u16 = 1500;

/// What could not be done, with the interface it was to be done to.
fn fail<'a>(what: &'static str, name: &'a str) -> impl Fn(io::Error) -> NetworkError + 'a {
    move |source| match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => NetworkError::Permission { what, name: name.to_owned() },
        Some(libc::ENOPKG) => NetworkError::NoBridge,
        _ => NetworkError::Interface { what, name: name.to_owned(), source },
    }
}

fn control_socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

/// `struct sockaddr_in` with an address.
fn sockaddr(ip: Ipv4Addr) -> [u8; 16] {
    let mut bytes = [0; 16];
    let family = u16::try_from(libc::AF_INET).unwrap_or_default();
    bytes[..2].copy_from_slice(&family.to_ne_bytes());
    bytes[4..8].copy_from_slice(&ip.octets());
    bytes
}

fn set_up(socket: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let mut ifreq = IfReq::new(name)?;
    ioctl_ifreq(socket, IfIoctl::GetFlags, &mut ifreq)?;
    let up = u16::try_from(libc::IFF_UP).unwrap_or_default();
    let flags = u16::from_ne_bytes(ifreq.value(0)) | up;
    ioctl_ifreq(socket, IfIoctl::SetFlags, &mut IfReq::new(name)?.with(&flags.to_ne_bytes()))
}

/// Switches an interface on.
pub(crate) fn bring_up(name: &str) -> Result<(), NetworkError> {
    let socket = control_socket().map_err(fail("open a socket for", name))?;
    set_up(socket.as_fd(), name).map_err(fail("bring up", name))
}

/// Makes the bridge if it is not there, and checks that it is the one that is wanted. Call it under the network's lock.
pub(crate) fn ensure_bridge(name: &str, subnet: Subnet) -> Result<(), NetworkError> {
    let socket = control_socket().map_err(fail("open a socket for", name))?;
    let socket = socket.as_fd();
    let gateway = subnet.gateway();
    let new = || IfReq::new(name).map_err(fail("name", name));
    match ioctl_ifreq(socket, IfIoctl::GetIndex, &mut new()?) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
            bridge_create(socket, name).map_err(fail("make the bridge", name))?;
        }
        Err(error) => return Err(fail("find", name)(error)),
        // Interface 0 is none, which only a bridge comes to see.
        Ok(()) => {
            let asked = ioctl_ifreq(socket, IfIoctl::BridgeAdd, &mut new()?);
            if asked.is_err_and(|error| error.raw_os_error() == Some(libc::EOPNOTSUPP)) {
                return Err(NetworkError::NotABridge { name: name.to_owned() });
            }
        }
    }
    let mut ifreq = new()?;
    match ioctl_ifreq(socket, IfIoctl::GetAddress, &mut ifreq) {
        Ok(()) => {
            let found = Ipv4Addr::from(ifreq.value::<4>(4));
            if found != gateway {
                return Err(NetworkError::OtherSubnet { name: name.to_owned(), found, wanted: gateway });
            }
        }
        Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {
            // A hardware address of its own: else the bridge would take that of a TAP, and change it when that TAP goes.
            let mut hardware = [0; 8];
            let ethernet = libc::ARPHRD_ETHER;
            hardware[..2].copy_from_slice(&ethernet.to_ne_bytes());
            hardware[2..].copy_from_slice(&mac_of(gateway));
            let set =
                |request, bytes: &[u8]| ioctl_ifreq(socket, request, &mut IfReq::new(name)?.with(bytes));
            set(IfIoctl::SetHardware, &hardware).map_err(fail("set the hardware address of", name))?;
            set(IfIoctl::SetAddress, &sockaddr(gateway)).map_err(fail("set the address of", name))?;
            set(IfIoctl::SetNetmask, &sockaddr(subnet.mask())).map_err(fail("set the netmask of", name))?;
        }
        Err(error) => return Err(fail("read the address of", name)(error)),
    }
    set_up(socket, name).map_err(fail("bring up", name))
}

/// Makes a TAP, which is down. It vanishes with its descriptor.
pub(crate) fn make_tap(name: &str, mtu: u16) -> Result<OwnedFd, NetworkError> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).open(TUN_PATH).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => NetworkError::NoTun,
        _ if source.raw_os_error() == Some(libc::ENODEV) => NetworkError::NoTun,
        _ => fail("open", TUN_PATH)(source),
    })?;
    let tap = OwnedFd::from(file);
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let flags = u16::try_from(flags).unwrap_or_default();
    let mut ifreq = IfReq::new(name).map_err(fail("name", name))?.with(&flags.to_ne_bytes());
    ioctl_ifreq(tap.as_fd(), IfIoctl::TunSetIff, &mut ifreq).map_err(fail("make the interface", name))?;
    tap_set_header(tap.as_fd(), VNET_HEADER_BYTES).map_err(fail("set the header length of", name))?;
    tap_set_offloads(tap.as_fd()).map_err(fail("set the offloads of", name))?;
    // IPv6 on the host's side would only announce itself to the guest.
    if let Err(error) = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1") {
        tracing::debug!(name, %error, "IPv6 stays on");
    }
    let socket = control_socket().map_err(fail("open a socket for", name))?;
    let socket = socket.as_fd();
    let mtu = libc::c_int::from(mtu).to_ne_bytes();
    let mut ifreq = IfReq::new(name).map_err(fail("name", name))?.with(&mtu);
    ioctl_ifreq(socket, IfIoctl::SetMtu, &mut ifreq).map_err(fail("set the MTU of", name))?;
    Ok(tap)
}

/// Makes a TAP on the bridge. It vanishes with its descriptor.
pub(crate) fn open_tap(name: &str, bridge: &str) -> Result<OwnedFd, NetworkError> {
    let tap = make_tap(name, MTU)?;
    let socket = control_socket().map_err(fail("open a socket for", name))?;
    let socket = socket.as_fd();
    let mut ifreq = IfReq::new(name).map_err(fail("name", name))?;
    ioctl_ifreq(socket, IfIoctl::GetIndex, &mut ifreq).map_err(fail("find", name))?;
    let index = ifreq.value::<4>(0);
    let mut ifreq = IfReq::new(bridge).map_err(fail("name", bridge))?.with(&index);
    ioctl_ifreq(socket, IfIoctl::BridgeAdd, &mut ifreq).map_err(fail("add to the bridge", name))?;
    set_up(socket, name).map_err(fail("bring up", name))?;
    Ok(tap)
}
