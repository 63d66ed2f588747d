//! `containerd-shim-hyper-v2`: containerd's Task and Sandbox API, each pod a virtual machine.
//!
//! ```text
//! containerd --start, in the bundle--> this program --spawns itself--> the pod's shim: serves, owns the machine
//!            <--address of its socket------/                              | ttrpc: Task v2 and v3, Sandbox v1
//!            --delete, when the shim is gone--> this program: what is left is cleaned up
//! ```
//!
//! The shim decodes, calls the sandbox, encodes and publishes; what a container is, `hyper_sandbox::pod` knows. One thread: the machine and
//! the network namespace belong to it.
//!
//! Files: `start`, `delete` and `info` (short-lived), `serve` (the long one), `service` (what the services share), `task`, `sandbox`,
//! `publish` (events), `bundle` (config.json), `config` (the operator's), `options` (the handler's), `encode` (messages), `status` (gRPC
//! codes), `metrics`, `log`, `trace` (spans to a collector).

mod bundle;
mod config;
mod delete;
mod encode;
mod info;
mod log;
mod metrics;
mod options;
mod publish;
mod sandbox;
mod serve;
mod service;
mod start;
mod status;
mod task;
mod trace;

use std::io::Write;
use std::process::ExitCode;

use containerd_shim::Flags;

/// This program.
const NAME: &str = "containerd-shim-hyper-v2";
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Why an action failed.
#[derive(Debug, thiserror::Error)]
enum ShimError {
    #[error("arguments: {0}")]
    Arguments(containerd_shim::Error),
    #[error("{0} is not set: this program is started by containerd")]
    Environment(&'static str),
    #[error("cannot {what} {path}: {source}")]
    Io { what: &'static str, path: String, source: std::io::Error },
    #[error("{0}")]
    Bundle(#[from] bundle::BundleError),
    #[error(transparent)]
    Sandbox(#[from] hyper_sandbox::SandboxError),
    #[error("the shim did not start: {0}")]
    NotStarted(String),
    #[error("ttrpc: {0}")]
    Ttrpc(#[from] containerd_shim_protos::ttrpc::Error),
    #[error("cannot encode or decode a message: {0}")]
    Encode(#[from] protobuf::Error),
}

impl ShimError {
    fn io(what: &'static str, path: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}

fn run() -> Result<(), ShimError> {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let flags = containerd_shim::parse(&args).map_err(ShimError::Arguments)?;
    if flags.version {
        return say(&format!("{NAME} {VERSION}\n"));
    }
    if flags.info {
        return answer(&info::run()?);
    }
    match flags.action.as_str() {
        "start" => {
            options::keep(&std::env::current_dir().map_err(ShimError::io("find", "the bundle"))?)?;
            say(&start::run(&flags)?)
        }
        "delete" => answer(&delete::run(&flags)?),
        _ => serve::run(&flags),
    }
}

fn say(text: &str) -> Result<(), ShimError> {
    answer(text.as_bytes())
}

fn answer(bytes: &[u8]) -> Result<(), ShimError> {
    let mut out = std::io::stdout();
    let written = out.write_all(bytes).and_then(|()| out.flush());
    written.map_err(ShimError::io("answer on", "standard output"))
}

/// The group that a container belongs to: its pod, or itself alone.
fn socket_of(flags: &Flags, group: &str) -> String {
    containerd_shim::socket_address(&flags.address, &flags.namespace, group)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to tell when standard error is gone.
            drop(writeln!(std::io::stderr(), "containerd-shim-hyper-v2: {error}"));
            ExitCode::FAILURE
        }
    }
}
