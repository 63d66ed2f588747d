//! Control groups, version 2: one per container below [`PARENT`].

pub(crate) mod device;
pub(crate) mod stats;
mod values;

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::error::{AgentError, ErrorKind, Tried};
use crate::spec::{DeviceRule, ResourceSpec};
use crate::sys;

/// The mount point.
pub(crate) const MOUNT: &str = "/sys/fs/cgroup";
/// Where containers' groups are.
const PARENT: &str = "/sys/fs/cgroup/hyper";
/// Controllers that containers get, of those that the kernel has.
const CONTROLLERS: [&str; 6] = ["cpuset", "cpu", "io", "memory", "hugetlb", "pids"];
/// Longest wait for a group to freeze, thaw or empty.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Deepest group below a container's that is looked into.
const MAX_DEPTH: usize = 8;
/// Most processes that are listed.
pub(crate) const MAX_PROCESSES: usize = 65_536;

/// A container's group.
#[derive(Debug, Clone)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

/// Makes controllers available to containers. Once per boot.
///
/// # Errors
/// The hierarchy is not there.
pub(crate) fn prepare() -> Result<(), AgentError> {
    enable(Path::new(MOUNT))?;
    match std::fs::create_dir(PARENT) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error).tried(|| format!("make {PARENT}")),
    }
    enable(Path::new(PARENT))
}

fn enable(group: &Path) -> Result<(), AgentError> {
    let there = std::fs::read_to_string(group.join("cgroup.controllers"))
        .tried(|| format!("read controllers of {}", group.display()))?;
    let wanted: Vec<String> =
        there.split_ascii_whitespace().filter(|c| CONTROLLERS.contains(c)).map(|c| format!("+{c}")).collect();
    std::fs::write(group.join("cgroup.subtree_control"), wanted.join(" "))
        .tried(|| format!("enable controllers of {}", group.display()))
}

impl Cgroup {
    /// Makes a group and sets its limits.
    ///
    /// # Errors
    /// It is there already, or a limit is not taken; the group is removed again then.
    pub(crate) fn create(container_id: &str, resources: &ResourceSpec) -> Result<Self, AgentError> {
        let group = Self { path: Path::new(PARENT).join(container_id) };
        std::fs::create_dir(&group.path).tried(|| format!("make cgroup {}", group.path.display()))?;
        if let Err(error) = group.apply(resources) {
            // It is empty: nothing ran in it.
            let _ = std::fs::remove_dir(&group.path);
            return Err(error);
        }
        Ok(group)
    }

    /// Its folder.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Sets limits.
    ///
    /// # Errors
    /// A value that the kernel does not take.
    pub(crate) fn apply(&self, resources: &ResourceSpec) -> Result<(), AgentError> {
        for setting in values::settings(resources)? {
            let written = std::fs::write(self.path.join(&setting.file), &setting.value);
            match written {
                Err(error) if setting.optional && error.kind() == std::io::ErrorKind::NotFound => {}
                other => other.tried(|| format!("set {} to {}", setting.file, setting.value))?,
            }
        }
        Ok(())
    }

    /// Allows these devices and no others.
    ///
    /// # Errors
    /// A rule that is none, or a kernel without device programs.
    pub(crate) fn allow_devices(&self, rules: &[DeviceRule]) -> Result<(), AgentError> {
        let program = device::compile(rules)?;
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
        let folder = rustix::fs::open(&self.path, flags, rustix::fs::Mode::empty())
            .tried(|| format!("open {}", self.path.display()))?;
        sys::attach_device_filter(folder.as_fd(), &program).tried(|| "attach the device filter".to_owned())
    }

