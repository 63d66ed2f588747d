//! One error type for the crate: what was tried, on what, and why it failed.
//!
//! `Display` gives one lower-case line without the cause; [`ImageError::one_line`] appends the chain of causes,
//! which is what a command line shows.

use std::io;
use std::path::{Path, PathBuf};

use crate::digest::Digest;

/// Result of everything in this crate that can fail.
pub type Result<T, E = ImageError> = std::result::Result<T, E>;

/// Longest piece of foreign text (a registry's message, a name from an archive) that gets into an error.
pub(crate) const MAX_FOREIGN_TEXT: usize = 200;

/// Why an image operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The text is no image reference.
    #[error("invalid reference format: {why}: \"{text}\"")]
    InvalidReference {
        /// What was given, shortened and without control characters.
        text: String,
        /// Which rule it breaks.
        why: &'static str,
    },
    /// The text is no digest this store can check.
    #[error("invalid digest \"{text}\": want sha256: and 64 lower-case hex digits")]
    InvalidDigest {
        /// What was given, shortened and without control characters.
        text: String,
    },
    /// The text is no platform.
    #[error("invalid platform \"{text}\": want os/architecture[/variant]")]
    InvalidPlatform {
        /// What was given, shortened and without control characters.
        text: String,
    },
    /// No key that the caller named has signed the image.
    #[error("image {image} is not signed by {keys}: {why}")]
    Unsigned {
        /// Its name.
        image: String,
        /// Where the keys were read from.
        keys: String,
        /// What was found instead.
        why: &'static str,
    },
    /// A file that holds no public key of a kind that is known.
    #[error("{name} holds no public key: want PEM with an ECDSA P-256 or Ed25519 key")]
    BadKey {
        /// The file.
        name: String,
    },
    /// Nothing in the store answers to this name or id.
    #[error("no such image: {query}")]
    NoSuchImage {
        /// What was asked for.
        query: String,
    },
    /// A short id that several images share.
    #[error("image id \"{query}\" is ambiguous: it fits {count} images")]
    AmbiguousId {
        /// What was asked for.
        query: String,
        /// How many images it fits.
        count: usize,
    },
    /// The image cannot be removed because a container uses it.
    #[error("conflict: unable to remove \"{query}\" (must be forced): {user} is using image {id}")]
    InUse {
        /// What was asked for.
        query: String,
        /// Who uses it, such as `container web`.
        user: String,
        /// Short image id.
        id: String,
    },
    /// Removing by id an image that has several names.
    #[error("conflict: unable to delete {id} (must be forced): image is referenced as {names}")]
    SeveralNames {
        /// Short image id.
        id: String,
        /// Its names, joined by commas.
        names: String,
    },
    /// The operating system refused an operation on a file of ours.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// The verb: "open", "rename", ...
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// No space (or quota) left.
    #[error("no space left on device: cannot write {what} under {}; {kept}", dir.display())]
    DiskFull {
        /// What was being written.
        what: String,
        /// The directory on the full file system.
        dir: PathBuf,
        /// What survives, in words.
        kept: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The store was written by a version of this program that this one does not know.
    #[error("image store {} has format {found:?}, this program knows {known:?}", path.display())]
    StoreVersion {
        /// Root of the store.
        path: PathBuf,
        /// What its version file says.
        found: String,
        /// What this code writes.
        known: &'static str,
    },
    /// A file of the store is not what this program wrote.
    #[error("image store is damaged: {what} ({})", path.display())]
    Damaged {
        /// What is wrong.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The parser's words, if it was one.
        #[source]
        source: Option<serde_json::Error>,
    },
    /// Another process held a lock of the store for longer than a caller may wait.
    #[error("gave up after {waited_s} s waiting for another process to release {}", path.display())]
    LockTimeout {
        /// The lock file.
        path: PathBuf,
        /// How long it was waited for.
        waited_s: u64,
    },
    /// A background task of this process died.
    #[error("a worker task of the image store was lost")]
    Worker {
        /// What tokio says of it.
        #[source]
        source: tokio::task::JoinError,
    },
    /// Content is not what its digest says.
    #[error("wrong digest: {what} should be {expected} but is {found}; nothing of it was kept")]
    WrongDigest {
        /// What was read.
        what: String,
        /// The digest that names it.
        expected: Digest,
        /// The digest of what came.
        found: Digest,
    },
    /// Content is longer or shorter than declared.
    #[error("wrong size: {what} is declared as {declared} bytes but has {found}")]
    WrongSize {
        /// What was read.
        what: String,
        /// Bytes declared by whoever refers to it.
        declared: u64,
        /// Bytes seen (at least).
        found: u64,
    },
    /// Something exceeds a bound of this program.
    #[error("{what} is too large: {found} exceeds the limit of {limit}")]
    TooLarge {
        /// What it is.
        what: String,
        /// Its measure.
        found: u64,
        /// The named bound.
        limit: u64,
    },
    /// A manifest, index or configuration that breaks its format.
    #[error("{what} is malformed: {why}")]
    Malformed {
        /// Which document.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// Not something that can be run: a chart, a signature, a schema 1 manifest, a foreign layer.
    #[error("{what} is not supported: {why}")]
    Unsupported {
        /// Which document.
        what: String,
        /// Why not.
        why: String,
    },
    /// The image exists, but not for the platform wanted.
    #[error("no image for platform {wanted} in {what}: it has {offered}")]
    NoPlatform {
        /// Which image.
        what: String,
        /// The platform asked for.
        wanted: String,
        /// What there is, joined by commas.
        offered: String,
    },
    /// The registry has no such tag or digest.
    #[error("manifest for {reference} not found: manifest unknown")]
    ManifestUnknown {
        /// What was asked for.
        reference: String,
    },
    /// The registry lacks a layer that its manifest names.
    #[error("blob {digest} of {repository} not found in the registry: blob unknown")]
    BlobUnknown {
        /// The blob.
        digest: Digest,
        /// Where it was looked for.
        repository: String,
    },
    /// The registry refuses us.
    #[error(
        "pull access denied for {repository}, repository does not exist or may require 'docker login': {message}"
    )]
    Denied {
        /// What was asked for.
        repository: String,
        /// The registry's words, cleaned.
        message: String,
    },
    /// The registry answers something that is no success.
    #[error("registry {host} answers {status} to {what}: {message}")]
    Status {
        /// Host and port.
        host: String,
        /// HTTP status code.
        status: u16,
        /// What was asked for.
        what: String,
        /// The registry's words, cleaned.
        message: String,
    },
    /// The connection failed or broke.
    #[error("cannot read {what} from registry {host}")]
    Transport {
        /// Host and port.
        host: String,
        /// What was asked for.
        what: String,
        /// The HTTP client's words.
        #[source]
        source: reqwest::Error,
    },
    /// The registry stopped talking.
    #[error("registry {host} sent nothing of {what} for {waited_s} s")]
    Stalled {
        /// Host and port.
        host: String,
        /// What was asked for.
        what: String,
        /// How long it was waited for.
        waited_s: u64,
    },
    /// The connection ended before all declared bytes came, more often than is tolerated.
    #[error("{what} is truncated: the registry {host} sent {found} of {declared} bytes, {tries} tries")]
    Truncated {
        /// Host and port.
        host: String,
        /// What was asked for.
        what: String,
        /// Bytes declared.
        declared: u64,
        /// Bytes that came.
        found: u64,
        /// How often it was tried without progress.
        tries: u32,
    },
    /// The registry breaks the protocol.
    #[error("registry {host} breaks the registry protocol: {why}")]
    Protocol {
        /// Host and port.
        host: String,
        /// What it did.
        why: String,
    },
    /// An archive given to `load` is not one, or is hostile.
    #[error("invalid image archive: {why}")]
    Archive {
        /// What is wrong with it.
        why: String,
    },
    /// Reading the archive failed.
    #[error("cannot read the image archive")]
    ArchiveRead {
        /// The reader's words.
        #[source]
        source: io::Error,
    },
    /// The credentials configured for a registry cannot be had.
    #[error("cannot get credentials for {host} from {from}: {why}")]
    Credentials {
        /// Host and port.
        host: String,
        /// The file or helper program.
        from: String,
        /// What is wrong.
        why: String,
    },
}

