//! The keeper: has a user's namespaces, hands them out, and ends when nobody has been in them for a while.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use rustix::net::sockopt::socket_acceptconn;
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet, LocalSet};
use tokio::time::timeout;

use super::anchor::Anchor;
use super::talk::{self, Wish};
use super::uplink::{self, Condition};
use super::{LOCK, SOCKET};
use crate::launch::scaled_ms;
use crate::store::FileLock;
use crate::{Dirs, SandboxError};

/// How long it stays when nobody is there: the next command need not wait for all to be made again.
const IDLE: Duration = Duration::from_secs(5);
/// How long whoever asks for the network waits for pasta.
const UPLINK_MS: u64 = 15_000;

/// Body of the hidden verb `keep`: standard input is the socket on which it is asked.
///
/// # Errors
/// When it was not started by hyper itself. What goes wrong with the namespaces is told to those who ask for them.
pub fn keep(dirs: &Dirs) -> Result<(), SandboxError> {
    let stdin = io::stdin();
    if !socket_acceptconn(&stdin).unwrap_or(false) {
        return Err(SandboxError::NotStarted("standard input is no listening socket"));
    }
    let fail = |source| SandboxError::io("use", "standard input", source);
    let listener = stdin.as_fd().try_clone_to_owned().map_err(fail)?;
    let null = std::fs::File::open("/dev/null").map_err(fail)?;
    rustix::stdio::dup2_stdin(&null).map_err(|error| fail(error.into()))?;
    // A session of our own: no terminal's hang-up or Ctrl-C reaches us. It fails only if we lead one already.
    let _ = rustix::process::setsid();
    let anchor = Anchor::start().inspect_err(|why| tracing::warn!("{why}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|source| SandboxError::io("start", "the keeper", source))?;
    LocalSet::new().block_on(&runtime, serve(listener, Rc::new(Keeper::new(anchor, &dirs.run)), &dirs.run))
}

/// What it has.
#[derive(Debug)]
struct Keeper {
    anchor: Result<Anchor, String>,
    uplink: tokio::sync::Mutex<Uplink>,
    run: std::path::PathBuf,
}

/// Pasta, once somebody has asked for the network.
#[derive(Debug, Default)]
struct Uplink(Option<(JoinHandle<()>, watch::Receiver<Condition>)>);

impl Drop for Uplink {
    fn drop(&mut self) {
        if let Some((task, _)) = &self.0 {
            task.abort();
        }
    }
}

async fn serve(listener: OwnedFd, keeper: Rc<Keeper>, run: &Path) -> Result<(), SandboxError> {
    let fail = |source| SandboxError::io("listen on", run.join(SOCKET), source);
    let listener = std::os::unix::net::UnixListener::from(listener);
    listener.set_nonblocking(true).map_err(fail)?;
    let listener = UnixListener::from_std(listener).map_err(fail)?;
    let mut guests = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    guests.spawn_local(Rc::clone(&keeper).converse(stream));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot take a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = guests.join_next() => {}
            () = tokio::time::sleep(keeper.patience()), if guests.is_empty() => {
                // Whoever makes a keeper has the lock, and connects to this one or finds none.
                let Some(lock) = FileLock::try_take(&run.join(LOCK))? else { continue };
                std::fs::remove_file(run.join(SOCKET)).map_err(fail)?;
                drop(listener);
                drop(keeper);
                drop(lock);
                return Ok(());
            }
        }
    }
}

impl Keeper {
    fn new(anchor: Result<Anchor, String>, run: &Path) -> Self {
        Self { anchor, uplink: tokio::sync::Mutex::default(), run: run.to_owned() }
    }

    /// How long it stays when nobody is there. Without namespaces the next who comes shall try again.
    fn patience(&self) -> Duration {
        if self.anchor.is_ok() { IDLE } else { Duration::from_millis(100) }
    }

    /// Answers until the other side is gone.
    async fn converse(self: Rc<Self>, mut stream: UnixStream) {
        while let Ok(byte) = stream.read_u8().await {
            let answered = match (Wish::of(byte), &self.anchor) {
                (None, _) => return,
                (_, Err(why)) => talk::answer(&stream, Err(why)),
                (Some(Wish::User), Ok(anchor)) => talk::answer(&stream, Ok(anchor.user.as_fd())),
                (Some(Wish::Network), Ok(anchor)) => match self.way_out(anchor).await {
                    Ok(()) => talk::answer(&stream, Ok(anchor.network.as_fd())),
                    Err(why) => talk::answer(&stream, Err(&why)),
                },
            };
            if let Err(error) = answered {
                tracing::debug!(%error, "somebody is gone before the answer");
                return;
            }
        }
    }

    /// Waits for pasta, which is started when it does not run.
    async fn way_out(&self, anchor: &Anchor) -> Result<(), String> {
        let mut uplink = self.uplink.lock().await;
        let mut condition = match &uplink.0 {
            Some((task, condition)) if !task.is_finished() => condition.clone(),
            _ => {
                let (tell, condition) = watch::channel(None);
                let task = tokio::task::spawn_local(uplink::run(anchor.pid(), self.run.clone(), tell));
                uplink.0 = Some((task, condition.clone()));
                condition
            }
        };
        drop(uplink);
        let settled = timeout(scaled_ms(UPLINK_MS), condition.wait_for(Option::is_some)).await;
        match settled {
            Ok(Ok(condition)) => condition.clone().unwrap_or(Ok(())),
            _ => Err("pasta does not start".to_owned()),
        }
    }
}
