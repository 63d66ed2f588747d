//! What is said on the VMM's control socket.
//!
//! The socket is a `SOCK_SEQPACKET` Unix socket pair; the VMM's end is its standard input. Each packet is one JSON value of at
//! most [`MAX_PACKET_BYTES`]. The first packet from the owner is [`Request::Boot`] or [`Request::Restore`]; with it, as `SCM_RIGHTS`, travel the
//! descriptors that the spec names by [`crate::FdSlot`]. Every request gets exactly one [`Message::Reply`], in order; at any time the
//! VMM may send a [`Message::Event`]. When the owner closes its end, the VMM ends the machine at once.
//!
//! ```text
//! owner --Boot(spec)+fds--> | VMM: Building --ok--> Running <--Pause/Resume--> Paused --Save+fds--> Paused
//!   or Restore(spec)+fds--> |                          \--guest ends, Shutdown, owner gone--> Event(Exited), process exit
//!       <--Reply--          |
//! ```

use serde::{Deserialize, Serialize};

use crate::{DiskId, FdSlot, VmSpec};

/// Largest packet, bytes.
pub const MAX_PACKET_BYTES: usize = 64 * 1024;
/// Most descriptors with one packet (the kernel's `SCM_MAX_FD` is 253).
pub const MAX_FDS: usize = 200;
/// Most parts of one disk: containerd's and Docker's images have at most 127 layers. A part is a partition to Linux, which has 255 of a disk.
pub const MAX_DISK_PARTS: usize = 160;
/// What the first sector of every part is a multiple of (4 KiB).
pub const PART_ALIGN_SECTORS: u64 = 8;

/// Port of the lifecycle device: the guest writes one byte of [`lifecycle`] to it.
pub const LIFECYCLE_PORT: u16 = 0x0520;

/// Values that the guest writes to [`LIFECYCLE_PORT`].
pub mod lifecycle {
    /// First instruction of PID 1.
    pub const USER_SPACE: u8 = 0x41;
    /// The agent serves requests.
    pub const AGENT_READY: u8 = 0x42;
    /// What follows is an orderly end: a reset after this is a shutdown, a reset without it is a crash.
    pub const POWER_OFF: u8 = 0x4f;
}

/// A request of the owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Build the machine and start it.
    Boot {
        /// What to build.
        spec: VmSpec,
    },
    /// Build the machine, put it where one was that was saved, and let it go on. The machine has the memory of the saved one as its own
    /// copy: pages are shared with the file until the guest writes to them.
    Restore {
        /// What to build: processors, memory and kinds of devices as in the machine that was saved. Backends, addresses and names of
        /// devices may differ, and are the guest's to find out. Kernel, initramfs and command line are not used.
        spec: VmSpec,
        /// What was saved.
        snapshot: SnapshotFds,
    },
    /// Write the machine to files; it must be paused, and stays so. Refused when a device has something that another machine cannot
    /// take over: shares, disks in bays, added memory. The content of disks is for the owner to keep as it is now. Connections stay with
    /// this machine; whoever goes on from it is told that it has none.
    Save {
        /// Empty files, opened for writing.
        snapshot: SnapshotFds,
        /// How long writing the memory may take, milliseconds: the guest stands still meanwhile.
        limit_ms: u32,
    },
    /// Ask for the state and the boot timeline.
    State,
    /// Stop all vCPUs; the reply comes when they have stopped.
    Pause,
    /// Let the vCPUs go on.
    Resume,
    /// Ask for counters.
    Metrics,
    /// Set the balloon's target.
    Balloon {
        /// Memory to take from the guest, in pages of 4 KiB.
        pages: u32,
    },
    /// Make the processors up to this number, which wait for the guest to start them. Those that are there stay.
    Vcpus {
        /// How many there are to be, at most the spec's.
        count: u8,
    },
    /// Set how much memory the guest is to have beside that of boot. The guest takes or gives it when it can; once it has,
    /// [`Event::MemoryReached`] comes, unless another such request came first.
    HotMemory {
        /// How much, MiB, rounded up to what can be plugged at once; at most the spec's.
        mib: u32,
        /// Comes back with the event.
        serial: u64,
    },
    /// Put a disk into an empty bay. The guest sees it when it binds its driver to the bay's window.
    Attach {
        /// Which bay, counted from 0 among the spec's bays.
        bay: u8,
        /// Serial of the disk.
        id: DiskId,
        /// What it is made of, in order, at least one and at most [`MAX_DISK_PARTS`]; [`part_starts`] says where each begins. A request of
        /// the guest has to lie inside one part.
        parts: Vec<DiskPart>,
    },
    /// Take the disk out of a bay, after the request that it is at, whatever the guest does. The guest should have unbound its driver.
    Detach {
        /// Which bay.
        bay: u8,
    },
    /// End the machine now, without asking the guest.
    Shutdown,
}

/// A file or block device that is a disk, or a part of one. It is read-only when its descriptor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPart {
    /// The open file.
    pub fd: FdSlot,
    /// How much of it is used, sectors of 512 bytes; the file has at least as many.
    pub sectors: u64,
}

