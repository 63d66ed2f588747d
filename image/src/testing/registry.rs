//! A registry on a loopback port: enough of the distribution protocol, and every way to break it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use base64::Engine as _;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::{MANIFEST, Sample};
use crate::digest::Digest;

/// What the registry demands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Demand {
    Nothing,
    Basic,
    /// A token; each is good for this many requests.
    Token(usize),
}

/// A way to answer one request for a blob wrongly.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// Announces everything, sends this many bytes, closes.
    CutAfter(usize),
    /// Answers with this status and nothing useful.
    Status(u16),
    /// Sends these bytes instead, with a length that fits.
    Instead(Vec<u8>),
    /// Sends these bytes in chunks, without a length.
    Unannounced(Vec<u8>),
    /// Sends everything although a range was asked for.
    NoRanges,
    /// Answers 206 with a range that was not asked for.
    WrongRange,
    /// Sends the caller elsewhere.
    Redirect(String),
    /// Answers 307 to itself, with another path.
    RedirectHere(String),
    /// Announces everything and then says nothing until the caller hangs up.
    Silence,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) path: String,
    pub(crate) headers: HashMap<String, String>,
}

#[derive(Debug)]
pub(crate) struct Content {
    pub(crate) manifests: HashMap<String, (String, Vec<u8>)>,
    pub(crate) blobs: HashMap<String, Vec<u8>>,
    pub(crate) demand: Demand,
    /// Faults by path, each used for one request; the last one stays if `forever` names the path.
    pub(crate) faults: HashMap<String, VecDeque<Fault>>,
    pub(crate) forever: bool,
    pub(crate) seen: Vec<Seen>,
    tokens: HashMap<String, usize>,
}

/// The registry; it serves while the runtime of the test lives.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    pub(crate) address: String,
    content: Arc<Mutex<Content>>,
}

pub(crate) const USER: &str = "user";
pub(crate) const PASSWORD: &str = "pass:word";

impl Server {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let content = Content {
            manifests: HashMap::new(),
            blobs: HashMap::new(),
            demand: Demand::Nothing,
            faults: HashMap::new(),
            forever: false,
            seen: Vec::new(),
            tokens: HashMap::new(),
        };
        let server = Self {
            address: listener.local_addr().unwrap().to_string(),
            content: Arc::new(Mutex::new(content)),
        };
        let accepting = server.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let server = accepting.clone();
                tokio::spawn(async move { server.serve(stream).await });
            }
        });
        server
    }

    pub(crate) fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap()
    }

    /// Offers a sample as `repo:tag` and by digest, and returns the reference.
    pub(crate) fn offer(&self, sample: &Sample, name: &str) -> crate::Reference {
        self.offer_blobs(sample);
        self.offer_manifest(name, MANIFEST, &sample.manifest)
    }

    pub(crate) fn offer_blobs(&self, sample: &Sample) {
        let mut content = self.content();
        for blob in sample.blobs() {
            content.blobs.insert(Digest::of(blob).to_string(), blob.to_vec());
        }
        let digest = sample.digest().to_string();
        content.manifests.insert(digest, (MANIFEST.to_owned(), sample.manifest.clone()));
    }

    pub(crate) fn offer_manifest(&self, name: &str, kind: &str, bytes: &[u8]) -> crate::Reference {
        let reference = crate::Reference::parse(&format!("{}/{name}", self.address)).unwrap();
        let mut content = self.content();
        for key in [reference.tag().unwrap().to_owned(), Digest::of(bytes).to_string()] {
            content.manifests.insert(key, (kind.to_owned(), bytes.to_vec()));
        }
        reference
    }

    /// Lets the next requests for a blob go wrong.
    pub(crate) fn fail(&self, blob: &[u8], faults: impl IntoIterator<Item = Fault>) {
        self.fail_at(&format!("blobs/{}", Digest::of(blob)), faults);
    }

    pub(crate) fn fail_at(&self, path_end: &str, faults: impl IntoIterator<Item = Fault>) {
        self.content().faults.insert(path_end.to_owned(), faults.into_iter().collect());
    }

    /// Requests whose path ends so.
    pub(crate) fn requests(&self, path_end: &str) -> Vec<Seen> {
        self.content().seen.iter().filter(|seen| seen.path.ends_with(path_end)).cloned().collect()
    }

    pub(crate) fn blob_requests(&self, blob: &[u8]) -> Vec<Seen> {
        self.requests(&format!("blobs/{}", Digest::of(blob)))
    }

    async fn serve(&self, stream: TcpStream) {
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
            return;
        }
        let path = line.split(' ').nth(1).unwrap().to_owned();
        let mut headers = HashMap::new();
        loop {
            line.clear();
            stream.read_line(&mut line).await.unwrap();
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            headers.insert(name.to_ascii_lowercase(), value.to_owned());
        }
        let seen = Seen { path, headers };
        self.content().seen.push(seen.clone());
        let (bytes, hang) = self.answer(&seen);
        let _ = stream.get_mut().write_all(&bytes).await;
        let _ = stream.get_mut().flush().await;
        if hang {
            line.clear();
            let _ = stream.read_line(&mut line).await;
        }
    }

    /// The whole answer, and whether to keep silent afterwards instead of closing.
    fn answer(&self, seen: &Seen) -> (Vec<u8>, bool) {
        if seen.path.starts_with("/token") {
            return (self.token(seen), false);
        }
        if let Some(refusal) = self.check_auth(seen) {
            return (refusal, false);
        }
        let mut content = self.content();
        let forever = content.forever;
        let fault = content.faults.iter_mut().find(|(end, _)| seen.path.ends_with(end.as_str())).and_then(
            |(_, faults)| {
                if forever && faults.len() == 1 { faults.front().cloned() } else { faults.pop_front() }
            },
        );
        let (kind, body) = if let Some((_, wanted)) = seen.path.rsplit_once("/manifests/") {
            match content.manifests.get(wanted) {
                Some((kind, bytes)) => (kind.clone(), bytes.clone()),
                None => return (error(404, "MANIFEST_UNKNOWN", "manifest unknown"), false),
            }
        } else {
            let wanted = seen.path.rsplit_once("/blobs/").map(|(_, digest)| digest).unwrap_or_default();
            match content.blobs.get(wanted) {
                Some(bytes) => ("application/octet-stream".to_owned(), bytes.clone()),
                None => return (error(404, "BLOB_UNKNOWN", "blob unknown"), false),
            }
        };
        let start: usize = seen
            .headers
            .get("range")
            .map(|range| range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap())
            .unwrap_or_default();
        faulty(&kind, &body, start, fault)
    }

    fn check_auth(&self, seen: &Seen) -> Option<Vec<u8>> {
        let mut content = self.content();
        let given = seen.headers.get("authorization").cloned().unwrap_or_default();
        let demand = content.demand.clone();
        match demand {
            Demand::Nothing => None,
            Demand::Basic if given == basic() => None,
            Demand::Basic => Some(challenge("Basic realm=\"test\"")),
            Demand::Token(_) => {
                let left = content.tokens.get_mut(given.trim_start_matches("Bearer "));
                if let Some(left) = left.filter(|left| **left > 0) {
                    *left -= 1;
                    return None;
                }
                let realm = format!("http://{}/token?x=y", self.address);
                Some(challenge(&format!(
                    "Bearer realm=\"{realm}\",service=\"test\",scope=\"repository:a:pull\""
                )))
            }
        }
    }

    fn token(&self, seen: &Seen) -> Vec<u8> {
        if seen.headers.get("authorization").is_none_or(|given| *given != basic()) {
            return error(401, "UNAUTHORIZED", "incorrect username or password");
        }
        let mut content = self.content();
        let Demand::Token(uses) = content.demand else { return error(404, "X", "no tokens here") };
        let token = format!("token-{}", content.tokens.len());
        content.tokens.insert(token.clone(), uses);
        head(200, &[("Content-Type", "application/json")], format!("{{\"token\":\"{token}\"}}").as_bytes())
    }
}

