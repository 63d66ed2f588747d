//! Standard streams: between the FIFOs, files and loggers of the caller and the streams of the agent.
//!
//! Every FIFO is opened for both directions, so that neither end has to be there first and a reader that goes away and comes back (a
//! restarted containerd) loses nothing. Standard input ends when the caller says so, after what it has written.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper_protocol::rpc::agent::Stdio;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::PodError;
use super::logger::{self, Logger, LoggerSpec, Whose};
use crate::launch::{Agent, Stream, scaled_ms};

/// Bytes that are copied at once.
const BUFFER_BYTES: usize = 64 * 1024;
/// How long the last output may take to be read when the process has ended.
const LAST_OUTPUT_MS: u64 = 10_000;

/// Where the streams of a process go: empty for nowhere, the path of a FIFO, `file://` and the path of a file that is appended to, or
/// `binary://`, the path of a program and its arguments as a query. A file or program of standard output gets standard error, too, when
/// that has none of its own.
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
    File(PathBuf),
    Logger(LoggerSpec),
}

fn place(uri: &str) -> Result<Place<'_>, PodError> {
    if uri.is_empty() {
        return Ok(Place::Nowhere);
    }
    Ok(match uri.split_once("://") {
        _ if uri.starts_with('/') => Place::Fifo(Path::new(uri)),
        Some(("fifo", fifo)) => Place::Fifo(Path::new(fifo)),
        Some(("file", file)) => Place::File(logger::path(uri, file)?),
        Some(("binary", program)) => Place::Logger(LoggerSpec::parse(uri, program)?),
        _ => {
            let scheme = uri.split("://").next().unwrap_or_default();
            return Err(PodError::Unsupported(format!("logging by {scheme:?}")));
        }
    })
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
    /// A FIFO, or the pipe of a logger.
    Pipe(pipe::Sender),
    File(tokio::fs::File),
    /// One that is to be started.
    Logger(LoggerSpec),
}

/// Streams that are being copied.
#[derive(Debug, Default)]
pub(super) struct Pumps {
    outputs: JoinSet<()>,
    feeder: JoinSet<()>,
    /// They end after their pipes.
    loggers: Vec<Logger>,
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
            Place::File(_) | Place::Logger(_) => {
                return Err(PodError::Unsupported(format!("standard input from {}", paths.stdin)));
            }
        }
        ends.stdout = sink(&paths.stdout)?;
        if !paths.terminal {
            let both =
                paths.stderr.is_empty() && matches!(ends.stdout, Some(Sink::File(_) | Sink::Logger(_)));
            ends.stderr = sink(if both { &paths.stdout } else { &paths.stderr })?;
        }
        Ok(ends)
    }

    /// Ends standard input, after what is still in the FIFO.
    pub(super) fn close_stdin(&mut self) {
        if let Some((_, keeper)) = &mut self.stdin {
            *keeper = None;
        }
    }

    /// Starts the loggers; one that is named twice gets both streams.
    async fn start_loggers(&mut self, whose: Whose<'_>) -> Result<Vec<Logger>, PodError> {
        let mut started = Vec::new();
        if let Some(Sink::Logger(spec)) = &self.stdout {
            let (logger, out, err) = spec.start(whose).await?;
            if matches!(&self.stderr, Some(Sink::Logger(other)) if other == spec) {
                self.stderr = Some(Sink::Pipe(err));
            }
            self.stdout = Some(Sink::Pipe(out));
            started.push(logger);
        }
        if let Some(Sink::Logger(spec)) = &self.stderr {
            let (logger, _, err) = spec.start(whose).await?;
            self.stderr = Some(Sink::Pipe(err));
            started.push(logger);
        }
        Ok(started)
    }

    /// Connects them to streams of the agent, which `stdio` names. Loggers are started first: the agent does not wait long for a stream
    /// that is not named.
    pub(super) async fn connect(
        mut self,
        agent: &Agent,
        stdio: &mut Stdio,
        whose: Whose<'_>,
    ) -> Result<Pumps, PodError> {
        stdio.terminal = self.terminal;
        let mut pumps = Pumps { loggers: self.start_loggers(whose).await?, ..Pumps::default() };
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
            opened.map(|fifo| Some(Sink::Pipe(fifo))).map_err(|source| PodError::io("open", path, source))
        }
        Place::File(path) => {
            let parents = path.parent().map_or(Ok(()), std::fs::create_dir_all);
            parents.map_err(|source| PodError::io("make the folder of the log", &path, source))?;
            let opened = std::fs::OpenOptions::new().append(true).create(true).open(&path);
            let file = opened.map_err(|source| PodError::io("open the log", &path, source))?;
            Ok(Some(Sink::File(file.into())))
        }
        Place::Logger(spec) => Ok(Some(Sink::Logger(spec))),
    }
}

impl Pumps {
    /// Waits until the last output has been taken, for a while; the FIFOs are closed then. Returns the loggers, which have all of it in
    /// their pipes.
    pub(super) async fn finish(mut self) -> Vec<Logger> {
        self.feeder.abort_all();
        let all = async { while self.outputs.join_next().await.is_some() {} };
        if timeout(scaled_ms(LAST_OUTPUT_MS), all).await.is_err() {
            tracing::warn!("nobody reads the last output");
            self.outputs.shutdown().await;
        }
        self.loggers
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
        Sink::Pipe(mut pipe) => copy(&mut stream, &mut pipe).await,
        Sink::File(mut file) => copy(&mut stream, &mut file).await,
        Sink::Logger(_) => Ok(()),
    };
    if let Err(error) = copied {
        tracing::warn!(%error, "output is dropped from now on");
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
    use super::*;

    #[test]
    fn places_are_told_apart() {
        assert_eq!(place("").unwrap(), Place::Nowhere);
        assert_eq!(place("/run/f").unwrap(), Place::Fifo(Path::new("/run/f")));
        assert_eq!(place("fifo:///run/f").unwrap(), Place::Fifo(Path::new("/run/f")));
        assert_eq!(place("file:///var/log/x%20y?z").unwrap(), Place::File("/var/log/x y".into()));
        assert!(matches!(place("binary:///usr/bin/logger"), Ok(Place::Logger(_))));
        assert!(matches!(place("npipe:////./pipe"), Err(PodError::Unsupported(_))));
        assert!(matches!(place("file://relative"), Err(PodError::Invalid(_))));
    }

    #[tokio::test]
    async fn files_are_appended_to_and_take_both_streams() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("new/folder/log");
        let paths = StdioPaths { stdout: format!("file://{}", log.display()), ..Default::default() };
        for _ in 0..2 {
            let ends = Ends::open(&paths).unwrap();
            for (sink, text) in [(ends.stdout, "out\n"), (ends.stderr, "err\n")] {
                let (near, mut far) = Stream::pair().unwrap();
                far.write_all(text.as_bytes()).await.unwrap();
                drop(far);
                drain(near, sink.unwrap()).await;
            }
        }
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "out\nerr\nout\nerr\n");
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
