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
mod life;
mod log;
mod machine;
mod memory;
mod probe;
mod run;
mod socket;
mod vcpus;

use std::process::ExitCode;

use hyper_vmm_spec::control::exit_code;
use rustix::process::{Signal, set_parent_process_death_signal};

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
    run::run(main_us).unwrap_or_else(|e| {
        log::line(format_args!("{}", log::chain(&e)));
        e.exit_code()
    })
}
