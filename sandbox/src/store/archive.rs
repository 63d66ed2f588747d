//! Files into and out of a running container, as tar streams (`cp`).

use std::pin::Pin;
use std::task::{Context, Poll};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, DuplexStream, ReadBuf};
use tokio::task::JoinHandle;

use crate::clock::Timestamp;
use crate::stream::wire::{Refusal, Reply, Request};
use crate::stream::{Frame, FrameError, FrameKind, FrameReader, MAX_DATA_BYTES, write_frame};
use crate::{Container, SandboxError};

/// What a path in a container is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStat {
    /// Last component of the path.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// `st_mode`: type and permissions.
    pub mode: u32,
    /// Last change of its content.
    pub mtime: Timestamp,
    /// Where a symbolic link points to; else empty.
    pub link_target: String,
}

/// How an archive is unpacked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchiveInOptions {
    /// Refuse to replace a directory by a file or the other way round.
    pub strict: bool,
    /// Keep owners from the archive; else the files belong to root.
    pub keep_owner: bool,
}

/// A tar that comes from a container. A read error says why the archive is not whole.
#[derive(Debug)]
pub struct ArchiveReader {
    from: DuplexStream,
    copy: Option<JoinHandle<Result<(), std::io::Error>>>,
}

impl AsyncRead for ArchiveReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        match Pin::new(&mut self.from).poll_read(context, buffer) {
            Poll::Ready(Ok(())) if buffer.filled().len() == before => {}
            other => return other,
        }
        // The end of the bytes is the end of the archive only if the copying says so.
        let Some(copy) = &mut self.copy else { return Poll::Ready(Ok(())) };
        match Pin::new(copy).poll(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(outcome) => {
                self.copy = None;
                Poll::Ready(outcome.unwrap_or_else(|error| Err(std::io::Error::other(error))))
            }
        }
    }
}

/// Copies stdout frames until the exit frame.
async fn copy_frames(
    mut from: FrameReader<tokio::net::unix::OwnedReadHalf>,
    mut to: DuplexStream,
) -> Result<(), std::io::Error> {
    loop {
        let frame = from.next().await.map_err(std::io::Error::other)?;
        let Some(frame) = frame else { return Err(std::io::Error::other(FrameError::Closed)) };
        match frame.kind {
            FrameKind::Stdout => to.write_all(&frame.payload).await?,
            FrameKind::Exit => return Ok(()),
            FrameKind::Refusal => {
                let refusal: Refusal = frame.parse_json().map_err(std::io::Error::other)?;
                return Err(std::io::Error::other(refusal.message));
            }
            kind => return Err(std::io::Error::other(FrameError::Payload(kind))),
        }
    }
}

impl Container {
    /// A tar of `path`: the file, or the directory with its name as the first component. `follow` follows a symbolic link at the end.
    ///
    /// # Errors
    /// [`SandboxError::Refused`] when there is no such path, [`SandboxError::WrongStatus`] when the container does not run.
    pub async fn archive_out(
        &self,
        path: &str,
        follow: bool,
    ) -> Result<(PathStat, ArchiveReader), SandboxError> {
        let asked = self.converse(&Request::ArchiveOut { path: path.to_owned(), follow }).await;
        let detail = format!("{}:{path}", self.name());
        let mut talk = self.home.audit().note("container copy out", self.id(), &detail, asked)?;
        let stat = match talk.answer().await?.ok_or(FrameError::Closed)? {
            Ok(Reply::Path { stat }) => stat,
            Ok(_) => return Err(FrameError::Payload(FrameKind::Reply).into()),
            Err(refusal) => return Err(SandboxError::Refused(refusal.message)),
        };
        let (near, far) = tokio::io::duplex(4 * MAX_DATA_BYTES);
        let (frames, to) = talk.into_split();
        let copy = tokio::spawn(async move {
            let copied = copy_frames(frames, far).await;
            drop(to);
            copied
        });
        Ok((stat, ArchiveReader { from: near, copy: Some(copy) }))
    }

    /// Unpacks a tar into the directory `path`. Returns the bytes of the archive.
    ///
    /// # Errors
    /// As [`Container::archive_out`]; also when `tar` fails to be read.
    pub async fn archive_in(
        &self,
        path: &str,
        tar: &mut (impl AsyncRead + Unpin + Send),
        options: ArchiveInOptions,
    ) -> Result<u64, SandboxError> {
        let asked = self.converse(&Request::ArchiveIn { path: path.to_owned(), options }).await;
        let detail = format!("{}:{path}", self.name());
        let talk = self.home.audit().note("container copy in", self.id(), &detail, asked)?;
        let (mut frames, mut to) = talk.into_split();
        let send = async {
            let mut buffer = vec![0; MAX_DATA_BYTES];
            loop {
                let len = tar
                    .read(&mut buffer)
                    .await
                    .map_err(|source| SandboxError::io("read", "the archive", source))?;
                let bytes = buffer.get(..len).unwrap_or_default();
                let kind = if bytes.is_empty() { FrameKind::StdinEnd } else { FrameKind::Stdin };
                write_frame(&mut to, &Frame::new(kind, bytes)).await?;
                if bytes.is_empty() {
                    // The answer comes while the connection stays open.
                    return std::future::pending::<Result<(), SandboxError>>().await;
                }
            }
        };
        let frame = tokio::select! {
            biased;
            frame = frames.next() => frame?.ok_or(FrameError::Closed)?,
            failed = send => match failed {
                // The supervisor closed: it has said why.
                Err(SandboxError::Stream(error)) => frames.next().await?.ok_or(error)?,
                Err(error) => return Err(error),
                Ok(()) => return Err(FrameError::Closed.into()),
            },
        };
        match frame.kind {
            FrameKind::Reply => match frame.parse_json()? {
                Reply::Archive { bytes } => Ok(bytes),
                _ => Err(FrameError::Payload(FrameKind::Reply).into()),
            },
            FrameKind::Refusal => Err(SandboxError::Refused(frame.parse_json::<Refusal>()?.message)),
            kind => Err(FrameError::Payload(kind).into()),
        }
    }

    /// What `path` is; a symbolic link at its end is not followed.
    ///
    /// # Errors
    /// As [`Container::archive_out`].
    pub async fn stat_path(&self, path: &str) -> Result<PathStat, SandboxError> {
        match self.ask(&Request::StatPath { path: path.to_owned() }).await? {
            Reply::Path { stat } => Ok(stat),
            _ => Err(FrameError::Payload(FrameKind::Reply).into()),
        }
    }
}
