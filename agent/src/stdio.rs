//! Standard streams: between a process's pipes or terminal and the host's connections.
//!
//! One buffer a stream and no queue: a reader that is slow stops the writer at the other end. A stream to the host ends by a half
//! close, after everything that the process wrote. When a process has ended but something it started still holds its output, the
//! stream ends as soon as it has been silent for [`DRAIN_IDLE`]; what comes later is read and dropped, so that the writer lives on.

use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_vsock::VsockStream;

use crate::error::{AgentError, Tried};
use crate::streams::Streams;

/// Size of the buffer of one stream, bytes: a pipe's default capacity.
const BUFFER_BYTES: usize = 64 * 1024;
/// How long output may be silent after its process has ended before its stream ends.
pub(crate) const DRAIN_IDLE: Duration = Duration::from_millis(200);
/// How long a host that does not read may hold back the end of a stream after its process has ended.
const DRAIN_STALL: Duration = Duration::from_secs(30);

/// A connection to the host.
trait HostStream: AsyncRead + AsyncWrite + Unpin + Send + 'static {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> HostStream for S {}

/// How long a half-closed connection waits for the host to close its end.
const LINGER: Duration = Duration::from_secs(10);

/// The host's connections of one process.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    stdin: Option<VsockStream>,
    stdout: Option<VsockStream>,
    stderr: Option<VsockStream>,
}

/// The ends that a child program is started with.
#[derive(Debug)]
pub(crate) struct ChildStdio {
    pub stdin: Stdio,
    pub stdout: Stdio,
    pub stderr: Stdio,
}

impl ChildStdio {
    /// /dev/null three times.
    pub(crate) fn null() -> Self {
        Self { stdin: Stdio::null(), stdout: Stdio::null(), stderr: Stdio::null() }
    }
}

/// Our ends, and the connections that they belong to.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    input: Option<(VsockStream, pipe::Sender)>,
    outputs: Vec<(pipe::Receiver, VsockStream)>,
}

/// Streams that are being copied.
#[derive(Debug)]
pub(crate) struct Pumps {
    exited: watch::Sender<bool>,
    outputs: Vec<JoinHandle<()>>,
}

impl Connections {
    /// Claims the connections that a request names; 0 is none.
    ///
    /// # Errors
    /// One does not come.
    pub(crate) async fn claim(streams: &Streams, ids: [u64; 3]) -> Result<Self, AgentError> {
        let mut claimed = [None, None, None];
        for (slot, id) in claimed.iter_mut().zip(ids) {
            if id != 0 {
                *slot = Some(streams.claim(id).await?);
            }
        }
        let [stdin, stdout, stderr] = claimed;
        Ok(Self { stdin, stdout, stderr })
    }

    /// Makes a pipe for each connection.
    ///
    /// # Errors
    /// No more descriptors.
    pub(crate) fn pipes(self) -> Result<(ChildStdio, Ends), AgentError> {
        let mut child = ChildStdio::null();
        let mut ends = Ends::default();
        if let Some(stream) = self.stdin {
            let (reader, writer) = new_pipe()?;
            child.stdin = Stdio::from(reader);
            ends.input = Some((stream, sender(writer)?));
        }
        for (stream, place) in [(self.stdout, &mut child.stdout), (self.stderr, &mut child.stderr)] {
            if let Some(stream) = stream {
                let (reader, writer) = new_pipe()?;
                *place = Stdio::from(writer);
                ends.outputs.push((receiver(reader)?, stream));
            }
        }
        Ok((child, ends))
    }

    /// Uses a terminal for all connections.
    ///
    /// # Errors
    /// No more descriptors.
    pub(crate) fn terminal(self, master: &OwnedFd) -> Result<Ends, AgentError> {
        let copy = || master.try_clone().tried(|| "copy the terminal's descriptor".to_owned());
        let mut ends = Ends::default();
        if let Some(stream) = self.stdin {
            ends.input = Some((stream, sender(copy()?)?));
        }
        if let Some(stream) = self.stdout {
            ends.outputs.push((receiver(copy()?)?, stream));
        }
        Ok(ends)
    }
}

