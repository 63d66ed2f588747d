//! Frames: one byte of kind, four bytes of length (little endian), payload.
//!
//! A conversation begins with one [`FrameKind::Request`] from the client; what follows depends on the request:
//!
//! ```text
//! client                      supervisor
//! Request(JSON)          -->
//!                        <--  Reply(JSON) | Refusal(JSON)        most requests end here
//! Stdin* StdinEnd        -->                                     start, attach, exec, archive_in
//! Resize Signal          -->
//!                        <--  Stdout* Stderr*                    start, attach, exec, archive_out
//!                        <--  Exit(code) | Refusal(JSON)
//! ```

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Most payload of a data frame, bytes; also the size of the buffers that streams are copied through.
pub(crate) const MAX_DATA_BYTES: usize = 64 * 1024;
/// Most payload of a JSON frame, bytes: an exec with a large environment fits (`ARG_MAX` is 2 MiB).
pub(crate) const MAX_JSON_BYTES: usize = 4 << 20;
/// Most bytes of the text that says why a machine ended under its process.
const MAX_REASON_BYTES: usize = 4096;

/// A conversation that does not keep to the protocol, or broke off.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The socket failed.
    #[error("socket: {0}")]
    Io(#[from] std::io::Error),
    /// Closed within a frame or where a frame must come.
    #[error("closed early")]
    Closed,
    /// Unknown kind.
    #[error("unknown frame kind {0}")]
    Kind(u8),
    /// Longer than its kind may be.
    #[error("frame of {len} bytes, at most {limit} are allowed")]
    TooLong {
        /// Announced length.
        len: usize,
        /// The bound.
        limit: usize,
    },
    /// The payload is not what its kind says.
    #[error("malformed frame of kind {0:?}")]
    Payload(FrameKind),
    /// The JSON in it is not what it must be.
    #[error("malformed message: {0}")]
    Json(#[from] serde_json::Error),
}

/// Kinds of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// Client: the request, JSON.
    Request = 1,
    /// Client: bytes for standard input.
    Stdin = 2,
    /// Client: end of standard input; empty.
    StdinEnd = 3,
    /// Client: rows and columns, two u16.
    Resize = 4,
    /// Client: signal number, u32.
    Signal = 5,
    /// Supervisor: the answer, JSON.
    Reply = 16,
    /// Supervisor: it did not work, JSON of a refusal.
    Refusal = 17,
    /// Supervisor: bytes of standard output.
    Stdout = 18,
    /// Supervisor: bytes of standard error.
    Stderr = 19,
    /// Supervisor: the process has ended, u8 exit code; then why, as text, when it did not end by itself. Nothing follows on this
    /// conversation but its end.
    Exit = 20,
}

impl FrameKind {
    fn from_byte(byte: u8) -> Result<Self, FrameError> {
        Ok(match byte {
            1 => Self::Request,
            2 => Self::Stdin,
            3 => Self::StdinEnd,
            4 => Self::Resize,
            5 => Self::Signal,
            16 => Self::Reply,
            17 => Self::Refusal,
            18 => Self::Stdout,
            19 => Self::Stderr,
            20 => Self::Exit,
            _ => return Err(FrameError::Kind(byte)),
        })
    }

    fn limit(self) -> usize {
        match self {
            Self::Request | Self::Reply | Self::Refusal => MAX_JSON_BYTES,
            Self::Stdin | Self::Stdout | Self::Stderr => MAX_DATA_BYTES,
            Self::StdinEnd => 0,
            Self::Resize | Self::Signal => 4,
            Self::Exit => 1 + MAX_REASON_BYTES,
        }
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) kind: FrameKind,
    pub(crate) payload: Vec<u8>,
}

impl Frame {
    pub(crate) fn new(kind: FrameKind, payload: impl Into<Vec<u8>>) -> Self {
        Self { kind, payload: payload.into() }
    }

    pub(crate) fn json(kind: FrameKind, value: &impl serde::Serialize) -> Result<Self, FrameError> {
        Ok(Self { kind, payload: serde_json::to_vec(value)? })
    }

