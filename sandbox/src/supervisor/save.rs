//! Saving the container that runs: its machine stands still while memory and disk are copied, and goes on.
//!
//! ```text
//! whoever asks something of the agent waits --> processes frozen --> vCPUs paused --> state, memory, rw.img --> all of it goes on
//! ```
//! Processes are frozen first, so that in a machine that goes on from what is saved none of them runs before it is somebody of its own.

use std::path::Path;
use std::time::Instant;

use tokio::time::timeout;

use super::run::Run;
use super::shared::Shared;
use super::verbs::{container_ref, refusal};
use crate::config::{ContainerConfig, MountConfig};
use crate::launch::{call, scaled_ms};
use crate::state::Status;
use crate::store::{SavedInterface, SavedMachine, create_files, describe, draft_dir};
use crate::stream::wire::{Refusal, Reply};
use crate::{Container, SandboxError, storage};

/// How long what is under way with the agent may take to end.
const QUIET_MS: u64 = 20_000;
/// How long the machine may stand still. Who asks for something meanwhile waits for an answer 30 s.
const STILL_MS: u64 = 20_000;

/// What of a container cannot be saved, if anything.
fn obstacle(config: &ContainerConfig) -> Option<String> {
    config.mounts.iter().find_map(|mount| match mount {
        MountConfig::Bind { source, .. } => Some(format!("it shares {} with the host", source.display())),
        MountConfig::Volume { target, .. } => Some(format!("it has a volume at {target}")),
        MountConfig::Tmpfs { .. } => None,
    })
}

/// Fills a draft.
pub(super) async fn save(shared: &Shared, draft: &str) -> Result<Reply, Refusal> {
    let dir = draft_dir(&shared.home, draft)?;
    let late = SandboxError::Timeout {
        what: "waiting for what is under way with the container",
        limit_ms: QUIET_MS,
    };
    let _alone = timeout(scaled_ms(QUIET_MS), shared.alone()).await.map_err(|_| late)?;
    let run = shared.running()?;
    // Its limits may have been changed since it was started.
    let container = Container::load(&shared.home, &shared.id)?;
    if let Some(why) = obstacle(container.config()) {
        return Err(SandboxError::Unsavable { container: container.name().to_owned(), why }.into());
    }
    let paused = shared.status() == Status::Paused;
    if !paused {
        let frozen = run.agent.rpc.pause_container(call(), &container_ref(&run)).await;
        frozen.map_err(|error| refusal("PauseContainer", error))?;
    }
    let saved = save_machine(&run, &container, &dir).await;
    if !paused {
        thaw(shared, &run).await?;
    }
    saved?;
    describe(&dir, &machine(&run, shared), &container)?;
    Ok(Reply::Done)
}

async fn save_machine(run: &Run, container: &Container, dir: &Path) -> Result<(), SandboxError> {
    let (state, memory) = create_files(dir)?;
    let deadline = Instant::now() + scaled_ms(STILL_MS);
    let (from, to) = (container.dir(), dir.to_owned());
    let copy = async move {
        let copied = tokio::task::spawn_blocking(move || storage::copy_rw(&from, &to, Some(deadline))).await;
        copied.map_err(|_| SandboxError::Refused("the thread that copies has ended".to_owned()))?
    };
    run.levers.save(&state, &memory, deadline, copy).await
}

/// Has the processes go on. Should they not, the user can try: the container is paused then.
async fn thaw(shared: &Shared, run: &Run) -> Result<(), Refusal> {
    let thawed = run.agent.rpc.resume_container(call(), &container_ref(run)).await;
    thawed.map(drop).map_err(|error| {
        shared.update(|state| {
            state.enter(Status::Paused);
        });
        refusal("ResumeContainer", error)
    })
}

fn machine(run: &Run, shared: &Shared) -> SavedMachine {
    let interface = shared.container().state().network.as_ref().map(|network| SavedInterface {
        mac: network.mac.clone(),
        address: format!("{}/{}", network.ip, network.prefix_len),
    });
    SavedMachine {
        inputs: run.inputs.clone(),
        guest_id: run.container_id.clone(),
        interface,
        next_exec: run.next_exec(),
        next_stream: run.agent.next_stream(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_the_host_stands_in_the_way() {
        let mut config = ContainerConfig::default();
        let tmpfs = MountConfig::Tmpfs { target: "/t".into(), size_bytes: 0, mode: 0, noexec: false };
        config.mounts = vec![tmpfs.clone()];
        assert_eq!(obstacle(&config), None);
        let (target, read_only) = ("/v".to_owned(), false);
        let volume =
            MountConfig::Volume { name: "data".into(), anonymous: true, target: target.clone(), read_only };
        let bind = MountConfig::Bind { source: "/run/x.sock".into(), target, read_only, create: false };
        for (mount, words) in
            [(volume, "it has a volume at /v"), (bind, "it shares /run/x.sock with the host")]
        {
            config.mounts = vec![tmpfs.clone(), mount];
            assert_eq!(obstacle(&config).as_deref(), Some(words));
        }
    }
}
