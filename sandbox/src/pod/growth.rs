//! How large the machine is while it runs: what it began with, or what all containers together may use when that is more.
//!
//! ```text
//!  create, update: claim -> vCPUs made, brought online; memory plugged -> limits of the container
//!  update, delete: limits of the container -> claim is less: vCPUs go offline, memory is asked back (given when the guest can)
//! ```
//!
//! A container without a limit claims nothing: it shares what is there.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use hyper_protocol::rpc::agent::SetProcessorsRequest;
use hyper_vmm_spec::{HOT_MEM_STEP_MIB, MAX_MEM_MIB, MAX_VCPUS};
use serde_json::Value;

use super::{PodError, Sandbox, held};
use crate::launch::{GrowthPlan, Levers, call};

/// Memory beside that of the containers, for what the guest itself needs, MiB.
pub const GUEST_MIB: u32 = 64;
/// vCPUs that a machine can come to have wherever it runs; more where the host has more.
const LEAST_MAX_VCPUS: u8 = 4;
/// Memory that the guest's kernel needs to describe [`HOT_MEM_STEP_MIB`] of it, MiB.
const MAP_MIB: u32 = 2;
/// Period of processor time when a quota comes without one, microseconds.
const DEFAULT_PERIOD_US: u64 = 100_000;

/// What a container may use; 0: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Claim {
    /// Thousandths of a processor.
    milli_cpus: u64,
    memory_mib: u64,
}

impl Claim {
    /// The limits of an OCI `linux.resources` object; what it does not name is as in `before`.
    pub(super) fn of(resources: &Value, before: Self) -> Self {
        let number = |pointer: &str| resources.pointer(pointer).and_then(Value::as_i64);
        let positive = |value: i64| u64::try_from(value).unwrap_or(0);
        let period = number("/cpu/period").map(positive).filter(|period| *period > 0);
        let milli =
            |quota: i64| positive(quota).saturating_mul(1000).div_ceil(period.unwrap_or(DEFAULT_PERIOD_US));
        Self {
            milli_cpus: number("/cpu/quota").map_or(before.milli_cpus, milli),
            memory_mib: number("/memory/limit")
                .map_or(before.memory_mib, |limit| positive(limit).div_ceil(1 << 20)),
        }
    }

    /// The larger of each.
    pub(super) fn max(self, other: Self) -> Self {
        Self {
            milli_cpus: self.milli_cpus.max(other.milli_cpus),
            memory_mib: self.memory_mib.max(other.memory_mib),
        }
    }
}

/// vCPUs and memory of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) vcpus: u8,
    /// That the guest has, MiB.
    pub(super) mem_mib: u32,
}

impl Room {
    /// What these claims need, but no less than `base`.
    fn for_claims<'a>(base: Self, claims: impl Iterator<Item = &'a Claim>) -> Self {
        let (mut milli_cpus, mut memory_mib) = (0_u64, 0_u64);
        for claim in claims {
            milli_cpus = milli_cpus.saturating_add(claim.milli_cpus);
            memory_mib = memory_mib.saturating_add(claim.memory_mib);
        }
        let memory_mib = if memory_mib > 0 { memory_mib.saturating_add(GUEST_MIB.into()) } else { 0 };
        Self {
            vcpus: base.vcpus.max(u8::try_from(milli_cpus.div_ceil(1000)).unwrap_or(u8::MAX)),
            mem_mib: base.mem_mib.max(u32::try_from(memory_mib).unwrap_or(u32::MAX)),
        }
    }
}

/// How far a machine of `base`, whose own memory is `vm_mem_mib`, may grow on this host: to all of its processors and memory.
pub(super) fn plan(base: Room, vm_mem_mib: u32) -> GrowthPlan {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let processors = u8::try_from(processors).unwrap_or(MAX_VCPUS);
    let host = rustix::system::sysinfo();
    let host_mib = (host.totalram * u64::from(host.mem_unit)) >> 20;
    plan_for(base, vm_mem_mib, processors, u32::try_from(host_mib).unwrap_or(MAX_MEM_MIB))
}

fn plan_for(base: Room, vm_mem_mib: u32, processors: u8, host_mib: u32) -> GrowthPlan {
    let most_mib = host_mib.min(MAX_MEM_MIB).saturating_sub(vm_mem_mib);
    GrowthPlan {
        max_vcpus: processors.clamp(LEAST_MAX_VCPUS, MAX_VCPUS).max(base.vcpus),
        hot_mem_mib: most_mib / HOT_MEM_STEP_MIB * HOT_MEM_STEP_MIB,
    }
}

/// Memory to plug, MiB, so that the guest has `more_mib` more of it, no more than `most_mib`.
fn hot_mib(more_mib: u32, most_mib: u32) -> u32 {
    let with_map = |hot: u32| more_mib.saturating_add(hot.div_ceil(HOT_MEM_STEP_MIB).saturating_mul(MAP_MIB));
    let mut hot = more_mib;
    // Each round adds what the last one's memory needs to be described; it settles within a few.
    while hot < with_map(hot) {
        hot = with_map(hot);
    }
    hot.min(most_mib)
}

/// The machine's size, and who claims what of it.
#[derive(Debug)]
pub(super) struct Growth {
    base: Room,
    plan: GrowthPlan,
    levers: Arc<Levers>,
    claims: Mutex<BTreeMap<String, Claim>>,
    /// What the machine has; also the order of changes.
    now: tokio::sync::Mutex<Room>,
}

impl Growth {
    pub(super) fn new(base: Room, plan: GrowthPlan, levers: Arc<Levers>) -> Self {
        Self { base, plan, levers, claims: Mutex::default(), now: tokio::sync::Mutex::new(base) }
    }