fn new_pipe() -> Result<(OwnedFd, OwnedFd), AgentError> {
    pipe_with(PipeFlags::CLOEXEC).tried(|| "make a pipe".to_owned())
}

// Unchecked: a terminal's descriptor is read and written as a pipe's. Both set O_NONBLOCK on our end only.
fn sender(fd: OwnedFd) -> Result<pipe::Sender, AgentError> {
    rustix::io::ioctl_fionbio(&fd, true).tried(|| "make a descriptor non-blocking".to_owned())?;
    pipe::Sender::from_owned_fd_unchecked(fd).tried(|| "use a pipe".to_owned())
}

fn receiver(fd: OwnedFd) -> Result<pipe::Receiver, AgentError> {
    rustix::io::ioctl_fionbio(&fd, true).tried(|| "make a descriptor non-blocking".to_owned())?;
    pipe::Receiver::from_owned_fd_unchecked(fd).tried(|| "use a pipe".to_owned())
}

impl Ends {
    /// Starts to copy.
    pub(crate) fn start(self) -> Pumps {
        let (exited, _) = watch::channel(false);
        if let Some((stream, pipe)) = self.input {
            tokio::spawn(pump_in(stream, pipe, exited.subscribe()));
        }
        let outputs = self
            .outputs
            .into_iter()
            .map(|(pipe, stream)| tokio::spawn(pump_out(pipe, stream, exited.subscribe())))
            .collect();
        Pumps { exited, outputs }
    }
}

impl Pumps {
    /// Says that the process has ended, and waits until its output is written to the end.
    pub(crate) async fn finish(self) {
        let _ = self.exited.send(true);
        for output in self.outputs {
            // A pump does not fail; its task can only end.
            let _ = output.await;
        }
    }
}

/// From the host to the process. Ends when the host half-closes, when the process closes its end, and when it exits.
async fn pump_in<S: HostStream>(mut stream: S, mut pipe: pipe::Sender, mut exited: watch::Receiver<bool>) {
    let copy = async {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let n = stream.read(&mut buffer).await.unwrap_or(0);
            let Some(read) = buffer.get(..n).filter(|r| !r.is_empty()) else { return };
            if pipe.write_all(read).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = copy => {}
        _ = exited.wait_for(|e| *e) => {}
    }
    // Dropping both closes the pipe, which the process sees as the end, and the connection, which the host sees.
}

/// From the process to the host.
async fn pump_out<S: HostStream>(mut pipe: pipe::Receiver, mut stream: S, mut exited: watch::Receiver<bool>) {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut listening = true;
    loop {
        let Some(n) = read_some(&mut pipe, &mut buffer, &mut exited).await else { break };
        let read = buffer.get(..n).unwrap_or_default();
        if read.is_empty() {
            end(stream).await;
            return;
        }
        if listening {
            listening = write_some(&mut stream, read, &mut exited).await;
        }
    }
    end(stream).await;
    tokio::spawn(discard(pipe, buffer));
}

/// Half-closes a stream to the host. The connection itself stays until the host closes its end too: a full close at once could
/// overtake what is still on its way.
async fn end<S: HostStream>(mut stream: S) {
    if stream.shutdown().await.is_ok() {
        tokio::spawn(async move {
            let mut rest = [0; 64];
            let read = async { while stream.read(&mut rest).await.is_ok_and(|n| n > 0) {} };
            let _ = timeout(LINGER, read).await;
        });
    }
}

/// Reads; after the process's exit only as long as there is something. `None`: silent.
async fn read_some<R: AsyncRead + Unpin>(
    pipe: &mut R,
    buffer: &mut [u8],
    exited: &mut watch::Receiver<bool>,
) -> Option<usize> {
    if !*exited.borrow() {
        tokio::select! {
            biased;
            // A terminal whose last user has gone answers EIO.
            n = pipe.read(buffer) => return Some(n.unwrap_or(0)),
            _ = exited.wait_for(|e| *e) => {}
        }
    }
    timeout(DRAIN_IDLE, pipe.read(buffer)).await.ok().map(|n| n.unwrap_or(0))
}

