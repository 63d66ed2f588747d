//! What dead supervisors and half-done commands left: recognised by free locks, and cleaned up.
//!
//! | left | recognised by | done |
//! |---|---|---|
//! | `containers/.new-*`, `.removed-*` | we hold the home's lock, under which they are made | removed |
//! | `snapshots/.new-*` | the lock in it is free | removed |
//! | a live status | its container's lock is free | exited, 137; removed if it was to remove itself |
//! | an end of what was to remove itself | its lock is free | removed |
//! | `volumes/.new-*`, `.removed-*` | we hold the home's lock | removed |
//! | `run/<id>` | its container is gone, or its lock is free | removed |
//! | `run/unpack-*` | the lock in it is free | removed |
//!
//! Processes need no cleaning (they end with their supervisor's sockets), nor do network devices and leases (they end with their
//! descriptors).

use std::io::ErrorKind;
use std::path::PathBuf;

use super::home::{NEW_PREFIX, REMOVED_PREFIX, list, remove_tree};
use super::lock::FileLock;
use super::{Home, names};
use crate::state::Status;
use crate::{Container, SandboxError};

/// Exit code of a container whose supervisor was killed: as of a container that was killed.
pub(crate) const LOST_EXIT_CODE: u8 = 137;
/// What [`crate::ContainerState::error`] says then.
pub(crate) const LOST_ERROR: &str = "supervisor was killed";
/// Prefix of directories of throw-away machines in the run directory.
pub(crate) const UNPACK_PREFIX: &str = "unpack-";

/// Cleans up. What cannot be cleaned is left with a warning: it must not keep a command from working.
pub(crate) fn recover(home: &Home) -> Result<(), SandboxError> {
    for container in home.containers()? {
        if needs_recovery(&container) || home.run_dir(container.id()).exists() {
            warn(recover_container(home, container.id()));
        }
    }
    let orphans = orphans(home)?;
    if orphans.is_empty() {
        return Ok(());
    }
    let _lock = home.lock()?;
    for orphan in self::orphans(home)? {
        match orphan {
            Orphan::Container(name) => warn(remove_tree(&home.containers_dir().join(name))),
            Orphan::Volume(name) => warn(remove_tree(&home.volumes_dir().join(name))),
            Orphan::Run(name) => warn(remove_tree(&home.dirs().run.join(name))),
            Orphan::Snapshot(dir) => warn(remove_tree(&dir)),
        }
    }
    Ok(())
}

enum Orphan {
    Container(String),
    Volume(String),
    Run(String),
    Snapshot(PathBuf),
}

fn warn(result: Result<(), SandboxError>) {
    if let Err(error) = result {
        tracing::warn!(%error, "clean-up failed");
    }
}

fn orphans(home: &Home) -> Result<Vec<Orphan>, SandboxError> {
    let names = list(&home.containers_dir())?;
    let half = |name: &&String| name.starts_with(NEW_PREFIX) || name.starts_with(REMOVED_PREFIX);
    let mut found: Vec<Orphan> = names.iter().filter(half).cloned().map(Orphan::Container).collect();
    found.extend(list(&home.volumes_dir())?.into_iter().filter(|name| half(&name)).map(Orphan::Volume));
    found.extend(super::snapshot::orphans(home)?.into_iter().map(Orphan::Snapshot));
    for run in list(&home.dirs().run)? {
        let of_container = run.len() == 16 && run.bytes().all(|b| b.is_ascii_hexdigit());
        let orphaned = if of_container {
            !names.iter().any(|id| names::is_id(id) && id.starts_with(&run))
        } else if run.starts_with(UNPACK_PREFIX) {
            FileLock::try_take_existing(&home.dirs().run.join(&run).join("lock"))?.is_some()
        } else {
            false
        };
        if orphaned {
            found.push(Orphan::Run(run));
        }
    }
    Ok(found)
}

/// Puts right one container if nobody lives that holds its lock.
pub(crate) fn recover_container(home: &Home, id: &str) -> Result<(), SandboxError> {
    let Some(lock) = FileLock::try_take_existing(&home.container_lock(id))? else { return Ok(()) };
    recover_locked(home, id, &lock)
}

/// Whether it says that it lives, or has ended and was to be gone then.
fn needs_recovery(container: &Container) -> bool {
    let status = container.state().status;
    status.is_live() || (status == Status::Exited && container.config().auto_remove)
}

