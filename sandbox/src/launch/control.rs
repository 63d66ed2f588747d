//! The VMM's control socket: requests in order, events at any time, and how the machine ended.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_vmm_spec::control::{Event, ExitCause, MAX_FDS, MAX_PACKET_BYTES, Message, Reply, Request};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    recv, sendmsg, socketpair,
};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::VmError;

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum VmEnd {
    /// In order: the guest powered off, or we asked.
    Ended,
    /// The guest's kernel crashed, or the machine faulted; with the last lines on its console.
    Crashed { what: String, last_lines: Vec<String> },
    /// The VMM is gone without a word.
    Lost,
    /// The file server of its shares is gone, so the machine is ended.
    Unserved,
}

impl VmEnd {
    /// One line for a person.
    pub(crate) fn message(&self) -> String {
        match self {
            Self::Ended => "the virtual machine has ended".to_owned(),
            Self::Crashed { what, last_lines } => {
                // The line that says what happened is rarely the last: a panic ends in a trace.
                let telling =
                    last_lines.iter().find(|line| line.contains("Kernel panic") || line.contains("BUG:"));
                match telling.or(last_lines.last()) {
                    Some(line) => format!("{what}: {line}"),
                    None => what.clone(),
                }
            }
            Self::Lost => "hyper-vmm ended unexpectedly".to_owned(),
            Self::Unserved => "hyper-fs, which serves its shared directories, ended unexpectedly".to_owned(),
        }
    }

    fn from_cause(cause: ExitCause) -> Self {
        match cause {
            ExitCause::PowerOff | ExitCause::Shutdown => Self::Ended,
            ExitCause::GuestCrash { last_lines } => {
                Self::Crashed { what: "guest kernel crashed".to_owned(), last_lines }
            }
            ExitCause::Fault { reason, last_lines } => {
                Self::Crashed { what: format!("virtual machine fault: {reason}"), last_lines }
            }
        }
    }
}

type Waiting = oneshot::Sender<Result<Reply, String>>;

/// Our end of the socket. The machine ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Control {
    socket: Arc<UnixStream>,
    waiting: Arc<Mutex<VecDeque<Waiting>>>,
    sending: tokio::sync::Mutex<()>,
    ended: watch::Receiver<Option<VmEnd>>,
    /// Serial of the latest request for memory that the guest has met.
    memory: watch::Receiver<u64>,
    reader: JoinHandle<()>,
}

