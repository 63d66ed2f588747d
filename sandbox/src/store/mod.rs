//! The containers and volumes of one user: [`Home`], [`Container`], [`Volume`].
//!
//! Files: `home` (open, create, find), `names`, `lock` (who is alive), `record` (config.json), `recover` (what dead supervisors left),
//! `volume`, `snapshot` (saved containers), `container` (the verbs that change a container's files), `start` (its supervisor), `ask` (the verbs that the supervisor
//! answers), `stats` (plain data), `archive` (cp).

mod archive;
mod ask;
mod container;
mod home;
mod jailed;
mod lock;
mod names;
mod record;
mod recover;
mod snapshot;
mod start;
mod stats;
mod volume;

pub use archive::{ArchiveInOptions, ArchiveReader, PathStat};
pub use container::{Container, ExecConfig, RemoveOptions, WaitCondition};
pub use home::Home;
pub use jailed::Jailed;
pub use snapshot::{Draft, Snapshot};
pub use stats::{ContainerStats, NetworkCounters, Process};
pub use volume::Volume;

pub(crate) use home::{RemoveDir, list, make_private_dir, remove_tree};
pub(crate) use lock::FileLock;
pub(crate) use names::{new_id, random};
pub(crate) use recover::{LOST_EXIT_CODE, UNPACK_PREFIX};
pub(crate) use snapshot::{
    SavedInterface, SavedMachine, create_files, describe, draft_dir, forget_saved, open_saved,
};
pub(crate) use start::HANDOVER;
#[cfg(test)]
pub(crate) use start::hand_over;

#[cfg(test)]
pub(crate) mod tests {
    //! What the tests of this crate share.

    use super::Home;
    use crate::config::ContainerConfig;
    use crate::dirs::{Dirs, Parts};

    /// An empty home in a directory that goes with the first value.
    pub(crate) fn home() -> (tempfile::TempDir, Home) {
        let dir = tempfile::tempdir().unwrap();
        let dirs = Dirs { data: dir.path().join("data"), run: dir.path().join("run") };
        let parts = Parts::in_dir(dir.path(), std::path::Path::new("/nonexistent/hyper"));
        let home = Home::open(dirs, parts).unwrap();
        (dir, home)
    }

    /// A configuration that passes every check.
    pub(crate) fn config(name: &str) -> ContainerConfig {
        let mut config = ContainerConfig { name: name.to_owned(), ..Default::default() };
        config.process.cmd = vec!["true".into()];
        config
    }
}