/// Writes all; false when the host does not listen any more.
async fn write_some<S: HostStream>(stream: &mut S, bytes: &[u8], exited: &mut watch::Receiver<bool>) -> bool {
    let write = stream.write_all(bytes);
    tokio::pin!(write);
    if !*exited.borrow() {
        tokio::select! {
            biased;
            written = &mut write => return written.is_ok(),
            _ = exited.wait_for(|e| *e) => {}
        }
    }
    matches!(timeout(DRAIN_STALL, write).await, Ok(Ok(())))
}

async fn discard(mut pipe: pipe::Receiver, mut buffer: Vec<u8>) {
    while pipe.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn pair() -> (pipe::Receiver, std::fs::File) {
        let (reader, writer) = new_pipe().unwrap();
        (receiver(reader).unwrap(), std::fs::File::from(writer))
    }

    #[tokio::test]
    async fn what_was_written_before_the_exit_is_read_after_it() {
        let (mut pipe, mut writer) = pair();
        writer.write_all(b"last words").unwrap();
        let (exited, mut receiver) = watch::channel(true);
        let mut buffer = [0; 32];
        assert_eq!(read_some(&mut pipe, &mut buffer, &mut receiver).await, Some(10));
        assert_eq!(read_some(&mut pipe, &mut buffer, &mut receiver).await, None, "held open but silent");
        drop(writer);
        assert_eq!(read_some(&mut pipe, &mut buffer, &mut receiver).await, Some(0));
        drop(exited);
    }

    #[tokio::test]
    async fn a_slow_host_gets_everything_and_holds_the_writer_back() {
        let (pipe, mut writer) = pair();
        let (mut host, stream) = tokio::io::duplex(1000);
        let (exited, receiver) = watch::channel(false);
        let pump = tokio::spawn(pump_out(pipe, stream, receiver));
        let sent: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let expected = sent.clone();
        let writing = std::thread::spawn(move || writer.write_all(&sent));
        let mut got = Vec::new();
        let mut buffer = [0; 700];
        while got.len() < 500_000 {
            let n = host.read(&mut buffer).await.unwrap();
            got.extend_from_slice(&buffer[..n]);
        }
        exited.send(true).unwrap();
        host.read_to_end(&mut got).await.unwrap();
        assert!(got == expected, "{} bytes of {}", got.len(), expected.len());
        writing.join().unwrap().unwrap();
        pump.await.unwrap();
    }

    #[tokio::test]
    async fn the_end_of_the_hosts_input_is_the_end_of_the_pipe() {
        let (reader, writer) = new_pipe().unwrap();
        let (mut host, stream) = tokio::io::duplex(1000);
        let (exited, receiver) = watch::channel(false);
        let pump = tokio::spawn(pump_in(stream, sender(writer).unwrap(), receiver));
        host.write_all(b"line\n").await.unwrap();
        host.shutdown().await.unwrap();
        pump.await.unwrap();
        let mut got = Vec::new();
        std::io::Read::read_to_end(&mut std::fs::File::from(reader), &mut got).unwrap();
        assert_eq!(got, b"line\n");
        drop(exited);
    }

    #[tokio::test]
    async fn a_host_that_goes_away_does_not_stop_the_writer() {
        let (pipe, mut writer) = pair();
        let (host, stream) = tokio::io::duplex(10);
        let (_exited, receiver) = watch::channel(false);
        let pump = tokio::spawn(pump_out(pipe, stream, receiver));
        drop(host);
        let writing = std::thread::spawn(move || writer.write_all(&vec![1; 500_000]));
        pump.await.unwrap();
        writing.join().unwrap().unwrap();
    }

    #[tokio::test]
    async fn an_exit_wakes_a_reader_that_waits() {
        let (mut pipe, writer) = pair();
        let (exited, mut receiver) = watch::channel(false);
        let reader = tokio::spawn(async move {
            let mut buffer = [0; 32];
            read_some(&mut pipe, &mut buffer, &mut receiver).await
        });
        tokio::task::yield_now().await;
        exited.send(true).unwrap();
        assert_eq!(reader.await.unwrap(), None);
        drop(writer);
    }
}