impl ImageError {
    /// The whole story in one line: this error and its causes, joined by `": "`, each cause only once.
    pub fn one_line(&self) -> String {
        let mut line = self.to_string();
        let mut cause = std::error::Error::source(self);
        if matches!(self, Self::DiskFull { source, .. } if source.kind() == io::ErrorKind::StorageFull) {
            cause = None;
        }
        while let Some(error) = cause {
            let text = error.to_string();
            if !line.contains(&text) {
                line.push_str(": ");
                line.push_str(&text);
            }
            cause = error.source();
        }
        line.replace(['\n', '\r'], " ")
    }

    /// Whether trying again may help: connection lost, stalled, server-side failure, rate limit.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Transport { .. } | Self::Stalled { .. } | Self::Truncated { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 425 | 429 | 500..=599),
            _ => false,
        }
    }

    /// Whether no connection could be made at all: wrong name, nobody there, no network.
    pub(crate) fn is_unreachable(&self) -> bool {
        matches!(self, Self::Transport { source, .. } if source.is_connect())
    }

    /// Wraps a system error on one of our files; a full disk becomes [`ImageError::DiskFull`].
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        if is_disk_full(&source) {
            return Self::DiskFull {
                what: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                dir: path.parent().unwrap_or(path).to_owned(),
                kept: "what was stored before is kept".to_owned(),
                source,
            };
        }
        Self::Io { action, path: path.to_owned(), source }
    }
}

/// Whether the system says that the disk or the user's share of it is full.
fn is_disk_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Foreign text made fit for an error line: control characters gone, at most [`MAX_FOREIGN_TEXT`] characters.
pub(crate) fn clean(text: &str) -> String {
    let mut out: String =
        text.chars().filter(|c| !c.is_control() && !is_bidi(*c)).take(MAX_FOREIGN_TEXT).collect();
    if text.chars().nth(MAX_FOREIGN_TEXT).is_some() {
        out.push_str("...");
    }
    out
}

/// Characters that reorder what a terminal shows.
fn is_bidi(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Runs blocking work (file system, hashing) off the async threads.
pub(crate) async fn blocking<T, F>(work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    tokio::task::spawn_blocking(work).await.map_err(|source| ImageError::Worker { source })?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_disk_is_told_apart() {
        let error = ImageError::io("write", Path::new("/x/y"), io::Error::from(io::ErrorKind::StorageFull));
        assert!(matches!(error, ImageError::DiskFull { .. }));
        assert!(error.one_line().starts_with("no space left on device: cannot write y under /x; "));
    }

    #[test]
    fn one_line_appends_causes_once() {
        let source = io::Error::new(io::ErrorKind::PermissionDenied, "no\nway");
        let error = ImageError::io("open", Path::new("/x"), source);
        assert_eq!(error.one_line(), "cannot open /x: no way");
    }

    #[test]
    fn foreign_text_is_cleaned() {
        assert_eq!(clean("a\x1b[31mb\u{202e}\n"), "a[31mb");
        assert_eq!(clean(&"x".repeat(500)).len(), MAX_FOREIGN_TEXT + 3);
    }
}
