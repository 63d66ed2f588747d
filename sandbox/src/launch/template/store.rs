//! Where templates are kept: found by their inputs, renamed into place when whole, removed when they are of no more use.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use super::Template;
use super::inputs::Inputs;
use crate::state::{read_json, write_json};
use crate::store::{FileLock, RemoveDir, list, make_private_dir, remove_tree};
use crate::{Home, SandboxError};

/// Of the folders of templates.
pub(super) const PREFIX: &str = "vm-";
/// Of a folder that is being filled; whoever has the lock removes those of others.
const NEW_PREFIX: &str = ".vm-";
/// Most templates: shapes that this host uses by turns. Each takes some 40 MiB of disk.
const MOST: usize = 8;

/// Who holds it makes templates.
const LOCK: &str = "vm.lock";
const INPUTS: &str = "inputs.json";
const STATE: &str = "state";
const MEMORY: &str = "memory";

fn dir_of(home: &Home, inputs: &Inputs) -> PathBuf {
    home.templates_dir().join(inputs.name())
}

/// The template of these inputs, if there is one. One that cannot be read counts as none.
pub(super) fn open(home: &Home, inputs: &Inputs) -> Option<Template> {
    let dir = dir_of(home, inputs);
    match read_json::<Inputs>(&dir.join(INPUTS)) {
        Ok(Some(found)) if found == *inputs => {}
        Ok(_) => return None,
        Err(error) => {
            tracing::warn!(%error, "a template cannot be used");
            return None;
        }
    }
    let open = |name| File::open(dir.join(name));
    match (open(STATE), open(MEMORY)) {
        (Ok(state), Ok(memory)) => Some(Template { state, memory }),
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(dir = %dir.display(), %error, "a template cannot be used");
            None
        }
    }
}

/// Whether there is a template of these inputs.
pub(super) fn has(home: &Home, inputs: &Inputs) -> bool {
    matches!(read_json::<Inputs>(&dir_of(home, inputs).join(INPUTS)), Ok(Some(found)) if found == *inputs)
}

/// Of the notes of failures, a byte each.
const FAILED_PREFIX: &str = "failed-";
/// How often templates of the same inputs may fail until none is made any more: a host on which none works must not make one for each
/// container.
const MOST_FAILURES: u64 = 3;

fn failures_of(home: &Home, inputs: &Inputs) -> PathBuf {
    home.templates_dir().join(format!("{FAILED_PREFIX}{}", inputs.name()))
}

/// Removes a template that does not work, and notes that. Machines that run on it keep what they have open.
pub(super) fn condemn(home: &Home, inputs: &Inputs) {
    let path = failures_of(home, inputs);
    let mut options = File::options();
    let noted = options.create(true).append(true).open(&path).and_then(|mut file| file.write_all(b"x"));
    if let Err(error) = noted {
        tracing::warn!(path = %path.display(), %error, "a failure is not noted");
    }
    if let Err(error) = remove_tree(&dir_of(home, inputs)) {
        tracing::warn!(%error, "a template stays");
    }
}

/// Whether templates of these inputs have failed too often.
pub(super) fn is_hopeless(home: &Home, inputs: &Inputs) -> bool {
    fs::metadata(failures_of(home, inputs)).is_ok_and(|data| data.len() >= MOST_FAILURES)
}

/// The right to make templates; one process at a time has it.
#[derive(Debug)]
pub(super) struct Maker {
    home: Home,
    _lock: FileLock,
}

/// A template that is being made; removed unless it is kept.
#[derive(Debug)]
pub(super) struct Draft {
    dir: PathBuf,
    undo: RemoveDir,
}

impl Maker {
    /// None when another process has it.
    pub(super) fn try_new(home: &Home) -> Result<Option<Self>, SandboxError> {
        make_private_dir(&home.templates_dir())?;
        let lock = FileLock::try_take(&home.templates_dir().join(LOCK))?;
        Ok(lock.map(|lock| Self { home: home.clone(), _lock: lock }))
    }

    /// Waits for whoever has it.
    pub(super) async fn new(home: &Home, limit: Duration) -> Result<Self, SandboxError> {
        make_private_dir(&home.templates_dir())?;
        let lock = FileLock::take_within(&home.templates_dir().join(LOCK), limit).await?;
        Ok(Self { home: home.clone(), _lock: lock })
    }

    /// Begins one.
    pub(super) fn draft(&self, inputs: &Inputs) -> Result<Draft, SandboxError> {
        let templates = self.home.templates_dir();
        for left in list(&templates)?.iter().filter(|name| name.starts_with(NEW_PREFIX)) {
            remove_tree(&templates.join(left))?;
        }
        let dir = templates.join(format!(".{}", inputs.name()));
        make_private_dir(&dir)?;
        let undo = RemoveDir(Some(dir.clone()));
        write_json(&dir.join(INPUTS), inputs)?;
        Ok(Draft { dir, undo })
    }

    /// Puts it into its place, and removes what is of no more use.
    pub(super) fn keep(&self, draft: Draft, inputs: &Inputs) -> Result<(), SandboxError> {
        let dir = dir_of(&self.home, inputs);
        // One of the same name that is not the same: damaged, or of other inputs.
        remove_tree(&dir)?;
        fs::rename(&draft.dir, &dir).map_err(|source| SandboxError::io("make", &dir, source))?;
        draft.undo.release();
        self.clean(inputs)
    }

