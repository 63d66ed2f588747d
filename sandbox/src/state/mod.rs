//! What a container is ([`ContainerState`]), persisted as `containers/<id>/state.json`, and the table of its statuses.
//!
//! Only the holder of `containers/<id>/lock` writes the state.
//!
//! ```text
//! created --> running <--> paused
//!    |          |  \-----> restarting --> running
//!    v          v              |
//!  exited <-----+--------------+          any --> dead (being removed)
//! ```

mod file;

use std::net::IpAddr;

use hyper_vmm_spec::control::Timeline;
use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::config::PortConfig;

pub(crate) use file::{read_json, sync_dir, write_json};

/// Where a container is in its life; Docker's words.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Made, never run (or it could not be started).
    #[default]
    Created,
    /// Its process runs.
    Running,
    /// Its processes are frozen.
    Paused,
    /// Its process has ended, and it waits to be started again.
    Restarting,
    /// Its process has ended.
    Exited,
    /// It is being removed.
    Dead,
}

impl Status {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Created, Self::Running, Self::Paused, Self::Restarting, Self::Exited, Self::Dead];

    /// Whether a container may go from `self` to `next`.
    #[must_use]
    pub fn may_become(self, next: Self) -> bool {
        use Status::{Created, Dead, Exited, Paused, Restarting, Running};
        match (self, next) {
            (Dead, _) | (_, Created) => false,
            (_, Dead) => true,
            (Created | Exited | Restarting | Paused, Running) => true,
            (Running, Paused | Restarting | Exited) => true,
            (Created | Paused | Restarting, Exited) => true,
            _ => false,
        }
    }

    /// Whether a supervisor must be alive in this status.
    #[must_use]
    pub fn is_live(self) -> bool {
        matches!(self, Self::Running | Self::Paused | Self::Restarting)
    }

    /// Docker's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Restarting => "restarting",
            Self::Exited => "exited",
            Self::Dead => "dead",
        }
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// What is known of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerState {
    /// Where it is in its life.
    pub status: Status,
    /// Process id of the VMM on the host; 0 when none runs.
    pub pid: u32,
    /// Exit code of the last run; 128 + n when killed by signal n.
    pub exit_code: u8,
    /// Why it could not be started or was lost; empty: nothing is wrong.
    pub error: String,
    /// The guest's kernel killed it for want of memory.
    pub oom_killed: bool,
    /// When it was last started.
    pub started: Timestamp,
    /// When it last ended.
    pub finished: Timestamp,
    /// Starts by policy since the user's last start.
    pub restart_count: u32,
    /// The user stopped it: policies do not start it again after a reboot.
    pub stopped_by_user: bool,
    /// How it is connected; `None` when it is not running or has no network.
    pub network: Option<NetworkState>,
    /// Published ports, with the host ports that were chosen; empty when it is not running.
    pub ports: Vec<ResolvedPort>,
    /// How long the last start took.
    pub boot: Option<BootTimeline>,
}

impl ContainerState {
    /// Goes to `next` if the table allows it; returns whether it did.
    pub(crate) fn enter(&mut self, next: Status) -> bool {
        if self.status != next && !self.status.may_become(next) {
            tracing::error!(from = %self.status, to = %next, "status change refused");
            return false;
        }
        self.status = next;
        true
    }

    /// The state after an end; what belongs to a running container is cleared.
    pub(crate) fn end(&mut self, status: Status, exit_code: u8, error: String) {
        self.enter(status);
        self.exit_code = exit_code;
        self.error = error;
        self.pid = 0;
        self.finished = Timestamp::now();
        self.network = None;
        self.ports.clear();
    }
}

/// The address of a running container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkState {
    /// Its address.
    pub ip: IpAddr,
    /// Length of the network's prefix.
    pub prefix_len: u8,
    /// The host's address on the bridge.
    pub gateway: IpAddr,
    /// Hardware address, `02:…`.
    pub mac: String,
    /// The host's interface.
    pub tap: String,
    /// The host's bridge.
    pub bridge: String,
}

/// A published port of a running container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedPort {
    /// What was asked for.
    #[serde(flatten)]
    pub wish: PortConfig,
    /// The address that is listened on.
    pub bound_ip: IpAddr,
    /// The port that is listened on.
    pub bound_port: u16,
}

/// Steps of the last start, for `bench boot`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BootTimeline {
    /// `CLOCK_MONOTONIC` when the supervisor began the start, microseconds.
    pub began_us: u64,
    /// The supervisor's own steps: name, and microseconds from `began_us` to the end of the step.
    pub steps: Vec<(String, u64)>,
    /// The VMM's steps.
    pub vmm: Timeline,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_of_statuses() {
        use Status::{Created, Dead, Exited, Paused, Restarting, Running};
        let allowed = [
            (Created, vec![Running, Exited, Dead]),
            (Running, vec![Paused, Restarting, Exited, Dead]),
            (Paused, vec![Running, Exited, Dead]),
            (Restarting, vec![Running, Exited, Dead]),
            (Exited, vec![Running, Dead]),
            (Dead, vec![]),
        ];
        for (from, next) in allowed {
            for to in Status::ALL {
                assert_eq!(from.may_become(to), next.contains(&to), "{from} -> {to}");
            }
        }
    }

    #[test]
    fn refused_change_changes_nothing() {
        let mut state = ContainerState { status: Status::Dead, ..Default::default() };
        assert!(!state.enter(Status::Running));
        assert_eq!(state.status, Status::Dead);
    }

    #[test]
    fn state_survives_its_file_and_lacks_nothing_old() {
        let state = ContainerState { status: Status::Exited, exit_code: 7, ..Default::default() };
        let text = serde_json::to_string(&state).unwrap();
        assert!(text.contains("\"status\":\"exited\""));
        assert_eq!(serde_json::from_str::<ContainerState>(&text).unwrap(), state);
        assert_eq!(serde_json::from_str::<ContainerState>("{}").unwrap(), ContainerState::default());
    }
}
