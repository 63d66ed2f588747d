//! Anything to talk to: the host's network, its sockets, and who listens on them. The case that starts the stand-in has listeners ready.

use std::io;
use std::net::{TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

use super::{Attempt, any, held, works};
use crate::sys::{address, call};

/// Where the case listens.
const TCP: &str = "127.0.0.1:47113";
const TCP6: &str = "[::1]:47113";
const ABSTRACT: &[u8] = b"hyper-stand-in";
const PATH: &str = "/run/hyper-stand-in.sock";

pub(super) const ALL: &[Attempt] = &[
    held("connect to the host over IPv4", |_| TcpStream::connect(TCP).map(drop)),
    held("connect to the host over IPv6", |_| TcpStream::connect(TCP6).map(drop)),
    held("send a datagram", |_| UdpSocket::bind("0.0.0.0:0")?.send_to(b"x", TCP).map(drop)),
    held("send a datagram beyond the host", |_| {
        UdpSocket::bind("0.0.0.0:0")?.send_to(b"x", "192.0.2.1:9").map(drop)
    })
    .inside_only(),
    held("see the host's interfaces", |_| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&socket).unsigned_abs() as usize;
        // SIOCGIFNAME of the interfaces after the loopback.
        any((2_u32..64).map(|index| {
            let mut request = [0_u32; 10];
            request[4] = index;
            works(libc::SYS_ioctl, &[fd, libc::SIOCGIFNAME as usize, address(&request)])
        }))
    })
    .inside_only(),
    held("open a raw socket", |_| socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)),
    held("open a packet socket", |_| socket(libc::AF_PACKET, libc::SOCK_RAW, 0)),
    held("speak netlink", |_| socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)).only_filter(),
    held("speak vsock", |_| socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)).only_filter(),
    held("use the kernel's ciphers", |_| socket(libc::AF_ALG, libc::SOCK_SEQPACKET, 0)).only_filter(),
    held("make any Unix socket", |_| socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0)).only_filter(),
    held("make a pair of datagram sockets", |_| {
        let pair = [0_i32; 2];
        works(libc::SYS_socketpair, &[libc::AF_UNIX as usize, libc::SOCK_DGRAM as usize, 0, address(&pair)])
    })
    .only_filter(),
    held("reach an abstract socket of the host", |_| {
        let to = SocketAddrUnix::new_abstract_name(ABSTRACT)?;
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
        Ok(rustix::net::connect(&socket, &to)?)
    }),
    held("reach a socket of the host by its path", |_| UnixStream::connect(PATH).map(drop)),
    held("reach containerd", |_| UnixStream::connect("/run/containerd/containerd.sock").map(drop))
        .inside_only(),
    held("reach docker", |_| UnixStream::connect("/run/docker.sock").map(drop)).inside_only(),
    held("reach the system's bus", |_| UnixStream::connect("/run/dbus/system_bus_socket").map(drop))
        .inside_only(),
    held("reach a socket of this sandbox by its path", |world| {
        any(world.handed.iter().filter_map(|fd| {
            let name = rustix::net::getsockname(fd).ok()?;
            let name = SocketAddrUnix::try_from(name).ok()?;
            let path = name.path()?.to_str().ok()?.to_owned();
            Some(UnixStream::connect(path).map(drop))
        }))
    })
    .inside_only(),
    held("make an interface", |_| {
        const TUN: &str = "/dev/net/tun";
        std::fs::File::open(TUN).map(drop)
    }),
];

fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<()> {
    let arguments = [family, kind, protocol].map(|number| number.unsigned_abs() as usize);
    call(libc::SYS_socket, &arguments).map(drop)
}
