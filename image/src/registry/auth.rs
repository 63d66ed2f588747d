//! Answering a registry's challenges: bearer tokens and basic authentication.
//!
//! ```text
//! no header --401 Bearer--> token of realm --401--> a new token --401--> denied
//!           \-401 Basic---> user:password  --401--> denied
//! ```
//! Several layers share one state; a challenge that another request has answered meanwhile costs nothing.

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Client, RequestBuilder, Url};
use serde::Deserialize;
use tokio::sync::Mutex;

use crate::error::{ImageError, Result, clean};
use crate::reference::Reference;
use crate::registry::body::{self, Peer};
use crate::registry::credentials::{Credentials, Source};

/// Longest `WWW-Authenticate` that is looked at.
const MAX_CHALLENGE: usize = 8 << 10;
/// Largest answer of a token server.
const MAX_TOKEN_ANSWER: u64 = 1 << 20;
/// Who we say we are to OAuth2 servers.
const CLIENT_ID: &str = "hyper";

/// How requests to one repository prove who we are.
pub(crate) struct Authenticator {
    client: Client,
    peer: Peer,
    reference: Reference,
    source: Source,
    /// Whether the token server may be spoken to without TLS.
    plain: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Counts the answered challenges.
    generation: u64,
    proof: Option<Proof>,
}

/// What goes into the Authorization header.
#[derive(Clone)]
enum Proof {
    Bearer(HeaderValue),
    Basic { username: String, password: String },
}

/// One challenge of a `WWW-Authenticate` header.
#[derive(Debug, PartialEq, Eq)]
struct Challenge {
    scheme: String,
    params: Vec<(String, String)>,
}

