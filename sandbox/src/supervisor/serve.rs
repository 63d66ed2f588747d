//! Conversations with clients: one task each.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::console::{Attachment, Console};
use super::shared::{Life, Shared};
use super::{archive, exec, save, verbs};
use crate::launch::scaled_ms;
use crate::store::WaitCondition;
use crate::stream::wire::{Refusal, Reply, Request};
use crate::stream::{AttachOptions, Frame, FrameError, FrameKind, FrameReader, TerminalSize, write_frame};

/// How long a client may take to say what it wants.
const REQUEST_MS: u64 = 10_000;
/// Most conversations at a time.
const MAX_CONVERSATIONS: usize = 512;

/// A conversation whose request was read.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) request: Request,
    pub(super) from: FrameReader<OwnedReadHalf>,
    pub(super) to: OwnedWriteHalf,
}

/// Reads the request.
pub(super) async fn open(stream: UnixStream) -> Result<Opened, FrameError> {
    let (from, to) = stream.into_split();
    let mut from = FrameReader::new(from);
    let frame = timeout(scaled_ms(REQUEST_MS), from.next()).await.map_err(|_| FrameError::Closed)??;
    let frame = frame.ok_or(FrameError::Closed)?;
    if frame.kind != FrameKind::Request {
        return Err(FrameError::Payload(frame.kind));
    }
    Ok(Opened { request: frame.parse_json()?, from, to })
}

/// Attaches whoever starts the container to the streams of its next process, before there is one.
pub(super) fn prepare(shared: &Shared, opened: &Opened) -> Option<(Arc<Console>, Attachment)> {
    let Request::Start { attach: Some(options) } = &opened.request else { return None };
    let console = shared.console();
    let attachment = console.attach(*options);
    Some((console, attachment))
}

/// Accepts conversations until it is dropped.
pub(super) async fn accept(listener: &UnixListener, shared: &Arc<Shared>, conversations: &mut JoinSet<()>) {
    loop {
        while conversations.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _)) if conversations.len() < MAX_CONVERSATIONS => stream,
            Ok(_) => continue,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let shared = Arc::clone(shared);
        conversations.spawn(async move {
            match open(stream).await {
                Ok(opened) => {
                    let attached = prepare(&shared, &opened);
                    converse(shared, opened, attached).await;
                }
                Err(error) => tracing::debug!(%error, "a client said nothing that is understood"),
            }
        });
    }
}

/// Answers one client to the end.
pub(super) async fn converse(
    shared: Arc<Shared>,
    opened: Opened,
    attached: Option<(Arc<Console>, Attachment)>,
) {
    if let Err(error) = answer(&shared, opened, attached).await {
        tracing::debug!(%error, "a conversation broke off");
    }
}

async fn answer(
    shared: &Arc<Shared>,
    opened: Opened,
    attached: Option<(Arc<Console>, Attachment)>,
) -> Result<(), FrameError> {
    let Opened { request, from, mut to } = opened;
    match request {
        Request::Start { .. } => match started(shared).await {
            Ok(()) => {
                reply(&mut to, &Reply::Done).await?;
                if let Some((console, attachment)) = attached {
                    attend(shared, "", &console, attachment, from, to).await?;
                }
                Ok(())
            }
            Err(refusal) => refuse(to, from, shared, refusal).await,
        },
        Request::Attach { options } => {
            if let Err(refusal) = shared.running() {
                return refuse(to, from, shared, refusal).await;
            }
            let console = shared.console();
            let attachment = console.attach(options);
            reply(&mut to, &Reply::Done).await?;
            if let Some(size) = options.size {
                Target { shared, process_id: "" }.resize(size).await;
            }
            attend(shared, "", &console, attachment, from, to).await
        }
        Request::Wait { condition } => {
            let exit_code = ended(shared, condition).await;
            reply(&mut to, &Reply::Exited { exit_code }).await?;
            hold(shared, from, to);
            Ok(())
        }
        Request::Stop { timeout_s } => {
            verbs::stop(shared, timeout_s).await;
            reply(&mut to, &Reply::Done).await?;
            hold(shared, from, to);
            Ok(())
        }
        Request::Save { draft } => match save::save(shared, &draft).await {
            Ok(done) => reply(&mut to, &done).await,
            Err(refusal) => refuse(to, from, shared, refusal).await,
        },
        Request::Exec { config, attach } => exec::exec(shared, config, attach, from, to).await,
        Request::ArchiveOut { path, follow } => archive::read(shared, &path, follow, from, to).await,
        Request::ArchiveIn { path, options } => archive::write(shared, &path, options, from, to).await,
        request => match verbs::simple(shared, request).await {
            Ok(done) => reply(&mut to, &done).await,
            Err(refusal) => refuse(to, from, shared, refusal).await,
        },
    }
}