    /// What a container claims.
    pub(super) fn claim_of(&self, id: &str) -> Claim {
        held(&self.claims).get(id).copied().unwrap_or_default()
    }

    pub(super) fn set_claim(&self, id: &str, claim: Claim) {
        held(&self.claims).insert(id.to_owned(), claim);
    }

    fn wanted(&self) -> Room {
        let wanted = Room::for_claims(self.base, held(&self.claims).values());
        let most = self.base.mem_mib.saturating_add(self.plan.hot_mem_mib);
        Room { vcpus: wanted.vcpus.min(self.plan.max_vcpus), mem_mib: wanted.mem_mib.min(most) }
    }
}

/// The claim of a container that is being made; given up unless it is kept.
#[derive(Debug)]
pub(super) struct Claimed {
    growth: Arc<Growth>,
    id: Option<String>,
}

impl Claimed {
    pub(super) fn new(growth: &Arc<Growth>, id: &str, claim: Claim) -> Self {
        growth.set_claim(id, claim);
        Self { growth: Arc::clone(growth), id: Some(id.to_owned()) }
    }

    pub(super) fn keep(mut self) {
        self.id = None;
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            held(&self.growth.claims).remove(id);
        }
    }
}

impl Sandbox {
    /// Gives up what a container claims. The machine shrinks when the guest can.
    pub(super) async fn give_up(&self, id: &str) {
        held(&self.growth.claims).remove(id);
        self.fit_or_warn().await;
    }

    /// As [`Sandbox::fit`], for changes that hold whether or not the machine can follow.
    pub(super) async fn fit_or_warn(&self) {
        // One that has ended has no size.
        if let Err(error) = self.fit().await
            && self.machine.ended().borrow().is_none()
        {
            tracing::warn!(%error, "the machine keeps its size");
        }
    }

    /// Makes the machine as large as the claims are. What grows is there when this returns; what shrinks may take its time.
    pub(super) async fn fit(&self) -> Result<(), PodError> {
        let growth = &self.growth;
        let mut now = growth.now.lock().await;
        let wanted = growth.wanted();
        if wanted.vcpus != now.vcpus {
            self.set_vcpus(wanted.vcpus).await?;
            now.vcpus = wanted.vcpus;
        }
        if wanted.mem_mib != now.mem_mib {
            let grows = wanted.mem_mib > now.mem_mib;
            let hot = hot_mib(wanted.mem_mib.saturating_sub(growth.base.mem_mib), growth.plan.hot_mem_mib);
            growth.levers.set_hot_memory(hot, grows).await?;
            now.mem_mib = wanted.mem_mib;
        }
        Ok(())
    }

    async fn set_vcpus(&self, count: u8) -> Result<(), PodError> {
        // Those that are offline stay, asleep.
        self.growth.levers.add_vcpus(count).await?;
        let request = SetProcessorsRequest { online: count.into(), ..Default::default() };
        self.call("SetProcessors", self.agent.rpc.set_processors(call(), &request)).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn claims_are_limits_and_keep_what_is_not_named() {
        let both =
            json!({"cpu": {"quota": 150_000, "period": 100_000}, "memory": {"limit": (256 << 20) + 1}});
        let first = Claim::of(&both, Claim::default());
        assert_eq!(first, Claim { milli_cpus: 1500, memory_mib: 257 });
        let faster = Claim::of(&json!({"cpu": {"quota": 200_000}}), first);
        assert_eq!(faster, Claim { milli_cpus: 2000, memory_mib: 257 });
        let free = Claim::of(&json!({"cpu": {"quota": -1, "period": 0}, "memory": {"limit": -1}}), first);
        assert_eq!(free, Claim::default());
        let absurd = Claim::of(&json!({"cpu": {"quota": i64::MAX, "period": 1}}), first);
        assert_eq!(absurd.milli_cpus, u64::MAX);
        assert_eq!(Claim::of(&json!(null), first), first);
    }

    #[test]
    fn machines_hold_what_their_containers_may_use() {
        let base = Room { vcpus: 1, mem_mib: 512 };
        let room = |claims: &[(u64, u64)]| {
            let claims: Vec<_> = claims
                .iter()
                .map(|(milli_cpus, memory_mib)| Claim { milli_cpus: *milli_cpus, memory_mib: *memory_mib })
                .collect();
            let room = Room::for_claims(base, claims.iter());
            (room.vcpus, room.mem_mib)
        };
        assert_eq!(room(&[]), (1, 512));
        assert_eq!(room(&[(500, 128), (500, 128), (0, 0)]), (1, 512));
        assert_eq!(room(&[(500, 512), (501, 512)]), (2, 1024 + GUEST_MIB));
        assert_eq!(room(&[(u64::MAX, u64::MAX), (1, 1)]), (u8::MAX, u32::MAX));
    }

    #[test]
    fn growth_ends_with_the_host() {
        let base = Room { vcpus: 1, mem_mib: 512 };
        let plan = plan_for(base, 540, 2, 8192);
        assert_eq!(plan, GrowthPlan { max_vcpus: 4, hot_mem_mib: 7552 });
        assert_eq!(
            plan_for(Room { vcpus: 8, ..base }, 540, 2, 512),
            GrowthPlan { max_vcpus: 8, hot_mem_mib: 0 }
        );
        let large = plan_for(base, 540, 200, u32::MAX);
        assert!(large.max_vcpus == MAX_VCPUS && large.hot_mem_mib + 540 <= MAX_MEM_MIB);
    }

    #[test]
    fn what_describes_memory_is_added_to_it() {
        assert_eq!([0, 1, 126, 127, 252].map(|more| hot_mib(more, 4096)), [0, 3, 128, 131, 256]);
        assert_eq!(hot_mib(1000, 512), 512);
        assert_eq!(hot_mib(u32::MAX, 1024), 1024);
    }
}