    /// Removes templates of other kernels, agents or runs of the host, and the oldest of those that are too many.
    fn clean(&self, current: &Inputs) -> Result<(), SandboxError> {
        let templates = self.home.templates_dir();
        for note in list(&templates)?.iter().filter(|name| name.starts_with(FAILED_PREFIX)) {
            if templates.join(note) != failures_of(&self.home, current) {
                let path = templates.join(note);
                fs::remove_file(&path).map_err(|source| SandboxError::io("remove", path, source))?;
            }
        }
        let mut useful: Vec<(SystemTime, PathBuf)> = Vec::new();
        for name in list(&templates)?.iter().filter(|name| name.starts_with(PREFIX)) {
            let dir = templates.join(name);
            let inputs = read_json::<Inputs>(&dir.join(INPUTS)).ok().flatten();
            let made = fs::metadata(dir.join(INPUTS)).and_then(|data| data.modified());
            match (inputs, made) {
                (Some(inputs), Ok(made)) if inputs.same_but_shape(current) => useful.push((made, dir)),
                _ => remove_tree(&dir)?,
            }
        }
        useful.sort_unstable_by(|one, other| other.cmp(one));
        useful.iter().skip(MOST).try_for_each(|(_, dir)| remove_tree(dir))
    }
}

impl Draft {
    /// The empty files for state and memory.
    pub(super) fn files(&self) -> Result<(File, File), SandboxError> {
        let create = |name| {
            let path = self.dir.join(name);
            let mut options = File::options();
            let file = options.write(true).create_new(true).open(&path);
            file.map_err(|source| SandboxError::io("make", path, source))
        };
        Ok((create(STATE)?, create(MEMORY)?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::MachineShape;
    use super::super::inputs::tests::parts;
    use super::*;

    fn shape(mem_mib: u32) -> MachineShape {
        MachineShape::of_tests().with_mem_mib(mem_mib)
    }

    fn keep(home: &Home, inputs: &Inputs) {
        let maker = Maker::try_new(home).unwrap().unwrap();
        let draft = maker.draft(inputs).unwrap();
        let (mut state, _memory) = draft.files().unwrap();
        state.write_all(b"state").unwrap();
        assert!(open(home, inputs).is_none(), "not yet");
        maker.keep(draft, inputs).unwrap();
    }

    fn names(home: &Home) -> Vec<String> {
        let mut names = list(&home.templates_dir()).unwrap();
        names.retain(|name| name != "vm.lock");
        names
    }

    #[test]
    fn templates_are_found_by_their_inputs_and_one_makes_them() {
        let (dir, home) = crate::store::tests::home();
        let parts = parts(dir.path());
        let inputs = shape(64).inputs(&parts).unwrap();
        assert!(open(&home, &inputs).is_none() && !has(&home, &inputs));
        keep(&home, &inputs);
        assert!(open(&home, &inputs).is_some() && has(&home, &inputs));
        assert!(open(&home, &shape(65).inputs(&parts).unwrap()).is_none());
        let first = Maker::try_new(&home).unwrap();
        assert!(first.is_some() && Maker::try_new(&home).unwrap().is_none());
        drop(first);
        // Another's inputs under this name, and files that are missing.
        let file = dir_of(&home, &inputs).join(INPUTS);
        write_json(&file, &shape(66).inputs(&parts).unwrap()).unwrap();
        assert!(open(&home, &inputs).is_none());
        fs::write(&file, "{").unwrap();
        assert!(open(&home, &inputs).is_none());
        keep(&home, &inputs);
        fs::remove_file(dir_of(&home, &inputs).join(MEMORY)).unwrap();
        assert!(open(&home, &inputs).is_none());
        for failures in 1..=MOST_FAILURES {
            assert!(!is_hopeless(&home, &inputs));
            condemn(&home, &inputs);
            assert_eq!(names(&home).len(), 1, "only the note, {failures} times");
        }
        assert!(is_hopeless(&home, &inputs));
        let other = shape(77).inputs(&parts).unwrap();
        assert!(!is_hopeless(&home, &other));
        keep(&home, &other);
        assert!(!is_hopeless(&home, &inputs), "forgotten with the next that is made");
    }

    #[test]
    fn what_is_of_no_use_goes() {
        let (dir, home) = crate::store::tests::home();
        let parts = parts(dir.path());
        keep(&home, &shape(32).inputs(&parts).unwrap());
        fs::write(&parts.initramfs, "another agent").unwrap();
        for mem_mib in 100..100 + u32::try_from(MOST).unwrap() + 3 {
            keep(&home, &shape(mem_mib).inputs(&parts).unwrap());
        }
        assert_eq!(names(&home).len(), MOST);
        let newest = shape(100 + u32::try_from(MOST).unwrap() + 2).inputs(&parts).unwrap();
        assert!(has(&home, &newest));
        assert!(!has(&home, &shape(100).inputs(&parts).unwrap()), "the oldest");
    }

    #[test]
    fn a_draft_that_is_given_up_leaves_nothing() {
        let (dir, home) = crate::store::tests::home();
        let inputs = shape(64).inputs(&parts(dir.path())).unwrap();
        let maker = Maker::try_new(&home).unwrap().unwrap();
        drop(maker.draft(&inputs).unwrap());
        assert!(names(&home).is_empty());
        // One whose maker was killed goes with the next.
        make_private_dir(&home.templates_dir().join(".vm-dead")).unwrap();
        drop(maker.draft(&inputs).unwrap());
        assert!(names(&home).is_empty());
    }
}
