//! Child programs: the agent's binary started again, with one thread, to work inside a container.

mod archive;
mod confine;
mod copy;
mod create;
mod disk_root;
mod exec;
mod fs;
pub(crate) mod init;
mod launch;
mod mounts;
pub(crate) mod path;
mod renew;
pub(crate) mod rootfs;
mod terminal;
pub(crate) mod user;

use std::io::{IoSlice, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::error::{AgentError, Tried};
use crate::plan::{MAX_PLAN_BYTES, Plan, Report, START};
use crate::sys;
use terminal::Terminal;

/// First argument of a child program; the second is the number of its control socket.
pub(crate) const ARGUMENT: &str = "child";

/// How a child program ends when nothing failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Its work is done.
    Done,
    /// It is to exit with this code.
    Exit(u8),
}

/// A child's main.
pub(crate) fn main(control: &str) -> ExitCode {
    let Some(control) = control.parse().ok().and_then(|n| sys::take_inherited_fd(n).ok()) else {
        return ExitCode::FAILURE;
    };
    let control = UnixStream::from(control);
    match read_plan(&control).and_then(|plan| run(&control, plan)) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Exit(code)) => ExitCode::from(code),
        Err(error) => {
            let report = Report::Failed { kind: error.kind(), message: error.to_string() };
            // When the agent is gone there is nobody to tell.
            let _ = send(&control, &report, None);
            ExitCode::FAILURE
        }
    }
}

fn run(control: &UnixStream, plan: Plan) -> Result<Outcome, AgentError> {
    match plan {
        Plan::Create(plan) => create::run(control, *plan),
        Plan::Exec(plan) => exec::run(control, *plan),
        Plan::ReadArchive(plan) => report(control, archive::read(&plan)?),
        Plan::WriteArchive(plan) => report(control, archive::write(&plan)?),
        Plan::StatPath(plan) => report(control, archive::stat(&plan)?),
        Plan::Renew(plan) => report(control, renew::run(&plan)?),
    }
}

fn report(control: &UnixStream, report: Report) -> Result<Outcome, AgentError> {
    send(control, &report, None).tried(|| "report".to_owned())?;
    Ok(Outcome::Done)
}

fn read_plan(mut control: &UnixStream) -> Result<Plan, AgentError> {
    let tried = || "read the plan".to_owned();
    let mut length = [0; 4];
    control.read_exact(&mut length).tried(tried)?;
    let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > MAX_PLAN_BYTES {
        return Err(AgentError::limit("plan bytes", MAX_PLAN_BYTES));
    }
    let mut json = vec![0; length];
    control.read_exact(&mut json).tried(tried)?;
    serde_json::from_slice(&json).map_err(|e| AgentError::invalid(format!("plan: {e}")))
}

/// Sends a report, with a descriptor when there is one.
///
/// # Errors
/// What `sendmsg` answers.
pub(crate) fn send(
    control: &UnixStream,
    report: &Report,
    descriptor: Option<&Terminal>,
) -> Result<(), rustix::io::Errno> {
    let line = report.line();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.map(|t| [t.master.as_fd()]);
    if let Some(descriptors) = &descriptors {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let mut sent = 0;
    while let Some(rest) = line.get(sent..).filter(|r| !r.is_empty()) {
        let n = rustix::net::sendmsg(control, &[IoSlice::new(rest)], &mut ancillary, SendFlags::NOSIGNAL)?;
        sent = sent.saturating_add(n);
        ancillary.clear();
    }
    Ok(())
}

/// Reports that the process is created and waits for the word to start.
///
/// # Errors
/// The agent let go: the process is not wanted any more.
fn await_start(mut control: &UnixStream, terminal: Option<&Terminal>) -> Result<(), AgentError> {
    send(control, &Report::Ready, terminal).tried(|| "report".to_owned())?;
    let mut word = [0];
    loop {
        match control.read(&mut word) {
            Ok(1) if word == [START] => return Ok(()),
            Ok(_) => return Err(AgentError::state("the process was given up before it started")),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).tried(|| "wait for the start".to_owned()),
        }
    }
}

fn join_cgroup(cgroup: &str) -> Result<(), AgentError> {
    let procs = format!("{cgroup}/cgroup.procs");
    std::fs::write(&procs, "0").tried(|| format!("enter cgroup {cgroup}"))
}

/// Sets how eagerly the kernel kills this process when memory runs out. Needs the agent's own /proc; inherited by fork.
fn set_oom_score_adj(value: Option<i32>) -> Result<(), AgentError> {
    let Some(value) = value else { return Ok(()) };
    std::fs::write("/proc/self/oom_score_adj", value.to_string())
        .tried(|| format!("set oom_score_adj to {value}"))
}
