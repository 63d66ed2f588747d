//! What the black-box cases are written with: the `hyper` program, a registry, terminals, and waiting for conditions.
//!
//! `cargo xtask test` runs the cases in the lab machine and sets `HYPER_TEST_PREFIX` (where the product is installed)
//! and `HYPER_TEST_FIXTURES`. Failures panic with the whole command line and all that it printed.
#![expect(clippy::panic, reason = "assertions of the cases; a panic is how a case fails")]

mod cluster;
mod collector;
mod container;
mod containerd;
mod crictl;
mod docker;
mod far;
mod installer;
mod machine;
mod nerdctl;
mod pods;
pub mod power;
mod program;
mod registry;
mod scratch;
mod server;
mod shim;
mod templates;
mod terminal;
mod user;

use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use cluster::{NODE, Node, documented};
pub use collector::{Collector, Span, hanging_collector};
pub use container::{Container, detached, from_fork, from_snapshot};
pub use containerd::{
    CONFIGURED_HANDLERS, Containerd, Events, HANDLER, RUNTIME, Release, SANDBOX_HANDLER, image_name,
};
pub use crictl::Crictl;
pub use docker::Docker;
pub use far::{Far, NameServer, arrived};
pub use installer::installer_archive;
pub use machine::{Footprint, Machine, Service, Wire};
pub use nerdctl::Nerdctl;
pub use pods::{Pod, PodSpec};
pub use program::{Done, Run, Running, VICTIMS, from_template, host, hyper, left_over};
pub use registry::{AUTH_REGISTRY, REGISTRY, SECRET, USER, image, registry, registry_with_password};
pub use scratch::Scratch;
pub(crate) use scratch::scratch_base;
pub use server::answers_on;
pub use shim::field;
pub use templates::{booted, cut, garble, templates};
pub use terminal::Terminal;
pub use user::{User, as_user};

/// Ten times what a start needs on hardware, because the processor here is emulated.
pub const DEADLINE: Duration = Duration::from_secs(180);

/// A path that the test run hands over in the environment.
///
/// # Panics
/// When the variable is not set: the cases were not started by `cargo xtask test`.
#[must_use]
pub fn given(variable: &str) -> PathBuf {
    match std::env::var_os(variable) {
        Some(value) => PathBuf::from(value),
        None => panic!("{variable} is not set: run the cases with `cargo xtask test`"),
    }
}

/// The folder of the fixtures.
#[must_use]
pub fn fixtures() -> PathBuf {
    given("HYPER_TEST_FIXTURES")
}

/// Waits until `condition` gives a value.
///
/// # Panics
/// When that takes longer than [`DEADLINE`]; `what` says what was waited for.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < DEADLINE, "waited {} s in vain for {what}", DEADLINE.as_secs());
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Something measured: a line that the run shows, whether the case passes or not.
#[expect(clippy::print_stdout, reason = "the run picks it out of the case's output")]
pub fn note(text: &str) {
    println!("\n@note {text}");
}

/// The SHA-256 of bytes, in hex.
#[must_use]
pub fn checksum(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes without a pattern that a buffer boundary could hide in; the same for the same length.
#[must_use]
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
