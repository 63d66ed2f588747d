//! Standard streams: between the FIFOs of the caller and the streams of the agent.
//!
//! Every FIFO is opened for both directions, so that neither end has to be there first and a reader that goes away and comes back (a
//! restarted containerd) loses nothing. Standard input ends when the caller says so, after what it has written.

use std::path::Path;
use std::sync::Arc;

use hyper_protocol::rpc::agent::Stdio;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::PodError;
use crate::launch::{Agent, Stream, scaled_ms};

/// Bytes that are copied at once.
const BUFFER_BYTES: usize = 64 * 1024;
/// How long the last output may take to be read when the process has ended.
const LAST_OUTPUT_MS: u64 = 10_000;

/// Where the streams of a process go: empty for nowhere, the path of a FIFO, or `file://` and a path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StdioPaths {
    /// Standard input.
    pub stdin: String,
    /// Standard output; everything when there is a terminal.
    pub stdout: String,
    /// Standard error; unused when there is a terminal.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Place<'a> {
    Nowhere,
    Fifo(&'a Path),
    File(&'a Path),
}

fn place(uri: &str) -> Result<Place<'_>, PodError> {
    let path = |text: &'static str| uri.strip_prefix(text).map(Path::new);
    let place = match uri {
        "" => return Ok(Place::Nowhere),
        _ if uri.starts_with('/') => Place::Fifo(Path::new(uri)),
        _ => match (path("fifo://"), path("file://")) {
            (Some(fifo), _) => Place::Fifo(fifo),
            (_, Some(file)) => Place::File(file),
            _ => {
                let scheme = uri.split("://").next().unwrap_or_default();
                return Err(PodError::Unsupported(format!("logging by {scheme:?}")));
            }
        },
    };
    Ok(place)
}

/// The caller's ends, open.
#[derive(Debug, Default)]
pub(super) struct Ends {
    stdin: Option<(pipe::Receiver, Option<pipe::Sender>)>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    terminal: bool,
}

#[derive(Debug)]
enum Sink {
    Fifo(pipe::Sender),
    File(tokio::fs::File),
}

/// Streams that are being copied.
#[derive(Debug, Default)]
pub(super) struct Pumps {
    outputs: JoinSet<()>,
    feeder: JoinSet<()>,
    /// Standard input, until the process is started.
    pub(super) input: Input,
}

/// What holds standard input open, and lets it begin.
#[derive(Debug, Default)]
pub(super) struct Input {
    keeper: Option<pipe::Sender>,
    begin: Arc<Notify>,
}

impl Input {
    /// The process runs: what was written is passed on. Not before, so that whoever writes finds a full pipe as with any process that does
    /// not read, and not its end.
    pub(super) fn begin(&self) {
        self.begin.notify_one();
    }

    /// No more will be written by those who have not opened the FIFO yet.
    pub(super) fn close(&mut self) {
        self.keeper = None;
    }
}

impl Ends {
    /// Opens all of them.
    pub(super) fn open(paths: &StdioPaths) -> Result<Self, PodError> {
        let mut ends = Self { terminal: paths.terminal, ..Self::default() };
        match place(&paths.stdin)? {
            Place::Nowhere => {}
            Place::Fifo(path) => {
                let fail = |source| PodError::io("open", path, source);
                let reader = pipe::OpenOptions::new().open_receiver(path).map_err(fail)?;
                // There is a reader now, so this does not wait.
                let keeper = pipe::OpenOptions::new().open_sender(path).map_err(fail)?;
                ends.stdin = Some((reader, Some(keeper)));
            }
            Place::File(path) => {
                return Err(PodError::Unsupported(format!(
                    "standard input from the file {}",
                    path.display()
                )));
            }
        }
        ends.stdout = sink(&paths.stdout)?;
        if !paths.terminal {
            ends.stderr = sink(&paths.stderr)?;
        }
        Ok(ends)
    }

    /// Ends standard input, after what is still in the FIFO.
    pub(super) fn close_stdin(&mut self) {
        if let Some((_, keeper)) = &mut self.stdin {
            *keeper = None;
        }
    }

    /// Connects them to streams of the agent, which `stdio` names.
    pub(super) async fn connect(self, agent: &Agent, stdio: &mut Stdio) -> Result<Pumps, PodError> {
        stdio.terminal = self.terminal;
        let mut pumps = Pumps::default();
        if let Some((reader, keeper)) = self.stdin {
            let (id, stream) = agent.open_stream().await?;
            stdio.stdin = id;
            pumps.input.keeper = keeper;
            pumps.feeder.spawn(feed(reader, stream, Arc::clone(&pumps.input.begin)));
        }
        for (sink, id) in [(self.stdout, &mut stdio.stdout), (self.stderr, &mut stdio.stderr)] {
            if let Some(sink) = sink {
                let (stream_id, stream) = agent.open_stream().await?;
                *id = stream_id;
                pumps.outputs.spawn(drain(stream, sink));
            }
        }
        Ok(pumps)
    }
}

