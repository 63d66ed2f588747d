//! The streams of a process, and who is attached to them.
//!
//! Output goes to every client that wants it, and waits for the slowest: nothing is lost, and a process that writes faster than it is
//! read is slowed down, as by a pipe. Once the process is being stopped, a client that does not read is left behind after
//! [`PATIENCE`], so that it cannot keep the container from ending.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use crate::config::ProcessConfig;
use crate::launch::Stream;
use crate::logs::{LogSource, LogWriter};
use crate::stream::{AttachOptions, Frame, FrameKind, MAX_DATA_BYTES, TerminalSize};

/// Frames that wait for a client, each at most [`MAX_DATA_BYTES`].
const QUEUE_FRAMES: usize = 16;
/// How long a client that does not read may hold up a process that is being stopped.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug, Clone)]
struct Client {
    id: u64,
    stdout: bool,
    stderr: bool,
    to: mpsc::Sender<Frame>,
}

/// A client's end.
#[derive(Debug)]
pub(super) struct Attachment {
    pub(super) id: u64,
    pub(super) frames: mpsc::Receiver<Frame>,
    pub(super) options: AttachOptions,
}

/// Streams of one process.
#[derive(Debug)]
pub(super) struct Console {
    pub(super) terminal: bool,
    pub(super) stdin_once: bool,
    clients: Mutex<Vec<Client>>,
    next: AtomicU64,
    stdin: tokio::sync::Mutex<StdinState>,
    size: Mutex<Option<TerminalSize>>,
    hurry: watch::Sender<bool>,
}

#[derive(Debug)]
enum StdinState {
    /// The process is not there yet; what was typed.
    Early(Vec<u8>, bool),
    Open(OwnedWriteHalf),
    Closed,
}

/// Most bytes that are kept for a process that is not there yet; more wait.
const MAX_EARLY_BYTES: usize = MAX_DATA_BYTES;

impl Console {
    pub(super) fn new(process: &ProcessConfig) -> Self {
        Self::of(process.terminal, process.stdin_once)
    }

    /// For a process with these properties.
    pub(super) fn of(terminal: bool, stdin_once: bool) -> Self {
        Self {
            terminal,
            stdin_once,
            clients: Mutex::new(Vec::new()),
            next: AtomicU64::new(1),
            stdin: tokio::sync::Mutex::new(StdinState::Early(Vec::new(), false)),
            size: Mutex::new(None),
            hurry: watch::channel(false).0,
        }
    }

    fn clients(&self) -> std::sync::MutexGuard<'_, Vec<Client>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Attaches a client: it gets all output from now on.
    pub(super) fn attach(&self, options: AttachOptions) -> Attachment {
        let (to, frames) = mpsc::channel(QUEUE_FRAMES);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.clients().push(Client { id, stdout: options.stdout, stderr: options.stderr, to });
        if let Some(size) = options.size {
            self.set_size(size);
        }
        Attachment { id, frames, options }
    }

    pub(super) fn detach(&self, id: u64) {
        self.clients().retain(|client| client.id != id);
    }