/// As [`recover_container`], by the holder of the container's lock.
pub(crate) fn recover_locked(home: &Home, id: &str, lock: &FileLock) -> Result<(), SandboxError> {
    let mut container = Container::load(home, id)?;
    remove_tree(&home.run_dir(id))?;
    if !needs_recovery(&container) {
        return Ok(());
    }
    if !container.state().status.is_live() {
        return container.remove_locked(true);
    }
    tracing::warn!(id, "its supervisor was killed");
    let noted = container
        .change_state(lock, |state| state.end(Status::Exited, LOST_EXIT_CODE, LOST_ERROR.to_owned()));
    if container.config().auto_remove {
        return container.remove_locked(true);
    }
    match noted {
        // It must not keep `rm -f` from making room.
        Err(SandboxError::Io { source, .. }) if source.kind() == ErrorKind::StorageFull => {
            tracing::warn!(id, error = %source, "its end cannot be noted");
            Ok(())
        }
        noted => noted,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::store::tests::{config, home};

    #[test]
    fn dead_supervisor_is_recognised_by_its_free_lock() {
        let (_dir, home) = home();
        let mut container = home.create(config("web")).unwrap();
        let lock = FileLock::try_take(&home.container_lock(container.id())).unwrap().unwrap();
        container.change_state(&lock, |state| state.status = Status::Running).unwrap();
        fs::create_dir_all(home.run_dir(container.id())).unwrap();
        recover(&home).unwrap();
        assert_eq!(home.find("web").unwrap().state().status, Status::Running, "its holder lives");
        drop(lock);
        recover(&home).unwrap();
        let found = home.find("web").unwrap();
        assert_eq!((found.state().status, found.state().exit_code), (Status::Exited, 137));
        assert_eq!(found.state().error, LOST_ERROR);
        assert!(!home.run_dir(found.id()).exists());
    }

    #[test]
    fn lost_container_that_was_to_remove_itself_is_removed() {
        let (_dir, home) = home();
        let mut wish = config("once");
        wish.auto_remove = true;
        let mut container = home.create(wish).unwrap();
        let lock = FileLock::try_take(&home.container_lock(container.id())).unwrap().unwrap();
        container.change_state(&lock, |state| state.status = Status::Running).unwrap();
        drop(lock);
        recover(&home).unwrap();
        assert!(matches!(home.find("once"), Err(SandboxError::NoSuchContainer(_))));
    }

    #[test]
    fn half_made_and_half_removed_are_removed() {
        let (_dir, home) = home();
        home.create(config("stays")).unwrap();
        for name in [".new-0123", ".removed-0123"] {
            fs::create_dir_all(home.containers_dir().join(name)).unwrap();
            fs::write(home.containers_dir().join(name).join("config.json"), "{").unwrap();
        }
        fs::create_dir_all(home.dirs().run.join("0123456789abcdef")).unwrap();
        let alive = home.dirs().run.join("unpack-1");
        let dead = home.dirs().run.join("unpack-2");
        for dir in [&alive, &dead] {
            fs::create_dir_all(dir).unwrap();
            fs::write(dir.join("lock"), "").unwrap();
        }
        let held = FileLock::try_take(&alive.join("lock")).unwrap().unwrap();
        recover(&home).unwrap();
        assert_eq!(list(&home.containers_dir()).unwrap().len(), 1);
        assert!(alive.exists() && !dead.exists());
        assert_eq!(list(&home.dirs().run).unwrap(), ["unpack-1"]);
        drop(held);
    }

    #[test]
    fn every_prefix_of_a_creation_leaves_nothing_or_a_container() {
        let (_dir, home) = home();
        let made = home.create(config("model")).unwrap();
        let text = fs::read(made.dir().join("config.json")).unwrap();
        for len in (0..text.len()).step_by(7) {
            let half = home.containers_dir().join(format!("{NEW_PREFIX}{len}"));
            fs::create_dir_all(&half).unwrap();
            fs::write(half.join("config.json"), &text[..len]).unwrap();
            assert_eq!(home.containers().unwrap().len(), 1);
        }
        recover(&home).unwrap();
        assert_eq!(list(&home.containers_dir()).unwrap(), [made.id()]);
    }
}