    /// Kills everything in it.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn kill(&self) -> Result<(), AgentError> {
        self.write("cgroup.kill", "1")
    }

    fn write(&self, file: &str, value: &str) -> Result<(), AgentError> {
        std::fs::write(self.path.join(file), value)
            .tried(|| format!("write {value} to {file} of {}", self.path.display()))
    }

    /// Freezes or thaws everything in it, and waits until that is so.
    ///
    /// # Errors
    /// It does not settle in time; what does not freeze is thawed again.
    pub(crate) async fn freeze(&self, frozen: bool) -> Result<(), AgentError> {
        let digit = if frozen { "1" } else { "0" };
        self.write("cgroup.freeze", digit)?;
        let settled = self.until("frozen", digit).await;
        if settled.is_err() && frozen {
            self.write("cgroup.freeze", "0")?;
        }
        settled
    }

    /// Waits until nothing is in it.
    ///
    /// # Errors
    /// It does not empty in time.
    pub(crate) async fn until_empty(&self) -> Result<(), AgentError> {
        self.until("populated", "0").await
    }

    async fn until(&self, key: &str, value: &str) -> Result<(), AgentError> {
        let path = self.path.join("cgroup.events");
        let mut watch = Watch::open(&path)?;
        let wait = async {
            while field(&watch.read()?, key) != Some(value) {
                watch.changed().await?;
            }
            Ok::<(), std::io::Error>(())
        };
        timeout(SETTLE_TIMEOUT, wait)
            .await
            .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
            .tried(|| format!("wait for {key} {value} in {}", path.display()))
    }

    /// A watch on the counters of memory events.
    ///
    /// # Errors
    /// There is no memory controller.
    pub(crate) fn memory_events(&self) -> Result<Watch, AgentError> {
        Watch::open(&self.path.join("memory.events"))
    }

    /// How many processes the kernel has killed for want of memory; 0 when that is not counted.
    pub(crate) fn oom_kills(&self) -> u64 {
        let events = std::fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        number(&events, "oom_kill")
    }

    /// All processes in it and below, by pid in the agent's namespace.
    ///
    /// # Errors
    /// It is gone.
    pub(crate) fn processes(&self) -> Result<Vec<Pid>, AgentError> {
        let mut pids = Vec::new();
        collect(&self.path, 0, &mut pids).tried(|| format!("list processes of {}", self.path.display()))?;
        pids.sort_unstable_by_key(|p| p.as_raw_nonzero());
        Ok(pids)
    }

    /// Sends a signal to all processes.
    ///
    /// # Errors
    /// The group is gone.
    pub(crate) fn signal(&self, signal: i32) -> Result<(), AgentError> {
        for pid in self.processes()? {
            // One that has just ended needs no signal.
            let _ = sys::kill(pid, signal);
        }
        Ok(())
    }

    /// Removes it; it must be empty.
    ///
    /// # Errors
    /// It is not.
    pub(crate) fn remove(&self) -> Result<(), AgentError> {
        remove_tree(&self.path, 0).tried(|| format!("remove cgroup {}", self.path.display()))
    }
}

fn collect(group: &Path, depth: usize, pids: &mut Vec<Pid>) -> std::io::Result<()> {
    let procs = std::fs::read_to_string(group.join("cgroup.procs"))?;
    pids.extend(procs.lines().filter_map(|l| l.parse().ok()).filter_map(Pid::from_raw));
    pids.truncate(MAX_PROCESSES);
    if depth < MAX_DEPTH {
        for entry in std::fs::read_dir(group)?.flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                // A group that is removed meanwhile has no processes.
                let _ = collect(&entry.path(), depth.saturating_add(1), pids);
            }
        }
    }
    Ok(())
}

fn remove_tree(group: &Path, depth: usize) -> std::io::Result<()> {
    if depth < MAX_DEPTH {
        for entry in std::fs::read_dir(group)?.flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                remove_tree(&entry.path(), depth.saturating_add(1))?;
            }
        }
    }
    std::fs::remove_dir(group)
}

/// A cgroup file that tells when it changes.
#[derive(Debug)]
pub(crate) struct Watch {
    file: AsyncFd<std::fs::File>,
}

impl Watch {
    fn open(path: &Path) -> Result<Self, AgentError> {
        let file = std::fs::File::open(path).tried(|| format!("open {}", path.display()))?;
        let file = sys::watch_priority(file).tried(|| format!("watch {}", path.display()))?;
        Ok(Self { file })
    }

    /// Its content; also what [`Watch::changed`] compares with.
    ///
    /// # Errors
    /// The group is gone.
    pub(crate) fn read(&self) -> std::io::Result<String> {
        use std::os::unix::fs::FileExt;
        let mut buffer = [0; 4096];
        let n = self.file.get_ref().read_at(&mut buffer, 0)?;
        Ok(String::from_utf8_lossy(buffer.get(..n).unwrap_or_default()).into_owned())
    }

    /// Waits for a change since the last [`Watch::read`].
    ///
    /// # Errors
    /// What polling answers.
    pub(crate) async fn changed(&mut self) -> std::io::Result<()> {
        self.file.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}

/// The value of a line `key value`.
pub(crate) fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')).map(str::trim)
}

/// As [`field`], as a number; 0 when it is not there.
pub(crate) fn number(text: &str, key: &str) -> u64 {
    field(text, key).and_then(|v| v.parse().ok()).unwrap_or_default()
}

/// A refusal for a container whose group is frozen.
pub(crate) fn is_frozen(container_id: &str) -> AgentError {
    AgentError::refused(ErrorKind::State, format!("container {container_id} is paused"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_whole_words() {
        let events = "low 0\noom 3\noom_kill 2\noom_group_kill 0\n";
        assert_eq!(number(events, "oom"), 3);
        assert_eq!(number(events, "oom_kill"), 2);
        assert_eq!(number(events, "nothing"), 0);
        assert_eq!(field("populated 1\nfrozen 0\n", "frozen"), Some("0"));
    }
}
