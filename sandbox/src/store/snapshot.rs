//! Saved containers: `snapshots/<name>`, and containers that go on from one.
//!
//! ```text
//! Container::save: snapshots/.new-<id> --supervisor fills it--> Draft --keep--> snapshots/<name>
//!                                                                 \--dropped--> removed
//! Home::go_on: snapshots/.new-<id> <-- links, copy of rw.img --renamed into--> containers/<id>: rw.img, saved/
//! ```
//!
//! | file | what |
//! |---|---|
//! | `snapshot.json` | name, source, its configuration |
//! | `saved/machine.json` | what the machine was made of and is known by |
//! | `saved/state`, `saved/memory` | the machine; links to them are shared by all that go on from it |
//! | `rw.img` | the writable layer as it was then |
//!
//! A container is continued once: its supervisor opens the files of `saved` and removes them before the guest may write to the disk, which
//! would not fit them any more. A tenant's memory is in here: nobody but its owner can read it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::home::{NEW_PREFIX, RemoveDir, list, make_private_dir, remove_tree};
use super::lock::FileLock;
use super::names;
use crate::clock::Timestamp;
use crate::config::{ContainerConfig, check_snapshot_name};
use crate::launch::{Inputs, Template, scaled_ms};
use crate::state::{read_json, write_json};
use crate::stream::wire::Request;
use crate::{Container, Home, SandboxError, storage};

/// How long a supervisor may take to save its container: until what goes on has ended, for the memory and for the disk.
const SAVE_MS: u64 = 90_000;
const RECORD: &str = "snapshot.json";
const LOCK: &str = "lock";
const SAVED: &str = "saved";
const MACHINE: &str = "machine.json";
const STATE: &str = "state";
const MEMORY: &str = "memory";

/// What is known of a saved machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedMachine {
    pub(crate) inputs: Inputs,
    /// Id of the container in the guest, which may be that of an earlier one on the host.
    pub(crate) guest_id: String,
    /// Hardware and network address of its interface; none without network.
    pub(crate) interface: Option<SavedInterface>,
    /// Numbers that the guest does not know yet.
    pub(crate) next_exec: u64,
    pub(crate) next_stream: u64,
}

/// The interface of a saved machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedInterface {
    pub(crate) mac: String,
    /// In CIDR notation.
    pub(crate) address: String,
}

/// `snapshot.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct SnapshotRecord {
    version: u32,
    /// Empty until it is kept.
    name: String,
    created: Timestamp,
    /// Name of the container that was saved, and its configuration.
    source: String,
    config: ContainerConfig,
}

impl SnapshotRecord {
    /// Version of the file's format; a file of a later one is refused.
    const VERSION: u32 = 1;
}

/// A saved container.
#[derive(Debug, Clone)]
pub struct Snapshot {
    dir: PathBuf,
    record: SnapshotRecord,
}

/// A container that was just saved; removed when this is dropped, unless it is kept.
#[derive(Debug)]
pub struct Draft {
    home: Home,
    snapshot: Snapshot,
    space: Space,
}

/// A directory of ours among the snapshots. Whoever cleans up sees by its lock that it is in use.
#[derive(Debug)]
struct Space {
    dir: PathBuf,
    undo: RemoveDir,
    _lock: FileLock,
}

impl Space {
    fn new(home: &Home) -> Result<Self, SandboxError> {
        let _home = home.lock()?;
        make_private_dir(&home.snapshots_dir())?;
        let dir = home.snapshots_dir().join(format!("{NEW_PREFIX}{}", names::new_id()));
        let undo = RemoveDir(Some(dir.clone()));
        make_private_dir(&dir)?;
        let lock = FileLock::try_take(&dir.join(LOCK))?;
        let lock = lock.ok_or(SandboxError::Refused("a fresh lock is taken".to_owned()))?;
        Ok(Self { dir, undo, _lock: lock })
    }

