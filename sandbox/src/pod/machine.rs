//! The machine of a sandbox: started, watched and ended by a task of its own.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hyper_protocol::rpc::agent::ConfigureRequest;
use tokio::sync::{Notify, watch};
use tracing::Instrument;

use super::bays::{Bays, MAX_BAYS};
use super::cgroup::HostCgroup;
use super::growth::{self, Growth, Room};
use super::live::LiveShare;
use super::netns::PodNetwork;
use super::{PodError, SandboxSpec, until_ended};
use crate::dirs::{Dirs, Parts};
use crate::launch::{Agent, DEFAULT_BOOT_MS, Guest, GuestPlan, MemorySizing, Steps, VmError, scaled_ms};
use crate::sockets::HostSockets;

/// How long an orderly end may take before the caller no longer waits; the machine is ended by force soon after.
const STOP_MS: u64 = 30_000;

/// The wish that it ends.
#[derive(Debug, Default)]
struct Stop {
    wished: Notify,
    orderly: AtomicBool,
}

/// A machine that runs in the background.
#[derive(Debug)]
pub(super) struct Machine {
    pid: u32,
    stop: Arc<Stop>,
    ended: watch::Receiver<Option<String>>,
}

/// A machine that has started, and what belongs to it.
pub(super) struct Started {
    pub(super) machine: Machine,
    pub(super) agent: Arc<Agent>,
    pub(super) live: LiveShare,
    pub(super) network: PodNetwork,
    pub(super) growth: Growth,
    pub(super) bays: Bays,
    pub(super) sockets: HostSockets,
}

impl Machine {
    /// Starts it, with all that it uses.
    pub(super) async fn start(spec: &SandboxSpec, parts: &Parts) -> Result<Started, PodError> {
        let parent = spec.run_dir.parent().unwrap_or(Path::new("/"));
        std::fs::create_dir_all(parent).map_err(|source| PodError::io("make", parent, source))?;
        super::clean(&spec.run_dir);
        let live = LiveShare::make(&spec.run_dir)?;
        // Undone after the machine, which is in it.
        let cgroup = HostCgroup::make(&spec.cgroup, &spec.run_dir)?;
        let (network, nets) = PodNetwork::enter(spec.netns.as_deref())?;
        let mut sizing = MemorySizing::load(&Dirs::from_env().data.join("templates"), parts);
        let vm_mem_mib = sizing.vm_mem_mib(spec.mem_mib, spec.vcpus);
        let base = Room { vcpus: spec.vcpus, mem_mib: spec.mem_mib };
        let growth = growth::plan(base, vm_mem_mib);
        let (sockets, socket_port) =
            HostSockets::serve().map_err(|source| PodError::io("make a socket in", &spec.run_dir, source))?;
        let plan = GuestPlan {
            run_dir: spec.run_dir.clone(),
            log_dir: spec.run_dir.clone(),
            vcpus: spec.vcpus,
            mem_mib: vm_mem_mib,
            growth: Some(growth),
            bays: MAX_BAYS,
            disks: Vec::new(),
            nets,
            host_ports: vec![socket_port],
            shares: vec![live.plan()],
            kernel_args: spec.kernel_args.clone(),
            template: None,
            cgroups: cgroup.entrances()?,
            in_pod: true,
            boot_ms: spec.boot_timeout_ms.map_or(DEFAULT_BOOT_MS, u64::from),
        };
        let configure = ConfigureRequest { hostname: spec.hostname.clone(), ..Default::default() };
        let started = async {
            let mut steps = Steps::begin();
            let boot = Guest::start(plan, parts, &mut steps);
            let guest = boot.instrument(tracing::debug_span!("boot")).await?;
            let configured = guest.configure(configure).await?;
            Ok::<_, VmError>((guest, configured))
        };
        let (guest, configured) = match started.await {
            Ok(both) => both,
            Err(error) => {
                cgroup.remove().await;
                return Err(error.into());
            }
        };
        if let Err(error) = sizing.learn(vm_mem_mib, spec.vcpus, configured.mem_total_bytes) {
            tracing::debug!(%error, "nothing is learned");
        }
        let agent = Arc::clone(&guest.agent);
        let levers = Arc::new(guest.levers());
        let growth = Growth::new(base, growth, Arc::clone(&levers));
        let bays = Bays::new(levers, guest.bays());
        let (tell, ended) = watch::channel(None);
        let stop = Arc::new(Stop::default());
        let machine = Self { pid: guest.pid(), stop: Arc::clone(&stop), ended };
        tokio::spawn(watch_over(guest, cgroup, stop, tell));
        Ok(Started { machine, agent, live, network, growth, bays, sockets })
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    pub(super) fn ended(&self) -> watch::Receiver<Option<String>> {
        self.ended.clone()
    }

    /// Ends it, and waits for that.
    pub(super) async fn stop(&self, orderly: bool) {
        self.stop.orderly.store(orderly, Ordering::SeqCst);
        self.stop.wished.notify_one();
        if tokio::time::timeout(scaled_ms(STOP_MS), until_ended(self.ended())).await.is_err() {
            tracing::warn!("the machine does not end");
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop.wished.notify_one();
    }
}

/// Holds the machine until it ends or is to end.
async fn watch_over(guest: Guest, cgroup: HostCgroup, stop: Arc<Stop>, tell: watch::Sender<Option<String>>) {
    let end = tokio::select! {
        end = guest.ended() => {
            let end = end.message();
            drop(guest);
            end
        }
        () = stop.wished.notified() => {
            if stop.orderly.load(Ordering::SeqCst) {
                guest.shutdown().await;
            } else {
                drop(guest);
            }
            "the virtual machine was ended".to_owned()
        }
    };
    cgroup.remove().await;
    tell.send_replace(Some(end));
}