impl Drop for Control {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Makes the socket: our end, and the VMM's, which becomes its standard input.
pub(crate) fn pair() -> io::Result<(Control, OwnedFd)> {
    let (near, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let flags = rustix::fs::fcntl_getfl(&near)?;
    rustix::fs::fcntl_setfl(&near, flags | rustix::fs::OFlags::NONBLOCK)?;
    Ok((Control::new(near)?, far))
}

impl Control {
    fn new(socket: OwnedFd) -> io::Result<Self> {
        // Tokio's type is used for its readiness only; packets are sent and received by calls of our own.
        let socket = Arc::new(UnixStream::from_std(socket.into())?);
        let waiting = Arc::new(Mutex::new(VecDeque::new()));
        let (tell, ended) = watch::channel(None);
        let (tell_memory, memory) = watch::channel(0);
        let reader = tokio::spawn(read(Arc::clone(&socket), Arc::clone(&waiting), tell, tell_memory));
        Ok(Self { socket, waiting, sending: tokio::sync::Mutex::new(()), ended, memory, reader })
    }

    /// Sends a request, with descriptors, and waits for its answer.
    pub(crate) async fn request(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<Reply, VmError> {
        let packet = serde_json::to_vec(request).map_err(|error| VmError::Control(error.to_string()))?;
        if packet.len() > MAX_PACKET_BYTES || fds.len() > MAX_FDS {
            return Err(VmError::Control(format!(
                "request of {} bytes and {} descriptors",
                packet.len(),
                fds.len()
            )));
        }
        let (tell, told) = oneshot::channel();
        let exchange = async {
            {
                // Answers come in the order of requests, so the two queues must agree.
                let _order = self.sending.lock().await;
                self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push_back(tell);
                let send = || send_packet(&self.socket, &packet, fds);
                let sent = self.socket.async_io(Interest::WRITABLE, send).await;
                sent.map_err(|error| VmError::Control(error.to_string()))?;
            }
            told.await.map_err(|_| VmError::Control("closed".into()))?.map_err(VmError::Refused)
        };
        match timeout(limit, exchange).await {
            Ok(answer) => answer,
            Err(_) => Err(VmError::Control("hyper-vmm does not answer".into())),
        }
    }

    /// The serial of the latest request for memory that the guest has met.
    pub(super) fn memory(&self) -> watch::Receiver<u64> {
        self.memory.clone()
    }

    /// Waits until the machine has ended.
    pub(crate) async fn ended(&self) -> VmEnd {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(end) => end.clone().unwrap_or(VmEnd::Lost),
            Err(_) => VmEnd::Lost,
        }
    }
}

fn send_packet(socket: &UnixStream, packet: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    sendmsg(socket, &[IoSlice::new(packet)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Reads until the VMM closes.
async fn read(
    socket: Arc<UnixStream>,
    waiting: Arc<Mutex<VecDeque<Waiting>>>,
    tell: watch::Sender<Option<VmEnd>>,
    tell_memory: watch::Sender<u64>,
) {
    let mut buffer = vec![0; MAX_PACKET_BYTES + 1];
    loop {
        let receive = || Ok(recv(&socket, buffer.as_mut_slice(), RecvFlags::empty())?.1);
        let len = match socket.async_io(Interest::READABLE, receive).await {
            Ok(len) => len,
            Err(error) => {
                tracing::debug!(%error, "control socket");
                0
            }
        };
        if len == 0 || len > MAX_PACKET_BYTES {
            break;
        }
        match serde_json::from_slice::<Message>(buffer.get(..len).unwrap_or_default()) {
            Ok(Message::Reply { result }) => {
                let first = waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                if let Some(first) = first {
                    // Nobody waits any more if the request timed out.
                    let _ = first.send(result);
                }
            }
            Ok(Message::Event { event: Event::AgentReady }) => {}
            Ok(Message::Event { event: Event::MemoryReached { serial } }) => {
                tell_memory.send_replace(serial);
            }
            Ok(Message::Event { event: Event::Exited { cause, .. } }) => {
                tell.send_replace(Some(VmEnd::from_cause(cause)));
            }
            Err(error) => {
                tracing::error!(%error, "hyper-vmm said what is not understood");
                break;
            }
        }
    }
    waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
    tell.send_if_modified(|end| {
        let lost = end.is_none();
        if lost {
            *end = Some(VmEnd::Lost);
        }
        lost
    });
}

/// The VMM's end, played by a test.
#[cfg(test)]
pub(super) mod testing {
    use super::*;

    pub(in crate::launch) fn say(far: &OwnedFd, message: &Message) {
        rustix::net::send(far, &serde_json::to_vec(message).unwrap(), SendFlags::empty()).unwrap();
    }

    pub(in crate::launch) fn done(far: &OwnedFd) {
        say(far, &Message::Reply { result: Ok(Reply::Done) });
    }

    pub(in crate::launch) fn memory_reached(far: &OwnedFd, serial: u64) {
        say(far, &Message::Event { event: Event::MemoryReached { serial } });
    }

    pub(in crate::launch) fn hear(far: &OwnedFd) -> Request {
        hear_until_closed(far).unwrap()
    }

    pub(in crate::launch) fn hear_until_closed(far: &OwnedFd) -> Option<Request> {
        let mut buffer = vec![0; MAX_PACKET_BYTES];
        let (_, len) = recv(far, buffer.as_mut_slice(), RecvFlags::empty()).unwrap();
        (len > 0).then(|| serde_json::from_slice(&buffer[..len]).unwrap())
    }
}

#[cfg(test)]
mod tests {
    use hyper_vmm_spec::control::{RunState, Timeline};

    use super::testing::{hear, say};
    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn answers_come_in_order_among_events() {
        let (control, far) = pair().unwrap();
        let state = Reply::State { state: RunState::Running, timeline: Default::default() };
        let expected = state.clone();
        let vmm = std::thread::spawn(move || {
            assert_eq!(hear(&far), Request::State);
            say(&far, &Message::Event { event: Event::AgentReady });
            say(&far, &Message::Reply { result: Ok(state) });
            assert_eq!(hear(&far), Request::Pause);
            say(&far, &Message::Reply { result: Err("not now".into()) });
        });
        assert_eq!(control.request(&Request::State, &[], LIMIT).await.unwrap(), expected);
        let refused = control.request(&Request::Pause, &[], LIMIT).await.unwrap_err();
        assert_eq!(refused.to_string(), "not now");
        vmm.join().unwrap();
        assert_eq!(control.ended().await, VmEnd::Lost);
        assert!(control.request(&Request::State, &[], LIMIT).await.is_err());
    }

    #[tokio::test]
    async fn the_telling_line_of_a_crash_is_kept() {
        let (control, far) = pair().unwrap();
        let last_lines =
            vec!["[ 1.0] Kernel panic - not syncing: test".to_owned(), "[ 1.1] trace".to_owned()];
        say(
            &far,
            &Message::Event {
                event: Event::Exited {
                    cause: ExitCause::GuestCrash { last_lines },
                    timeline: Timeline::default(),
                },
            },
        );
        drop(far);
        let end = control.ended().await;
        assert_eq!(end.message(), "guest kernel crashed: [ 1.0] Kernel panic - not syncing: test");
    }

    #[tokio::test]
    async fn nonsense_and_silence_are_an_end() {
        let (control, far) = pair().unwrap();
        rustix::net::send(&far, b"hello", SendFlags::empty()).unwrap();
        assert_eq!(control.ended().await, VmEnd::Lost);
        let (control, _far) = pair().unwrap();
        let error = control.request(&Request::State, &[], Duration::from_millis(10)).await.unwrap_err();
        assert!(matches!(error, VmError::Control(_)));
    }
}
