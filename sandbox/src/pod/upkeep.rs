//! What is asked of a container that is there: standing still, its processes, what it uses, other limits.

use hyper_protocol::rpc::agent::UpdateContainerRequest;
use serde_json::Value;

use super::container::reference;
use super::growth::Claim;
use super::{PodError, PodEvent, Sandbox, held, translate};
use crate::launch::call;
use crate::store::ContainerStats;
use crate::supervisor::stats_of;

impl Sandbox {
    /// Freezes all processes of a container.
    ///
    /// # Errors
    /// No such container, it does not run, or it is frozen already.
    pub async fn pause(&self, id: &str) -> Result<(), PodError> {
        let container = self.container(id)?;
        let request = reference(id);
        self.call("PauseContainer", self.agent.rpc.pause_container(call(), &request)).await?;
        *held(&container.paused) = true;
        (self.events)(PodEvent::Paused { container: id.to_owned() });
        Ok(())
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// No such container, or it is not frozen.
    pub async fn resume(&self, id: &str) -> Result<(), PodError> {
        let container = self.container(id)?;
        let request = reference(id);
        self.call("ResumeContainer", self.agent.rpc.resume_container(call(), &request)).await?;
        *held(&container.paused) = false;
        (self.events)(PodEvent::Resumed { container: id.to_owned() });
        Ok(())
    }

    /// Process ids in the container, as the container numbers them.
    ///
    /// # Errors
    /// No such container.
    pub async fn pids(&self, id: &str) -> Result<Vec<u32>, PodError> {
        self.container(id)?;
        let request = reference(id);
        let all = self.call("ListProcesses", self.agent.rpc.list_processes(call(), &request)).await?;
        Ok(all.processes.into_iter().map(|process| process.pid).collect())
    }

    /// What a container uses.
    ///
    /// # Errors
    /// No such container.
    pub async fn stats(&self, id: &str) -> Result<ContainerStats, PodError> {
        self.container(id)?;
        let request = reference(id);
        self.call("Stats", self.agent.rpc.stats(call(), &request)).await.map(stats_of)
    }

    /// Changes limits. `resources` is an OCI `linux.resources` object, JSON.
    ///
    /// # Errors
    /// No such container, or a limit that the guest does not take.
    pub async fn update(&self, id: &str, resources: &[u8]) -> Result<(), PodError> {
        self.container(id)?;
        let mut wish: Value = serde_json::from_slice(resources)
            .map_err(|error| PodError::Invalid(format!("the resources of {id}: {error}")))?;
        if let Some(wish) = wish.as_object_mut() {
            translate::resources(wish);
            // Device rules do not change.
            wish.remove("devices");
        }
        let before = self.growth.claim_of(id);
        let after = Claim::of(&wish, before);
        self.growth.set_claim(id, before.max(after));
        self.fit_or_warn().await;
        let request = UpdateContainerRequest {
            container_id: id.to_owned(),
            oci_resources: wish.to_string().into_bytes(),
            ..Default::default()
        };
        let updated = self.call("UpdateContainer", self.agent.rpc.update_container(call(), &request)).await;
        // Only now what was more than it is; and nothing has changed if the guest refused.
        self.growth.set_claim(id, if updated.is_ok() { after } else { before });
        self.fit_or_warn().await;
        updated.map(drop)
    }
}