    fn name(&self) -> String {
        self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

/// Half-made snapshots whose makers are gone. Call it under the home's lock to be sure.
pub(super) fn orphans(home: &Home) -> Result<Vec<PathBuf>, SandboxError> {
    let mut found = Vec::new();
    for name in list(&home.snapshots_dir())?.iter().filter(|name| name.starts_with(NEW_PREFIX)) {
        let dir = home.snapshots_dir().join(name);
        let lock = dir.join(LOCK);
        // Without a lock its maker ended before it had one.
        if !lock.exists() || FileLock::try_take_existing(&lock)?.is_some() {
            found.push(dir);
        }
    }
    Ok(found)
}

/// The directory that a client has made for its supervisor to fill.
pub(crate) fn draft_dir(home: &Home, name: &str) -> Result<PathBuf, SandboxError> {
    match name.strip_prefix(NEW_PREFIX) {
        Some(id) if names::is_id(id) => Ok(home.snapshots_dir().join(name)),
        _ => Err(SandboxError::NoSuchSnapshot(name.to_owned())),
    }
}

/// The empty files for a machine's state and memory, in the directory of a draft.
pub(crate) fn create_files(dir: &Path) -> Result<(File, File), SandboxError> {
    let saved = dir.join(SAVED);
    make_private_dir(&saved)?;
    let create = |name| {
        let path = saved.join(name);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        file.map_err(|source| SandboxError::io("make", path, source))
    };
    Ok((create(STATE)?, create(MEMORY)?))
}

/// Writes down what was saved: the draft is whole then.
pub(crate) fn describe(dir: &Path, machine: &SavedMachine, source: &Container) -> Result<(), SandboxError> {
    write_json(&dir.join(SAVED).join(MACHINE), machine)?;
    let record = SnapshotRecord {
        version: SnapshotRecord::VERSION,
        name: String::new(),
        created: Timestamp::now(),
        source: source.name().to_owned(),
        config: source.config().clone(),
    };
    write_json(&dir.join(RECORD), &record)
}

/// What a container goes on from when it is started, if anything.
pub(crate) fn open_saved(container_dir: &Path) -> Result<Option<(SavedMachine, Template)>, SandboxError> {
    let saved = container_dir.join(SAVED);
    let Some(machine) = read_json::<SavedMachine>(&saved.join(MACHINE))? else { return Ok(None) };
    let open = |name| {
        let path = saved.join(name);
        File::open(&path).map_err(|source| SandboxError::io("open", path, source))
    };
    Ok(Some((machine, Template { state: open(STATE)?, memory: open(MEMORY)? })))
}

/// A container goes on once: at its next start there is nothing to go on from.
pub(crate) fn forget_saved(container_dir: &Path) -> Result<(), SandboxError> {
    remove_tree(&container_dir.join(SAVED))
}

impl SavedMachine {
    /// Checks that it can go on with what there is now. `name` is whose it is.
    fn check(&self, home: &Home, name: &str) -> Result<(), SandboxError> {
        let now = self.inputs.shape().inputs(home.parts())?;
        if now == self.inputs { Ok(()) } else { Err(SandboxError::Stale(name.to_owned())) }
    }
}

impl Snapshot {
    fn load(dir: PathBuf, name: &str) -> Result<Self, SandboxError> {
        let path = dir.join(RECORD);
        let record: Option<SnapshotRecord> = read_json(&path)?;
        let record = record.ok_or_else(|| SandboxError::NoSuchSnapshot(name.to_owned()))?;
        if record.version > SnapshotRecord::VERSION {
            return Err(SandboxError::TooNew { path, version: record.version });
        }
        Ok(Self { dir, record })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// Name of the container that was saved.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.record.source
    }

    /// When it was made.
    #[must_use]
    pub fn created(&self) -> Timestamp {
        self.record.created
    }

    /// What the container was.
    #[must_use]
    pub fn saved_config(&self) -> &ContainerConfig {
        &self.record.config
    }

    /// What a container that goes on from it is: as the one that was saved, with a name of its own and without published ports.
    #[must_use]
    pub fn config(&self) -> ContainerConfig {
        ContainerConfig { name: String::new(), ports: Vec::new(), ..self.record.config.clone() }
    }

    /// What it takes on the disk, bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let files = ["rw.img", "saved/state", "saved/memory"].map(|name| self.dir.join(name));
        files.iter().filter_map(|path| fs::metadata(path).ok()).map(|data| data.blocks() * 512).sum()
    }

    fn machine(&self) -> Result<SavedMachine, SandboxError> {
        let missing = || SandboxError::NoSuchSnapshot(self.name().to_owned());
        read_json(&self.dir.join(SAVED).join(MACHINE))?.ok_or_else(missing)
    }
}

impl Draft {
    /// What was saved.
    #[must_use]
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Keeps it; an empty name is replaced by a made-up one.
    ///
    /// # Errors
    /// [`SandboxError::SnapshotExists`], [`SandboxError::Config`] for a bad name.
    pub fn keep(self, name: &str) -> Result<Snapshot, SandboxError> {
        let (audit, of) = (self.home.audit(), format!("of {}", self.snapshot.source()));
        let kept = self.try_keep(name);
        let name = kept.as_ref().map_or(name, Snapshot::name).to_owned();
        audit.note("snapshot create", &name, &of, kept)
    }

