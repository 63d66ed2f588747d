//! All that the agent knows of its sandbox, and how it ends.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::fs::{Mode, OFlags};
use tokio::sync::Notify;

use crate::child::rootfs;
use crate::container::Container;
use crate::error::{AgentError, ErrorKind, Tried};
use crate::events::Events;
use crate::net::loopback::Loopback;
use crate::plan::{ArchivePlan, Plan, Report};
use crate::reaper::Reaper;
use crate::sockets::HostSockets;
use crate::spawn::Spawned;
use crate::stdio::ChildStdio;
use crate::streams::Streams;
use crate::trace::{Steps, Traces};
use crate::{bays, cgroup, log};

/// Most containers in one sandbox.
const MAX_CONTAINERS: usize = 256;
/// Most file systems of shared memory in one sandbox: a pod has one.
const MAX_SHARED_MEMORY: usize = 16;
/// Longest id, bytes.
const MAX_ID_BYTES: usize = 64;

/// The sandbox.
#[derive(Debug, Default)]
pub(crate) struct Sandbox {
    pub reaper: Arc<Reaper>,
    pub streams: Arc<Streams>,
    pub events: Arc<Events>,
    pub traces: Traces,
    pub loopback: Loopback,
    pub sockets: HostSockets,
    containers: Mutex<BTreeMap<String, Slot>>,
    configured: AtomicBool,
    prepared: AtomicBool,
    /// Tags of the shares that are mounted.
    shares: tokio::sync::Mutex<BTreeSet<String>>,
    /// Disks that came while it ran.
    pub disks: bays::Table,
    /// Names of the shared memory that is mounted.
    memory: tokio::sync::Mutex<BTreeSet<String>>,
    /// Rung when the machine is to end.
    pub end: Notify,
}

/// Which time it is that a sandbox is configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Configured {
    /// The machine is new.
    First,
    /// The machine goes on from one that was saved with containers.
    Again,
}

#[derive(Debug)]
enum Slot {
    /// Being made or removed.
    Busy,
    Ready(Arc<Container>),
}

/// An id that is taken until the container is there, or given back.
#[derive(Debug)]
pub(crate) struct Reservation<'a> {
    sandbox: &'a Sandbox,
    id: String,
    /// What the slot becomes.
    then: Option<Arc<Container>>,
}

impl Reservation<'_> {
    /// Puts the container into its place.
    pub(crate) fn fill(mut self, container: Arc<Container>) {
        self.then = Some(container);
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let Ok(mut containers) = self.sandbox.containers.lock() else { return };
        match self.then.take() {
            Some(container) => containers.insert(std::mem::take(&mut self.id), Slot::Ready(container)),
            None => containers.remove(&self.id),
        };
    }
}

/// Checks a container's id: it becomes the name of a cgroup.
///
/// # Errors
/// Not 1 to 64 of `[a-zA-Z0-9_.-]`.
pub(crate) fn check_id(id: &str) -> Result<(), AgentError> {
    let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    if id.is_empty() || id.len() > MAX_ID_BYTES || id.starts_with('.') || !id.bytes().all(fine) {
        return Err(AgentError::invalid(format!("container id {id:?} is not 1 to 64 of [a-zA-Z0-9_.-]")));
    }
    Ok(())
}

