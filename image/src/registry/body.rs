//! Sending requests and reading bodies with bounds and deadlines; errors name the peer and the purpose.

use std::time::Duration;

use reqwest::{RequestBuilder, Response, StatusCode};
use serde::Deserialize;

use crate::error::{ImageError, Result, clean};

/// Largest error document that is read.
const MAX_ERROR_BODY: u64 = 64 << 10;

/// Who is spoken to and how long silence is borne.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) host: String,
    pub(crate) stall: Duration,
}

#[derive(Deserialize)]
struct ErrorDocument {
    #[serde(default)]
    errors: Vec<ErrorEntry>,
    #[serde(default)]
    details: Option<String>,
}

#[derive(Deserialize)]
struct ErrorEntry {
    #[serde(default)]
    code: Option<String>,
    #[serde(default)]
    message: Option<String>,
}

impl Peer {
    /// Sends a request and waits for the head of the answer.
    pub(crate) async fn send(&self, request: RequestBuilder, what: &str) -> Result<Response> {
        match tokio::time::timeout(self.stall, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(self.transport(error, what)),
            Err(_) => Err(self.stalled(what)),
        }
    }

    /// The next piece of a body; `None` at its end.
    pub(crate) async fn chunk(
        &self,
        response: &mut Response,
        what: &str,
    ) -> Result<Option<impl AsRef<[u8]> + use<>>> {
        match tokio::time::timeout(self.stall, response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(error)) => Err(self.transport(error, what)),
            Err(_) => Err(self.stalled(what)),
        }
    }

    /// The peer breaks the protocol.
    pub(crate) fn protocol(&self, why: &str) -> ImageError {
        ImageError::Protocol { host: self.host.clone(), why: why.to_owned() }
    }

    /// The peer answers no success.
    pub(crate) fn status(&self, status: StatusCode, what: &str, message: String) -> ImageError {
        ImageError::Status {
            host: self.host.clone(),
            status: status.as_u16(),
            what: what.to_owned(),
            message,
        }
    }

    fn transport(&self, error: reqwest::Error, what: &str) -> ImageError {
        // Addresses of storage back ends carry signatures.
        let source = error.without_url();
        ImageError::Transport { host: self.host.clone(), what: what.to_owned(), source }
    }

    fn stalled(&self, what: &str) -> ImageError {
        ImageError::Stalled { host: self.host.clone(), what: what.to_owned(), waited_s: self.stall.as_secs() }
    }
}

/// Reads a whole body of at most `limit` bytes.
pub(crate) async fn read_all(peer: &Peer, mut response: Response, limit: u64, what: &str) -> Result<Vec<u8>> {
    let too_large =
        |found| ImageError::TooLarge { what: format!("{what} from registry {}", peer.host), found, limit };
    if let Some(found) = response.content_length().filter(|declared| *declared > limit) {
        return Err(too_large(found));
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = peer.chunk(&mut response, what).await? {
        bytes.extend_from_slice(chunk.as_ref());
        if bytes.len() as u64 > limit {
            return Err(too_large(bytes.len() as u64));
        }
    }
    Ok(bytes)
}

/// What an error response says, in words fit for a line; never fails.
pub(crate) async fn error_message(peer: &Peer, response: Response) -> String {
    let status = response.status();
    let bytes = read_all(peer, response, MAX_ERROR_BODY, "an error message").await.unwrap_or_default();
    let document: Option<ErrorDocument> = serde_json::from_slice(&bytes).ok();
    let said = document.and_then(|document| match document.errors.into_iter().next() {
        Some(ErrorEntry { code: Some(code), message: Some(message) }) if !message.is_empty() => {
            Some(format!("{}: {message}", code.to_ascii_lowercase()))
        }
        Some(ErrorEntry { code, message }) => message.or(code),
        None => document.details,
    });
    let said =
        said.unwrap_or_else(|| status.canonical_reason().unwrap_or("no reason given").to_ascii_lowercase());
    clean(&said)
}