    fn try_keep(self, name: &str) -> Result<Snapshot, SandboxError> {
        let Self { home, mut snapshot, space } = self;
        let _lock = home.lock()?;
        let name = match name {
            "" => names::new_name(&|name| home.snapshots_dir().join(name).exists()),
            name => name.to_owned(),
        };
        home.check_new_snapshot(&name)?;
        snapshot.record.name.clone_from(&name);
        write_json(&space.dir.join(RECORD), &snapshot.record)?;
        snapshot.dir = home.snapshots_dir().join(&name);
        let failed = |source| SandboxError::io("make", &snapshot.dir, source);
        fs::remove_file(space.dir.join(LOCK)).map_err(failed)?;
        fs::rename(&space.dir, &snapshot.dir).map_err(failed)?;
        space.undo.release();
        Ok(snapshot)
    }
}

impl Container {
    /// Saves it as it is now: its memory, processes and files. It stands still meanwhile and goes on afterwards.
    ///
    /// # Errors
    /// [`SandboxError::WrongStatus`] when it does not run, [`SandboxError::Refused`] with what stands in the way.
    pub async fn save(&self) -> Result<Draft, SandboxError> {
        let space = Space::new(&self.home)?;
        let saved = self.ask_within(&Request::Save { draft: space.name() }, scaled_ms(SAVE_MS)).await;
        self.noted("container save", saved)?;
        let snapshot = Snapshot::load(space.dir.clone(), "")?;
        Ok(Draft { home: self.home.clone(), snapshot, space })
    }
}

impl Home {
    /// All snapshots, by name. One whose files are damaged is left out with a warning in the log.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>, SandboxError> {
        let mut all = Vec::new();
        for name in list(&self.snapshots_dir())? {
            match self.snapshot(&name) {
                Ok(snapshot) => all.push(snapshot),
                Err(SandboxError::NoSuchSnapshot(_)) => {}
                Err(error) => tracing::warn!(name, %error, "snapshot left out"),
            }
        }
        all.sort_by(|one, other| one.name().cmp(other.name()));
        Ok(all)
    }

    /// One snapshot.
    ///
    /// # Errors
    /// [`SandboxError::NoSuchSnapshot`].
    pub fn snapshot(&self, name: &str) -> Result<Snapshot, SandboxError> {
        check_snapshot_name(name).map_err(|_| SandboxError::NoSuchSnapshot(name.to_owned()))?;
        Snapshot::load(self.snapshots_dir().join(name), name)
    }

