//! The log: to the FIFO `log` in the bundle, which containerd reads.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use containerd_shim::Flags;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{EnvFilter, Layer, reload};

use crate::trace::Tracing;

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

/// What changes the filter of the log; not set when `HYPER_LOG` rules.
static RELOAD: OnceLock<Box<dyn Fn(EnvFilter) + Send + Sync>> = OnceLock::new();

/// Logs what is of this level and above from now on, unless `HYPER_LOG` says what is logged.
pub(crate) fn set_level(level: &str) {
    if let (Some(reload), Ok(filter)) = (RELOAD.get(), filter(level)) {
        reload(filter);
    }
}

/// Messages of the exporter about its own doings are of no use to anybody.
const QUIET: &str = "opentelemetry=warn,opentelemetry_sdk=warn,opentelemetry_otlp=warn";

fn filter(level: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::try_new(format!("{level},{QUIET}"))
}

/// Logs to the bundle's FIFO from now on, if there is one, and has spans exported. Both directions of the FIFO: containerd may come and go.
pub(crate) fn start(bundle: &Path, flags: &Flags, tracing: Option<&Tracing>) {
    let mut options = OpenOptions::new();
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let fifo = options.read(true).write(true).custom_flags(nonblock).open(bundle.join("log"));
    let own = EnvFilter::try_from_env("HYPER_LOG").ok();
    let is_own = own.is_some();
    let level = if flags.debug { "debug" } else { "info" };
    let (filter, handle) =
        reload::Layer::new(own.or_else(|| filter(level).ok()).unwrap_or_else(|| EnvFilter::new(level)));
    if !is_own {
        // There is one log in a process.
        let _ = RELOAD.set(Box::new(move |filter| drop(handle.reload(filter))));
    }
    let log = fifo.ok().map(|fifo| {
        tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .with_writer(Lossy(Mutex::new(fifo)))
            // How long each call took, and the agent's part of it; calls are spans of the level debug.
            .with_span_events(FmtSpan::CLOSE)
            .with_filter(filter)
    });
    let subscriber = tracing_subscriber::registry().with(tracing.map(Tracing::layer)).with(log);
    // Only the first subscriber of a process counts, and this is it.
    drop(tracing::subscriber::set_global_default(subscriber));
    tracing::debug!(flags.id, "the shim's log begins");
}
