//! One container: its cgroup, its namespaces and its processes.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags};

use crate::cgroup::{self, Cgroup};
use crate::error::{AgentError, ErrorKind, Tried};
use crate::events::{Event, Events};
use crate::plan::{CreatePlan, ExecPlan, File, Plan, ProcessPlan, RenewPlan};
use crate::process::Process;
use crate::reaper::Reaper;
use crate::sockets::HostSocket;
use crate::spawn::Spawned;
use crate::stdio::{ChildStdio, Connections, Ends};
use crate::{listing, sys};

/// Most processes of a container that were made by request and are remembered; the oldest that have ended make room.
const MAX_PROCESSES: usize = 512;
/// Longest process id, bytes.
const MAX_PROCESS_ID_BYTES: usize = 128;

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    id: String,
    cgroup: Cgroup,
    /// Its first process, for others to join.
    pidfd: OwnedFd,
    /// Kept open so that files can be copied after its processes have ended.
    mount_namespace: OwnedFd,
    /// Its root folder.
    root: OwnedFd,
    /// What processes that are added get unless they say otherwise.
    template: Template,
    paused: AtomicBool,
    processes: Mutex<Processes>,
    /// What listens for it in place of the host's sockets.
    _sockets: Vec<HostSocket>,
}

/// What is inherited by processes that are added.
#[derive(Debug)]
pub(crate) struct Template {
    pub capabilities: crate::spec::CapabilitySpec,
    pub no_new_privileges: bool,
    pub seccomp: Option<crate::spec::SeccompSpec>,
    pub rlimits: Vec<crate::spec::RlimitSpec>,
    pub oom_score_adj: Option<i32>,
}

#[derive(Debug, Default)]
struct Processes {
    by_id: BTreeMap<String, Arc<Process>>,
    /// In order of creation, to know the oldest.
    order: Vec<String>,
}

impl Container {
    /// Makes a container and its first process.
    ///
    /// # Errors
    /// What of it failed. Nothing is left then but the cgroup, which is the caller's.
    pub(crate) async fn create(
        id: &str,
        reaper: &Reaper,
        mut plan: CreatePlan,
        connections: Connections,
        sockets: Vec<HostSocket>,
        (cgroup, pid_namespace, ipc_namespace): (Cgroup, Option<&Self>, Option<&Self>),
    ) -> Result<Arc<Self>, AgentError> {
        let template = Template {
            capabilities: plan.process.capabilities.clone(),
            no_new_privileges: plan.process.no_new_privileges,
            seccomp: plan.process.seccomp.clone(),
            rlimits: plan.process.process.rlimits.clone().unwrap_or_default(),
            oom_score_adj: plan.process.process.oom_score_adj,
        };
        let terminal = plan.process.terminal.is_some();
        let (connections, stdio, ends) = split(connections, terminal)?;
        // Each is handed over by a descriptor of its own, which the child takes.
        let duplicate =
            |other: &Self| other.pidfd.try_clone().tried(|| "duplicate a container's pidfd".to_owned());
        let pids = pid_namespace.map(duplicate).transpose()?;
        let ipc = ipc_namespace.map(duplicate).transpose()?;
        plan.pid_namespace = pids.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        plan.ipc_namespace = ipc.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let join: Vec<_> = pids.iter().chain(&ipc).map(AsFd::as_fd).collect();
        let spawned = Spawned::start(reaper, &Plan::Create(Box::new(plan)), stdio, &join).await?;
        let created = spawned.created(reaper).await?;
        let (pidfd, mount_namespace, root) = handles(created.pid)?;
        let process = Process::adopt(reaper, created, connections, ends, cgroup.clone())?;
        let processes =
            Processes { by_id: BTreeMap::from([(String::new(), process)]), order: vec![String::new()] };
        Ok(Arc::new(Self {
            id: id.to_owned(),
            cgroup,
            pidfd,
            mount_namespace,
            root,
            template,
            paused: AtomicBool::new(false),
            processes: Mutex::new(processes),
            _sockets: sockets,
        }))
    }

