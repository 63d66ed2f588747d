//! Between the sandbox's words and containerd's messages.

use containerd_shim_protos::api::{Mount, Status};
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp as WireTime;
use containerd_shim_protos::protobuf::{EnumOrUnknown, MessageField};
use hyper_sandbox::pod::{ProcessStatus, RootMount};
use hyper_sandbox::{ContainerStats, Timestamp};

/// A moment.
pub(crate) fn time(at: Timestamp) -> MessageField<WireTime> {
    let ns = at.unix_ns();
    MessageField::some(WireTime {
        seconds: ns.div_euclid(1_000_000_000),
        nanos: i32::try_from(ns.rem_euclid(1_000_000_000)).unwrap_or_default(),
        ..Default::default()
    })
}

/// A mount of a root.
pub(crate) fn root_mount(mount: &Mount) -> RootMount {
    RootMount { kind: mount.type_.clone(), source: mount.source.clone(), options: mount.options.clone() }
}

/// What a process does.
pub(crate) fn task_status(status: ProcessStatus) -> EnumOrUnknown<Status> {
    EnumOrUnknown::new(match status {
        ProcessStatus::Created => Status::CREATED,
        ProcessStatus::Running => Status::RUNNING,
        ProcessStatus::Paused => Status::PAUSED,
        ProcessStatus::Stopped => Status::STOPPED,
    })
}

/// An `Any` of a message, by its full name.
pub(crate) fn any<M: protobuf::MessageFull>(message: &M) -> Result<Any, protobuf::Error> {
    Ok(Any {
        type_url: M::descriptor().full_name().to_owned(),
        value: message.write_to_bytes()?,
        ..Default::default()
    })
}

/// What a container uses, as version 2 of control groups counts it.
pub(crate) fn metrics(stats: &ContainerStats) -> Metrics {
    // No limit is the largest number, as in containerd's own library.
    let limit = |value: u64| if value == 0 { u64::MAX } else { value };
    let network = |net: &hyper_sandbox::NetworkCounters| NetworkStat {
        name: net.name.clone(),
        rx_bytes: net.rx_bytes,
        rx_packets: net.rx_packets,
        rx_errors: net.rx_errors,
        rx_dropped: net.rx_dropped,
        tx_bytes: net.tx_bytes,
        tx_packets: net.tx_packets,
        tx_errors: net.tx_errors,
        tx_dropped: net.tx_dropped,
        ..Default::default()
    };
    Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids,
            limit: stats.pids_limit,
            ..Default::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: stats.cpu_usage_ns / 1000,
            user_usec: stats.cpu_user_ns / 1000,
            system_usec: stats.cpu_system_ns / 1000,
            ..Default::default()
        }),
        memory: MessageField::some(MemoryStat {
            usage: stats.memory_usage_bytes,
            usage_limit: limit(stats.memory_limit_bytes),
            inactive_file: stats.memory_inactive_file_bytes,
            ..Default::default()
        }),
        io: MessageField::some(IOStat {
            usage: vec![IOEntry {
                rbytes: stats.block_read_bytes,
                wbytes: stats.block_write_bytes,
                ..Default::default()
            }],
            ..Default::default()
        }),
        memory_events: MessageField::some(MemoryEvents { oom_kill: stats.oom_kills, ..Default::default() }),
        network: stats.networks.iter().map(network).collect(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_are_times() {
        let wire = time(Timestamp::from_unix_ns(-1));
        assert_eq!((wire.seconds, wire.nanos), (-1, 999_999_999));
    }

    #[test]
    fn metrics_have_containerds_name() {
        let packed = any(&Metrics::default()).unwrap();
        assert_eq!(packed.type_url, "io.containerd.cgroups.v2.Metrics");
    }
}
