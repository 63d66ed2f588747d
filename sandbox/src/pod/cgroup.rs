//! The control group of the host that a sandbox's processes are counted in: the one that the pod's first container names.
//!
//! ```text
//! /kubepods/pod7/abc                  cgroup v2: /sys/fs/cgroup/kubepods/pod7/abc
//!                                     cgroup v1: the same below each hierarchy that counts (memory, cpu, pids, blkio)
//! kubepods-pod7.slice:cri:abc         systemd:   /kubepods.slice/kubepods-pod7.slice/cri-abc.scope
//! ```
//! VMM and file server enter it before they become what they are, so that all their memory is counted there. It is removed when both
//! have ended; a list of the folders in the run directory lets whoever cleans up after a dead shim do the same.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use super::PodError;

/// Where control groups are.
const ROOT: &str = "/sys/fs/cgroup";
/// Hierarchies of version 1 that count what processes use and take a process without being set up.
const V1: [&str; 4] = ["memory", "cpu,cpuacct", "pids", "blkio"];
/// Kind of a file system of version 2 (linux/magic.h).
const CGROUP2_MAGIC: i64 = 0x6367_7270;
/// Longest path, bytes.
const MAX_PATH_BYTES: usize = 2048;
/// List of the folders, in the run directory.
const LIST: &str = "cgroups";
/// How long the last process of a group may take to let go of its memory.
const EMPTY_LIMIT: Duration = Duration::from_secs(5);
/// How often that is looked at.
const LOOK_PAUSE: Duration = Duration::from_millis(10);

/// Folders of a group, one for each hierarchy.
#[derive(Debug, Default)]
pub(super) struct HostCgroup {
    dirs: Vec<PathBuf>,
    list: Option<PathBuf>,
}

/// The path below the root of a hierarchy that `linux.cgroupsPath` means.
fn relative(path: &str) -> Result<PathBuf, PodError> {
    let wrong = |why: &str| PodError::Invalid(format!("the cgroup {path:?} of the sandbox: {why}"));
    if path.len() > MAX_PATH_BYTES {
        return Err(wrong("its path is too long"));
    }
    let parts: Vec<&str> = path.split(':').collect();
    let below = match parts.as_slice() {
        [slice, prefix, name] => {
            let unit = match (*prefix, *name) {
                (_, name) if name.ends_with(".slice") => name.to_owned(),
                ("", name) => format!("{name}.scope"),
                (prefix, name) => format!("{prefix}-{name}.scope"),
            };
            if unit.contains('/') {
                return Err(wrong("a unit has no slash"));
            }
            slices(slice).ok_or_else(|| wrong("no slice of systemd"))?.join(unit)
        }
        [plain] => PathBuf::from(plain.trim_start_matches('/')),
        _ => return Err(wrong("neither a path nor slice:prefix:name")),
    };
    let mut names = below.components().peekable();
    if names.peek().is_none() || !names.all(|name| matches!(name, Component::Normal(_))) {
        return Err(wrong("it does not stay below the root"));
    }
    Ok(below)
}

/// The folders of a slice: `a-b.slice` lies in `a.slice`. None: `-.slice`, the root.
fn slices(name: &str) -> Option<PathBuf> {
    let name = if name.is_empty() { "system.slice" } else { name };
    let stem = name.strip_suffix(".slice").filter(|stem| !stem.contains('/'))?;
    if stem == "-" {
        return Some(PathBuf::new());
    }
    let mut path = PathBuf::new();
    let mut begun = String::new();
    for part in stem.split('-') {
        if part.is_empty() {
            return None;
        }
        begun = if begun.is_empty() { part.to_owned() } else { format!("{begun}-{part}") };
        path.push(format!("{begun}.slice"));
    }
    Some(path)
}

fn is_v2(root: &Path) -> bool {
    rustix::fs::statfs(root).is_ok_and(|data| data.f_type == CGROUP2_MAGIC)
}

impl HostCgroup {
    /// Makes the group that `path` names and lists its folders in `run_dir`; an empty path is none, and no group.
    pub(super) fn make(path: &str, run_dir: &Path) -> Result<Self, PodError> {
        if path.is_empty() {
            return Ok(Self::default());
        }
        let root = Path::new(ROOT);
        let below = relative(path)?;
        let group = if is_v2(root) {
            Self { dirs: vec![root.join(&below)], list: None }
        } else {
            let there = V1.iter().map(|name| root.join(name)).filter(|dir| dir.join("cgroup.procs").exists());
            Self { dirs: there.map(|dir| dir.join(&below)).collect(), list: None }
        };
        group.made(run_dir)
    }

    fn made(mut self, run_dir: &Path) -> Result<Self, PodError> {
        let list = run_dir.join(LIST);
        let text: String = self.dirs.iter().map(|dir| format!("{}\n", dir.display())).collect();
        // Before they are made: what is not there is no harm to whoever cleans up.
        std::fs::write(&list, text).map_err(|source| PodError::io("write", &list, source))?;
        self.list = Some(list);
        for dir in &self.dirs {
            make_dirs(dir).map_err(|source| PodError::io("make the sandbox's cgroup", dir, source))?;
            // Version 2 has processes in leaves only.
            let counted = std::fs::read_to_string(dir.join("cgroup.subtree_control")).unwrap_or_default();
            if !counted.trim().is_empty() {
                return Err(PodError::State(format!(
                    "the cgroup {} of the sandbox is one that others are counted below: name a folder in it",
                    dir.display()
                )));
            }
        }
        Ok(self)
    }