impl Sandbox {
    fn lock(&self) -> Result<std::sync::MutexGuard<'_, BTreeMap<String, Slot>>, AgentError> {
        self.containers
            .lock()
            .map_err(|_| AgentError::state("the table of containers is not usable any more"))
    }

    /// Marks the sandbox as configured.
    ///
    /// # Errors
    /// It was already, and does not go on from a machine that was saved: then its containers would be paused.
    pub(crate) fn configure(&self) -> Result<Configured, AgentError> {
        if !self.configured.swap(true, Ordering::SeqCst) {
            return Ok(Configured::First);
        }
        let containers = self.lock()?;
        let paused = |slot: &Slot| matches!(slot, Slot::Ready(container) if container.is_paused());
        if containers.is_empty() || !containers.values().all(paused) {
            return Err(AgentError::state("the sandbox is configured already"));
        }
        Ok(Configured::Again)
    }

    /// Prepares for containers, once: cgroups and the folders that their roots are built in.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn prepare(&self) -> Result<(), AgentError> {
        if self.prepared.load(Ordering::SeqCst) {
            return Ok(());
        }
        cgroup::prepare()?;
        for dir in rootfs::DIRS {
            std::fs::create_dir_all(dir).tried(|| format!("make {dir}"))?;
        }
        self.prepared.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Mounts shares, each once, for the namespaces of containers to inherit. A share's folder that is a mount of its own on the host
    /// becomes one here when it is first walked through: that too happens here, for the kernel would give a second mount of the tag
    /// the file system of such a folder, and containers that share a folder are to share its pages.
    ///
    /// # Errors
    /// A tag that no device has, or too many.
    pub(crate) async fn mount_shares(&self, wanted: Vec<(String, String)>) -> Result<(), AgentError> {
        if wanted.is_empty() {
            return Ok(());
        }
        let mut mounted = self.shares.lock().await;
        let have = mounted.clone();
        let work = tokio::task::spawn_blocking(move || rootfs::mount_shares(&have, &wanted));
        let new = work.await.map_err(|_| AgentError::state("the thread that mounts shares is gone"))??;
        mounted.extend(new);
        Ok(())
    }

    /// Mounts memory that containers have in common, each once, for their namespaces to inherit. It stays as long as the sandbox: a
    /// container that is made again finds what it left.
    ///
    /// # Errors
    /// Too many, or what the kernel answers.
    pub(crate) async fn mount_memory(&self, wanted: Vec<(String, u64)>) -> Result<(), AgentError> {
        let mut mounted = self.memory.lock().await;
        for (name, size_bytes) in wanted {
            if mounted.contains(&name) {
                continue;
            }
            if mounted.len() >= MAX_SHARED_MEMORY {
                return Err(AgentError::limit("shared memory of the sandbox", MAX_SHARED_MEMORY));
            }
            rootfs::mount_memory(&name, size_bytes)?;
            mounted.insert(name);
        }
        Ok(())
    }

    /// Takes an id for a new container.
    ///
    /// # Errors
    /// It is taken, not an id, or there are too many.
    pub(crate) fn reserve(&self, id: &str) -> Result<Reservation<'_>, AgentError> {
        check_id(id)?;
        let mut containers = self.lock()?;
        if containers.contains_key(id) {
            return Err(AgentError::refused(ErrorKind::Exists, format!("there is a container {id} already")));
        }
        if containers.len() >= MAX_CONTAINERS {
            return Err(AgentError::limit("containers", MAX_CONTAINERS));
        }
        containers.insert(id.to_owned(), Slot::Busy);
        Ok(Reservation { sandbox: self, id: id.to_owned(), then: None })
    }

    /// A container by id.
    ///
    /// # Errors
    /// There is none, or it is being made or removed.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, AgentError> {
        match self.lock()?.get(id) {
            Some(Slot::Ready(container)) => Ok(Arc::clone(container)),
            Some(Slot::Busy) => Err(AgentError::state(format!("container {id} is being made or removed"))),
            None => Err(AgentError::not_found(format!("there is no container {id}"))),
        }
    }

    /// Removes a container with everything in it. One that is not there is fine.
    ///
    /// # Errors
    /// It is being made, or does not end.
    pub(crate) async fn delete(&self, id: &str) -> Result<(), AgentError> {
        let (container, mut reservation) = {
            let mut containers = self.lock()?;
            let container = match containers.get(id) {
                None => return Ok(()),
                Some(Slot::Busy) => {
                    return Err(AgentError::state(format!("container {id} is being made or removed")));
                }
                Some(Slot::Ready(container)) => Arc::clone(container),
            };
            containers.insert(id.to_owned(), Slot::Busy);
            (container, Reservation { sandbox: self, id: id.to_owned(), then: None })
        };
        // Should it fail or be given up, the container stays in its place.
        reservation.then = Some(Arc::clone(&container));
        let mut steps = Steps::default();
        steps.next("end processes");
        container.destroy().await?;
        reservation.then = None;
        // Its mounts go with the last who knows it.
        steps.next("let go of mounts and disks");
        drop(container);
        self.disks.let_go(id).await;
        steps.next("write back");
        if !self.shares.lock().await.is_empty() {
            // Shares stay mounted: what was written through a mapping is on its way yet, and the host may end the machine next.
            sync().await;
        }
        Ok(())
    }

    /// Kills everything, and brings to the disks what is not there yet.
    pub(crate) async fn stop_all(&self) {
        let ids: Vec<String> = self.lock().map(|c| c.keys().cloned().collect()).unwrap_or_default();
        for id in ids {
            if let Err(error) = self.delete(&id).await {
                log::error(format!("end container {id}: {error}"));
            }
        }
        // Disks were unmounted with the namespaces of their containers; what is still held is written at least.
        sync().await;
    }

    /// Runs an archive program in a container's root; its standard input or output is the stream.
    ///
    /// # Errors
    /// What it reports.
    pub(crate) async fn archive(
        &self,
        container: &Container,
        plan: impl FnOnce(ArchivePlan) -> Plan,
        request: ArchivePlan,
        stream: Option<(u64, Direction)>,
    ) -> Result<Report, AgentError> {
        crate::spec::absolute("path", &request.path)?;
        let mut stdio = ChildStdio::null();
        if let Some((id, direction)) = stream {
            let stream = OwnedFd::from(self.streams.claim(id).await?);
            rustix::io::ioctl_fionbio(&stream, false).tried(|| "make a stream blocking".to_owned())?;
            match direction {
                Direction::Out => stdio.stdout = Stdio::from(stream),
                Direction::In => stdio.stdin = Stdio::from(stream),
            }
        }
        let namespace = container.mount_namespace();
        let plan = plan(ArchivePlan { mount_namespace: namespace.as_raw_fd(), ..request });
        Spawned::start(&self.reaper, &plan, stdio, &[namespace.as_fd()]).await?.answer().await
    }
}

