//! A user who is not root: namespaces of that user's own, in which root's code has root's power over nothing else.
//!
//! ```text
//! hyper run --asks--> keeper (one for a user, made by whoever comes first) --descriptor--> user namespace, in which the user is 0
//!    `--executes itself in it--> hyper run -> hyper supervise   (network of the host: pulls, names and published ports are as for root)
//!                                               `--asks keeper--> network namespace: bridge, TAPs, rules <-- pasta --> host's network
//! ```
//!
//! Whoever is in the namespace holds a connection to the keeper, and with the last of them it ends, after a while, and pasta with it.
//! Files: `talk` (what is asked of the keeper), `keeper`, `anchor` (makes the namespaces), `uplink` (pasta).

mod anchor;
mod keeper;
mod talk;
mod uplink;

use std::convert::Infallible;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

pub use self::anchor::anchor;
pub use self::keeper::keep;
pub(crate) use self::uplink::DOOR;
use crate::launch::scaled_ms;
use crate::store::{FileLock, make_private_dir};
use crate::{Dirs, SandboxError};

/// Where the keeper of this process's namespaces listens; set for programs that are in them.
const KEEPER_VAR: &str = "HYPER_KEEPER";
/// Under [`Dirs::run`]: the keeper's socket, the lock under which it is made and ends, its log.
const SOCKET: &str = "keeper.sock";
const LOCK: &str = "keeper.lock";
const LOG: &str = "keeper.log";
/// How long it may take to find or make a keeper that answers.
const ENTER_MS: u64 = 10_000;
/// Pause before a keeper that is just ending is looked for again.
const RETRY: Duration = Duration::from_millis(5);

/// Why a user who is not root cannot have namespaces, or a network in them. Every message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum RootlessError {
    /// A directory that others can get at.
    #[error("{path} is not safe to use: {why}; remove it, or set HYPER_RUN to a directory of your own")]
    Directory {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The keeper refuses, in its words.
    #[error("{0}")]
    Refused(String),
    /// No keeper answers.
    #[error("the keeper of this user's namespaces does not answer: {source}; see {log}")]
    Silent {
        /// What its log is.
        log: PathBuf,
        /// The last try.
        source: io::Error,
    },
    /// The namespace cannot be entered.
    #[error("cannot {what}: {source}")]
    Enter {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// Whether this process has to [`enter`] before it can run machines.
#[must_use]
pub fn is_needed() -> bool {
    !rustix::process::geteuid().is_root()
}

/// Enters this user's namespace and executes this program in it once more, with the same arguments. To be called while the process has one
/// thread.
///
/// # Errors
/// When there is no namespace to be had; it does not come back otherwise.
pub fn enter(dirs: &Dirs) -> Result<Infallible, SandboxError> {
    make_run_dir(dirs)?;
    let (namespace, connection) = user_namespace(&dirs.run)?;
    let fail = |what| move |source: io::Error| RootlessError::Enter { what, source };
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::User))
        .map_err(|error| fail("enter the user namespace")(error.into()))?;
    // It goes on in the next program and its children: as long as one of them lives, the keeper does.
    rustix::io::fcntl_setfd(&connection, rustix::io::FdFlags::empty())
        .map_err(|error| fail("keep the connection to the keeper")(error.into()))?;
    let mut command = this_program().map_err(fail("find this program"))?;
    command.args(std::env::args_os().skip(1));
    command.env("HYPER_ROOT", &dirs.data).env("HYPER_RUN", &dirs.run).env(KEEPER_VAR, dirs.run.join(SOCKET));
    Err(fail("execute hyper in the user namespace")(command.exec()).into())
}

/// Whether namespaces can be made: makes some and lets go of them.
///
/// # Errors
/// Why not, in one line.
pub fn try_namespaces() -> Result<(), String> {
    anchor::Anchor::start().map(drop)
}

/// Whether the way out of such namespaces is there: the program, as it is found.
///
/// # Errors
/// What to do.
pub fn find_uplink() -> Result<PathBuf, String> {
    uplink::find().ok_or_else(|| uplink::MISSING.to_owned())
}

