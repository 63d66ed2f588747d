//! What the life of a container and the conversations about it share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, RwLock, RwLockReadGuard, RwLockWriteGuard, watch};

use super::console::Console;
use super::run::Run;
use crate::config::RestartPolicy;
use crate::launch::MachineShape;
use crate::state::{ContainerState, Status};
use crate::store::FileLock;
use crate::stream::wire::Refusal;
use crate::{Container, Home, SandboxError};

/// Where the supervisor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    /// A start is under way.
    Starting,
    /// The process runs.
    Running,
    /// It has ended and will be started again.
    Restarting,
    /// It has ended, or could not be started; the supervisor is about to end.
    Over,
}

/// What conversations wait for.
#[derive(Debug, Clone)]
pub(super) struct Phase {
    pub(super) life: Life,
    /// Starts that succeeded.
    pub(super) starts: u64,
    /// Ends of the process.
    pub(super) exits: u64,
    pub(super) exit_code: u8,
    /// Why the last start failed.
    pub(super) failure: Option<Refusal>,
}

/// What is shared; all locks are held for moments only.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) home: Home,
    pub(super) id: String,
    container: Mutex<Container>,
    lock: Mutex<Option<FileLock>>,
    phase: watch::Sender<Phase>,
    /// Streams of the process that runs, or will run next.
    console: Mutex<Arc<Console>>,
    run: Mutex<Option<Arc<Run>>>,
    stopped: watch::Sender<bool>,
    /// The start that is under way must not go on.
    abandon: watch::Sender<bool>,
    /// The process does not end by signals: end the machine.
    pub(super) force: Notify,
    held: Mutex<Vec<tokio::net::UnixStream>>,
    /// Held by whoever asks something of the agent that must not be half done when the machine is saved.
    quiet: RwLock<()>,
    /// The template that the latest start lacked.
    lacking: Mutex<Option<MachineShape>>,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(home: &Home, id: &str, lock: FileLock) -> Result<Self, SandboxError> {
        let container = Container::load(home, id)?;
        let phase = Phase {
            life: Life::Starting,
            starts: 0,
            exits: 0,
            exit_code: container.state().exit_code,
            failure: None,
        };
        let console = Arc::new(Console::new(&container.config().process));
        Ok(Self {
            home: home.clone(),
            id: id.to_owned(),
            container: Mutex::new(container),
            lock: Mutex::new(Some(lock)),
            phase: watch::channel(phase).0,
            console: Mutex::new(console),
            run: Mutex::new(None),
            stopped: watch::channel(false).0,
            abandon: watch::channel(false).0,
            force: Notify::new(),
            held: Mutex::new(Vec::new()),
            quiet: RwLock::new(()),
            lacking: Mutex::new(None),
        })
    }

    /// A copy of the container as it is now.
    pub(super) fn container(&self) -> Container {
        held(&self.container).clone()
    }

    pub(super) fn status(&self) -> Status {
        held(&self.container).state().status
    }

    /// Changes and writes the state. A full disk must not end the container: it is logged, and tried again with the next change.
    pub(super) fn update(&self, change: impl FnOnce(&mut ContainerState)) {
        let lock = held(&self.lock);
        let Some(lock) = lock.as_ref() else { return };
        if let Err(error) = held(&self.container).change_state(lock, change) {
            tracing::error!(%error, "state is not written");
        }
    }

    /// Reads the configuration again and returns the restart policy.
    pub(super) fn reload_policy(&self) -> RestartPolicy {
        let mut container = held(&self.container);
        if let Err(error) = container.reload_config() {
            tracing::warn!(%error, "configuration is not read again");
        }
        container.config().restart
    }

    /// Waits while the machine is saved, and keeps it from that. Not to be asked for twice by one task: a save may wait in between.
    pub(super) async fn busy(&self) -> RwLockReadGuard<'_, ()> {
        self.quiet.read().await
    }

    /// Waits until nobody is [`Shared::busy`], and has everybody wait.
    pub(super) async fn alone(&self) -> RwLockWriteGuard<'_, ()> {
        self.quiet.write().await
    }

    pub(super) fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Goes to another phase; with an exit code, the process has ended.
    pub(super) fn enter(&self, life: Life, exit_code: Option<u8>) {
        self.phase.send_modify(|phase| {
            phase.life = life;
            phase.starts += u64::from(life == Life::Running);
            if let Some(exit_code) = exit_code {
                phase.exits += 1;
                phase.exit_code = exit_code;
            }
        });
    }

    /// A start has failed: written down, and told to whoever waits for it.
    pub(super) fn start_failed(&self, refusal: Refusal, restart: bool) {
        self.update(|state| {
            let status = if restart { Status::Exited } else { state.status };
            if restart {
                state.enter(status);
            }
            state.pid = 0;
            state.exit_code = refusal.exit_code;
            state.error.clone_from(&refusal.message);
            state.network = None;
            state.ports.clear();
        });
        let exit_code = refusal.exit_code;
        self.phase.send_modify(|phase| {
            phase.life = Life::Over;
            phase.exit_code = exit_code;
            phase.failure = Some(refusal);
        });
    }

    /// The streams of the process that runs or will run next.
    pub(super) fn console(&self) -> Arc<Console> {
        Arc::clone(&held(&self.console))
    }

    /// Streams for the next process; the old ones have ended.
    pub(super) fn renew_console(&self) {
        let fresh = Arc::new(Console::new(&self.container().config().process));
        *held(&self.console) = fresh;
    }

    pub(super) fn set_run(&self, run: Option<Arc<Run>>) {
        *held(&self.run) = run;
    }

    /// The run, if the process runs.
    pub(super) fn running(&self) -> Result<Arc<Run>, Refusal> {
        let run = held(&self.run).clone();
        run.ok_or_else(|| Refusal::new(format!("container {} is not running", self.container().name())))
    }

    /// The user wants it to stop: policies do not start it again.
    pub(super) fn mark_stopped(&self) {
        self.update(|state| state.stopped_by_user = true);
        self.stopped.send_replace(true);
    }

    pub(super) fn is_stopped(&self) -> bool {
        *self.stopped.borrow()
    }

    /// Remembers the template that a start lacked.
    pub(super) fn set_lacking(&self, shape: Option<MachineShape>) {
        *held(&self.lacking) = shape;
    }

    /// The template that the latest start lacked.
    pub(super) fn take_lacking(&self) -> Option<MachineShape> {
        held(&self.lacking).take()
    }

    /// Waits until the user wants it to stop.
    pub(super) async fn stopped(&self) {
        let mut stopped = self.stopped.subscribe();
        // The sender lives as long as we do.
        let _ = stopped.wait_for(|stopped| *stopped).await;
    }

    /// Gives up a start that is under way; says whether there was one. A process that runs is not touched.
    pub(super) fn abandon_start(&self) -> bool {
        let starting = matches!(self.phase.borrow().life, Life::Starting | Life::Restarting);
        if starting {
            self.abandon.send_replace(true);
        }
        starting
    }

    /// Waits until the start is given up.
    pub(super) async fn abandoned(&self) {
        let mut abandon = self.abandon.subscribe();
        // The sender lives as long as we do.
        let _ = abandon.wait_for(|abandon| *abandon).await;
    }

    /// Keeps a conversation open until the lock is free: its client wants to know that.
    pub(super) fn hold(&self, stream: tokio::net::UnixStream) {
        let let_go = held(&self.lock).is_none();
        if !let_go {
            held(&self.held).push(stream);
        }
    }

    pub(super) fn wants_removal(&self) -> bool {
        self.container().config().auto_remove
    }

    pub(super) fn remove(&self) {
        if let Err(error) = self.container().remove_locked(true) {
            tracing::error!(%error, "the container stays");
        }
    }

    /// Lets the lock go; whoever waited for that hears of it.
    pub(super) fn let_go(&self) {
        *held(&self.lock) = None;
        held(&self.held).clear();
    }
}
