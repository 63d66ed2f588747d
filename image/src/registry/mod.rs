//! Registry client (OCI distribution specification 1.1): manifests and blobs of one repository.

use std::path::Path;
use std::time::Duration;

use reqwest::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_TYPE, LOCATION, RANGE};
use reqwest::redirect::Policy;
use reqwest::{Client, Response, StatusCode, Url};

use crate::digest::Digest;
use crate::error::{ImageError, Result};
use crate::manifest::{self, MAX_MANIFEST_BYTES};
use crate::pull::PullOptions;
use crate::reference::Reference;
use crate::registry::auth::Authenticator;
use crate::registry::body::Peer;
use crate::registry::credentials::Source;

pub(crate) mod auth;
pub(crate) mod body;
pub(crate) mod credentials;

/// Longest chain of redirects.
const MAX_REDIRECTS: usize = 10;
/// Challenges answered per request: the token may have expired between two of them.
const MAX_CHALLENGES: usize = 2;
/// Docker's directory of certificate authorities for single registries.
const CERTS_DIR: &str = "/etc/docker/certs.d";
/// Largest file of certificates.
const MAX_CERT_BYTES: u64 = 1 << 20;
/// Most files of certificates for one registry.
const MAX_CERT_FILES: usize = 64;

/// How long a pull waits and how often it tries again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Milliseconds for a connection to be made.
    pub connect_ms: u64,
    /// Milliseconds of silence after which a connection counts as lost.
    pub stall_ms: u64,
    /// Tries in a row without progress before giving up.
    pub tries: u32,
    /// Milliseconds before the second try; doubles with each further one.
    pub backoff_ms: u64,
    /// Longest pause between two tries in milliseconds.
    pub max_backoff_ms: u64,
}

impl Default for Patience {
    fn default() -> Self {
        Self { connect_ms: 15_000, stall_ms: 60_000, tries: 5, backoff_ms: 500, max_backoff_ms: 8_000 }
    }
}

impl Patience {
    /// The pause after the `failed`th try in a row.
    pub(crate) fn pause(&self, failed: u32) -> Duration {
        let factor = 1_u64 << failed.saturating_sub(1).min(16);
        Duration::from_millis(self.backoff_ms.saturating_mul(factor).min(self.max_backoff_ms))
    }
}

/// A manifest or index as the registry gave it.
#[derive(Clone, Debug)]
pub(crate) struct Fetched {
    pub(crate) bytes: Vec<u8>,
    pub(crate) digest: Digest,
    pub(crate) content_type: Option<String>,
}

/// The beginning of a blob's answer.
#[derive(Debug)]
pub(crate) enum BlobAnswer {
    /// The body starts at this offset: the one asked for, or zero if the registry knows no ranges.
    From(u64, Response),
    /// The registry refuses the range; begin again at zero.
    RangeRefused,
}

/// One repository of a registry.
pub(crate) struct Registry {
    client: Client,
    base: Url,
    peer: Peer,
    reference: Reference,
    auth: Authenticator,
    patience: Patience,
}

impl Registry {
    /// Prepares to speak to the registry of `reference`; nothing is sent yet.
    pub(crate) fn new(
        reference: &Reference,
        source: Source,
        plain_http: bool,
        patience: Patience,
    ) -> Result<Self> {
        let host = reference.endpoint().to_owned();
        let plain = plain_http || reference.is_loopback();
        let peer = Peer { host: host.clone(), stall: Duration::from_millis(patience.stall_ms) };
        let scheme = if plain { "http" } else { "https" };
        let base = Url::parse(&format!("{scheme}://{host}/v2/{}/", reference.path()))
            .map_err(|_| peer.protocol("its address is malformed"))?;
        let client = build_client(reference, plain, patience).map_err(|source| ImageError::Transport {
            host: host.clone(),
            what: "anything".to_owned(),
            source,
        })?;
        let auth = Authenticator::new(client.clone(), peer.clone(), reference.clone(), source, plain);
        Ok(Self { client, base, peer, reference: reference.clone(), auth, patience })
    }

