//! Starting machines: hyper-vmm, hyper-fs, and the way to the agent.
//!
//! ```text
//! Guest::start: sockets -> hyper-fs (if something is shared) -> hyper-vmm, Boot -> doorbell -> RPC -> Configure
//! Guest::shutdown: agent Shutdown -> control Shutdown -> kill
//! ```
//!
//! Files: `guest` (the whole), `plan` (what is to be started, as a `VmSpec`), `control` (the VMM's socket), `callers` (connections of the guest), `file_server`, `child`
//! (processes and their logs), `template` (machines that are cloned), `levers` (what changes a running machine), `agent` (RPC and streams), `memory` (how large the VM must be), `unpack`.

mod agent;
mod callers;
mod child;
mod control;
mod file_server;
mod guest;
mod levers;
mod memory;
mod plan;
mod template;
mod unpack;

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use hyper_vmm_spec::SpecError;

pub(crate) use agent::{Agent, Stream, call, context, rpc_error, untraced};
#[cfg(test)]
pub(crate) use callers::testing as callers_testing;
pub(crate) use callers::{Callers, HostPortPlan};
pub(crate) use child::last_words;
pub(crate) use control::VmEnd;
pub(crate) use guest::{Guest, Steps};
pub(crate) use levers::Levers;
pub(crate) use memory::MemorySizing;
pub(crate) use plan::{DEFAULT_BOOT_MS, DiskPlan, GrowthPlan, GuestPlan, NetPlan, SharePlan};
pub(crate) use template::{Inputs, MachineShape, Started, Template, go_on, make as make_template, start};
pub(crate) use unpack::unpack;

/// A VMM that is played, for tests of what uses it.
#[cfg(test)]
pub(crate) use levers::testing;

/// Compression of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// A plain tar.
    None,
    /// gzip.
    Gzip,
    /// Zstandard.
    Zstd,
}

/// One layer of an image on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerBlob {
    /// The file.
    pub path: PathBuf,
    /// Its compression.
    pub compression: Compression,
    /// SHA-256 of the uncompressed tar.
    pub diff_id: [u8; 32],
}

/// How far an unpacking is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnpackProgress {
    /// Index of the layer that is being sent, from 0.
    pub layer: usize,
    /// Bytes of it that were sent.
    pub sent_bytes: u64,
    /// All its bytes.
    pub total_bytes: u64,
}

/// What came of an unpacking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unpacked {
    /// Length of the image, bytes.
    pub image_bytes: u64,
    /// Files and directories in it.
    pub inodes: u64,
}

/// Why a machine could not be started, or failed.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A part is missing on the host.
    #[error("{part} cannot be used, looked for at {path}: {source}")]
    Part {
        /// Which.
        part: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// Why it cannot be used.
        source: std::io::Error,
    },
    /// A pipe or socket could not be made.
    #[error("cannot make {what}: {source}")]
    Descriptor {
        /// What.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The machine cannot be described.
    #[error("bad machine: {0}")]
    Spec(#[from] SpecError),
    /// The VMM refused to build or change the machine.
    #[error("{0}")]
    Refused(String),
    /// The conversation with the VMM broke.
    #[error("control socket of hyper-vmm: {0}")]
    Control(String),
    /// The machine ended when it should not.
    #[error("{0}")]
    Ended(String),
    /// The agent did not report in time.
    #[error("the guest did not answer within {limit_ms} ms; its last words: {last_words}")]
    NoDoorbell {
        /// The deadline.
        limit_ms: u64,
        /// Last line on its console.
        last_words: String,
    },
    /// The agent is not ours.
    #[error(transparent)]
    Doorbell(#[from] hyper_protocol::DoorbellError),
    /// No connection to a port of the guest.
    #[error("cannot connect to port {port} of the guest: {source}")]
    Connect {
        /// The vsock port.
        port: u32,
        /// Why not.
        source: std::io::Error,
    },
    /// The agent refused a request.
    #[error("{message}")]
    Agent {
        /// Which request.
        call: &'static str,
        /// What it said.
        message: String,
    },
    /// The conversation with the agent broke.
    #[error("the agent did not answer {call}: {source}")]
    Rpc {
        /// Which request.
        call: &'static str,
        /// Why not.
        source: ttrpc::Error,
    },
    /// Unpacking makes no progress.
    #[error("unpacking made no progress for {limit_ms} ms")]
    Stalled {
        /// The deadline.
        limit_ms: u64,
    },
    /// `HYPER_TEMPLATE` is none of its values.
    #[error("HYPER_TEMPLATE is {0:?}: give auto, never or always")]
    TemplateMode(String),
    /// A start from a template was insisted on.
    #[error("HYPER_TEMPLATE is always, and this container cannot start from a template: {0}")]
    NoTemplate(String),
    /// What the agent says cannot be.
    #[error("the agent's answer to {0} cannot be")]
    Nonsense(&'static str),
}

/// Deadlines are multiplied by `HYPER_TIMEOUT_SCALE` (1 to 1000): emulated hosts are slow.
pub(crate) fn scaled_ms(ms: u64) -> Duration {
    static SCALE: OnceLock<u64> = OnceLock::new();
    let scale = SCALE.get_or_init(|| {
        let var = std::env::var("HYPER_TIMEOUT_SCALE").ok();
        var.and_then(|text| text.parse::<u64>().ok()).unwrap_or(1).clamp(1, 1000)
    });
    Duration::from_millis(ms.saturating_mul(*scale))
}