    /// Adds a process.
    ///
    /// # Errors
    /// Its id is taken, the container has ended or is paused, or what of it failed.
    pub(crate) async fn add_process(
        &self,
        reaper: &Reaper,
        process_id: &str,
        process: ProcessPlan,
        connections: Connections,
    ) -> Result<Arc<Process>, AgentError> {
        if process_id.is_empty() || process_id.len() > MAX_PROCESS_ID_BYTES {
            return Err(AgentError::invalid(format!("process id of {} bytes", process_id.len())));
        }
        self.can_run()?;
        let terminal = process.terminal.is_some();
        let (connections, stdio, ends) = split(connections, terminal)?;
        let plan = Plan::Exec(Box::new(ExecPlan {
            cgroup: self.cgroup.path().display().to_string(),
            pidfd: self.pidfd.as_raw_fd(),
            process,
        }));
        // Taken before it is made, so that two requests cannot both make it.
        self.lock()?.room(&self.id, process_id)?;
        let spawned = Spawned::start(reaper, &plan, stdio, &[self.pidfd.as_fd()]).await?;
        let created = spawned.created(reaper).await?;
        let process = Process::adopt(reaper, created, connections, ends, self.cgroup.clone())?;
        self.lock()?.insert(&self.id, process_id, Arc::clone(&process))?;
        Ok(process)
    }

    /// Refuses when its first process has ended or it is paused.
    ///
    /// # Errors
    /// One of the two.
    pub(crate) fn can_run(&self) -> Result<(), AgentError> {
        if self.first()?.is_ended() {
            return Err(AgentError::state(format!("container {} is not running", self.id)));
        }
        if self.is_paused() {
            return Err(cgroup::is_frozen(&self.id));
        }
        Ok(())
    }

    fn lock(&self) -> Result<std::sync::MutexGuard<'_, Processes>, AgentError> {
        self.processes.lock().map_err(|_| AgentError::state("the container's table is not usable any more"))
    }

    /// A process by id.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn process(&self, process_id: &str) -> Result<Arc<Process>, AgentError> {
        self.lock()?.by_id.get(process_id).cloned().ok_or_else(|| {
            AgentError::not_found(format!("container {} has no process {process_id:?}", self.id))
        })
    }

    /// Its first process.
    ///
    /// # Errors
    /// None: it is always there.
    pub(crate) fn first(&self) -> Result<Arc<Process>, AgentError> {
        self.process("")
    }

    /// Its cgroup.
    pub(crate) fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Its root folder.
    pub(crate) fn root(&self) -> &OwnedFd {
        &self.root
    }

    /// Its mount namespace.
    pub(crate) fn mount_namespace(&self) -> &OwnedFd {
        &self.mount_namespace
    }

    /// What added processes inherit.
    pub(crate) fn template(&self) -> &Template {
        &self.template
    }

    /// Freezes or thaws it.
    ///
    /// # Errors
    /// It is so already, it has ended, or the kernel does not follow in time.
    pub(crate) async fn set_paused(&self, paused: bool) -> Result<(), AgentError> {
        if self.first()?.is_ended() {
            return Err(AgentError::state(format!("container {} is not running", self.id)));
        }
        if self.paused.swap(paused, Ordering::SeqCst) == paused {
            let is = if paused { "already" } else { "not" };
            return Err(AgentError::state(format!("container {} is {is} paused", self.id)));
        }
        let result = self.cgroup.freeze(paused).await;
        if result.is_err() {
            self.paused.store(!paused, Ordering::SeqCst);
        }
        result
    }

    /// Makes it another one, in a machine that goes on from one that was saved: processes that were added and had connections are killed,
    /// with what they have started; the first one lets go of its own; names and files are those given.
    ///
    /// # Errors
    /// It is not paused, or what of it failed.
    pub(crate) async fn renew(
        &self,
        reaper: &Reaper,
        hostname: String,
        files: Vec<File>,
    ) -> Result<(), AgentError> {
        if !self.is_paused() {
            return Err(AgentError::state(format!("container {} is not paused", self.id)));
        }
        let attached: Vec<_> = {
            let processes = self.lock()?;
            let added = processes.by_id.iter().filter(|(id, process)| !id.is_empty() && !process.is_ended());
            added.filter(|(_, process)| process.lines().any()).map(|(_, process)| process.pid()).collect()
        };
        for pid in listing::with_descendants(self, &attached)? {
            // It is frozen, so this is it; one that has ended needs none.
            let _ = sys::kill(pid, libc::SIGKILL);
        }
        self.first()?.lines().let_go().await;
        let plan = Plan::Renew(RenewPlan { pidfd: self.pidfd.as_raw_fd(), hostname, files });
        let renewing = Spawned::start(reaper, &plan, ChildStdio::null(), &[self.pidfd.as_fd()]).await?;
        renewing.answer().await.map(drop)
    }

    /// Whether it is frozen.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    /// Kills everything in it and waits until all of it is gone, streams too.
    ///
    /// # Errors
    /// It does not end in time.
    pub(crate) async fn destroy(&self) -> Result<(), AgentError> {
        self.cgroup.kill()?;
        self.cgroup.until_empty().await?;
        let processes: Vec<_> = self.lock()?.by_id.values().cloned().collect();
        for process in processes {
            process.wait().await?;
        }
        self.cgroup.remove()
    }

    /// Reports it whenever the kernel kills one of its processes for want of memory. Ends with the cgroup.
    pub(crate) fn watch_memory(&self, events: &Arc<Events>) {
        let Ok(mut watch) = self.cgroup.memory_events() else { return };
        let (events, container_id) = (Arc::clone(events), self.id.clone());
        tokio::spawn(async move {
            let mut seen = 0;
            // Reading fails when the cgroup is removed.
            while let Ok(counters) = watch.read() {
                let kills = cgroup::number(&counters, "oom_kill");
                if kills > seen {
                    seen = kills;
                    events.push(Event::Oom { container_id: container_id.clone() });
                }
                if watch.changed().await.is_err() {
                    return;
                }
            }
        });
    }
}