    /// The registry of `reference`, spoken to as the caller of a pull wishes.
    pub(crate) fn of(reference: &Reference, options: &PullOptions) -> Result<Self> {
        let source = Source {
            auth: options.auth.clone(),
            config_dir: options.docker_config_dir.clone(),
            helper_dir: None,
        };
        Self::new(reference, source, options.plain_http, options.patience)
    }

    /// Whom this speaks to, for errors and for reading bodies.
    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }

    /// How long this waits.
    pub(crate) fn patience(&self) -> Patience {
        self.patience
    }

    /// Fetches a manifest or index by tag or digest, trying again while that may help.
    pub(crate) async fn manifest(&self, wanted: &str) -> Result<Fetched> {
        let mut failed = 0;
        loop {
            match self.manifest_once(wanted).await {
                // Mostly a wrong name or no network: people want to know at once.
                Err(error) if error.is_unreachable() => return Err(error),
                Err(error) if error.is_transient() && failed + 1 < self.patience.tries => {
                    failed += 1;
                    tracing::debug!(error = error.one_line(), failed, "manifest: trying again");
                    tokio::time::sleep(self.patience.pause(failed)).await;
                }
                outcome => return outcome,
            }
        }
    }

    async fn manifest_once(&self, wanted: &str) -> Result<Fetched> {
        let what = format!("manifest of {}", self.reference);
        let response = self.get(&format!("manifests/{wanted}"), &what, Some(manifest::ACCEPT), 0).await?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => {
                return Err(ImageError::ManifestUnknown { reference: self.reference.to_string() });
            }
            _ => return Err(self.refusal(response, &what).await),
        }
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let announced = header("docker-content-digest").and_then(|text| Digest::parse(text).ok());
        let content_type = header(CONTENT_TYPE.as_str())
            .map(|text| text.split(';').next().unwrap_or(text).trim().to_owned());
        let bytes = body::read_all(&self.peer, response, MAX_MANIFEST_BYTES, &what).await?;
        let digest = Digest::of(&bytes);
        // What was asked for by digest must match that; a tag's answer must match what the registry says it is.
        let expected = Digest::parse(wanted).ok().or(announced);
        if let Some(expected) = expected.filter(|expected| *expected != digest) {
            return Err(ImageError::WrongDigest { what, expected, found: digest });
        }
        Ok(Fetched { bytes, digest, content_type })
    }

    /// Asks once for a blob from `offset` on.
    pub(crate) async fn blob(&self, digest: &Digest, offset: u64) -> Result<BlobAnswer> {
        let what = format!("layer {}", digest.short());
        let response = self.get(&format!("blobs/{digest}"), &what, None, offset).await?;
        match response.status() {
            StatusCode::OK => Ok(BlobAnswer::From(0, response)),
            StatusCode::PARTIAL_CONTENT if offset > 0 => {
                let range = response.headers().get("content-range").and_then(|value| value.to_str().ok());
                match range.and_then(range_start) {
                    Some(start) if start == offset => Ok(BlobAnswer::From(offset, response)),
                    _ => Ok(BlobAnswer::RangeRefused),
                }
            }
            StatusCode::RANGE_NOT_SATISFIABLE if offset > 0 => Ok(BlobAnswer::RangeRefused),
            StatusCode::NOT_FOUND => Err(ImageError::BlobUnknown {
                digest: digest.clone(),
                repository: self.reference.familiar_name(),
            }),
            _ => Err(self.refusal(response, &what).await),
        }
    }

    /// Sends a GET below `/v2/<repository>/`, answers challenges and follows redirects.
    ///
    /// Credentials go to the registry's own origin only, never to where it redirects.
    async fn get(&self, path: &str, what: &str, accept: Option<&str>, offset: u64) -> Result<Response> {
        let malformed = || self.peer.protocol("it redirects to a malformed address");
        // Made of text: `join` would take the colon of a digest for that of a scheme.
        let mut url = Url::parse(&format!("{}{path}", self.base)).map_err(|_| malformed())?;
        let (mut challenges, mut redirects) = (0, 0);
        loop {
            let own = url.origin() == self.base.origin();
            let mut request = self.client.get(url.clone()).header(ACCEPT_ENCODING, "identity");
            if let Some(accept) = accept {
                request = request.header(ACCEPT, accept);
            }
            if offset > 0 {
                request = request.header(RANGE, format!("bytes={offset}-"));
            }
            let (request, known) = if own { self.auth.sign(request).await } else { (request, 0) };
            let response = self.peer.send(request, what).await?;
            match response.status() {
                StatusCode::UNAUTHORIZED if own && challenges < MAX_CHALLENGES => {
                    challenges += 1;
                    self.auth.answer(response.headers(), known).await?;
                }
                status if matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) => {
                    redirects += 1;
                    if redirects > MAX_REDIRECTS {
                        return Err(self.peer.protocol("it redirects in circles"));
                    }
                    let target = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
                    url = target.and_then(|target| url.join(target).ok()).ok_or_else(malformed)?;
                    if !(url.scheme() == "https" || (url.scheme() == "http" && self.base.scheme() == "http"))
                    {
                        return Err(self.peer.protocol("it redirects to an address without encryption"));
                    }
                }
                _ => return Ok(response),
            }
        }
    }

    /// The error of a response that is no success.
    async fn refusal(&self, response: Response, what: &str) -> ImageError {
        let status = response.status();
        let message = body::error_message(&self.peer, response).await;
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => self.auth.denied(&message),
            _ => self.peer.status(status, what, message),
        }
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("base", &self.base.as_str()).finish_non_exhaustive()
    }
}