    /// Checks that a snapshot can be kept by this name.
    ///
    /// # Errors
    /// [`SandboxError::SnapshotExists`], [`SandboxError::Config`] for a bad name.
    pub fn check_new_snapshot(&self, name: &str) -> Result<(), SandboxError> {
        check_snapshot_name(name)?;
        let taken = self.snapshots_dir().join(name).exists();
        if taken { Err(SandboxError::SnapshotExists(name.to_owned())) } else { Ok(()) }
    }

    /// Removes a snapshot. Containers that go on from it keep what they have of it.
    ///
    /// # Errors
    /// [`SandboxError::NoSuchSnapshot`].
    pub fn remove_snapshot(&self, name: &str) -> Result<(), SandboxError> {
        self.audit().note("snapshot remove", name, "", self.try_remove_snapshot(name))
    }

    fn try_remove_snapshot(&self, name: &str) -> Result<(), SandboxError> {
        let _lock = self.lock()?;
        let dir = self.snapshot(name)?.dir;
        let beside = self.snapshots_dir().join(format!("{NEW_PREFIX}{}", names::new_id()));
        fs::rename(&dir, &beside).map_err(|source| SandboxError::io("remove", dir, source))?;
        remove_tree(&beside)
    }

    /// Makes a container that goes on from a snapshot when it is started.
    ///
    /// # Errors
    /// [`SandboxError::Stale`], and as [`Home::create`].
    pub async fn go_on(&self, from: &Snapshot, config: ContainerConfig) -> Result<Container, SandboxError> {
        let whose = if from.name().is_empty() { from.source() } else { from.name() };
        from.machine()?.check(self, whose)?;
        let space = Space::new(self)?;
        let (source, target) = (from.dir.clone(), space.dir.clone());
        // As long as much was written to it, where the host's file system cannot share.
        let copied = tokio::task::spawn_blocking(move || copy(&source, &target)).await;
        copied.map_err(|_| SandboxError::Refused("the thread that copies has ended".to_owned()))??;
        self.create_with(config, |container| {
            storage::move_rw(&space.dir, container)?;
            let (from, to) = (space.dir.join(SAVED), container.join(SAVED));
            fs::rename(from, &to).map_err(|source| SandboxError::io("make", to, source))
        })
    }
}