/// First sector of each part of a disk, and the sectors of all of it: a part begins at the next multiple of [`PART_ALIGN_SECTORS`] after the
/// one before it. What is between is no part. None when that is more than a disk can be.
#[must_use]
pub fn part_starts(sectors: &[u64]) -> Option<(Vec<u64>, u64)> {
    let mut end: u64 = 0;
    let mut starts = Vec::with_capacity(sectors.len());
    for count in sectors {
        let start = end.checked_next_multiple_of(PART_ALIGN_SECTORS)?;
        starts.push(start);
        end = start.checked_add(*count)?;
    }
    // Byte offsets have to be numbers, too.
    (end <= u64::MAX >> 9).then_some((starts, end))
}

/// A saved machine. Both files belong together, and to the VMM, kernel and processor that wrote them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotFds {
    /// Processors and devices.
    pub state: FdSlot,
    /// Guest memory, region after region, with holes where it is zero. To be restored from it must be opened for reading only, and its
    /// content must stay as long as machines run on it.
    pub memory: FdSlot,
}

/// What the VMM sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Message {
    /// Answer to the oldest unanswered request.
    Reply {
        /// The outcome; the error is one line for a person.
        result: Result<Reply, String>,
    },
    /// Something happened.
    Event {
        /// What.
        event: Event,
    },
}

/// A successful answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Reply {
    /// Done, nothing to say.
    Done,
    /// The state.
    State {
        /// Where the machine is in its life.
        state: RunState,
        /// When each step was reached.
        timeline: Timeline,
    },
    /// Counters since boot.
    Metrics(Metrics),
}

/// Where a machine is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// vCPUs run.
    Running,
    /// vCPUs are stopped.
    Paused,
}

/// Steps of a start, in microseconds of `CLOCK_MONOTONIC` since the VMM process began its `main`; 0 = not reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// Absolute `CLOCK_MONOTONIC` of the process's `main`, microseconds.
    pub main_us: u64,
    /// The boot request was read.
    pub spec_us: u64,
    /// Memory is mapped, the kernel is loaded, devices are built.
    pub built_us: u64,
    /// The first vCPU entered the guest.
    pub entered_us: u64,
    /// PID 1 ran its first instruction.
    pub user_space_us: u64,
    /// The agent serves requests.
    pub agent_ready_us: u64,
    /// Processor time that closing the jail and binding threads to their filters have taken so far.
    pub jail_us: u64,
}

/// Counters since boot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// Exits to the VMM, all vCPUs.
    pub vm_exits: u64,
    /// Per device, in slot order: name and named counters.
    pub devices: Vec<(String, Vec<(String, u64)>)>,
}

/// Something that happened on its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    /// The agent wrote [`lifecycle::AGENT_READY`].
    AgentReady,
    /// The guest has as much memory as it was to have by the latest [`Request::HotMemory`].
    MemoryReached {
        /// That request's.
        serial: u64,
    },
    /// The machine has ended; the process exits after sending this.
    Exited {
        /// How it ended.
        cause: ExitCause,
        /// When each step was reached.
        timeline: Timeline,
    },
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cause", rename_all = "snake_case")]
pub enum ExitCause {
    /// The guest announced its end and reset.
    PowerOff,
    /// The owner asked, or went away.
    Shutdown,
    /// The guest reset itself unannounced, which is what its kernel does on panic; with the last lines that it logged.
    GuestCrash {
        /// Last lines of the serial console, oldest first, at most 40 of at most 200 bytes, printable ASCII only.
        last_lines: Vec<String>,
    },
    /// A triple fault or an exit that KVM cannot handle.
    Fault {
        /// What KVM reported.
        reason: String,
        /// As above.
        last_lines: Vec<String>,
    },
}

/// Exit codes of the `hyper-vmm` process.
pub mod exit_code {
    /// The guest powered off, or the owner ended the machine.
    pub const ENDED: u8 = 0;
    /// The machine could not be built; the reply to `Boot` says why.
    pub const BUILD: u8 = 1;
    /// Bad use: no control socket on standard input, bad first packet.
    pub const USAGE: u8 = 2;
    /// The guest crashed.
    pub const GUEST_CRASH: u8 = 3;
    /// The VMM itself failed.
    pub const INTERNAL: u8 = 4;
    /// The jail could not be closed; the log says why.
    pub const JAIL: u8 = 5;
    /// A thread made a system call that it may not make; the log says which.
    pub const FORBIDDEN: u8 = 6;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_each_other_at_whole_pages() {
        assert_eq!(part_starts(&[]), Some((vec![], 0)));
        assert_eq!(part_starts(&[9, 1, 8]), Some((vec![0, 16, 24], 32)));
        assert_eq!(part_starts(&[u64::MAX >> 9]), Some((vec![0], u64::MAX >> 9)));
        for bad in [&[u64::MAX >> 8][..], &[u64::MAX, 1], &[u64::MAX >> 9, 1]] {
            assert_eq!(part_starts(bad), None);
        }
    }
}
