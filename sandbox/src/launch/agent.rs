//! The way to the agent: RPC and streams over the VMM's vsock socket.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper_protocol::rpc::agent_ttrpc::AgentClient;
use hyper_protocol::{DOORBELL_MAX_BYTES, Doorbell, RPC_PORT, STREAM_PORT, TRACE_KEY};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::callers::Callers;
use super::{VmError, scaled_ms};

/// A stream of a process, as a raw connection.
pub(crate) type Stream = UnixStream;

/// How long a connection to a port of the guest may take.
const CONNECT_MS: u64 = 5_000;
/// Longest answer of the VMM to `CONNECT`, bytes: `OK ` and a port number.
const MAX_ANSWER_BYTES: usize = 32;
/// How long a request that needs no waiting may take.
const CALL_MS: u64 = 20_000;

/// A connection to an agent that serves.
pub(crate) struct Agent {
    pub(crate) rpc: AgentClient,
    /// The connection of the client, to end it.
    connection: std::os::unix::net::UnixStream,
    vsock: PathBuf,
    next_stream: AtomicU64,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("vsock", &self.vsock).finish_non_exhaustive()
    }
}

/// What goes with a request: its deadline, `None` for one that waits; and that its steps are to be kept, when spans are exported.
pub(crate) fn context(limit: Option<Duration>) -> ttrpc::context::Context {
    let mut context = limit.map_or_else(|| ttrpc::context::with_timeout(0), ttrpc::context::with_duration);
    if let Some(trace) = crate::trace::key() {
        context.add(TRACE_KEY.to_owned(), trace.to_string());
    }
    context
}

/// The deadline of a request that is never traced.
pub(crate) fn untraced(limit: Duration) -> ttrpc::context::Context {
    ttrpc::context::with_duration(limit)
}

/// The deadline of a request that needs no waiting.
pub(crate) fn call() -> ttrpc::context::Context {
    context(Some(scaled_ms(CALL_MS)))
}

/// What the agent said no to, or that it did not answer.
pub(crate) fn rpc_error(call: &'static str) -> impl FnOnce(ttrpc::Error) -> VmError {
    move |error| match error {
        ttrpc::Error::RpcStatus(status) => VmError::Agent { call, message: status.message },
        source => VmError::Rpc { call, source },
    }
}

impl Agent {
    /// Connects to the RPC port.
    pub(crate) async fn connect(vsock: &Path) -> Result<Self, VmError> {
        let fail = |source| VmError::Connect { port: RPC_PORT, source };
        let stream = connect_port(vsock, RPC_PORT).await?.into_std().map_err(fail)?;
        let connection = stream.try_clone().map_err(fail)?;
        let stream = UnixStream::from_std(stream).map_err(fail)?;
        let client = ttrpc::r#async::Client::new(ttrpc::r#async::transport::Socket::new(stream));
        Ok(Self {
            rpc: AgentClient::new(client),
            connection,
            vsock: vsock.to_owned(),
            next_stream: AtomicU64::new(1),
        })
    }

    /// Ends the connection, whoever still holds this: after its last answer the agent waits for that.
    pub(crate) fn hang_up(&self) {
        if let Err(error) = self.connection.shutdown(std::net::Shutdown::Both) {
            tracing::debug!(%error, "the connection to the agent had ended");
        }
    }

    /// The id of the next stream. A guest that goes on from one that was saved may remember those before it.
    pub(crate) fn next_stream(&self) -> u64 {
        self.next_stream.load(Ordering::Relaxed)
    }

    /// Begins streams with this id.
    pub(crate) fn begin_streams(&self, id: u64) {
        self.next_stream.store(id, Ordering::Relaxed);
    }

    /// Opens a stream and returns the id by which a request claims it.
    pub(crate) async fn open_stream(&self) -> Result<(u64, Stream), VmError> {
        let id = self.next_stream.fetch_add(1, Ordering::Relaxed);
        let mut stream = connect_port(&self.vsock, STREAM_PORT).await?;
        let fail = |source| VmError::Connect { port: STREAM_PORT, source };
        stream.write_all(&id.to_le_bytes()).await.map_err(fail)?;
        Ok((id, stream))
    }
}

/// Connects to a port of the guest through the VMM.
pub(crate) async fn connect_port(vsock: &Path, port: u32) -> Result<UnixStream, VmError> {
    let fail = |source| VmError::Connect { port, source };
    let connect = async {
        let mut stream = UnixStream::connect(vsock).await?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
        let answer = read_line(&mut stream, MAX_ANSWER_BYTES).await?;
        if !answer.starts_with(b"OK ") {
            return Err(io::Error::from(io::ErrorKind::ConnectionRefused));
        }
        Ok(stream)
    };
    match timeout(scaled_ms(CONNECT_MS), connect).await {
        Ok(stream) => stream.map_err(fail),
        Err(_) => Err(fail(io::ErrorKind::TimedOut.into())),
    }
}

/// Reads one line, byte by byte: what comes after it belongs to somebody else.
async fn read_line(stream: &mut UnixStream, limit: usize) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        if line.len() >= limit {
            return Err(io::ErrorKind::InvalidData.into());
        }
        line.push(stream.read_u8().await?);
    }
    Ok(line)
}

/// Waits for the doorbell.
pub(crate) async fn doorbell(callers: &Callers) -> Result<Doorbell, VmError> {
    let fail = |source| VmError::Descriptor { what: "a connection of the doorbell", source };
    // A VMM that has gone is told of by its control socket, with a reason.
    let Some(mut stream) = callers.next().await.map_err(fail)? else { std::future::pending().await };
    let line = read_line(&mut stream, DOORBELL_MAX_BYTES).await.map_err(fail)?;
    Ok(Doorbell::parse(&line)?)
}

#[cfg(test)]
mod tests {
    use super::super::callers::testing::call;
    use super::*;
    use std::io::Write;
    use tokio::net::UnixListener;

    async fn answering(answer: &'static [u8]) -> Result<UnixStream, VmError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let vmm = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            assert_eq!(read_line(&mut stream, 64).await.unwrap(), b"CONNECT 1025\n");
            stream.write_all(answer).await.unwrap();
        });
        let connected = connect_port(&path, STREAM_PORT).await;
        vmm.await.unwrap();
        connected
    }

    #[tokio::test]
    async fn ports_are_connected_and_nothing_is_swallowed() {
        let mut stream = answering(b"OK 1073741824\nhello").await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hello");
    }

    #[tokio::test]
    async fn refusals_and_floods_are_errors() {
        for answer in [&b""[..], b"NO\n", b"OK", b"OK 11111111111111111111111111111111111111111111\n"] {
            assert!(matches!(answering(answer).await, Err(VmError::Connect { port: STREAM_PORT, .. })));
        }
    }

    #[tokio::test]
    async fn doorbell_is_understood_or_refused() {
        for (line, ok) in
            [(Doorbell::line("x"), true), ("hyper-agent 9 x\n".into(), false), ("a".repeat(200), false)]
        {
            let (callers, plan) = Callers::of_port(7).unwrap();
            call(&plan).write_all(line.as_bytes()).unwrap();
            assert_eq!(doorbell(&callers).await.is_ok(), ok, "{line}");
        }
    }
}
