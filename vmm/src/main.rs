//! `hyper-vmm`: see the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    hyper_vmm::main()
}