/// The HTTP client: proxies from the environment except for this machine, no redirects of its own.
fn build_client(reference: &Reference, plain: bool, patience: Patience) -> reqwest::Result<Client> {
    let mut builder = Client::builder()
        .user_agent(concat!("hyper/", env!("CARGO_PKG_VERSION")))
        .redirect(Policy::none())
        .referer(false)
        .connect_timeout(Duration::from_millis(patience.connect_ms));
    if reference.is_loopback() {
        builder = builder.no_proxy();
    }
    if !plain {
        for pem in registry_certificates(&Path::new(CERTS_DIR).join(reference.domain())) {
            for certificate in reqwest::Certificate::from_pem_bundle(&pem)? {
                builder = builder.add_root_certificate(certificate);
            }
        }
    }
    builder.build()
}

/// The `*.crt` files of a registry's directory, as Docker reads them; unreadable ones are skipped with a warning.
fn registry_certificates(dir: &Path) -> Vec<Vec<u8>> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut found = Vec::new();
    for entry in entries.flatten().take(MAX_CERT_FILES) {
        let path = entry.path();
        if path.extension().is_none_or(|ext| ext != "crt") {
            continue;
        }
        match crate::store::read_bounded(&path, MAX_CERT_BYTES) {
            Ok(pem) => found.extend(pem),
            Err(error) => tracing::warn!(error = error.one_line(), "certificate skipped"),
        }
    }
    found
}

/// The first byte of `bytes 5-9/10`.
fn range_start(text: &str) -> Option<u64> {
    text.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_limit() {
        let patience = Patience::default();
        let pauses: Vec<u128> = (1..=6).map(|failed| patience.pause(failed).as_millis()).collect();
        assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 8000]);
        assert_eq!(patience.pause(u32::MAX).as_millis(), 8000);
    }

    #[test]
    fn content_ranges() {
        assert_eq!(range_start("bytes 5-9/10"), Some(5));
        assert_eq!(range_start("bytes */10"), None);
        assert_eq!(range_start("items 5-9/10"), None);
    }
}