/// Copies what was saved: the disk, and links to what nobody writes to.
fn copy(from: &Path, to: &Path) -> Result<(), SandboxError> {
    storage::copy_rw(from, to, None)?;
    let (from, to) = (from.join(SAVED), to.join(SAVED));
    make_private_dir(&to)?;
    for name in [MACHINE, STATE, MEMORY] {
        let to = to.join(name);
        fs::hard_link(from.join(name), &to).map_err(|source| SandboxError::io("link", to, source))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::MachineShape;
    use crate::store::tests::{config, home};

    fn draft(home: &Home, source: &Container) -> Draft {
        let space = Space::new(home).unwrap();
        assert_eq!(draft_dir(home, &space.name()).unwrap(), space.dir);
        // As a supervisor leaves it.
        let (state, memory) = create_files(&space.dir).unwrap();
        state.set_len(5).unwrap();
        memory.set_len(1 << 20).unwrap();
        fs::write(space.dir.join("rw.img"), "disk").unwrap();
        for part in [&home.parts().vmm, &home.parts().kernel, &home.parts().initramfs] {
            if !part.exists() {
                fs::write(part, "part").unwrap();
            }
        }
        let machine = SavedMachine {
            inputs: MachineShape::of_tests().inputs(home.parts()).unwrap(),
            guest_id: source.id().to_owned(),
            interface: None,
            next_exec: 3,
            next_stream: 9,
        };
        describe(&space.dir, &machine, source).unwrap();
        let snapshot = Snapshot::load(space.dir.clone(), "").unwrap();
        Draft { home: home.clone(), snapshot, space }
    }

    fn in_dir(home: &Home) -> Vec<String> {
        list(&home.snapshots_dir()).unwrap()
    }

    #[tokio::test]
    async fn snapshots_are_kept_listed_gone_on_from_and_removed() {
        let (_dir, home) = home();
        let source = home.create(config("web")).unwrap();
        drop(draft(&home, &source));
        assert_eq!(in_dir(&home), [""; 0], "a draft that is not kept leaves nothing");
        draft(&home, &source).keep("one").unwrap();
        assert!(matches!(draft(&home, &source).keep("one"), Err(SandboxError::SnapshotExists(_))));
        assert!(draft(&home, &source).keep("../two").is_err());
        let made_up = draft(&home, &source).keep("").unwrap();
        let names: Vec<String> = home.snapshots().unwrap().iter().map(|s| s.name().to_owned()).collect();
        assert!(
            names.len() == 2 && ["one", made_up.name()].iter().all(|name| names.iter().any(|n| n == name))
        );
        assert_eq!(in_dir(&home).len(), 2);

        let one = home.snapshot("one").unwrap();
        assert_eq!((one.source(), one.config().name.as_str()), ("web", ""));
        let clone = home.go_on(&one, one.config()).await.unwrap();
        home.remove_snapshot("one").unwrap();
        assert!(matches!(home.snapshot("one"), Err(SandboxError::NoSuchSnapshot(_))));
        assert!(matches!(home.remove_snapshot("one"), Err(SandboxError::NoSuchSnapshot(_))));
        assert_eq!(fs::read_to_string(clone.dir().join("rw.img")).unwrap(), "disk");
        let (machine, files) = open_saved(&clone.dir()).unwrap().unwrap();
        assert_eq!((machine.guest_id.as_str(), machine.next_exec), (source.id(), 3));
        assert_eq!(files.memory.metadata().unwrap().len(), 1 << 20);
        forget_saved(&clone.dir()).unwrap();
        assert!(open_saved(&clone.dir()).unwrap().is_none(), "once");
        assert!(open_saved(&source.dir()).unwrap().is_none());
    }

    #[tokio::test]
    async fn what_was_made_of_other_parts_does_not_go_on() {
        let (_dir, home) = home();
        let source = home.create(config("web")).unwrap();
        let one = draft(&home, &source).keep("one").unwrap();
        fs::write(&home.parts().kernel, "another kernel").unwrap();
        let error = home.go_on(&one, one.config()).await.unwrap_err();
        assert!(matches!(&error, SandboxError::Stale(name) if name == "one"), "{error}");
        assert_eq!((home.containers().unwrap().len(), in_dir(&home).len()), (1, 1), "nothing is left behind");
    }

    #[test]
    fn nobody_else_reads_a_tenants_memory() {
        let (_dir, home) = home();
        let source = home.create(config("web")).unwrap();
        let one = draft(&home, &source).keep("one").unwrap();
        for (path, mode) in [("", 0o700), ("saved", 0o700), ("saved/state", 0o600), ("saved/memory", 0o600)] {
            let found = fs::metadata(one.dir.join(path)).unwrap().mode() & 0o777;
            assert_eq!(found, mode, "{path}: {found:o}");
        }
    }

    #[test]
    fn drafts_of_the_dead_are_cleaned_up_and_others_are_not() {
        let (_dir, home) = home();
        let alive = Space::new(&home).unwrap();
        let Space { dir: dead, undo, _lock: lock } = Space::new(&home).unwrap();
        undo.release();
        drop(lock);
        let half = home.snapshots_dir().join(format!("{NEW_PREFIX}{}", names::new_id()));
        make_private_dir(&half).unwrap();
        super::super::recover::recover(&home).unwrap();
        assert!(alive.dir.exists() && !dead.exists() && !half.exists());
        for odd in ["one", "..", ".new-../x", ".new-", ""] {
            assert!(draft_dir(&home, odd).is_err(), "{odd:?}");
        }
    }
}