impl Processes {
    /// Checks that an id is free, and makes room by forgetting the oldest process that has ended.
    fn room(&mut self, container_id: &str, process_id: &str) -> Result<(), AgentError> {
        if self.by_id.contains_key(process_id) {
            return Err(AgentError::refused(
                ErrorKind::Exists,
                format!("container {container_id} has a process {process_id:?} already"),
            ));
        }
        if self.by_id.len() < MAX_PROCESSES {
            return Ok(());
        }
        let ended = |id: &String| !id.is_empty() && self.by_id.get(id).is_none_or(|p| p.is_ended());
        match self.order.iter().position(ended) {
            Some(position) => {
                let id = self.order.remove(position);
                self.by_id.remove(&id);
                Ok(())
            }
            None => Err(AgentError::limit("processes of a container", MAX_PROCESSES)),
        }
    }

    fn insert(
        &mut self,
        container_id: &str,
        process_id: &str,
        process: Arc<Process>,
    ) -> Result<(), AgentError> {
        self.room(container_id, process_id)?;
        self.by_id.insert(process_id.to_owned(), process);
        self.order.push(process_id.to_owned());
        Ok(())
    }
}

type Split = (Option<Connections>, ChildStdio, Ends);

/// With a terminal the connections wait for it, and the child program starts with /dev/null.
fn split(connections: Connections, terminal: bool) -> Result<Split, AgentError> {
    if terminal {
        return Ok((Some(connections), ChildStdio::null(), Ends::default()));
    }
    let (stdio, ends) = connections.pipes()?;
    Ok((None, stdio, ends))
}

/// What is needed to join a container: its first process, mount namespace and root.
fn handles(pid: Pid) -> Result<(OwnedFd, OwnedFd, OwnedFd), AgentError> {
    let number = pid.as_raw_nonzero();
    let pidfd =
        rustix::process::pidfd_open(pid, PidfdFlags::empty()).tried(|| format!("open process {number}"))?;
    let open = |name: &str, flags: OFlags| {
        let path = format!("/proc/{number}/{name}");
        rustix::fs::open(path.as_str(), flags | OFlags::CLOEXEC, Mode::empty())
            .tried(|| format!("open {path}"))
    };
    let mount_namespace = open("ns/mnt", OFlags::RDONLY)?;
    let root = open("root", OFlags::PATH | OFlags::DIRECTORY)?;
    Ok((pidfd, mount_namespace, root))
}
