//! VmSpec in, running machine out. One process per machine: a control socket on standard input, a log on standard error.
//!
//! ```text
//!  main --> the jail closes (hyper_jail::vmm) --> run (main thread: control socket, device handlers)
//!             \--> machine::start: memory, kernel, devices --> filters of system calls --> vCPUs
//!                    \--> vcpus (one thread each): KVM_RUN --exit--> bus --> devices' registers
//! ```
#![forbid(unsafe_code)]

mod arch;
mod bus;
mod confine;
mod event_loop;
#[cfg(feature = "fuzz")]
pub mod fuzz;
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

use hyper_jail::JailError;
use hyper_jail::vmm::{Network, POD_NETWORK};
use hyper_vmm_hv::Hypervisor;
use hyper_vmm_spec::control::exit_code;

/// The whole program: its arguments, its descriptors, its exit code.
#[must_use]
pub fn main() -> ExitCode {
    let main_us = life::now_us();
    log::install_panic_hook();
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.as_slice() {
        [] => ExitCode::from(run_machine(main_us, Network::None)),
        [one] if one == POD_NETWORK => ExitCode::from(run_machine(main_us, Network::Pods)),
        [one] if one == "--probe" => match probe::print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::from(exit_code::INTERNAL),
        },
        _ => {
            log::line(format_args!(
                "give a control socket on standard input and at most {POD_NETWORK}, or --probe"
            ));
            ExitCode::from(exit_code::USAGE)
        }
    }
}

fn run_machine(main_us: u64, network: Network) -> u8 {
    let kvm = match close_jail(network) {
        Ok(kvm) => kvm,
        Err(e) => {
            log::line(format_args!("{}", log::chain(&e)));
            return exit_code::JAIL;
        }
    };
    run::run(main_us, kvm).unwrap_or_else(|e| {
        log::line(format_args!("{}", log::chain(&e)));
        e.exit_code()
    })
}

/// Takes everything away but /dev/kvm, whose state the owner is told when it asks for a machine. From here on nothing is opened by a path.
fn close_jail(network: Network) -> Result<Result<Hypervisor, hyper_vmm_hv::HvError>, JailError> {
    hyper_jail::close_inherited()?;
    let kvm = Hypervisor::open();
    confine::counted(|| hyper_jail::vmm::close(network))?;
    Ok(kvm)
}
