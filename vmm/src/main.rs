//! VmSpec in, running machine out. One process per machine: a control socket on standard input, a log on standard error.
//!
//! ```text
//!  main --> run (main thread: control socket, device handlers)
//!             \--> machine::start: memory, kernel, devices, vCPUs
//!                    \--> vcpus (one thread each): KVM_RUN --exit--> bus --> devices' registers
//! ```
#![forbid(unsafe_code)]

mod arch;
mod bus;
mod event_loop;
mod hot_memory;
mod life;
mod log;
mod machine;
mod memory;
mod probe;
mod run;
mod snapshot;
mod socket;
mod vcpus;

use std::process::ExitCode;

use hyper_vmm_spec::control::exit_code;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit};

/// Descriptors that a machine may need at most: vsock connections, queue and timer events, disks, with room to spare.
const OPEN_FILES: u64 = 4096;

fn main() -> ExitCode {
    let main_us = life::now_us();
    log::install_panic_hook();
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.as_slice() {
        [] => ExitCode::from(run_machine(main_us)),
        [one] if one == "--probe" => match probe::print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::from(exit_code::INTERNAL),
        },
        _ => {
            log::line(format_args!("give no argument and a control socket on standard input, or --probe"));
            ExitCode::from(exit_code::USAGE)
        }
    }
}

fn run_machine(main_us: u64) -> u8 {
    // The closed control socket ends us when the owner goes; this is for an owner whose socket somebody else keeps open.
    if let Err(e) = set_parent_process_death_signal(Some(Signal::KILL)) {
        log::line(format_args!("cannot ask for the owner's death signal: {e}"));
    }
    raise_open_files();
    run::run(main_us).unwrap_or_else(|e| {
        log::line(format_args!("{}", log::chain(&e)));
        e.exit_code()
    })
}

/// The usual soft limit of 1024 is less than the vsock device's table of connections.
fn raise_open_files() {
    let now = getrlimit(Resource::Nofile);
    let enough = now.maximum.map_or(OPEN_FILES, |hard| hard.min(OPEN_FILES));
    if now.current.is_some_and(|soft| soft < enough)
        && let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: Some(enough), maximum: now.maximum })
    {
        log::line(format_args!("cannot raise the limit of open files to {enough}: {e}"));
    }
}
