//! The control socket: packets of JSON, the first one with descriptors.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use hyper_vmm_spec::FdSlot;
use hyper_vmm_spec::control::{MAX_FDS, MAX_PACKET_BYTES, Message, Request};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, SocketType, recvmsg, send,
    sockopt,
};

use crate::log;

/// The VMM's end of the socket pair.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    fd: OwnedFd,
}

/// What came in.
#[derive(Debug)]
pub(crate) enum Packet {
    /// The owner has closed its end.
    Closed,
    /// A request and the descriptors that came with it.
    Request(Box<Request>, Descriptors),
    /// Something that is not a request; why not.
    Bad(String),
}

/// Why standard input is no control socket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    #[error(
        "standard input is not a control socket: this program is started by hyper, not by hand (try --probe)"
    )]
    NotASocket,
    #[error("cannot duplicate standard input")]
    Duplicate(#[source] io::Error),
}

impl ControlSocket {
    /// Takes standard input, which must be a `SOCK_SEQPACKET` socket.
    pub(crate) fn from_stdin() -> Result<Self, SocketError> {
        let stdin = io::stdin();
        match sockopt::socket_type(&stdin) {
            Ok(SocketType::SEQPACKET) => {}
            _ => return Err(SocketError::NotASocket),
        }
        let fd = stdin.as_fd().try_clone_to_owned().map_err(SocketError::Duplicate)?;
        Ok(Self { fd })
    }

    /// Waits for one packet.
    pub(crate) fn receive(&self) -> io::Result<Packet> {
        let mut bytes = vec![0; MAX_PACKET_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let message = rustix::io::retry_on_intr(|| {
            recvmsg(&self.fd, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        });
        let message = match message {
            Ok(message) => message,
            Err(rustix::io::Errno::CONNRESET) => return Ok(Packet::Closed),
            Err(e) => return Err(e.into()),
        };
        let mut fds = Vec::new();
        for part in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = part {
                fds.extend(received.map(Some));
            }
        }
        if message.bytes == 0 {
            return Ok(Packet::Closed);
        }
        if message.flags.contains(ReturnFlags::TRUNC) {
            return Ok(Packet::Bad(format!("request of more than {MAX_PACKET_BYTES} bytes")));
        }
        if message.flags.contains(ReturnFlags::CTRUNC) {
            return Ok(Packet::Bad(format!(
                "more than {MAX_FDS} descriptors, or no room for them in this process"
            )));
        }
        Ok(match serde_json::from_slice(bytes.get(..message.bytes).unwrap_or_default()) {
            Ok(request) => Packet::Request(Box::new(request), Descriptors(fds)),
            Err(e) => Packet::Bad(format!("bad request: {e}")),
        })
    }

    /// Sends one packet. The owner is not waited for: one that lets hundreds of messages pile up has lost them.
    pub(crate) fn send(&self, message: &Message) {
        let sent = serde_json::to_vec(message).map_err(io::Error::from).and_then(|bytes| {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            Ok(rustix::io::retry_on_intr(|| send(&self.fd, &bytes, flags))?)
        });
        match sent {
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
                log::line(format_args!("cannot send to the owner: {e}"));
            }
            _ => {}
        }
    }
}

impl AsRawFd for ControlSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Descriptors that came with the boot request; each is taken once.
#[derive(Debug, Default)]
pub(crate) struct Descriptors(Vec<Option<OwnedFd>>);

/// A descriptor that the spec names and that is not there.
#[derive(Debug, thiserror::Error)]
#[error("descriptor {slot} for {what} did not come with the boot request, or is named twice")]
pub(crate) struct MissingDescriptor {
    slot: u32,
    what: &'static str,
}

impl Descriptors {
    /// Takes the descriptor at `slot`; `what` it is for goes into the error.
    pub(crate) fn take(&mut self, slot: FdSlot, what: &'static str) -> Result<OwnedFd, MissingDescriptor> {
        let found = usize::try_from(slot.0).ok().and_then(|n| self.0.get_mut(n)).and_then(Option::take);
        found.ok_or(MissingDescriptor { slot: slot.0, what })
    }
}
