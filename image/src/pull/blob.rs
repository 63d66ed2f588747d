//! Downloading one blob: resumed, retried, bounded, checked.
//!
//! ```text
//!          +---- lost, but further than before: count from one ----+
//!          v                                                       |
//! begin -> GET from `len` -> stream -> complete? --no--> lost -> pause (a few times in a row, then error)
//!            | no ranges       | more than declared: error
//!            v                 v
//!          start at 0        finish: digest right -> stored; wrong -> nothing kept, error
//! ```

use crate::error::{ImageError, Result, blocking};
use crate::manifest::BlobRef;
use crate::progress::LayerState;
use crate::registry::{BlobAnswer, Registry};
use crate::store::Store;
use crate::store::ingest::{Begin, Partial};

/// Bytes gathered before they are hashed and written by a blocking thread.
const FLUSH_BYTES: usize = if cfg!(test) { 32 << 10 } else { 1 << 20 };

/// Who is told how far a blob is.
type Report<'a> = &'a (dyn Fn(LayerState) + Send + Sync);

/// One blob being downloaded.
struct Download<'a> {
    registry: &'a Registry,
    blob: &'a BlobRef,
    report: Report<'a>,
    what: String,
    /// `None` only while a blocking thread has it, or after that thread died.
    partial: Option<Box<Partial>>,
    len: u64,
}

/// Makes sure that a blob is stored, downloading what is missing of it. Returns whether it had to.
pub(crate) async fn fetch(
    store: &Store,
    registry: &Registry,
    blob: &BlobRef,
    report: Report<'_>,
) -> Result<bool> {
    let begin = store.begin(&blob.digest, blob.size_bytes, &|| report(LayerState::Waiting)).await?;
    let partial = match begin {
        Begin::Present => {
            report(LayerState::AlreadyExists);
            return Ok(false);
        }
        Begin::Partial(partial) => partial,
    };
    let (len, what) = (partial.len(), format!("layer {}", blob.digest.short()));
    let mut download = Download { registry, blob, report, what, partial: Some(partial), len };
    let outcome = download.run().await;
    match &outcome {
        Ok(()) => report(LayerState::DownloadComplete),
        // Content that is wrong must not be what the next pull resumes.
        Err(ImageError::WrongDigest { .. } | ImageError::WrongSize { .. }) => {
            if let Some(partial) = download.partial.take() {
                blocking(move || partial.discard()).await?;
            }
        }
        Err(_) => {}
    }
    outcome.map(|()| true)
}

impl Download<'_> {
    /// Tries until the blob is stored or trying is pointless.
    async fn run(&mut self) -> Result<()> {
        let patience = self.registry.patience();
        let (mut best, mut failed) = (self.len, 0);
        loop {
            let resumed = self.partial.as_ref().is_some_and(|partial| partial.was_resumed());
            let error = match self.attempt().await {
                Ok(()) => match self.finish().await {
                    // A crash may have left a beginning that never reached the disk: once more from zero.
                    Err(ImageError::WrongDigest { .. }) if resumed => {
                        tracing::debug!(blob = %self.blob.digest, "leftover of an earlier pull is bad");
                        best = 0;
                        continue;
                    }
                    outcome => return outcome,
                },
                Err(error) if error.is_transient() => error,
                Err(error) => return Err(error),
            };
            if self.len > best {
                best = self.len;
                failed = 0;
            }
            failed += 1;
            tracing::debug!(error = error.one_line(), failed, len = self.len, "layer: connection lost");
            if failed >= patience.tries {
                return Err(self.give_up(error, failed));
            }
            let pause = patience.pause(failed);
            (self.report)(LayerState::Retrying {
                pause_ms: u64::try_from(pause.as_millis()).unwrap_or(u64::MAX),
            });
            tokio::time::sleep(pause).await;
        }
    }

    /// Asks once for what is missing and writes it down.
    async fn attempt(&mut self) -> Result<()> {
        let total = self.blob.size_bytes;
        if self.len == total {
            return Ok(());
        }
        let mut answer = self.registry.blob(&self.blob.digest, self.len).await?;
        if matches!(answer, BlobAnswer::RangeRefused) {
            self.restart().await?;
            answer = self.registry.blob(&self.blob.digest, 0).await?;
        }
        let BlobAnswer::From(start, mut response) = answer else {
            return Err(self.registry.peer().protocol("it refuses to send a layer from its beginning"));
        };
        if start < self.len {
            self.restart().await?;
        }
        if let Some(coming) =
            response.content_length().filter(|coming| self.len.saturating_add(*coming) > total)
        {
            return Err(self.wrong_size(self.len.saturating_add(coming)));
        }
        (self.report)(LayerState::Downloading { current: self.len, total });
        let mut buffer = Vec::with_capacity(FLUSH_BYTES);
        loop {
            let chunk = match self.registry.peer().chunk(&mut response, &self.what).await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => break,
                Err(error) => {
                    self.flush(buffer).await?;
                    return Err(error);
                }
            };
            let found = self.len + (buffer.len() + chunk.as_ref().len()) as u64;
            if found > total {
                return Err(self.wrong_size(found));
            }
            buffer.extend_from_slice(chunk.as_ref());
            (self.report)(LayerState::Downloading { current: found, total });
            if buffer.len() >= FLUSH_BYTES {
                self.flush(std::mem::take(&mut buffer)).await?;
            }
        }
        self.flush(buffer).await?;
        if self.len < total { Err(self.truncated(1)) } else { Ok(()) }
    }

    /// Checks the complete blob and gives it its name.
    async fn finish(&mut self) -> Result<()> {
        (self.report)(LayerState::Verifying);
        self.with_partial(|partial| partial.finish()).await
    }

    async fn flush(&mut self, buffer: Vec<u8>) -> Result<()> {
        if buffer.is_empty() {
            return Ok(());
        }
        self.with_partial(move |partial| partial.write(&buffer)).await
    }

    async fn restart(&mut self) -> Result<()> {
        self.with_partial(|partial| partial.restart()).await
    }

    /// Lends the file to a blocking thread.
    async fn with_partial(
        &mut self,
        work: impl FnOnce(&mut Partial) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let Some(mut partial) = self.partial.take() else {
            return Err(self.registry.peer().protocol("a layer was lost by its writer"));
        };
        let (partial, outcome) = blocking(move || {
            let outcome = work(&mut partial);
            Ok((partial, outcome))
        })
        .await?;
        self.len = partial.len();
        self.partial = Some(partial);
        outcome
    }

    /// The final error after too many lost connections; a body that always ends early is called truncated.
    fn give_up(&self, error: ImageError, tries: u32) -> ImageError {
        match error {
            ImageError::Truncated { .. } => self.truncated(tries),
            ImageError::Transport { source, .. } if source.is_body() || source.is_decode() => {
                self.truncated(tries)
            }
            other => other,
        }
    }

    fn truncated(&self, tries: u32) -> ImageError {
        ImageError::Truncated {
            host: self.registry.peer().host.clone(),
            what: self.what.clone(),
            declared: self.blob.size_bytes,
            found: self.len,
            tries,
        }
    }

    fn wrong_size(&self, found: u64) -> ImageError {
        ImageError::WrongSize { what: self.what.clone(), declared: self.blob.size_bytes, found }
    }
}