    pub(crate) fn resize(rows: u16, cols: u16) -> Self {
        let mut payload = rows.to_le_bytes().to_vec();
        payload.extend(cols.to_le_bytes());
        Self { kind: FrameKind::Resize, payload }
    }

    /// Rows and columns of a [`FrameKind::Resize`].
    pub(crate) fn size(&self) -> Result<(u16, u16), FrameError> {
        match self.payload.as_slice() {
            [a, b, c, d] => Ok((u16::from_le_bytes([*a, *b]), u16::from_le_bytes([*c, *d]))),
            _ => Err(FrameError::Payload(self.kind)),
        }
    }

    /// The number of a [`FrameKind::Signal`].
    pub(crate) fn signal(&self) -> Result<u32, FrameError> {
        let bytes: [u8; 4] =
            self.payload.as_slice().try_into().map_err(|_| FrameError::Payload(self.kind))?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// The end of a process; `reason` is empty when it ended by itself.
    pub(crate) fn exit(code: u8, reason: &str) -> Self {
        let mut payload = vec![code];
        payload.extend(reason.bytes().take(MAX_REASON_BYTES));
        Self { kind: FrameKind::Exit, payload }
    }

    /// The text after the code of a [`FrameKind::Exit`].
    pub(crate) fn reason(&self) -> String {
        String::from_utf8_lossy(self.payload.get(1..).unwrap_or_default()).into_owned()
    }

    /// The code of a [`FrameKind::Exit`].
    pub(crate) fn exit_code(&self) -> Result<u8, FrameError> {
        self.payload.first().copied().ok_or(FrameError::Payload(self.kind))
    }

    pub(crate) fn parse_json<T: serde::de::DeserializeOwned>(&self) -> Result<T, FrameError> {
        Ok(serde_json::from_slice(&self.payload)?)
    }
}

/// Reads frames. [`FrameReader::next`] may be dropped at any await and called again: nothing is lost.
#[derive(Debug)]
pub(crate) struct FrameReader<R> {
    from: R,
    buffer: Vec<u8>,
}

const HEAD_BYTES: usize = 5;
/// What one read asks for, bytes: a full data frame in one system call.
const READ_BYTES: usize = MAX_DATA_BYTES + HEAD_BYTES;

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(crate) fn new(from: R) -> Self {
        Self { from, buffer: Vec::new() }
    }

    /// The reader and what was read beyond the last frame.
    pub(crate) fn into_parts(self) -> (R, Vec<u8>) {
        (self.from, self.buffer)
    }

    /// Goes on where another reader stopped, see [`FrameReader::into_parts`].
    pub(crate) fn resume(from: R, buffer: Vec<u8>) -> Self {
        Self { from, buffer }
    }

    /// The next frame; `None` at an orderly end.
    pub(crate) async fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            if let Some(frame) = self.take()? {
                return Ok(Some(frame));
            }
            self.buffer.reserve(READ_BYTES);
            match self.from.read_buf(&mut self.buffer).await {
                Ok(0) if self.buffer.is_empty() => return Ok(None),
                Ok(0) => return Err(FrameError::Closed),
                Ok(_) => {}
                Err(error) if is_end(&error) && self.buffer.is_empty() => return Ok(None),
                Err(error) if is_end(&error) => return Err(FrameError::Closed),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn take(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some((kind, rest)) = self.buffer.split_first() else { return Ok(None) };
        let kind = FrameKind::from_byte(*kind)?;
        let Some((len, rest)) = rest.split_first_chunk::<4>() else { return Ok(None) };
        let len = usize::try_from(u32::from_le_bytes(*len)).unwrap_or(usize::MAX);
        if len > kind.limit() {
            return Err(FrameError::TooLong { len, limit: kind.limit() });
        }
        let Some(payload) = rest.get(..len) else { return Ok(None) };
        let frame = Frame { kind, payload: payload.to_vec() };
        self.buffer.drain(..HEAD_BYTES + len);
        Ok(Some(frame))
    }
}

/// Whether the other side has gone.
pub(crate) fn is_end(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe)
}

