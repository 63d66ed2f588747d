//! The client half of a conversation with a process: what the CLI writes and reads.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Mutex;

use super::frame::{Frame, FrameError, FrameKind, FrameReader, MAX_DATA_BYTES, write_frame};
use crate::SandboxError;

/// Which streams a client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachOptions {
    /// Write to standard input. Without it [`AttachInput::write`] writes to nobody.
    pub stdin: bool,
    /// Read standard output (and, with a terminal, everything).
    pub stdout: bool,
    /// Read standard error.
    pub stderr: bool,
    /// Size of the client's terminal, set before the process starts.
    pub size: Option<TerminalSize>,
}

/// Size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Height.
    pub rows: u16,
    /// Width.
    pub cols: u16,
}

/// A conversation with a process: take it apart and use the halves from different tasks. Dropping both detaches; the process goes on.
#[derive(Debug)]
pub struct Attached {
    /// What goes to the process.
    pub input: AttachInput,
    /// What comes from it.
    pub output: AttachOutput,
}

/// What came from the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Bytes of standard output.
    Stdout(Vec<u8>),
    /// Bytes of standard error.
    Stderr(Vec<u8>),
    /// It has ended; all its output came before.
    Exit {
        /// Its exit code; 137 when it did not end by itself.
        code: u8,
        /// Why it did not: its machine crashed or was lost. Empty otherwise.
        reason: String,
    },
    /// The supervisor closed the conversation without an exit: it was killed.
    Detached,
}

/// The way to the process. Clones share one connection.
#[derive(Debug, Clone)]
pub struct AttachInput {
    to: Arc<Mutex<OwnedWriteHalf>>,
}

/// The way from the process.
#[derive(Debug)]
pub struct AttachOutput {
    from: FrameReader<OwnedReadHalf>,
    ended: bool,
}

impl Attached {
    /// Takes over a connection on which the request has been answered; `read` came after the answer.
    pub(crate) fn new(stream: UnixStream, read: Vec<u8>) -> Self {
        let (from, to) = stream.into_split();
        Self {
            input: AttachInput { to: Arc::new(Mutex::new(to)) },
            output: AttachOutput { from: FrameReader::resume(from, read), ended: false },
        }
    }
}

impl AttachInput {
    async fn send(&self, frame: Frame) -> Result<(), SandboxError> {
        write_frame(&mut *self.to.lock().await, &frame).await.map_err(SandboxError::Stream)
    }

    /// Writes bytes to standard input; waits while the process does not read. Not cancel safe.
    ///
    /// # Errors
    /// When the process or the supervisor has gone.
    pub async fn write(&self, bytes: &[u8]) -> Result<(), SandboxError> {
        for chunk in bytes.chunks(MAX_DATA_BYTES) {
            self.send(Frame::new(FrameKind::Stdin, chunk)).await?;
        }
        Ok(())
    }

    /// Ends standard input; output goes on.
    ///
    /// # Errors
    /// When the supervisor has gone.
    pub async fn close_stdin(&self) -> Result<(), SandboxError> {
        self.send(Frame::new(FrameKind::StdinEnd, [])).await
    }

    /// Sets the size of the process's terminal.
    ///
    /// # Errors
    /// When the supervisor has gone.
    pub async fn resize(&self, size: TerminalSize) -> Result<(), SandboxError> {
        self.send(Frame::resize(size.rows, size.cols)).await
    }

    /// Sends a signal to the process (of an exec: to that process).
    ///
    /// # Errors
    /// When the supervisor has gone.
    pub async fn signal(&self, signal: u32) -> Result<(), SandboxError> {
        self.send(Frame::new(FrameKind::Signal, signal.to_le_bytes())).await
    }
}

impl AttachOutput {
    /// The next thing that happened. After [`Output::Exit`] or [`Output::Detached`] it is [`Output::Detached`] for ever.
    /// Cancel safe: it may stand in a `select!`.
    ///
    /// # Errors
    /// When the supervisor breaks the protocol.
    pub async fn next(&mut self) -> Result<Output, SandboxError> {
        if self.ended {
            return Ok(Output::Detached);
        }
        let frame = self.from.next().await.inspect_err(|_| self.ended = true)?;
        let Some(frame) = frame else {
            self.ended = true;
            return Ok(Output::Detached);
        };
        match frame.kind {
            FrameKind::Stdout => Ok(Output::Stdout(frame.payload)),
            FrameKind::Stderr => Ok(Output::Stderr(frame.payload)),
            FrameKind::Exit => {
                self.ended = true;
                Ok(Output::Exit { code: frame.exit_code()?, reason: frame.reason() })
            }
            kind => {
                self.ended = true;
                Err(FrameError::Payload(kind).into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn input_and_output_halves() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut early = Vec::new();
        write_frame(&mut early, &Frame::new(FrameKind::Stdout, *b"first")).await.unwrap();
        let Attached { input, mut output } = Attached::new(near, early);
        input.write(b"in").await.unwrap();
        input.close_stdin().await.unwrap();
        input.resize(TerminalSize { rows: 2, cols: 3 }).await.unwrap();
        let mut reader = FrameReader::new(&mut far);
        let frame = reader.next().await.unwrap().unwrap();
        assert_eq!((frame.kind, frame.payload.as_slice()), (FrameKind::Stdin, b"in".as_slice()));
        assert_eq!(reader.next().await.unwrap().unwrap().kind, FrameKind::StdinEnd);
        assert_eq!(reader.next().await.unwrap().unwrap().size().unwrap(), (2, 3));
        write_frame(&mut far, &Frame::new(FrameKind::Stderr, *b"e")).await.unwrap();
        write_frame(&mut far, &Frame::exit(3, "why")).await.unwrap();
        assert_eq!(output.next().await.unwrap(), Output::Stdout(b"first".to_vec()));
        assert_eq!(output.next().await.unwrap(), Output::Stderr(b"e".to_vec()));
        assert_eq!(output.next().await.unwrap(), Output::Exit { code: 3, reason: "why".into() });
        assert_eq!(output.next().await.unwrap(), Output::Detached);
    }

    #[tokio::test]
    async fn killed_supervisor_is_a_detach_and_nonsense_an_error() {
        let (near, far) = UnixStream::pair().unwrap();
        drop(far);
        let mut attached = Attached::new(near, Vec::new());
        assert_eq!(attached.output.next().await.unwrap(), Output::Detached);
        let (near, mut far) = UnixStream::pair().unwrap();
        write_frame(&mut far, &Frame::new(FrameKind::Stdin, *b"x")).await.unwrap();
        let mut attached = Attached::new(near, Vec::new());
        assert!(attached.output.next().await.is_err());
        assert_eq!(attached.output.next().await.unwrap(), Output::Detached);
    }
}