pub(super) async fn reply(to: &mut OwnedWriteHalf, reply: &Reply) -> Result<(), FrameError> {
    write_frame(to, &Frame::json(FrameKind::Reply, reply)?).await
}

/// Says no.
pub(super) async fn refuse(
    mut to: OwnedWriteHalf,
    from: FrameReader<OwnedReadHalf>,
    shared: &Shared,
    refusal: Refusal,
) -> Result<(), FrameError> {
    let over = shared.phase().borrow().life == Life::Over;
    write_frame(&mut to, &Frame::json(FrameKind::Refusal, &refusal)?).await?;
    if over {
        hold(shared, from, to);
    }
    Ok(())
}

/// Keeps the connection until the lock is free.
fn hold(shared: &Shared, from: FrameReader<OwnedReadHalf>, to: OwnedWriteHalf) {
    if let Ok(stream) = from.into_parts().0.reunite(to) {
        shared.hold(stream);
    }
}

/// Waits until the process runs (or has run since this was asked), or could not be started.
async fn started(shared: &Shared) -> Result<(), Refusal> {
    let mut phase = shared.phase();
    let before = phase.borrow().starts;
    let seen = phase
        .wait_for(|phase| phase.life == Life::Running || phase.starts > before || phase.life == Life::Over)
        .await;
    match seen {
        Ok(phase) if phase.starts > before || phase.life == Life::Running => Ok(()),
        Ok(phase) => Err(phase.failure.clone().unwrap_or_else(|| Refusal::new("the container has ended"))),
        Err(_) => Err(Refusal::new("the supervisor ends")),
    }
}

async fn ended(shared: &Shared, condition: WaitCondition) -> u8 {
    let mut phase = shared.phase();
    let before = phase.borrow().exits;
    let next = condition == WaitCondition::NextExit;
    let seen = phase.wait_for(|phase| phase.life == Life::Over || (next && phase.exits > before)).await;
    seen.map_or(0, |phase| phase.exit_code)
}

/// The process that a conversation is about.
pub(super) struct Target<'a> {
    pub(super) shared: &'a Shared,
    pub(super) process_id: &'a str,
}

impl Target<'_> {
    async fn resize(&self, size: TerminalSize) {
        let Ok(run) = self.shared.running() else { return };
        if let Err(error) = verbs::resize(&run, self.process_id, size).await {
            tracing::debug!(%error, "terminal not resized");
        }
    }

    async fn signal(&self, signal: u32) {
        let sent = match self.process_id {
            "" => verbs::kill(self.shared, signal).await,
            process_id => match self.shared.running() {
                Ok(run) => run.signal(process_id, signal).await.map_err(Refusal::from),
                Err(refusal) => Err(refusal),
            },
        };
        if let Err(refusal) = sent {
            tracing::debug!(message = refusal.message, "signal not sent");
        }
    }
}

/// Passes on what the client sends and what the process writes, until the process has ended or the client has gone.
pub(super) async fn attend(
    shared: &Shared,
    process_id: &str,
    console: &Console,
    attachment: Attachment,
    mut from: FrameReader<OwnedReadHalf>,
    mut to: OwnedWriteHalf,
) -> Result<(), FrameError> {
    let Attachment { id, mut frames, options } = attachment;
    let target = Target { shared, process_id };
    let deliver = async {
        while let Some(frame) = frames.recv().await {
            write_frame(&mut to, &frame).await?;
        }
        Ok(())
    };
    let listen = listen(&mut from, &target, console, options);
    let done = tokio::select! {
        delivered = deliver => delivered,
        heard = listen => {
            console.detach(id);
            console.client_input_ended(options).await;
            heard
        }
    };
    console.detach(id);
    done
}

/// Hears the client until it goes.
async fn listen(
    from: &mut FrameReader<OwnedReadHalf>,
    target: &Target<'_>,
    console: &Console,
    options: AttachOptions,
) -> Result<(), FrameError> {
    while let Some(frame) = from.next().await? {
        match frame.kind {
            FrameKind::Stdin if options.stdin => console.write_stdin(&frame.payload).await,
            FrameKind::Stdin => {}
            FrameKind::StdinEnd => console.client_input_ended(options).await,
            FrameKind::Resize => {
                let (rows, cols) = frame.size()?;
                console.set_size(TerminalSize { rows, cols });
                target.resize(TerminalSize { rows, cols }).await;
            }
            FrameKind::Signal => target.signal(frame.signal()?).await,
            kind => return Err(FrameError::Payload(kind)),
        }
    }
    Ok(())
}
