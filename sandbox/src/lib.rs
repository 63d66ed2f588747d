//! One VM and its containers: spec, state, storage, network, launch, undo.
//!
//! ```text
//! hyper run --Home::create--> containers/<id>/config.json        (status created)
//!           --Container::start--> spawns `<exe> supervise <id>`, hands it the container's lock and its first client
//!                                  | supervisor: storage, network, hyper-fs, hyper-vmm, agent; logs, exit, restarts
//!           <==attach frames=====> | run/<id>/sup.sock for every later client
//! ```
//!
//! Nothing here needs a daemon. A container is alive exactly when somebody holds the lock on `containers/<id>/lock`; what a dead
//! supervisor left behind is recognised by the free lock and cleaned up by the next [`Home::open`].
//!
//! Entry points: [`Home`] (all containers and volumes of one user), [`Container`] (one of them), [`Attached`] (a conversation with a
//! process), [`supervise`] (the body of the hidden `supervise` verb).

pub mod audit;
mod clock;
mod config;
mod dirs;
mod error;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod launch;
mod logs;
mod network;
mod oci;
pub mod pod;
pub mod rootless;
mod rtnetlink;
mod sockets;
mod state;
mod storage;
mod store;
mod stream;
mod supervisor;
mod sys;
mod sys_bpf;
mod trace;

pub use clock::{Timestamp, TimestampError};
pub use config::{
    ConfigError, ContainerConfig, DEFAULT_MEM_MIB, DEFAULT_SHM_BYTES, DEFAULT_STOP_TIMEOUT_S, EgressRule,
    EgressTarget, ExtraHost, ImageConfig, LEAST_MEM_MIB, MountConfig, NetworkMode, PortConfig, ProcessConfig,
    Protocol, ResourceConfig, ResourceUpdate, RestartPolicy, SecurityConfig, UlimitConfig,
};
pub use dirs::{Dirs, Parts};
pub use error::{SandboxError, StartError};
pub use launch::{Compression, LayerBlob, UnpackProgress, Unpacked, VmError};
pub use logs::{LogEntry, LogOptions, LogSource, LogStream};
pub use network::NetworkError;
pub use rootless::RootlessError;
pub use state::{BootTimeline, ContainerState, NetworkState, ResolvedPort, Status};
pub use storage::StorageError;
pub use store::{
    ArchiveInOptions, ArchiveReader, Container, ContainerStats, Draft, ExecConfig, Home, Jailed,
    NetworkCounters, PathStat, Process, RemoveOptions, Snapshot, Volume, WaitCondition,
};
pub use stream::{AttachInput, AttachOptions, AttachOutput, Attached, FrameError, Output, TerminalSize};
pub use supervisor::supervise;
pub use trace::{Export, Exporter, GuestSpan, settle_guest_spans, trace_guests};
