//! hyper-fs, started and watched: a machine whose file server has gone is not left with processes that wait for ever.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::VmError;
use super::child::spawn;
use super::plan::SharePlan;
use crate::dirs::Parts;

/// A running file server. Dropping it kills it.
#[derive(Debug)]
pub(super) struct FileServer {
    gone: watch::Receiver<bool>,
    /// Owns the process.
    watcher: JoinHandle<()>,
}

#[derive(Debug, Serialize)]
struct Spec<'a> {
    shares: &'a [SharePlan],
}

impl FileServer {
    /// Starts it on a listening socket (it can only accept) and connects to it; the socket's name is gone again at once. Returns our end
    /// and the task that keeps its log, too.
    pub(super) fn start(
        parts: &Parts,
        shares: &[SharePlan],
        run_dir: &Path,
        log_dir: &Path,
        cgroups: &[OwnedFd],
    ) -> Result<(Self, JoinHandle<()>, OwnedFd), VmError> {
        let fail = |source: io::Error| VmError::Descriptor { what: "the file server's socket", source };
        let path = run_dir.join("fs");
        let listener = UnixListener::bind(&path).map_err(fail)?;
        let connected = UnixStream::connect(&path);
        std::fs::remove_file(&path).map_err(fail)?;
        let near = connected.map_err(fail)?;
        let spec = serde_json::to_string(&Spec { shares }).map_err(|error| fail(error.into()))?;
        let args = [OsStr::new("--spec"), OsStr::new(&spec)];
        let (mut child, log) =
            spawn("hyper-fs", &parts.fs, &args, listener.into(), &log_dir.join("fs.log"), cgroups)?;
        let (tell, gone) = watch::channel(false);
        let watcher = tokio::spawn(async move {
            match child.wait().await {
                Ok(status) => tracing::debug!(%status, "the file server has ended"),
                Err(error) => tracing::warn!(%error, "the file server is not watched"),
            }
            tell.send_replace(true);
        });
        Ok((Self { gone, watcher }, log, near.into()))
    }

    /// Waits until it has ended.
    pub(super) async fn gone(&self) {
        let mut gone = self.gone.clone();
        // A watcher that ended without a word has nothing to watch any more.
        let _ = gone.wait_for(|gone| *gone).await;
    }

    /// Whether it has ended.
    pub(super) fn is_gone(&self) -> bool {
        *self.gone.borrow()
    }

    /// Waits for its end, which follows the machine's; kills it after `limit`.
    pub(super) async fn end(&mut self, limit: Duration) {
        if timeout(limit, &mut self.watcher).await.is_err() {
            tracing::warn!("the file server does not end");
        }
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        // With the task goes the process.
        self.watcher.abort();
    }
}