/// Makes the directory of sockets, and checks that it is this user's alone.
///
/// # Errors
/// When it cannot be made, or is not.
pub fn make_run_dir(dirs: &Dirs) -> Result<(), SandboxError> {
    make_private_dir(&dirs.run)?;
    Ok(check_owner(&dirs.run)?)
}

/// The keeper's socket, if this process is in the namespaces of one.
pub(crate) fn keeper() -> Option<PathBuf> {
    std::env::var_os(KEEPER_VAR).map(PathBuf::from).filter(|path| path.is_absolute())
}

/// The network namespace of this user, with a way out.
pub(crate) async fn network(keeper: PathBuf) -> Result<OwnedFd, SandboxError> {
    let asked = tokio::task::spawn_blocking(move || {
        talk::ask(&keeper, talk::Wish::Network).map_err(|error| silent(&keeper, error))
    });
    match asked.await {
        Ok(answer) => Ok(answer?.map_err(RootlessError::Refused)?.0),
        Err(error) => Err(SandboxError::io("ask", "the keeper", io::Error::other(error))),
    }
}

fn silent(socket: &Path, source: io::Error) -> RootlessError {
    RootlessError::Silent { log: socket.with_file_name(LOG), source }
}

/// Asks the keeper for the user namespace, and makes the keeper when there is none.
fn user_namespace(run: &Path) -> Result<(OwnedFd, OwnedFd), SandboxError> {
    let socket = run.join(SOCKET);
    let deadline = Instant::now() + scaled_ms(ENTER_MS);
    loop {
        match talk::ask(&socket, talk::Wish::User) {
            Ok(answer) => return Ok(answer.map_err(RootlessError::Refused)?),
            Err(error) if Instant::now() >= deadline => return Err(silent(&socket, error).into()),
            Err(_) => {}
        }
        start_keeper(run, &socket)?;
        // One that was just ending has not answered.
        std::thread::sleep(RETRY);
    }
}

/// Starts a keeper, unless somebody else was quicker. It has its socket from the first moment on: who connects is heard.
fn start_keeper(run: &Path, socket: &Path) -> Result<(), SandboxError> {
    let _lock = FileLock::take_short(&run.join(LOCK))?;
    if talk::is_served(socket) {
        return Ok(());
    }
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(SandboxError::io("remove", socket, error));
        }
        _ => {}
    }
    let listener =
        UnixListener::bind(socket).map_err(|source| SandboxError::io("listen on", socket, source))?;
    let log = run.join(LOG);
    let file = File::create(&log).map_err(|source| SandboxError::io("make", &log, source))?;
    let started = this_program()
        .map_err(|source| SandboxError::io("find", "this program", source))?
        .arg("keep")
        .env("HYPER_RUN", run)
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(Stdio::from(file))
        .process_group(0)
        .spawn();
    started.map(drop).map_err(|source| SandboxError::io("start", "the keeper", source))
}

/// This program once more.
fn this_program() -> io::Result<Command> {
    std::env::current_exe().map(Command::new)
}

/// Checks that a directory is the user's alone: in `/tmp` anybody can have been there before.
pub(crate) fn check_owner(dir: &Path) -> Result<(), RootlessError> {
    let refuse = |why| RootlessError::Directory { path: dir.to_owned(), why };
    let found = fs::symlink_metadata(dir).map_err(|_| refuse("it cannot be looked at"))?;
    if !found.is_dir() {
        return Err(refuse("it is no directory"));
    }
    if found.uid() != rustix::process::geteuid().as_raw() {
        return Err(refuse("it belongs to somebody else"));
    }
    if found.mode() & 0o022 != 0 {
        return Err(refuse("others may write to it"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn directories_of_others_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("own");
        fs::create_dir(&own).unwrap();
        fs::set_permissions(&own, fs::Permissions::from_mode(0o700)).unwrap();
        check_owner(&own).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&own, &link).unwrap();
        fs::set_permissions(&own, fs::Permissions::from_mode(0o770)).unwrap();
        for bad in [&own, &link, &dir.path().join("none")] {
            let text = check_owner(bad).unwrap_err().to_string();
            assert!(text.contains("HYPER_RUN"), "{text}");
        }
    }
}
