//! Makes a container: namespaces, root, mounts, then its first process, waiting to be started.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::fs::Mode;
use rustix::mount::{MountAttrFlags, MountPropagationFlags, mount_change};
use rustix::process::DumpableBehavior;
use rustix::thread::{ThreadNameSpaceType, UnshareFlags};

use super::launch::Created;
use super::path::{self, Missing};
use super::{Outcome, await_start, confine, disk_root, fs, init, mounts, rootfs, send, set_oom_score_adj};
use crate::error::{AgentError, Tried};
use crate::plan::{CreatePlan, Report};
use crate::sys::{self, Fork};
use crate::trace::{self, Step};

/// Everything but the network, which is the sandbox's, users, which the machine isolates, and processes and IPC, which can be another
/// container's.
const NAMESPACES: UnshareFlags =
    UnshareFlags::NEWNS.union(UnshareFlags::NEWUTS).union(UnshareFlags::NEWCGROUP);

/// Takes down how long each step takes, if that is wished for.
struct Steps {
    began_ns: Option<u64>,
    done: Vec<Step>,
}

impl Steps {
    fn begin(wanted: bool) -> Self {
        Self { began_ns: wanted.then(trace::now_ns), done: Vec::new() }
    }

    /// What was done since the last step was called this.
    fn done(&mut self, name: &str) {
        let Some(start_ns) = self.began_ns else { return };
        let now_ns = trace::now_ns();
        self.began_ns = Some(now_ns);
        let duration_ns = now_ns.saturating_sub(start_ns);
        self.done.push(Step { name: name.to_owned(), start_ns, duration_ns });
    }

    fn report(self, control: &UnixStream) {
        if self.began_ns.is_some() {
            // Who made the container is told by the next report if the agent is gone.
            let _ = send(control, &Report::Steps(self.done), None);
        }
    }
}

/// Enters the cgroup and new namespaces and forks the container's first process.
///
/// # Errors
/// What failed before the fork; what fails after it is reported by the forked process.
pub(crate) fn run(control: &UnixStream, plan: CreatePlan) -> Result<Outcome, AgentError> {
    let mut steps = Steps::begin(plan.traced);
    super::join_cgroup(&plan.cgroup)?;
    set_oom_score_adj(plan.process.process.oom_score_adj)?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .tried(|| "become undumpable".to_owned())?;
    let mut new = NAMESPACES;
    for (fd, kind, own, what) in [
        (plan.pid_namespace, ThreadNameSpaceType::PROCESS_ID, UnshareFlags::NEWPID, "join a pid namespace"),
        (
            plan.ipc_namespace,
            ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION,
            UnshareFlags::NEWIPC,
            "join an IPC namespace",
        ),
    ] {
        if fd < 0 {
            new |= own;
            continue;
        }
        let other = sys::take_inherited_fd(fd).tried(|| "take a container's pidfd".to_owned())?;
        rustix::thread::move_into_thread_name_spaces(other.as_fd(), kind).tried(|| what.to_owned())?;
    }
    unshare(new)?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .tried(|| "make mounts private".to_owned())?;
    steps.done("make namespaces");
    match sys::fork().tried(|| "fork the container's first process".to_owned())? {
        Fork::Parent(pid) => {
            let pid = pid.as_raw_nonzero().get().unsigned_abs();
            send(control, &Report::Pid(pid), None).tried(|| "report a pid".to_owned())?;
            Ok(Outcome::Done)
        }
        Fork::Child => first_process(control, plan, steps),
    }
}

#[expect(deprecated, reason = "the safe form; CLONE_FILES, which makes it unsafe, is not among the flags")]
fn unshare(namespaces: UnshareFlags) -> Result<(), AgentError> {
    rustix::thread::unshare(namespaces).tried(|| "make namespaces".to_owned())
}

fn first_process(control: &UnixStream, plan: CreatePlan, mut steps: Steps) -> Result<Outcome, AgentError> {
    rustix::process::setsid().tried(|| "start a session".to_owned())?;
    rustix::process::umask(Mode::empty());
    set_names(&plan)?;
    let mut volumes = mounts::Volumes::default();
    let root = match (&plan.root_share, &plan.root_disks) {
        (Some((tag, path)), _) => rootfs::bind(volumes.open_share(tag, path)?.as_fd())?,
        (None, Some(disks)) => disk_root::build(disks)?,
        (None, None) => rootfs::build(&plan.image_disk, &plan.writable_disk)?,
    };
    steps.done("mount the root");
    for mount in &plan.mounts {
        mounts::kernel(root.as_fd(), mount)?;
    }
    mounts::devices(root.as_fd(), &plan.devices)?;
    steps.done("mount kernel file systems");
    for volume in &plan.volumes {
        volumes.mount(root.as_fd(), volume)?;
    }
    drop(volumes);
    steps.done("mount volumes");
    mounts::inject(root.as_fd(), &plan.files, plan.root_read_only)?;
    mounts::sysctl(root.as_fd(), &plan.sysctl)?;
    let cwd = &plan.process.process.cwd;
    if !cwd.is_empty() {
        path::resolve_or_make(root.as_fd(), cwd, Missing::Folder)?;
    }
    steps.done("write files");
    let init = if plan.init { Some(init::open_self()?) } else { None };
    let created = Created::new(plan.process, root.as_fd(), confine::last_capability()?)?;
    if let Some(terminal) = created.terminal() {
        terminal.as_console(root.as_fd())?;
    }
    mounts::read_only(root.as_fd(), &plan.readonly_paths)?;
    mounts::mask(root.as_fd(), &plan.masked_paths)?;
    rootfs::enter(&root)?;
    if plan.root_read_only {
        fs::restrict(root.as_fd(), MountAttrFlags::MOUNT_ATTR_RDONLY, false)
            .tried(|| "make the root read-only".to_owned())?;
    }
    drop(root);
    steps.done("enter the root");
    steps.report(control);
    await_start(control, created.terminal())?;
    match init {
        Some(program) => init::run(control, created, &program),
        None => Ok(Outcome::Exit(created.run(control))),
    }
}

fn set_names(plan: &CreatePlan) -> Result<(), AgentError> {
    if !plan.hostname.is_empty() {
        rustix::system::sethostname(plan.hostname.as_bytes())
            .tried(|| format!("set hostname {}", plan.hostname))?;
    }
    if !plan.domainname.is_empty() {
        rustix::system::setdomainname(plan.domainname.as_bytes())
            .tried(|| format!("set domain name {}", plan.domainname))?;
    }
    Ok(())
}