/// Writes everything back.
async fn sync() {
    if tokio::task::spawn_blocking(rustix::fs::sync).await.is_err() {
        log::error("sync: the thread is gone");
    }
}

/// Which way an archive goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the container to the host.
    Out,
    /// From the host to the container.
    In,
}

/// Sets the wall clock.
///
/// # Errors
/// A time that is none, or what the kernel answers.
pub(crate) fn set_clock(unix_ns: i64) -> Result<(), AgentError> {
    if unix_ns <= 0 {
        return Err(AgentError::invalid(format!("{unix_ns} is no time of today")));
    }
    let time = rustix::time::Timespec {
        tv_sec: unix_ns.div_euclid(1_000_000_000),
        tv_nsec: unix_ns.rem_euclid(1_000_000_000),
    };
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, time).tried(|| "set the clock".to_owned())
}

/// Gives the host's entropy to the kernel, and has it used at once: a machine that was saved shares what the kernel had before with all
/// that go on from it.
///
/// # Errors
/// Too little or too much, or what the kernel answers.
pub(crate) fn add_entropy(bytes: &[u8]) -> Result<(), AgentError> {
    const MIN_BYTES: usize = 32;
    if bytes.len() < MIN_BYTES || bytes.len() > crate::sys::MAX_ENTROPY_BYTES {
        return Err(AgentError::invalid(format!(
            "{} bytes of entropy: {MIN_BYTES} to {} are wanted",
            bytes.len(),
            crate::sys::MAX_ENTROPY_BYTES
        )));
    }
    let device = rustix::fs::open("/dev/urandom", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
        .tried(|| "open /dev/urandom".to_owned())?;
    crate::sys::add_entropy(device.as_fd(), bytes).tried(|| "add entropy".to_owned())?;
    crate::sys::reseed(device.as_fd()).tried(|| "use the entropy".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_of_folders() {
        assert!(check_id("a").is_ok());
        assert!(check_id(&"x".repeat(64)).is_ok());
        for bad in ["", "..", ".", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(check_id(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_reservation_is_given_back() {
        let sandbox = Sandbox::default();
        let reservation = sandbox.reserve("a").unwrap();
        assert_eq!(sandbox.reserve("a").unwrap_err().kind(), ErrorKind::Exists);
        assert_eq!(sandbox.container("a").unwrap_err().kind(), ErrorKind::State);
        drop(reservation);
        assert_eq!(sandbox.container("a").unwrap_err().kind(), ErrorKind::NotFound);
        assert!(sandbox.reserve("a").is_ok());
    }

    #[test]
    fn too_many_containers_are_refused() {
        let sandbox = Sandbox::default();
        let taken: Vec<_> = (0..MAX_CONTAINERS).map(|n| sandbox.reserve(&n.to_string()).unwrap()).collect();
        assert_eq!(sandbox.reserve("one-more").unwrap_err().kind(), ErrorKind::Limit);
        drop(taken);
    }

    #[test]
    fn configuring_happens_once() {
        let sandbox = Sandbox::default();
        assert_eq!(sandbox.configure().unwrap(), Configured::First);
        assert!(sandbox.configure().is_err());
        assert!(set_clock(0).is_err());
        assert!(add_entropy(&[0; 31]).is_err());
    }
}
