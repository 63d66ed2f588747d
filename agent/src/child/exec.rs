//! Adds a process to a container: joins its namespaces and cgroup, then waits to be started.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::fs::Mode;
use rustix::process::DumpableBehavior;
use rustix::thread::ThreadNameSpaceType;

use super::launch::{Created, open_root};
use super::{Outcome, await_start, confine, join_cgroup, send, set_oom_score_adj};
use crate::error::{AgentError, Tried};
use crate::plan::{ExecPlan, Report};
use crate::sys::{self, Fork};

/// Those that a container has of its own.
const NAMESPACES: ThreadNameSpaceType = ThreadNameSpaceType::MOUNT
    .union(ThreadNameSpaceType::PROCESS_ID)
    .union(ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION)
    .union(ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME)
    .union(ThreadNameSpaceType::CONTROL_GROUP);

/// Joins the container and forks the new process.
///
/// # Errors
/// What failed before the fork; what fails after it is reported by the forked process.
pub(crate) fn run(control: &UnixStream, plan: ExecPlan) -> Result<Outcome, AgentError> {
    let container = sys::take_inherited_fd(plan.pidfd).tried(|| "take the container's pidfd".to_owned())?;
    let last_capability = confine::last_capability()?;
    join_cgroup(&plan.cgroup)?;
    set_oom_score_adj(plan.process.process.oom_score_adj)?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .tried(|| "become undumpable".to_owned())?;
    rustix::thread::move_into_thread_name_spaces(container.as_fd(), NAMESPACES)
        .tried(|| "join the container's namespaces".to_owned())?;
    drop(container);
    match sys::fork().tried(|| "fork into the container".to_owned())? {
        Fork::Parent(pid) => {
            let pid = pid.as_raw_nonzero().get().unsigned_abs();
            send(control, &Report::Pid(pid), None).tried(|| "report a pid".to_owned())?;
            Ok(Outcome::Done)
        }
        Fork::Child => {
            rustix::process::setsid().tried(|| "start a session".to_owned())?;
            rustix::process::umask(Mode::empty());
            let root = open_root()?;
            let created = Created::new(plan.process, root.as_fd(), last_capability)?;
            drop(root);
            await_start(control, created.terminal())?;
            Ok(Outcome::Exit(created.run(control)))
        }
    }
}