fn sink(uri: &str) -> Result<Option<Sink>, PodError> {
    match place(uri)? {
        Place::Nowhere => Ok(None),
        Place::Fifo(path) => {
            let opened = pipe::OpenOptions::new().read_write(true).open_sender(path);
            opened.map(|fifo| Some(Sink::Fifo(fifo))).map_err(|source| PodError::io("open", path, source))
        }
        Place::File(path) => {
            let opened = std::fs::OpenOptions::new().append(true).create(true).open(path);
            let file = opened.map_err(|source| PodError::io("open", path, source))?;
            Ok(Some(Sink::File(file.into())))
        }
    }
}

impl Pumps {
    /// Waits until the last output has been taken, for a while; the FIFOs are closed then.
    pub(super) async fn finish(mut self) {
        self.feeder.abort_all();
        let all = async { while self.outputs.join_next().await.is_some() {} };
        if timeout(scaled_ms(LAST_OUTPUT_MS), all).await.is_err() {
            tracing::warn!("nobody reads the last output");
        }
    }
}

/// Standard input, to its end.
async fn feed(mut from: pipe::Receiver, stream: Stream, begin: Arc<Notify>) {
    begin.notified().await;
    // The read half is kept: without it the agent would take the stream for closed.
    let (_read, mut to) = stream.into_split();
    if let Err(error) = copy(&mut from, &mut to).await {
        tracing::debug!(%error, "standard input ends");
    }
    // A process that has closed its input needs no end of it.
    let _ = to.shutdown().await;
}

/// Output, to its end; when it cannot be written any more it is read and dropped, so that the process goes on.
async fn drain(mut stream: Stream, sink: Sink) {
    let copied = match sink {
        Sink::Fifo(mut fifo) => copy(&mut stream, &mut fifo).await,
        Sink::File(mut file) => copy(&mut stream, &mut file).await,
    };
    if let Err(error) = copied {
        tracing::debug!(%error, "output is dropped");
        // Its end, whatever it is.
        let _ = copy(&mut stream, &mut tokio::io::sink()).await;
    }
}

async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
) -> std::io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return to.flush().await;
        }
        to.write_all(buffer.get(..length).unwrap_or_default()).await?;
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn places_are_told_apart() {
        assert_eq!(place("").unwrap(), Place::Nowhere);
        assert_eq!(place("/run/f").unwrap(), Place::Fifo(Path::new("/run/f")));
        assert_eq!(place("fifo:///run/f").unwrap(), Place::Fifo(Path::new("/run/f")));
        assert_eq!(place("file:///var/log/x").unwrap(), Place::File(Path::new("/var/log/x")));
        assert!(matches!(place("binary:///usr/bin/logger"), Err(PodError::Unsupported(_))));
    }

    fn fifo(dir: &tempfile::TempDir, name: &str) -> PathBuf {
        let path = dir.path().join(name);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        path
    }

    #[tokio::test]
    async fn input_ends_when_the_keeper_and_the_writer_have_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir, "in");
        let paths = StdioPaths { stdin: path.display().to_string(), ..Default::default() };
        let (reader, keeper) = Ends::open(&paths).unwrap().stdin.unwrap();
        let (near, mut far) = Stream::pair().unwrap();
        let begin = Arc::new(Notify::new());
        begin.notify_one();
        let feeding = tokio::spawn(feed(reader, near, begin));
        let mut writer = pipe::OpenOptions::new().open_sender(&path).unwrap();
        writer.write_all(b"hello").await.unwrap();
        drop(writer);
        let mut bytes = [0; 5];
        far.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"hello");
        assert!(timeout(std::time::Duration::from_millis(50), far.read_u8()).await.is_err(), "still open");
        drop(keeper);
        assert!(far.read_u8().await.is_err(), "the end");
        feeding.await.unwrap();
    }

    #[tokio::test]
    async fn output_is_kept_until_somebody_reads() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir, "out");
        let sink = sink(&path.display().to_string()).unwrap().unwrap();
        let (near, mut far) = Stream::pair().unwrap();
        let draining = tokio::spawn(drain(near, sink));
        far.write_all(b"last words").await.unwrap();
        let mut reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        drop(far);
        let mut text = String::new();
        reader.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "last words");
        draining.await.unwrap();
    }
}