    pub(super) fn set_size(&self, size: TerminalSize) {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner) = Some(size);
    }

    /// The size that was last asked for.
    pub(super) fn size(&self) -> Option<TerminalSize> {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on slow clients are left behind.
    pub(super) fn hurry(&self) {
        self.hurry.send_replace(true);
    }

    /// Sends to every client that wants it.
    async fn send(&self, kind: FrameKind, bytes: &[u8]) {
        let clients = self.clients().clone();
        for client in clients {
            let wanted = match kind {
                FrameKind::Stdout => client.stdout,
                FrameKind::Stderr => client.stderr,
                _ => true,
            };
            if wanted && !self.deliver(&client, Frame::new(kind, bytes)).await {
                self.detach(client.id);
            }
        }
    }

    async fn deliver(&self, client: &Client, frame: Frame) -> bool {
        let mut hurry = self.hurry.subscribe();
        let impatience = async {
            let _ = hurry.wait_for(|hurry| *hurry).await;
            sleep(PATIENCE).await;
        };
        tokio::select! {
            biased;
            sent = client.to.send(frame) => sent.is_ok(),
            () = impatience => false,
        }
    }

    /// Copies a stream of the process to its end: into the log, and to the clients.
    pub(super) async fn pump(
        &self,
        mut from: impl AsyncRead + Unpin,
        source: LogSource,
        log: Option<&Mutex<LogWriter>>,
    ) {
        let kind = match source {
            LogSource::Stdout => FrameKind::Stdout,
            LogSource::Stderr => FrameKind::Stderr,
        };
        let mut buffer = vec![0; MAX_DATA_BYTES];
        loop {
            let len = match from.read(&mut buffer).await {
                Ok(0) => return,
                Ok(len) => len,
                Err(error) => {
                    tracing::debug!(?source, %error, "a stream broke");
                    return;
                }
            };
            let bytes = buffer.get(..len).unwrap_or_default();
            if let Some(log) = log
                && let Err(error) = log.lock().unwrap_or_else(PoisonError::into_inner).append(source, bytes)
            {
                tracing::error!(%error, "output is not logged");
            }
            self.send(kind, bytes).await;
        }
    }

    /// The process is there: what was typed early is written, and standard input is open (or, without a stream, closed).
    pub(super) async fn open_stdin(&self, stream: Option<Stream>) {
        let mut stdin = self.stdin.lock().await;
        let Some(stream) = stream else {
            *stdin = StdinState::Closed;
            return;
        };
        let (_, mut to) = stream.into_split();
        if let StdinState::Early(bytes, closed) = &*stdin {
            let written = to.write_all(bytes).await;
            if *closed || written.is_err() {
                *stdin = StdinState::Closed;
                return;
            }
        }
        *stdin = StdinState::Open(to);
    }

    /// Writes to the process; waits while it does not read. Bytes for a process that has closed its input are dropped.
    pub(super) async fn write_stdin(&self, bytes: &[u8]) {
        loop {
            let mut stdin = self.stdin.lock().await;
            match &mut *stdin {
                StdinState::Early(early, _) if early.len() + bytes.len() <= MAX_EARLY_BYTES => {
                    early.extend_from_slice(bytes);
                    return;
                }
                StdinState::Early(..) => {}
                StdinState::Open(to) => {
                    if to.write_all(bytes).await.is_err() {
                        *stdin = StdinState::Closed;
                    }
                    return;
                }
                StdinState::Closed => return,
            }
            drop(stdin);
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends standard input.
    pub(super) async fn close_stdin(&self) {
        let mut stdin = self.stdin.lock().await;
        match &mut *stdin {
            StdinState::Early(_, closed) => *closed = true,
            // Dropping the half shuts the stream down for writing.
            StdinState::Open(_) => *stdin = StdinState::Closed,
            StdinState::Closed => {}
        }
    }

    /// A client has ended its input, or gone. A terminal's input stays open: its user may come back.
    pub(super) async fn client_input_ended(&self, options: AttachOptions) {
        if options.stdin && self.stdin_once && !self.terminal {
            self.close_stdin().await;
        }
    }

    /// The process has ended: clients hear of it after the output, and no more.
    pub(super) async fn finish(&self, exit_code: u8, reason: &str) {
        let clients = std::mem::take(&mut *self.clients());
        for client in clients {
            // A client that does not read hears of it when it does: its place in the queue waits in a task of its own.
            let frame = Frame::exit(exit_code, reason);
            if let Err(mpsc::error::TrySendError::Full(frame)) = client.to.try_send(frame) {
                tokio::spawn(async move { client.to.send(frame).await });
            }
        }
        // Whoever writes to it is woken.
        let _ = timeout(Duration::from_millis(100), self.close_stdin()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(stdout: bool, stderr: bool) -> AttachOptions {
        AttachOptions { stdin: true, stdout, stderr, size: None }
    }

    fn console() -> Console {
        Console::of(false, true)
    }

    #[tokio::test]
    async fn clients_get_what_they_want_and_the_exit_last() {
        let console = console();
        let mut both = console.attach(options(true, true));
        let mut errors = console.attach(options(false, true));
        console.pump(&b"out"[..], LogSource::Stdout, None).await;
        console.pump(&b"err"[..], LogSource::Stderr, None).await;
        console.finish(3, "").await;
        let kinds = |frame: Option<Frame>| frame.map(|frame| frame.kind);
        assert_eq!(kinds(both.frames.recv().await), Some(FrameKind::Stdout));
        assert_eq!(kinds(both.frames.recv().await), Some(FrameKind::Stderr));
        assert_eq!(both.frames.recv().await.unwrap().exit_code().unwrap(), 3);
        assert!(both.frames.recv().await.is_none());
        assert_eq!(kinds(errors.frames.recv().await), Some(FrameKind::Stderr));
        assert_eq!(kinds(errors.frames.recv().await), Some(FrameKind::Exit));
    }

    #[tokio::test]
    async fn gone_clients_hold_nobody_up() {
        let console = console();
        let gone = console.attach(options(true, true));
        drop(gone);
        let bytes = vec![0; MAX_DATA_BYTES * (QUEUE_FRAMES + 2)];
        console.pump(bytes.as_slice(), LogSource::Stdout, None).await;
        assert!(console.clients().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn stuck_client_is_left_behind_only_when_stopping() {
        let console = console();
        let stuck = console.attach(options(true, true));
        let bytes = vec![0; MAX_DATA_BYTES * (QUEUE_FRAMES + 1)];
        let mut pump = std::pin::pin!(console.pump(bytes.as_slice(), LogSource::Stdout, None));
        assert!(timeout(PATIENCE * 10, &mut pump).await.is_err(), "it waits");
        console.hurry();
        timeout(PATIENCE * 2, &mut pump).await.unwrap();
        drop(stuck);
    }

    #[tokio::test]
    async fn early_input_is_kept() {
        let console = console();
        console.write_stdin(b"early ").await;
        let (near, mut far) = Stream::pair().unwrap();
        console.open_stdin(Some(near)).await;
        console.write_stdin(b"late").await;
        console.client_input_ended(options(true, true)).await;
        let mut text = String::new();
        far.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "early late");
        console.write_stdin(b"dropped").await;
    }

    #[tokio::test]
    async fn early_end_is_an_end() {
        let console = console();
        console.write_stdin(b"all").await;
        console.close_stdin().await;
        let (near, mut far) = Stream::pair().unwrap();
        console.open_stdin(Some(near)).await;
        let mut text = String::new();
        far.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "all");
    }

    #[tokio::test]
    async fn terminals_keep_their_input() {
        let console = Console::of(true, true);
        let (near, mut far) = Stream::pair().unwrap();
        console.open_stdin(Some(near)).await;
        console.client_input_ended(options(true, true)).await;
        console.write_stdin(b"again").await;
        let mut buffer = [0; 5];
        far.read_exact(&mut buffer).await.unwrap();
        assert_eq!(&buffer, b"again");
    }
}
