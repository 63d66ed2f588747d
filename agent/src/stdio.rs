//! Standard streams: between a process's pipes or terminal and the host's connections.
//!
//! One buffer a stream and no queue: a reader that is slow stops the writer at the other end. A stream to the host ends by a half
//! close, after everything that the process wrote. When a process has ended but something it started still holds its output, the
//! stream ends as soon as it has been silent for [`DRAIN_IDLE`]; what comes later is read and dropped, so that the writer lives on.
//!
//! A machine that goes on from one that was saved has lost all connections: what is copied waits for others ([`Lines`]).
//!
//! ```text
//! Heard --the host closes it--> Deaf          Heard --it breaks, or is let go of--> Awaited --another one--> Heard
//! ```

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot, watch};
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
    stdout: Option<(pipe::Receiver, VsockStream)>,
    stderr: Option<(pipe::Receiver, VsockStream)>,
}

/// Streams that are being copied.
#[derive(Debug)]
pub(crate) struct Pumps {
    exited: watch::Sender<bool>,
    outputs: Vec<JoinHandle<()>>,
}

/// What a pump is told.
#[derive(Debug)]
enum Change<S> {
    /// Let go of the connection, and of output that nobody has read. Answered when that is done.
    LetGo(oneshot::Sender<()>),
    /// Use this one from now on.
    Take(S),
}

/// The ways to the pumps of one process, to give them other connections.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    stdin: Option<mpsc::Sender<Change<VsockStream>>>,
    stdout: Option<mpsc::Sender<Change<VsockStream>>>,
    stderr: Option<mpsc::Sender<Change<VsockStream>>>,
}

impl Lines {
    /// Whether there are any.
    pub(crate) fn any(&self) -> bool {
        self.all().next().is_some()
    }

    fn all(&self) -> impl Iterator<Item = &mpsc::Sender<Change<VsockStream>>> {
        [&self.stdin, &self.stdout, &self.stderr].into_iter().flatten()
    }

    /// Lets go of all connections, and drops output that is in the pipes: it belongs to whoever had it written. Input that was taken stays.
    pub(crate) async fn let_go(&self) {
        for line in self.all() {
            let (done, told) = oneshot::channel();
            // A stream that has ended has nothing to let go of.
            if line.send(Change::LetGo(done)).await.is_ok() {
                let _ = told.await;
            }
        }
    }

