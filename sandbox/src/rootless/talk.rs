//! What is asked of the keeper, and its answers: a byte and a descriptor, or a byte and why not.

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use crate::launch::scaled_ms;

/// How long an answer may take: starting pasta is in it.
const ANSWER_MS: u64 = 20_000;
/// First byte of an answer.
const YES: u8 = b'+';
const NO: u8 = b'-';
/// Longest reason for a refusal, bytes.
const MAX_REASON_BYTES: usize = 1024;

/// What somebody wants of the keeper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// The user namespace.
    User,
    /// The network namespace, with a way out.
    Network,
}

impl Wish {
    const fn byte(self) -> u8 {
        match self {
            Self::User => b'u',
            Self::Network => b'n',
        }
    }

    /// Reads one.
    pub(super) fn of(byte: u8) -> Option<Self> {
        [Self::User, Self::Network].into_iter().find(|wish| wish.byte() == byte)
    }
}

/// The descriptor that was asked for, and the connection: the keeper lives as long as somebody has it. Or why there is none.
pub(super) type Answer = Result<(OwnedFd, OwnedFd), String>;

/// Asks for something and waits for the answer.
pub(super) fn ask(socket: &Path, wish: Wish) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(scaled_ms(ANSWER_MS)))?;
    stream.write_all(&[wish.byte()])?;
    let mut bytes = vec![0; 1 + MAX_REASON_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(&stream, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let fd = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    match (bytes.get(..received.bytes).and_then(<[u8]>::split_first), fd) {
        (Some((&YES, _)), Some(fd)) => Ok(Ok((fd, stream.into()))),
        (Some((&NO, reason)), _) => Ok(Err(String::from_utf8_lossy(reason).into_owned())),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Whether somebody listens there.
pub(super) fn is_served(socket: &Path) -> bool {
    UnixStream::connect(socket).is_ok()
}

/// Answers, in one piece.
pub(super) fn answer(to: impl AsFd, answer: Result<BorrowedFd<'_>, &str>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let mut bytes = vec![if answer.is_ok() { YES } else { NO }];
    let fds: Vec<BorrowedFd<'_>> = answer.ok().into_iter().collect();
    match answer {
        Ok(_) => {
            ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        }
        Err(reason) => bytes.extend(reason.bytes().take(MAX_REASON_BYTES)),
    }
    sendmsg(to, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn descriptors_and_reasons_arrive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            for wish in [Wish::User, Wish::Network] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                assert_eq!(Wish::of(byte[0]), Some(wish));
                let null = std::fs::File::open("/dev/null").unwrap();
                answer(&stream, if wish == Wish::User { Ok(null.as_fd()) } else { Err("none left") })
                    .unwrap();
            }
            // The third is hung up on.
            drop(listener.accept().unwrap());
        });
        let (null, _connection) = ask(&path, Wish::User).unwrap().unwrap();
        assert_eq!(rustix::fs::fstat(&null).unwrap().st_rdev, rustix::fs::stat("/dev/null").unwrap().st_rdev);
        assert_eq!(ask(&path, Wish::Network).unwrap().unwrap_err(), "none left");
        assert!(ask(&path, Wish::User).is_err());
        server.join().unwrap();
        assert!(!is_served(&path) && Wish::of(b'x').is_none());
    }
}
