//! The guest's connections to ports of the host: one end of a pair of sockets goes to whoever serves the port.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sendmsg,
    socketpair,
};

/// The ports that are served, each with a connected `SOCK_SEQPACKET` socket to who serves it.
#[derive(Debug, Default)]
pub struct Callers(HashMap<u32, OwnedFd>);

impl Callers {
    /// These ports and their sockets.
    #[must_use]
    pub fn new(ports: impl IntoIterator<Item = (u32, OwnedFd)>) -> Self {
        Self(ports.into_iter().collect())
    }

    /// Makes a connection to a port and hands its other end over, with a packet of one byte. Nobody is waited for: who serves the port and
    /// does not take what has come gets no more, and the guest is refused.
    pub(super) fn call(&self, port: u32) -> io::Result<UnixStream> {
        let service = self.0.get(&port).ok_or(io::ErrorKind::ConnectionRefused)?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (near, far) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let far = [far.as_fd()];
        if !ancillary.push(SendAncillaryMessage::ScmRights(&far)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        rustix::io::retry_on_intr(|| sendmsg(service, &[IoSlice::new(&[0])], &mut ancillary, flags))?;
        Ok(near.into())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    use std::io::{IoSliceMut, Read, Write};

    /// A socket for a port, and the end of who serves it.
    pub(in crate::vsock) fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    /// Takes the next connection.
    pub(in crate::vsock) fn answer(service: &OwnedFd) -> UnixStream {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [1];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let message = recvmsg(service, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, flags).unwrap();
        assert_eq!(message.bytes, 1);
        let mut streams = ancillary.drain().filter_map(|part| match part {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        streams.next().unwrap().into()
    }

    #[test]
    fn a_call_arrives_or_is_refused() {
        let (service, far) = pair();
        let callers = Callers::new([(52, service)]);
        assert_eq!(callers.call(53).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let mut near = callers.call(52).unwrap();
        near.write_all(b"hello").unwrap();
        drop(near);
        let mut text = String::new();
        answer(&far).read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        drop(far);
        assert!(callers.call(52).is_err(), "nobody serves it any more");
    }

    #[test]
    fn who_does_not_answer_is_not_waited_for() {
        let (service, far) = pair();
        let callers = Callers::new([(52, service)]);
        let waiting = (0..10_000).take_while(|_| callers.call(52).is_ok()).count();
        assert!(waiting < 10_000, "the socket never fills up");
        drop(answer(&far));
        assert!(callers.call(52).is_ok());
    }
}