/// The Authorization header of the user of this registry.
fn basic() -> String {
    let encoded = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
    format!("Basic {encoded}")
}

fn challenge(value: &str) -> Vec<u8> {
    head(
        401,
        &[("WWW-Authenticate", value)],
        b"{\"errors\":[{\"code\":\"UNAUTHORIZED\",\"message\":\"authentication required\"}]}",
    )
}

fn error(status: u16, code: &str, message: &str) -> Vec<u8> {
    let body = format!("{{\"errors\":[{{\"code\":\"{code}\",\"message\":\"{message}\"}}]}}");
    head(status, &[], body.as_bytes())
}

fn head(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut out = format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
    for (name, value) in headers {
        out.push_str(&format!("{name}: {value}\r\n"));
    }
    out.push_str("\r\n");
    let mut out = out.into_bytes();
    out.extend_from_slice(body);
    out
}

/// Content from `start` on, spoiled as told.
fn faulty(kind: &str, body: &[u8], start: usize, fault: Option<Fault>) -> (Vec<u8>, bool) {
    let kind = ("Content-Type", kind);
    if start > 0 && start >= body.len() {
        return (head(416, &[], b""), false);
    }
    let range = format!("bytes {start}-{}/{}", body.len().saturating_sub(1), body.len());
    let whole = if start > 0 {
        head(206, &[kind, ("Content-Range", &range)], &body[start..])
    } else {
        head(200, &[kind], body)
    };
    let head_len = whole.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
    let answer = match fault {
        None => whole,
        Some(Fault::CutAfter(n)) => whole[..(head_len + n).min(whole.len())].to_vec(),
        Some(Fault::Silence) => return (whole[..head_len].to_vec(), true),
        Some(Fault::Status(status)) => error(status, "TROUBLE", "something\\u001b[31m broke"),
        Some(Fault::Instead(bytes)) => head(200, &[kind], &bytes),
        Some(Fault::Unannounced(bytes)) => {
            let mut out =
                b"HTTP/1.1 200 X\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
            for chunk in bytes.chunks(100_000) {
                out.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                out.extend_from_slice(chunk);
                out.extend_from_slice(b"\r\n");
            }
            out.extend_from_slice(b"0\r\n\r\n");
            out
        }
        Some(Fault::NoRanges) => head(200, &[kind], body),
        Some(Fault::WrongRange) => head(206, &[kind, ("Content-Range", "bytes 1-2/3")], body),
        Some(Fault::Redirect(to) | Fault::RedirectHere(to)) => head(307, &[("Location", &to)], b""),
    };
    (answer, false)
}
