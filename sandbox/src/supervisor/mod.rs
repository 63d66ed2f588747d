//! The supervisor: one process for each running container, alive as long as its machine.
//!
//! ```text
//! starter --stdin: lock, first request--> handover
//!   loop: boot (storage, network, machine, container) -> run (process, output, clients) -> machine ends -> state written
//!         policy says again? back off : leave the loop
//!   clients hear the exit, auto-remove, lock let go, last bytes delivered
//! ```
//!
//! Files: `handover`, `shared` (what conversations and the loop share), `policy` (restarts), `boot` (one start), `run` (one run),
//! `console` (streams of a process and who is attached), `serve` (conversations), `verbs` (what is answered with one RPC), `exec`,
//! `archive`, `save` (for others to go on from), `template` (for the next start).

mod archive;
mod boot;
mod console;
mod exec;
mod handover;
mod policy;
mod run;
mod save;
mod serve;
mod shared;
mod template;
mod verbs;

pub(crate) use verbs::stats_of;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use self::shared::{Life, Shared};
use crate::state::Status;
use crate::store::{FileLock, make_private_dir, remove_tree};
use crate::stream::wire::Refusal;
use crate::{Home, SandboxError};

/// How long clients may take to read the last output after everything else is done. Nothing is held meanwhile but the bytes.
const LINGER: Duration = Duration::from_secs(24 * 3600);

/// Body of the hidden verb `supervise <id>`: runs one container to its end. Blocks; builds its own runtime, so it must not be called
/// within one. Standard input is the socket of the starter ([`crate::Container::start`] spawned us); standard error is
/// `containers/<id>/supervisor.log`, where the caller's tracing subscriber should write to.
///
/// # Errors
/// When nobody started us properly, or the state cannot be written; what goes wrong with the container is told to its clients instead.
pub fn supervise(home: &Home, id: &str) -> Result<(), SandboxError> {
    let (lock, first) = handover::take(home, id)?;
    // A session of our own: no terminal's hang-up or Ctrl-C reaches us. It fails only if we lead one already.
    let _ = rustix::process::setsid();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|source| SandboxError::io("start", "the supervisor", source))?;
    runtime.block_on(run(home, id, lock, first))
}

/// Undo of the run directory.
#[derive(Debug)]
struct RunDir(std::path::PathBuf);

impl Drop for RunDir {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.0) {
            tracing::warn!(%error, "undo failed");
        }
    }
}

async fn run(
    home: &Home,
    id: &str,
    lock: FileLock,
    first: std::os::unix::net::UnixStream,
) -> Result<(), SandboxError> {
    let run_dir = home.run_dir(id);
    remove_tree(&run_dir)?;
    make_private_dir(&run_dir)?;
    let undo = RunDir(run_dir.clone());
    let path = run_dir.join("sup.sock");
    let listener =
        UnixListener::bind(&path).map_err(|source| SandboxError::io("listen on", &path, source))?;
    let first =
        UnixStream::from_std(first).map_err(|source| SandboxError::io("use", "standard input", source))?;
    let shared = Arc::new(Shared::new(home, id, lock)?);

    let mut conversations = JoinSet::new();
    let template = tokio::spawn(template::make_afterwards(Arc::clone(&shared)));
    // The starter's request is taken before anything starts, so that it misses nothing of the output.
    let opened = serve::open(first).await?;
    let attached = serve::prepare(&shared, &opened);
    conversations.spawn(serve::converse(Arc::clone(&shared), opened, attached));
    {
        let life = supervise_container(&shared);
        let accept = serve::accept(&listener, &shared, &mut conversations);
        tokio::select! {
            () = life => {}
            () = accept => {}
        }
    }
    drop(listener);
    if shared.wants_removal() {
        shared.remove();
    }
    drop(undo);
    shared.let_go();
    let last_words = async { while conversations.join_next().await.is_some() {} };
    if timeout(LINGER, last_words).await.is_err() {
        tracing::warn!(id, "a client never read the last output");
    }
    if let Err(error) = template.await {
        tracing::warn!(%error, "no template is made");
    }
    Ok(())
}

/// Starts the container, again and again if its policy says so.
async fn supervise_container(shared: &Arc<Shared>) {
    let mut back_off = policy::BackOff::default();
    let mut restarts = 0;
    loop {
        let began = Instant::now();
        let outcome = tokio::select! {
            biased;
            // Dropping the start undoes it.
            () = shared.abandoned() => Err(SandboxError::Abandoned.into()),
            outcome = run::run_once(shared, restarts) => outcome,
        };
        let exit_code = match outcome {
            Ok(exit_code) => exit_code,
            Err(error) => {
                let refusal = Refusal::from(error);
                tracing::warn!(message = refusal.message, "not started");
                shared.start_failed(refusal, restarts > 0);
                return;
            }
        };
        let policy = shared.reload_policy();
        if !policy::restarts(policy, exit_code, restarts) || shared.is_stopped() {
            shared.enter(Life::Over, Some(exit_code));
            return;
        }
        restarts += 1;
        let pause = back_off.next(began.elapsed());
        tracing::info!(exit_code, restarts, pause_ms = pause.as_millis(), "restarting");
        shared.update(|state| {
            state.enter(Status::Restarting);
            state.restart_count = restarts;
        });
        shared.enter(Life::Restarting, Some(exit_code));
        if timeout(pause, shared.stopped()).await.is_ok() {
            shared.update(|state| {
                state.enter(Status::Exited);
            });
            shared.enter(Life::Over, None);
            return;
        }
    }
}
