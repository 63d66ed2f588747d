//! Raw connections from the host, waiting for the request that names them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::{Notify, oneshot};
use tokio::time::timeout;
use tokio_vsock::{VsockListener, VsockStream};

use crate::error::{AgentError, ErrorKind};
use crate::log;

/// Most connections that wait to be named.
pub(crate) const MAX_UNCLAIMED: usize = 256;
/// The host's address.
pub(crate) const HOST_CID: u32 = 2;
/// How long an unclaimed connection is kept, and a request waits for one that it names.
const CLAIM_TIMEOUT: Duration = Duration::from_millis(hyper_protocol::STREAM_CLAIM_TIMEOUT_MS);

#[derive(Debug)]
enum Entry<S> {
    /// Connected, not named yet.
    Waiting(S),
    /// Named, not connected yet.
    Wanted(oneshot::Sender<S>),
}

#[derive(Debug)]
struct Inner<S> {
    entries: HashMap<u64, Entry<S>>,
    /// Connections that have not said their id.
    unnamed: usize,
}

/// All connections that are not in use yet.
#[derive(Debug)]
pub(crate) struct Streams<S = VsockStream> {
    inner: Mutex<Inner<S>>,
    /// Wakes the accept loop when there is room again.
    room: Notify,
}

impl<S> Default for Streams<S> {
    fn default() -> Self {
        let inner = Mutex::new(Inner { entries: HashMap::new(), unnamed: 0 });
        Self { inner, room: Notify::new() }
    }
}

