//! What the agent tells a child program to do, and what it reports back.
//!
//! The agent starts itself again for everything that has to be done in a program of one thread: joining namespaces, changing the
//! root, dropping privileges. Parent and child share one stream socket:
//!
//! ```text
//! agent                                          child
//!   | -- 4 bytes length, plan as JSON ----------> |
//!   | <-- {"pid": n} ---------------------------- | (create and exec: the process that goes on)
//!   | <-- {"steps": …} -------------------------- | (create, when the request is traced)
//!   | <-- {"ready": …} + terminal descriptor ---- | created
//!   | -- 's' -----------------------------------> | start
//!   | <-- end of stream, or {"exec_failed": …} -- | the program runs, or not
//! ```
//! Archives and questions: the plan goes down, one report comes up.

use serde::{Deserialize, Serialize};

use crate::error::ErrorKind;
use crate::spec::{CapabilitySpec, DeviceSpec, MountSpec, ProcessSpec, SeccompSpec};
use crate::trace::Step;

/// Largest plan, bytes: a specification, its mounts and 16 injected files at most, as JSON.
pub(crate) const MAX_PLAN_BYTES: usize = 48 << 20;
/// Largest report, bytes.
pub(crate) const MAX_REPORT_BYTES: usize = 16 * 1024;
/// The byte that starts a created process.
pub(crate) const START: u8 = b's';

/// What to do.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub(crate) enum Plan {
    /// Make a container.
    Create(Box<CreatePlan>),
    /// Add a process to one.
    Exec(Box<ExecPlan>),
    /// Write a tar to standard output.
    ReadArchive(ArchivePlan),
    /// Unpack a tar from standard input.
    WriteArchive(ArchivePlan),
    /// Say what a path is.
    StatPath(ArchivePlan),
    /// Give a container other names and files.
    Renew(RenewPlan),
}

/// A container to make.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CreatePlan {
    /// Its cgroup's folder.
    pub cgroup: String,
    pub hostname: String,
    pub domainname: String,
    /// Inherited descriptor: pidfd of the process whose pid namespace is joined; -1: a new one.
    pub pid_namespace: i32,
    /// Inherited descriptor: pidfd of the process whose IPC namespace is joined; -1: a new one.
    pub ipc_namespace: i32,
    /// Tag and path of the share that is the root, instead of the disks.
    pub root_share: Option<(String, String)>,
    /// The disks that the root is put together from, instead of those below.
    pub root_disks: Option<DiskRoot>,
    /// Serial of the image disk.
    pub image_disk: String,
    /// Serial of the writable disk; empty: tmpfs.
    pub writable_disk: String,
    pub root_read_only: bool,
    /// Mounts of kernel file systems.
    pub mounts: Vec<MountSpec>,
    /// Mounts of shares and memory.
    pub volumes: Vec<Volume>,
    pub files: Vec<File>,
    pub devices: Vec<DeviceSpec>,
    pub sysctl: Vec<(String, String)>,
    pub masked_paths: Vec<String>,
    pub readonly_paths: Vec<String>,
    /// Put an init of ours as PID 1.
    pub init: bool,
    /// Its steps are to be reported.
    pub traced: bool,
    pub process: ProcessPlan,
}

/// A root that is put together from disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskRoot {
    /// In order.
    pub mounts: Vec<DiskMount>,
    /// Made where they are missing.
    pub folders: Vec<DiskFolder>,
    pub root: RootOfDisks,
}

/// What of the disks is the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum RootOfDisks {
    /// One folder.
    Folder(DiskPath),
    /// Layers, uppermost first, and the folders for what is written (upper, work); none: it cannot be written to.
    Overlay { lower: Vec<DiskPath>, writable: Option<(DiskPath, DiskPath)> },
}

/// A disk, mounted at a place of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskMount {
    pub disk: DiskName,
    /// `erofs` or `ext4`.
    pub kind: String,
    pub read_only: bool,
    /// Further disks of the same file system.
    pub devices: Vec<DiskName>,
}

/// A disk, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskName {
    pub serial: String,
    /// Number of the part, from 1; 0: all of it.
    pub part: u32,
}

/// A folder of a mounted disk: number of the mount, and a plain relative path, or nothing for all of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskPath {
    pub mount: u32,
    pub path: String,
}

/// A folder to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskFolder {
    pub at: DiskPath,
    pub mode: u32,
}

/// A process to add.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ExecPlan {
    pub cgroup: String,
    /// Inherited descriptor: pidfd of the container's first process.
    pub pidfd: i32,
    pub process: ProcessPlan,
}

/// How a process is to run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ProcessPlan {
    pub process: ProcessSpec,
    /// Docker's USER; empty: by number.
    pub user: String,
    pub additional_groups: Vec<String>,
    pub capabilities: CapabilitySpec,
    pub no_new_privileges: bool,
    pub seccomp: Option<SeccompSpec>,
    pub terminal: Option<Window>,
}

/// Size of a terminal, characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Window {
    pub rows: u16,
    pub cols: u16,
}

/// A mount from a share or of memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Volume {
    pub destination: String,
    pub source: VolumeSource,
    pub read_only: bool,
    pub copy_up: bool,
}

/// Where a volume's content lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum VolumeSource {
    /// A folder or file of a virtio-fs share.
    Share { tag: String, path: String },
    /// Memory.
    Tmpfs { size_bytes: u64, mode: u32, noexec: bool },
    /// Memory that containers have in common, by its name.
    Shared { name: String, size_bytes: u64 },
    /// A listener that stands for a socket of the host, by the number that both sides know it by.
    Socket { id: u64, mode: u32, uid: u32, gid: u32 },
}

/// A file to put into the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct File {
    pub path: String,
    pub content: Vec<u8>,
    pub mode: u32,
}

/// A container that is to be another one.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RenewPlan {
    /// Inherited descriptor: pidfd of the container's first process.
    pub pidfd: i32,
    pub hostname: String,
    pub files: Vec<File>,
}

/// A path in a container's root.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ArchivePlan {
    /// Inherited descriptor: the container's mount namespace.
    pub mount_namespace: i32,
    pub path: String,
    pub strict: bool,
    pub follow_symlink: bool,
    pub keep_owner: bool,
}

/// What a child says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Report {
    /// The process that goes on, in the agent's pid namespace.
    Pid(u32),
    /// What was done until now, for who asked.
    Steps(Vec<Step>),
    /// Created, waiting for [`START`]. With a terminal, its descriptor travels along.
    Ready,
    /// Not created.
    Failed { kind: ErrorKind, message: String },
    /// Created, but the command could not be executed.
    ExecFailed { exit_code: u32, error: String },
    /// An archive was written or unpacked.
    Archived { bytes: u64 },
    /// A container has other names and files.
    Renewed,
    /// What a path is.
    Stat { name: String, size: u64, mode: u32, mtime_unix_ns: i64, link_target: String },
}

impl Report {
    /// As one line, with its newline.
    pub(crate) fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).unwrap_or_default();
        line.push(b'\n');
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_one_line() {
        let report = Report::Failed { kind: ErrorKind::NotFound, message: "a\nb".to_owned() };
        let line = report.line();
        assert_eq!(line.iter().filter(|b| **b == b'\n').count(), 1);
        assert_eq!(serde_json::from_slice::<Report>(&line).unwrap(), report);
    }
}
