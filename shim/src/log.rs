//! The log: to the FIFO `log` in the bundle, which containerd reads.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Writes what fits and drops the rest: a reader that is gone must not stop the shim.
#[derive(Debug)]
struct Lossy(Mutex<File>);

/// One line on its way.
#[derive(Debug)]
struct Line<'a>(&'a Lossy);

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Whatever became of it, the line is done with.
        drop(self.0.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lossy {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self)
    }
}

/// Logs to the bundle's FIFO from now on, if there is one. Both directions: containerd may come and go.
pub(crate) fn start(bundle: &Path, debug: bool, id: &str) {
    let mut options = OpenOptions::new();
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let Ok(fifo) = options.read(true).write(true).custom_flags(nonblock).open(bundle.join("log")) else {
        return;
    };
    let level = if debug { "debug" } else { "info" };
    let filter = EnvFilter::try_from_env("HYPER_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(Lossy(Mutex::new(fifo)))
        .finish();
    // Only the first subscriber of a process counts, and this is it.
    drop(tracing::subscriber::set_global_default(subscriber));
    tracing::debug!(id, "the shim's log begins");
}
