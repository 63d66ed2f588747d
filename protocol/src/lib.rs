//! All that host and guest share: the agent's RPC (generated from `proto/agent.proto`), ports, limits and the doorbell.
//!
//! Conversions in this crate never panic: what arrives from a guest is hostile.
#![deny(unsafe_code)]

mod doorbell;

pub use doorbell::{DOORBELL_MAX_BYTES, Doorbell, DoorbellError};

/// Messages and the client and server of the agent's RPC, generated from `proto/agent.proto`.
#[expect(
    missing_debug_implementations,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    clippy::panic,
    clippy::unwrap_used,
    clippy::pedantic,
    reason = "generated code; proto/agent.proto is its documentation"
)]
pub mod rpc {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

/// Version of everything in this crate; host and guest must agree on it.
pub const PROTOCOL_VERSION: u32 = 2;

/// Guest port of the RPC.
pub const RPC_PORT: u32 = 1024;
/// Guest port of raw streams.
pub const STREAM_PORT: u32 = 1025;
/// Host port of the doorbell: the agent connects when it serves.
pub const DOORBELL_PORT: u32 = 1026;
/// Host port of the name service: one connection a query.
pub const DNS_PORT: u32 = 1027;
/// Host port of Unix sockets of the host that containers are given: one connection a client, which begins with the socket's id.
pub const SOCKET_PORT: u32 = 1028;

/// Largest OCI specification, bytes.
pub const MAX_OCI_SPEC_BYTES: usize = 1 << 20;
/// Largest injected file, bytes.
pub const MAX_INJECTED_FILE_BYTES: usize = 1 << 20;
/// Longest DNS message (RFC 1035, 4.2.2), bytes.
pub const MAX_DNS_MESSAGE_BYTES: usize = 65_535;
/// Most parts of a disk that is attached, and most mounts, folders and layers of a root of disks; what the VMM takes.
pub const MAX_DISK_PARTS: usize = 160;
/// How long an unclaimed stream connection is kept, milliseconds.
pub const STREAM_CLAIM_TIMEOUT_MS: u64 = 10_000;
/// Metadata of a request whose steps in the guest are to be kept for `TakeSpans`: a number other than 0.
pub const TRACE_KEY: &str = "hyper-trace";
/// Requests whose steps are kept, by their method.
pub const TRACED_CALLS: [&str; 6] =
    ["Configure", "ConfigureNetwork", "CreateContainer", "CreateProcess", "DeleteContainer", "StartProcess"];
/// Most steps of one request: making a container has about twenty.
pub const MAX_TRACE_SPANS: usize = 64;
/// Longest name of a step, bytes.
pub const MAX_SPAN_NAME_BYTES: usize = 48;
/// Virtio-fs tag of the share that holds all host directories of a sandbox, one directory or file each.
pub const SHARE_TAG: &str = "hyper";