impl Challenge {
    fn param(&self, name: &str) -> Option<&str> {
        self.params.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

impl Authenticator {
    pub(crate) fn new(client: Client, peer: Peer, reference: Reference, source: Source, plain: bool) -> Self {
        Self { client, peer, reference, source, plain, state: Mutex::default() }
    }

    /// Adds what is known to a request; the number tells [`Authenticator::answer`] what was known.
    pub(crate) async fn sign(&self, request: RequestBuilder) -> (RequestBuilder, u64) {
        let state = self.state.lock().await;
        let request = match &state.proof {
            None => request,
            Some(Proof::Bearer(value)) => request.header(AUTHORIZATION, value.clone()),
            Some(Proof::Basic { username, password }) => request.basic_auth(username, Some(password)),
        };
        (request, state.generation)
    }

    /// Answers the challenge of a response with status 401 to a request signed with `known`.
    pub(crate) async fn answer(&self, headers: &HeaderMap, known: u64) -> Result<()> {
        let mut state = self.state.lock().await;
        if state.generation != known {
            return Ok(());
        }
        let challenges = parse_challenges(headers);
        let credentials = self.source.credentials(&self.reference).await?;
        let bearer = challenges.iter().find(|challenge| challenge.scheme == "bearer");
        let basic = challenges.iter().any(|challenge| challenge.scheme == "basic");
        state.proof = Some(match (bearer, credentials) {
            (Some(_), Credentials::Registry(token)) => self.bearer(&token)?,
            (Some(challenge), credentials) => self.fetch_token(challenge, &credentials).await?,
            (None, Credentials::Basic { username, password }) if basic => Proof::Basic { username, password },
            (None, _) if basic => return Err(self.denied("authentication required")),
            (None, _) => {
                return Err(self.denied("it asks for a kind of authentication that is not known here"));
            }
        });
        state.generation += 1;
        Ok(())
    }

    /// An error that says that the registry refuses us.
    pub(crate) fn denied(&self, message: &str) -> ImageError {
        ImageError::Denied { repository: self.reference.familiar_name(), message: clean(message) }
    }

    async fn fetch_token(&self, challenge: &Challenge, credentials: &Credentials) -> Result<Proof> {
        let mut url = self.realm(challenge)?;
        let scope = match challenge.param("scope") {
            Some(scope) if !scope.is_empty() => scope.to_owned(),
            _ => format!("repository:{}:pull", self.reference.path()),
        };
        let service = challenge.param("service").unwrap_or_default();
        let request = if let Credentials::Identity(token) = credentials {
            let form = [
                ("grant_type", "refresh_token"),
                ("service", service),
                ("client_id", CLIENT_ID),
                ("scope", &scope),
                ("refresh_token", token),
            ];
            self.client.post(url).form(&form)
        } else {
            url.query_pairs_mut().append_pair("service", service).append_pair("scope", &scope);
            let request = self.client.get(url);
            match credentials {
                Credentials::Basic { username, password } => request.basic_auth(username, Some(password)),
                _ => request,
            }
        };
        let response = self.peer.send(request, "a token").await?;
        let status = response.status();
        if status.is_success() {
            let bytes = body::read_all(&self.peer, response, MAX_TOKEN_ANSWER, "a token").await?;
            let answer: Option<TokenAnswer> = serde_json::from_slice(&bytes).ok();
            let token =
                answer.and_then(|answer| answer.token.or(answer.access_token)).filter(|t| !t.is_empty());
            return self.bearer(&token.ok_or_else(|| self.peer.protocol("its token server sends no token"))?);
        }
        let message = body::error_message(&self.peer, response).await;
        if matches!(status.as_u16(), 400 | 401 | 403 | 404) {
            return Err(self.denied(&message));
        }
        Err(self.peer.status(status, "a token", message))
    }

    /// Where tokens are given out. Credentials go there, so it must be as safe as the registry itself.
    fn realm(&self, challenge: &Challenge) -> Result<Url> {
        let realm = challenge.param("realm").unwrap_or_default();
        let url =
            Url::parse(realm).map_err(|_| self.peer.protocol("its token server has no valid address"))?;
        if url.scheme() == "https" || (url.scheme() == "http" && self.plain) {
            return Ok(url);
        }
        Err(self.peer.protocol("it wants credentials to be sent without encryption"))
    }

    fn bearer(&self, token: &str) -> Result<Proof> {
        let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
            .map_err(|_| self.peer.protocol("its token server sends a malformed token"))?;
        value.set_sensitive(true);
        Ok(Proof::Bearer(value))
    }
}

/// Parses all challenges (RFC 9110, 11.6.1): schemes and parameters, separated by commas, values maybe quoted.
fn parse_challenges(headers: &HeaderMap) -> Vec<Challenge> {
    let mut challenges = Vec::new();
    for value in headers.get_all(WWW_AUTHENTICATE) {
        if let Ok(text) = value.to_str()
            && text.len() <= MAX_CHALLENGE
        {
            parse_challenge_list(text, &mut challenges);
        }
    }
    challenges
}

/// What the fuzzer sends as a header.
#[cfg(feature = "fuzz")]
pub(crate) fn challenges_in(bytes: &[u8]) -> usize {
    let mut headers = HeaderMap::new();
    if let Ok(value) = HeaderValue::from_bytes(bytes) {
        headers.insert(WWW_AUTHENTICATE, value);
    }
    parse_challenges(&headers).len()
}

/// Parses one header line.
fn parse_challenge_list(text: &str, challenges: &mut Vec<Challenge>) {
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find([' ', '\t', ',', '=', '"']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if word.is_empty() {
            return;
        }
        match after.trim_start_matches([' ', '\t']).strip_prefix('=') {
            None => {
                challenges.push(Challenge { scheme: word.to_ascii_lowercase(), params: Vec::new() });
                rest = after;
            }
            Some(value) => {
                let Some((value, after)) = take_value(value.trim_start_matches([' ', '\t'])) else { return };
                if let Some(challenge) = challenges.last_mut() {
                    challenge.params.push((word.to_ascii_lowercase(), value));
                }
                rest = after;
            }
        }
    }
}

/// Splits off a token or a quoted string; `None` if its quotes do not end.
fn take_value(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([' ', '\t', ',']).unwrap_or(text.len());
        let (value, rest) = text.split_at(end);
        return Some((value.to_owned(), rest));
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, quoted.get(at + 1..)?)),
            '\\' => value.push(chars.next()?.1),
            _ => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Vec<Challenge> {
        let mut challenges = Vec::new();
        parse_challenge_list(text, &mut challenges);
        challenges
    }

    #[test]
    fn challenges() {
        let all = parse(
            r#"Bearer realm="https://auth.example/token?a=b",service="r, \"x\"", scope="repository:a/b:pull,push" , Basic realm=plain"#,
        );
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].scheme, "bearer");
        assert_eq!(all[0].param("realm"), Some("https://auth.example/token?a=b"));
        assert_eq!(all[0].param("service"), Some("r, \"x\""));
        assert_eq!(all[0].param("scope"), Some("repository:a/b:pull,push"));
        assert_eq!((all[1].scheme.as_str(), all[1].param("realm")), ("basic", Some("plain")));
    }

    #[test]
    fn malformed_challenges_end_quietly() {
        for text in [
            "",
            ",,,",
            "=",
            "\"",
            "Bearer realm=\"x",
            "Bearer realm=\"x\\",
            "Bearer =",
            "a=b",
            "Bearer\trealm",
        ] {
            let _ = parse(text);
        }
        assert_eq!(parse("Negotiate")[0].scheme, "negotiate");
    }
}