    /// Goes on with other connections. One for a stream that is not there, or has ended, is closed.
    pub(crate) async fn take(&self, connections: Connections) {
        let Connections { stdin, stdout, stderr } = connections;
        for (line, stream) in [(&self.stdin, stdin), (&self.stdout, stdout), (&self.stderr, stderr)] {
            if let (Some(line), Some(stream)) = (line, stream) {
                let _ = line.send(Change::Take(stream)).await;
            }
        }
    }
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
        for (stream, place, end) in [
            (self.stdout, &mut child.stdout, &mut ends.stdout),
            (self.stderr, &mut child.stderr, &mut ends.stderr),
        ] {
            if let Some(stream) = stream {
                let (reader, writer) = new_pipe()?;
                *place = Stdio::from(writer);
                *end = Some((receiver(reader)?, stream));
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
            ends.stdout = Some((receiver(copy()?)?, stream));
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
    pub(crate) fn start(self) -> (Pumps, Lines) {
        let (exited, _) = watch::channel(false);
        let mut lines = Lines::default();
        if let Some((stream, pipe)) = self.input {
            let (line, changes) = mpsc::channel(1);
            lines.stdin = Some(line);
            tokio::spawn(pump_in(stream, pipe, exited.subscribe(), changes));
        }
        let mut outputs = Vec::new();
        for (end, place) in [(self.stdout, &mut lines.stdout), (self.stderr, &mut lines.stderr)] {
            if let Some((pipe, stream)) = end {
                let (line, changes) = mpsc::channel(1);
                *place = Some(line);
                outputs.push(tokio::spawn(pump_out(pipe, stream, exited.subscribe(), changes)));
            }
        }
        (Pumps { exited, outputs }, lines)
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
async fn pump_in<S: HostStream>(
    stream: S,
    pipe: pipe::Sender,
    mut exited: watch::Receiver<bool>,
    changes: mpsc::Receiver<Change<S>>,
) {
    tokio::select! {
        () = copy_in(stream, pipe, changes) => {}
        _ = exited.wait_for(|e| *e) => {}
    }
    // Dropping both closes the pipe, which the process sees as the end, and the connection, which the host sees.
}

async fn copy_in<S: HostStream>(stream: S, mut pipe: pipe::Sender, mut changes: mpsc::Receiver<Change<S>>) {
    let mut stream = Some(stream);
    let mut buffer = vec![0; BUFFER_BYTES];
    let (mut at, mut end) = (0, 0);
    loop {
        let left = buffer.get(at..end).filter(|left| !left.is_empty());
        let change = match (left, &mut stream) {
            (Some(left), _) => tokio::select! {
                biased;
                Some(change) = changes.recv() => change,
                written = pipe.write(left) => {
                    match written {
                        Ok(n) if n > 0 => at = at.saturating_add(n),
                        _ => return,
                    }
                    continue;
                }
            },
            (None, Some(host)) => tokio::select! {
                biased;
                Some(change) = changes.recv() => change,
                read = host.read(&mut buffer) => {
                    match read {
                        Ok(0) => return,
                        Ok(n) => (at, end) = (0, n),
                        Err(_) => stream = None,
                    }
                    continue;
                }
            },
            (None, None) => match changes.recv().await {
                Some(change) => change,
                None => return,
            },
        };
        match change {
            Change::Take(new) => stream = Some(new),
            Change::LetGo(done) => {
                stream = None;
                let _ = done.send(());
            }
        }
    }
}

/// Who reads what a process writes.
#[derive(Debug)]
enum Listener<S> {
    /// The host, by this.
    Heard(S),
    /// Nobody any more: it is read and dropped.
    Deaf,
    /// The host, by a connection that is to come: nothing is read before.
    Awaited,
}

/// From the process to the host.
async fn pump_out<S: HostStream>(
    mut pipe: pipe::Receiver,
    stream: S,
    mut exited: watch::Receiver<bool>,
    mut changes: mpsc::Receiver<Change<S>>,
) {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut host = Listener::Heard(stream);
    loop {
        let read = async {
            match host {
                // Whoever waits for its end is not kept by a connection that does not come.
                Listener::Awaited => {
                    let _ = exited.wait_for(|e| *e).await;
                    None
                }
                _ => read_some(&mut pipe, &mut buffer, &mut exited).await,
            }
        };
        let read = tokio::select! {
            biased;
            Some(change) = changes.recv() => {
                host = match change {
                    Change::Take(new) => Listener::Heard(new),
                    Change::LetGo(done) => {
                        drop_unread(&pipe, &mut buffer);
                        let _ = done.send(());
                        Listener::Awaited
                    }
                };
                continue;
            }
            read = read => read,
        };
        let Some(n) = read else { break };
        let bytes = buffer.get(..n).unwrap_or_default();
        if bytes.is_empty() {
            return end(host).await;
        }
        if let Listener::Heard(stream) = &mut host {
            match write_some(stream, bytes, &mut exited).await {
                Ok(()) => {}
                // A connection that is closed says so; any other end is that of all connections of a saved machine.
                Err(error) if error.kind() == ErrorKind::BrokenPipe || *exited.borrow() => {
                    host = Listener::Deaf
                }
                Err(_) => host = Listener::Awaited,
            }
        }
    }
    end(host).await;
    tokio::spawn(discard(pipe, buffer));
}

/// Reads and drops what is there now.
fn drop_unread(pipe: &pipe::Receiver, buffer: &mut [u8]) {
    // The end, if it is there, is read again.
    while pipe.try_read(buffer).is_ok_and(|n| n > 0) {}
}

/// Half-closes a stream to the host. The connection itself stays until the host closes its end too: a full close at once could
/// overtake what is still on its way.
async fn end<S: HostStream>(host: Listener<S>) {
    let Listener::Heard(mut stream) = host else { return };
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

/// Writes all; after the process's exit not longer than [`DRAIN_STALL`].
async fn write_some<S: HostStream>(
    stream: &mut S,
    bytes: &[u8],
    exited: &mut watch::Receiver<bool>,
) -> std::io::Result<()> {
    let write = stream.write_all(bytes);
    tokio::pin!(write);
    if !*exited.borrow() {
        tokio::select! {
            biased;
            written = &mut write => return written,
            _ = exited.wait_for(|e| *e) => {}
        }
    }
    timeout(DRAIN_STALL, write).await.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))
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
        let pump = tokio::spawn(pump_out(pipe, stream, receiver, mpsc::channel(1).1));
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
        let pump = tokio::spawn(pump_in(stream, sender(writer).unwrap(), receiver, mpsc::channel(1).1));
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
        let pump = tokio::spawn(pump_out(pipe, stream, receiver, mpsc::channel(1).1));
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

    async fn let_go<S>(line: &mpsc::Sender<Change<S>>) {
        let (done, told) = oneshot::channel();
        assert!(line.send(Change::LetGo(done)).await.is_ok());
        told.await.unwrap();
    }

    #[tokio::test]
    async fn output_goes_on_at_another_connection_with_what_is_written_from_then_on() {
        let (pipe, mut writer) = pair();
        let (mut first, stream) = tokio::io::duplex(10);
        let (exited, receiver) = watch::channel(false);
        let (line, changes) = mpsc::channel(1);
        let pump = tokio::spawn(pump_out(pipe, stream, receiver, changes));
        writer.write_all(b"before").unwrap();
        let mut got = [0; 6];
        first.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"before");
        let_go(&line).await;
        assert_eq!(first.read(&mut got).await.unwrap(), 0, "let go of");
        // Nothing is read for nobody.
        writer.write_all(b"frozen").unwrap();
        tokio::task::yield_now().await;
        let (mut second, stream) = tokio::io::duplex(10);
        assert!(line.send(Change::Take(stream)).await.is_ok());
        second.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"frozen");
        drop(writer);
        assert_eq!(second.read(&mut got).await.unwrap(), 0);
        pump.await.unwrap();
        drop(exited);
    }

    #[tokio::test]
    async fn what_nobody_has_read_is_dropped_with_the_connection() {
        let (pipe, mut writer) = pair();
        let (exited, receiver) = watch::channel(false);
        let (line, changes) = mpsc::channel(1);
        let (_first, stream) = tokio::io::duplex(10);
        // More than the connection takes: some is in the pump, some in the pipe.
        writer.write_all(&[b'o'; 100]).unwrap();
        let pump = pump_out(pipe, stream, receiver, changes);
        tokio::pin!(pump);
        assert!(futures_util::poll!(&mut pump).is_pending());
        writer.write_all(b"more of it").unwrap();
        drop(_first);
        let pumped = async {
            let_go(&line).await;
            writer.write_all(b"new").unwrap();
            let (mut second, stream) = tokio::io::duplex(10);
            assert!(line.send(Change::Take(stream)).await.is_ok());
            let mut got = [0; 3];
            second.read_exact(&mut got).await.unwrap();
            got
        };
        tokio::select! {
            () = &mut pump => panic!("it has not ended"),
            got = pumped => assert_eq!(&got, b"new"),
        }
        drop(exited);
    }

    #[tokio::test]
    async fn an_exit_is_not_kept_by_a_connection_that_does_not_come() {
        let (pipe, _writer) = pair();
        let (_host, stream) = tokio::io::duplex(10);
        let (exited, receiver) = watch::channel(false);
        let (line, changes) = mpsc::channel(1);
        let pump = tokio::spawn(pump_out(pipe, stream, receiver, changes));
        let_go(&line).await;
        exited.send(true).unwrap();
        pump.await.unwrap();
    }

    #[tokio::test]
    async fn input_goes_on_at_another_connection_and_keeps_what_was_taken() {
        let (reader, writer) = new_pipe().unwrap();
        let (mut first, stream) = tokio::io::duplex(100_000);
        let (exited, receiver) = watch::channel(false);
        let (line, changes) = mpsc::channel(1);
        let pump = tokio::spawn(pump_in(stream, sender(writer).unwrap(), receiver, changes));
        // More than the pipe holds, less than the pump and the pipe do.
        first.write_all(&[b'1'; 70_000]).await.unwrap();
        let mut pipe = super::receiver(reader).unwrap();
        let mut got = vec![0; 70_000];
        pipe.read_exact(&mut got[..10_000]).await.unwrap();
        let_go(&line).await;
        pipe.read_exact(&mut got[10_000..]).await.unwrap();
        assert!(got.iter().all(|byte| *byte == b'1'));
        let (mut second, stream) = tokio::io::duplex(10);
        assert!(line.send(Change::Take(stream)).await.is_ok());
        second.write_all(b"2").await.unwrap();
        pipe.read_exact(&mut got[..1]).await.unwrap();
        assert_eq!(got[0], b'2');
        drop(second);
        assert_eq!(pipe.read(&mut got).await.unwrap(), 0);
        pump.await.unwrap();
        drop((exited, first));
    }
}
