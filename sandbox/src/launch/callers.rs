//! Connections of the guest to a port of the host, as the VMM hands them over: it has no path to look a listener up by.
//!
//! The VMM may be in the guest's hands, so whatever comes is looked at before it is used.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType, recvmsg,
    socketpair, sockopt,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Who serves a port takes connections here.
#[derive(Debug)]
pub(crate) struct Callers {
    /// Tokio's type is used for its readiness only; it is a `SOCK_SEQPACKET` socket.
    socket: UnixStream,
}

/// A port of the host that a guest may connect to, and the VMM's end of its socket.
#[derive(Debug)]
pub(crate) struct HostPortPlan {
    pub(crate) port: u32,
    pub(crate) socket: OwnedFd,
}

impl Callers {
    /// A port to be served, and what the VMM is given for it.
    pub(crate) fn of_port(port: u32) -> io::Result<(Self, HostPortPlan)> {
        let (near, socket) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let flags = rustix::fs::fcntl_getfl(&near)?;
        rustix::fs::fcntl_setfl(&near, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok((Self { socket: UnixStream::from_std(near.into())? }, HostPortPlan { port, socket }))
    }

    /// Waits for the next connection. `Ok(None)`: there will be none, because no VMM has the other end any more.
    ///
    /// # Errors
    /// What came was none; the next may be one.
    pub(crate) async fn next(&self) -> io::Result<Option<UnixStream>> {
        let received = self.socket.async_io(Interest::READABLE, || receive(&self.socket)).await?;
        let Some(stream) = received else { return Ok(None) };
        let stream = std::os::unix::net::UnixStream::from(stream);
        stream.set_nonblocking(true)?;
        UnixStream::from_std(stream).map(Some)
    }
}

fn receive(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    // Descriptors that there is no room for are closed by the kernel.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0; 1];
    let message = match recvmsg(
        socket.as_fd(),
        &mut [IoSliceMut::new(&mut byte)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    ) {
        Err(rustix::io::Errno::CONNRESET) => return Ok(None),
        other => other?,
    };
    let mut came = ancillary.drain().filter_map(|part| match part {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    match came.next() {
        Some(fd) if is_stream(&fd) => Ok(Some(fd)),
        None if message.bytes == 0 => Ok(None),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn is_stream(fd: &OwnedFd) -> bool {
    sockopt::socket_type(fd) == Ok(SocketType::STREAM)
        && sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX)
}

/// The VMM's end, played by a test.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    pub(crate) fn hand_over(plan: &HostPortPlan, fds: &[&OwnedFd]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        sendmsg(&plan.socket, &[io::IoSlice::new(&[0])], &mut ancillary, SendFlags::empty()).unwrap();
    }

    /// A connection of the guest; its end.
    pub(crate) fn call(plan: &HostPortPlan) -> std::os::unix::net::UnixStream {
        let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        hand_over(plan, &[&OwnedFd::from(far)]);
        near
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{call, hand_over};
    use super::*;
    use std::io::Write;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn connections_come_in_order_until_nobody_has_the_other_end() {
        let (callers, plan) = Callers::of_port(7).unwrap();
        for word in ["one", "two"] {
            call(&plan).write_all(word.as_bytes()).unwrap();
        }
        for word in ["one", "two"] {
            let mut text = String::new();
            callers.next().await.unwrap().unwrap().read_to_string(&mut text).await.unwrap();
            assert_eq!(text, word);
        }
        drop(plan);
        assert!(callers.next().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn what_is_no_connection_is_an_error_and_not_kept() {
        let (callers, plan) = Callers::of_port(7).unwrap();
        let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let datagrams = OwnedFd::from(std::os::unix::net::UnixDatagram::unbound().unwrap());
        let network = OwnedFd::from(std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        for fds in [&[][..], &[&file], &[&datagrams], &[&network], &[&file, &file, &file]] {
            hand_over(&plan, fds);
            assert_eq!(callers.next().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        let _guest = call(&plan);
        assert!(callers.next().await.unwrap().is_some());
    }
}