/// Writes one frame. Not cancel safe.
pub(crate) async fn write_frame(to: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> Result<(), FrameError> {
    let limit = frame.kind.limit();
    if frame.payload.len() > limit {
        return Err(FrameError::TooLong { len: frame.payload.len(), limit });
    }
    let len = u32::try_from(frame.payload.len()).map_err(|_| FrameError::Payload(frame.kind))?;
    let mut head = [0; 5];
    head[0] = frame.kind as u8;
    head[1..].copy_from_slice(&len.to_le_bytes());
    to.write_all(&head).await?;
    to.write_all(&frame.payload).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(bytes: &[u8]) -> Result<Option<Frame>, FrameError> {
        FrameReader::new(bytes).next().await
    }

    #[tokio::test]
    async fn frames_survive() {
        let frames = [
            Frame::json(FrameKind::Request, &"hello").unwrap(),
            Frame::new(FrameKind::Stdin, vec![7; MAX_DATA_BYTES]),
            Frame::new(FrameKind::StdinEnd, []),
            Frame::resize(24, 80),
            Frame::new(FrameKind::Signal, 9_u32.to_le_bytes()),
            Frame::new(FrameKind::Stdout, *b"out"),
            Frame::new(FrameKind::Stderr, *b"err"),
            Frame::exit(137, "killed"),
        ];
        let mut wire = Vec::new();
        for frame in &frames {
            write_frame(&mut wire, frame).await.unwrap();
        }
        let mut reader = FrameReader::new(wire.as_slice());
        for frame in frames {
            assert_eq!(reader.next().await.unwrap(), Some(frame));
        }
        assert!(reader.next().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn lengths_are_bounded_before_they_are_used() {
        let huge = [2, 0xff, 0xff, 0xff, 0xff];
        assert!(matches!(read(&huge).await, Err(FrameError::TooLong { .. })));
        let long_end = [3, 1, 0, 0, 0, 1];
        assert!(matches!(read(&long_end).await, Err(FrameError::TooLong { len: 1, limit: 0 })));
        let frame = Frame::new(FrameKind::Stdout, vec![0; MAX_DATA_BYTES + 1]);
        assert!(matches!(write_frame(&mut Vec::new(), &frame).await, Err(FrameError::TooLong { .. })));
    }

    #[tokio::test]
    async fn every_cut_is_an_error() {
        let mut wire = Vec::new();
        write_frame(&mut wire, &Frame::new(FrameKind::Stdin, *b"abc")).await.unwrap();
        for len in 1..wire.len() {
            assert!(matches!(read(&wire[..len]).await, Err(FrameError::Closed)), "{len}");
        }
    }

    #[tokio::test]
    async fn dropping_a_read_loses_nothing() {
        let (near, mut far) = tokio::io::duplex(64);
        let mut wire = Vec::new();
        write_frame(&mut wire, &Frame::new(FrameKind::Stdin, *b"abc")).await.unwrap();
        let mut reader = FrameReader::new(near);
        for byte in wire.iter().take(wire.len() - 1) {
            far.write_all(&[*byte]).await.unwrap();
            tokio::select! {
                biased;
                frame = reader.next() => panic!("{frame:?}"),
                () = std::future::ready(()) => {}
            }
        }
        far.write_all(&wire[wire.len() - 1..]).await.unwrap();
        assert_eq!(reader.next().await.unwrap().unwrap().payload, b"abc");
    }

    #[tokio::test]
    async fn unknown_kinds_and_short_payloads() {
        assert!(matches!(read(&[0]).await, Err(FrameError::Kind(0))));
        assert!(matches!(read(&[255]).await, Err(FrameError::Kind(255))));
        assert!(Frame::new(FrameKind::Resize, [1, 2, 3]).size().is_err());
        assert!(Frame::new(FrameKind::Signal, []).signal().is_err());
        assert!(Frame::new(FrameKind::Exit, []).exit_code().is_err());
        let frame = Frame::exit(137, &"é".repeat(MAX_REASON_BYTES));
        assert_eq!(frame.payload.len(), FrameKind::Exit.limit());
        assert!(frame.exit_code().unwrap() == 137 && frame.reason().starts_with("éé"));
        assert_eq!(Frame::exit(0, "").reason(), "");
    }
}