    /// Descriptors that a process writes 0 to in order to enter it.
    pub(super) fn entrances(&self) -> Result<Vec<OwnedFd>, PodError> {
        let open = |dir: &PathBuf| {
            let path = dir.join("cgroup.procs");
            let opened: Result<File, _> = OpenOptions::new().write(true).open(&path);
            opened.map(OwnedFd::from).map_err(|source| PodError::io("open", path, source))
        };
        self.dirs.iter().map(open).collect()
    }

    /// Removes it, when its last process is gone.
    pub(super) async fn remove(mut self) {
        let until = Instant::now() + EMPTY_LIMIT;
        for dir in std::mem::take(&mut self.dirs) {
            while is_busy(&dir) && Instant::now() < until {
                tokio::time::sleep(LOOK_PAUSE).await;
            }
        }
        if let Some(list) = self.list.take() {
            // The run directory may have gone first.
            let _ = std::fs::remove_file(list);
        }
    }
}

impl Drop for HostCgroup {
    fn drop(&mut self) {
        // A start that was given up: who is in it is being killed, and what is left now goes with the run directory.
        self.dirs.retain(|dir| is_busy(dir));
        if let Some(list) = self.list.take().filter(|_| self.dirs.is_empty()) {
            let _ = std::fs::remove_file(list);
        }
    }
}

/// Makes a folder with its parents and, in version 2, lets the parents' children be counted. What counts nothing is no reason to fail.
fn make_dirs(dir: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let root = Path::new(ROOT);
    let mut parents: Vec<&Path> =
        dir.ancestors().skip(1).take_while(|parent| parent.starts_with(root)).collect();
    parents.reverse();
    for parent in parents {
        for controller in ["+memory", "+cpu", "+io", "+pids"] {
            let _ = std::fs::write(parent.join("cgroup.subtree_control"), controller);
        }
    }
    Ok(())
}

/// Tries to remove a folder; whether somebody is still in it.
fn is_busy(dir: &Path) -> bool {
    match std::fs::remove_dir(dir) {
        Err(error) if error.kind() == ErrorKind::ResourceBusy => true,
        Err(error) if error.kind() != ErrorKind::NotFound => {
            tracing::warn!(dir = %dir.display(), %error, "undo failed");
            false
        }
        _ => false,
    }
}

fn remove_all(dirs: &[PathBuf]) {
    let until = Instant::now() + EMPTY_LIMIT;
    for dir in dirs {
        while is_busy(dir) && Instant::now() < until {
            std::thread::sleep(LOOK_PAUSE);
        }
    }
}

/// Removes the groups that a run directory lists.
pub(super) fn clean(run_dir: &Path) {
    let Ok(text) = std::fs::read_to_string(run_dir.join(LIST)) else { return };
    let dirs: Vec<PathBuf> = text.lines().map(PathBuf::from).filter(|dir| dir.starts_with(ROOT)).collect();
    remove_all(&dirs);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_forms_name_a_folder() {
        for (path, folder) in [
            ("/kubepods/burstable/pod7/abc", "kubepods/burstable/pod7/abc"),
            ("default/one", "default/one"),
            (
                "kubepods-burstable-pod7.slice:cri-containerd:abc",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7.slice/cri-containerd-abc.scope",
            ),
            ("system.slice:docker:x", "system.slice/docker-x.scope"),
            (":docker:x", "system.slice/docker-x.scope"),
            ("-.slice::x", "x.scope"),
            ("a.slice:p:b.slice", "a.slice/b.slice"),
        ] {
            assert_eq!(relative(path).unwrap(), Path::new(folder), "{path}");
        }
    }

    #[test]
    fn paths_stay_below_the_root() {
        let long = "x".repeat(MAX_PATH_BYTES + 1);
        for wrong in [
            "/",
            "/a/../../b",
            "..",
            "a:b",
            "a:b:c",
            "a--b.slice:p:n",
            "a.slice:p:../n",
            "a/b.slice:p:n",
            "a:b:c:d",
            &long,
        ] {
            assert!(matches!(relative(wrong), Err(PodError::Invalid(_))), "{wrong}");
        }
    }

    #[tokio::test]
    async fn folders_are_listed_while_they_are_there() {
        let dir = tempfile::tempdir().unwrap();
        let group = HostCgroup { dirs: vec![dir.path().join("a/b")], list: None }.made(dir.path()).unwrap();
        assert!(dir.path().join("a/b").is_dir() && dir.path().join(LIST).is_file());
        group.remove().await;
        assert!(!dir.path().join("a/b").exists() && !dir.path().join(LIST).exists());
        assert!(HostCgroup::make("", dir.path()).unwrap().entrances().unwrap().is_empty());
        std::fs::create_dir(dir.path().join("inner")).unwrap();
        std::fs::write(dir.path().join("inner/cgroup.subtree_control"), "cpu memory\n").unwrap();
        let inner = HostCgroup { dirs: vec![dir.path().join("inner")], list: None }.made(dir.path());
        assert!(matches!(inner, Err(PodError::State(_))));
    }
}
