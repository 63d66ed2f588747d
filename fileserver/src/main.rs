//! The file server of one sandbox: virtio-fs over vhost-user.
//!
//! Started only when host directories are shared, with a listening Unix stream socket as standard input on which one
//! connection is accepted:
//!
//! ```text
//! hyper-fs --spec '{"shares":[{"name":"0","source":"/srv/data","read_only":true}]}'
//! ```
//! The guest sees one file system whose root holds every share under its name. The process keeps nothing of the host but the shares: its
//! root is an empty tmpfs with the shares mounted in it, read-only ones by the host's kernel. It ends with the connection, or with its parent.

mod confine;
mod filter;
mod lines;
mod serve;
mod spec;
mod sys;

use std::io::Write;
use std::process::ExitCode;

use crate::confine::ConfineError;
use crate::serve::ServeError;
use crate::spec::{FileServerSpec, SpecError};

/// Why the server ends.
#[derive(Debug, thiserror::Error)]
enum MainError {
    #[error("bad use")]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Inherited(#[from] hyper_jail::JailError),
    #[error("cannot confine the file server")]
    Confine(#[from] ConfineError),
    #[error("cannot serve")]
    Serve(#[from] ServeError),
}

fn run() -> Result<(), MainError> {
    hyper_jail::close_inherited()?;
    let spec = FileServerSpec::from_args(std::env::args().skip(1))?;
    lines::start();
    let listener = serve::take_listener()?;
    let view = confine::enter(&spec)?;
    serve::serve(listener, view)?;
    Ok(())
}

fn main() -> ExitCode {
    let Err(error) = run() else { return ExitCode::SUCCESS };
    let mut line = format!("hyper-fs: {error}");
    let mut cause = std::error::Error::source(&error);
    while let Some(source) = cause {
        line.push_str(&format!(": {source}"));
        cause = source.source();
    }
    line.push('\n');
    // Nowhere is left to report a broken standard error.
    let _ = std::io::stderr().write_all(line.as_bytes());
    if matches!(error, MainError::Spec(_)) { ExitCode::from(2) } else { ExitCode::FAILURE }
}