impl Streams {
    /// Accepts connections for ever.
    pub(crate) async fn serve(self: Arc<Self>, listener: VsockListener) {
        loop {
            let full = self.inner.lock().map_or(0, |i| i.unnamed.saturating_add(i.entries.len()));
            if full >= MAX_UNCLAIMED {
                self.room.notified().await;
                continue;
            }
            match listener.accept().await {
                Ok((stream, peer)) if peer.cid() == HOST_CID => {
                    self.expect_one();
                    tokio::spawn(Arc::clone(&self).name(stream));
                }
                Ok(_) => {}
                Err(error) => {
                    log::error(format!("accept a stream: {error}"));
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl<S: AsyncRead + Unpin> Streams<S> {
    fn expect_one(&self) {
        if let Ok(mut inner) = self.inner.lock() {
            inner.unnamed = inner.unnamed.saturating_add(1);
        }
    }

    /// Reads a connection's id and keeps it until it is claimed or too old.
    async fn name(self: Arc<Self>, mut stream: S) {
        let mut id = [0; 8];
        let named = timeout(CLAIM_TIMEOUT, stream.read_exact(&mut id)).await;
        let id = u64::from_le_bytes(id);
        let accepted = match self.inner.lock() {
            Ok(mut inner) => {
                inner.unnamed = inner.unnamed.saturating_sub(1);
                matches!(named, Ok(Ok(_))) && id != 0 && inner.arrive(id, stream)
            }
            Err(_) => false,
        };
        self.room.notify_one();
        if !accepted {
            return;
        }
        tokio::time::sleep(CLAIM_TIMEOUT).await;
        if let Ok(mut inner) = self.inner.lock()
            && matches!(inner.entries.get(&id), Some(Entry::Waiting(_)))
        {
            inner.entries.remove(&id);
        }
        self.room.notify_one();
    }

    /// Takes the connection with this id; waits for it a while.
    ///
    /// # Errors
    /// It does not come, or someone else waits for it.
    pub(crate) async fn claim(&self, id: u64) -> Result<S, AgentError> {
        let wanted = {
            let Ok(mut inner) = self.inner.lock() else {
                return Err(AgentError::state("the streams are not usable any more"));
            };
            match inner.entries.remove(&id) {
                Some(Entry::Waiting(stream)) => {
                    drop(inner);
                    self.room.notify_one();
                    return Ok(stream);
                }
                Some(wanted @ Entry::Wanted(_)) => {
                    inner.entries.insert(id, wanted);
                    return Err(AgentError::invalid(format!("stream {id} is named twice")));
                }
                None => {}
            }
            if inner.entries.len() >= MAX_UNCLAIMED {
                return Err(AgentError::limit("streams that wait", MAX_UNCLAIMED));
            }
            let (sender, receiver) = oneshot::channel();
            inner.entries.insert(id, Entry::Wanted(sender));
            receiver
        };
        let _forget = Forget { streams: self, id };
        match timeout(CLAIM_TIMEOUT, wanted).await {
            Ok(Ok(stream)) => Ok(stream),
            _ => Err(AgentError::refused(ErrorKind::Deadline, format!("stream {id} did not connect"))),
        }
    }
}

impl<S> Inner<S> {
    fn arrive(&mut self, id: u64, stream: S) -> bool {
        match self.entries.remove(&id) {
            None => {
                self.entries.insert(id, Entry::Waiting(stream));
                true
            }
            // Who wanted it may have given up; then it is closed here.
            Some(Entry::Wanted(sender)) => {
                let _ = sender.send(stream);
                false
            }
            // Used twice: the first one stays.
            Some(waiting @ Entry::Waiting(_)) => {
                self.entries.insert(id, waiting);
                false
            }
        }
    }
}

/// Removes the mark of a request that waits, however it ends.
struct Forget<'a, S> {
    streams: &'a Streams<S>,
    id: u64,
}

impl<S> Drop for Forget<'_, S> {
    fn drop(&mut self) {
        if let Ok(mut inner) = self.streams.inner.lock()
            && matches!(inner.entries.get(&self.id), Some(Entry::Wanted(_)))
        {
            inner.entries.remove(&self.id);
        }
        self.streams.room.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncWriteExt, DuplexStream, duplex};

    fn connect(streams: &Arc<Streams<DuplexStream>>) -> DuplexStream {
        let (ours, theirs) = duplex(64);
        streams.expect_one();
        tokio::spawn(Arc::clone(streams).name(theirs));
        ours
    }

    async fn settle() {
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_request_may_come_before_its_connection_and_after() {
        let streams = Arc::new(Streams::default());
        let mut first = connect(&streams);
        first.write_all(&7_u64.to_le_bytes()).await.unwrap();
        first.write_all(b"x").await.unwrap();
        settle().await;
        assert_eq!(streams.claim(7).await.unwrap().read_u8().await.unwrap(), b'x');
        let claim = tokio::spawn({
            let streams = Arc::clone(&streams);
            async move { streams.claim(8).await }
        });
        settle().await;
        assert!(streams.claim(8).await.is_err(), "named twice");
        let mut second = connect(&streams);
        second.write_all(&8_u64.to_le_bytes()).await.unwrap();
        assert!(claim.await.unwrap().is_ok());
        assert_eq!(streams.inner.lock().unwrap().unnamed, 0);
    }

    #[tokio::test]
    async fn an_id_used_twice_and_none_at_all_are_closed() {
        let streams = Arc::new(Streams::default());
        let mut first = connect(&streams);
        first.write_all(&[&3_u64.to_le_bytes()[..], b"1"].concat()).await.unwrap();
        settle().await;
        let mut second = connect(&streams);
        second.write_all(&[&3_u64.to_le_bytes()[..], b"2"].concat()).await.unwrap();
        let mut zero = connect(&streams);
        zero.write_all(&0_u64.to_le_bytes()).await.unwrap();
        settle().await;
        assert_eq!(second.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(zero.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(streams.claim(3).await.unwrap().read_u8().await.unwrap(), b'1');
    }

    #[tokio::test]
    async fn requests_that_are_given_up_leave_nothing() {
        let streams: Arc<Streams<DuplexStream>> = Arc::default();
        let given_up = timeout(Duration::from_millis(1), streams.claim(5)).await;
        assert!(given_up.is_err());
        assert!(streams.inner.lock().unwrap().entries.is_empty());
    }
}
