//! What a container's processes use: plain data.

use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;

/// One line of `top`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// As the container numbers it.
    pub pid: u32,
    /// Its parent.
    pub ppid: u32,
    /// User id.
    pub uid: u32,
    /// User name, or the number.
    pub user: String,
    /// Processor time used, milliseconds.
    pub cpu_ms: u64,
    /// When it began.
    pub started: Timestamp,
    /// Its terminal, `?` if none.
    pub tty: String,
    /// Command line.
    pub command: String,
}

/// What a container uses; one sample.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStats {
    /// When the sample was taken.
    pub sampled: Timestamp,
    /// Processor time since its start, nanoseconds.
    pub cpu_usage_ns: u64,
    /// Of it in user mode.
    pub cpu_user_ns: u64,
    /// Of it in the kernel.
    pub cpu_system_ns: u64,
    /// vCPUs.
    pub cpus: u32,
    /// Memory in use, with page cache, bytes.
    pub memory_usage_bytes: u64,
    /// Of it page cache not used lately, bytes; `docker stats` shows usage without it.
    pub memory_inactive_file_bytes: u64,
    /// The limit, bytes.
    pub memory_limit_bytes: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Their limit; 0: none.
    pub pids_limit: u64,
    /// Bytes read from disks.
    pub block_read_bytes: u64,
    /// Bytes written to disks.
    pub block_write_bytes: u64,
    /// Network interfaces.
    pub networks: Vec<NetworkCounters>,
    /// Processes killed for want of memory.
    pub oom_kills: u64,
}

/// Counters of a network interface of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkCounters {
    /// Name in the container.
    pub name: String,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Errors on receive.
    pub rx_errors: u64,
    /// Dropped on receive.
    pub rx_dropped: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Errors on send.
    pub tx_errors: u64,
    /// Dropped on send.
    pub tx_dropped: u64,
}
