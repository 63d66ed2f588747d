//! Archives: between a client's frames and a stream of the agent.

use std::sync::Arc;

use hyper_protocol::rpc::agent::ArchiveRequest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::run::Run;
use super::serve::{refuse, reply};
use super::shared::Shared;
use super::verbs::stat_path;
use crate::launch::{Stream, context, rpc_error};
use crate::store::{ArchiveInOptions, PathStat};
use crate::stream::wire::{Refusal, Reply};
use crate::stream::{Frame, FrameError, FrameKind, FrameReader, MAX_DATA_BYTES, write_frame};

async fn open(shared: &Shared) -> Result<(Arc<Run>, u64, Stream), Refusal> {
    let run = shared.running()?;
    let (id, stream) = run.agent.open_stream().await.map_err(|error| Refusal::new(error.to_string()))?;
    Ok((run, id, stream))
}

fn refusal(call: &'static str, error: ttrpc::Error) -> Refusal {
    Refusal::new(rpc_error(call)(error).to_string())
}

/// Sends a tar of `path`: what it is, data, and an exit frame or a refusal.
pub(super) async fn read(
    shared: &Shared,
    path: &str,
    follow: bool,
    from: FrameReader<OwnedReadHalf>,
    mut to: OwnedWriteHalf,
) -> Result<(), FrameError> {
    let begun: Result<(PathStat, Arc<Run>, u64, Stream), Refusal> = async {
        let stat = stat_path(&*shared.running()?, path).await?;
        let (run, id, stream) = open(shared).await?;
        Ok((stat, run, id, stream))
    }
    .await;
    let (stat, run, id, mut stream) = match begun {
        Ok(begun) => begun,
        Err(refusal) => return refuse(to, from, shared, refusal).await,
    };
    reply(&mut to, &Reply::Path { stat }).await?;
    let request = ArchiveRequest {
        container_id: run.container_id.clone(),
        path: path.to_owned(),
        stream: id,
        follow_symlink: follow,
        ..Default::default()
    };
    let last = match relay_out(&run, &request, &mut stream, &mut to).await? {
        Ok(()) => Frame::exit(0, ""),
        Err(error) => Frame::json(FrameKind::Refusal, &refusal("ReadArchive", error))?,
    };
    write_frame(&mut to, &last).await
}

/// Copies the archive to the client while the agent writes it; the inner result is the agent's answer.
async fn relay_out(
    run: &Run,
    request: &ArchiveRequest,
    stream: &mut Stream,
    to: &mut OwnedWriteHalf,
) -> Result<Result<(), ttrpc::Error>, FrameError> {
    let copy = async {
        let mut buffer = vec![0; MAX_DATA_BYTES];
        loop {
            match stream.read(&mut buffer).await {
                // A broken stream is explained by the answer.
                Ok(0) | Err(_) => return Ok::<(), FrameError>(()),
                Ok(len) => {
                    let bytes = buffer.get(..len).unwrap_or_default();
                    write_frame(to, &Frame::new(FrameKind::Stdout, bytes)).await?;
                }
            }
        }
    };
    let answer = run.agent.rpc.read_archive(context(None), request);
    // An agent that refuses never opens the stream's other end; one that answers has written it to its end.
    let (mut copy, mut answer) = (std::pin::pin!(copy), std::pin::pin!(answer));
    let mut copied = false;
    let outcome = loop {
        tokio::select! {
            biased;
            done = &mut copy, if !copied => {
                done?;
                copied = true;
            }
            outcome = &mut answer => break outcome,
        }
    };
    if outcome.is_ok() && !copied {
        copy.await?;
    }
    Ok(outcome.map(drop))
}

/// Takes a tar from the client into the directory `path`.
pub(super) async fn write(
    shared: &Shared,
    path: &str,
    options: ArchiveInOptions,
    mut from: FrameReader<OwnedReadHalf>,
    mut to: OwnedWriteHalf,
) -> Result<(), FrameError> {
    let (run, id, mut stream) = match open(shared).await {
        Ok(opened) => opened,
        Err(refusal) => return refuse(to, from, shared, refusal).await,
    };
    let request = ArchiveRequest {
        container_id: run.container_id.clone(),
        path: path.to_owned(),
        stream: id,
        strict: options.strict,
        keep_owner: options.keep_owner,
        ..Default::default()
    };
    let answer = run.agent.rpc.write_archive(context(None), &request);
    let copy = async {
        while let Some(frame) = from.next().await? {
            match frame.kind {
                FrameKind::Stdin => {
                    if stream.write_all(&frame.payload).await.is_err() {
                        break;
                    }
                }
                FrameKind::StdinEnd => {
                    // The agent may have stopped reading: its answer says why.
                    let _ = stream.shutdown().await;
                    return Ok(());
                }
                kind => return Err(FrameError::Payload(kind)),
            }
        }
        Ok::<(), FrameError>(())
    };
    let (mut copy, mut answer) = (std::pin::pin!(copy), std::pin::pin!(answer));
    let mut copied = false;
    let outcome = loop {
        tokio::select! {
            done = &mut copy, if !copied => {
                done?;
                copied = true;
            }
            outcome = &mut answer => break outcome,
        }
    };
    match outcome {
        Ok(done) => reply(&mut to, &Reply::Archive { bytes: done.bytes }).await,
        Err(error) => {
            let refusal = Frame::json(FrameKind::Refusal, &refusal("WriteArchive", error))?;
            write_frame(&mut to, &refusal).await
        }
    }
}
