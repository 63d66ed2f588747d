//! PID 1 of the guest: unpacks images and runs containers.
//!
//! One binary, three programs by how it is started: the agent itself as PID 1, a child program that works inside a container
//! ([`child`]), and the init of a container ([`child::init`]).
//!
//! ```text
//! boot ─▶ service ─▶ request ─▶ sandbox ─▶ container ─▶ process ─▶ spawn ══▶ child (create, exec, archive)
//!                                  │            └▶ cgroup   └▶ stdio ◀─ streams
//!                                  └▶ net, unpack, events, reaper, trace
//! ```

mod bays;
mod boot;
mod cgroup;
mod child;
mod container;
mod disk;
mod disk_root;
mod error;
mod events;
mod listing;
mod log;
mod net;
mod plan;
mod process;
mod processors;
mod reaper;
mod request;
mod sandbox;
mod seccomp;
mod service;
mod sockets;
mod spawn;
mod spec;
mod stdio;
mod streams;
mod sys;
mod sysctl;
mod trace;
mod unpack;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args();
    let name = arguments.next().unwrap_or_default();
    if name == child::init::NAME {
        return ExitCode::from(child::init::main());
    }
    if arguments.next().as_deref() == Some(child::ARGUMENT) {
        return child::main(&arguments.next().unwrap_or_default());
    }
    if std::process::id() != 1 {
        log::error("this program is PID 1 of a guest of hyper; it does nothing elsewhere");
        return ExitCode::from(2);
    }
    // When PID 1 returns the kernel panics, which ends the machine; the supervisor sees the last lines.
    if let Err(error) = boot::run() {
        log::error(error.to_string());
    }
    ExitCode::FAILURE
}
