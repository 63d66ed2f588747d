//! Names: what containers ask at 127.0.0.11:53 arrives here, one vsock connection a question.
//!
//! Names of running containers of the same home are answered from its state; the rest is forwarded to the name servers of the host (or
//! of `--dns`), as the guest wrote it. Files: `message` (RFC 1035, as much as is needed), `forward`.

mod forward;
mod message;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use hyper_protocol::MAX_DNS_MESSAGE_BYTES;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use self::message::{Answer, Kind, NXDOMAIN, Question, SERVFAIL};
use crate::Home;
use crate::config::NetworkMode;
use crate::launch::{Callers, scaled_ms};
use crate::network::Names;

/// Most questions of one guest at a time; more wait.
const MAX_QUESTIONS: usize = 64;
/// How long one question may take in all.
const QUESTION_MS: u64 = 15_000;
/// Names of the host, as containers see it.
const HOST_NAMES: [&str; 2] = ["host.docker.internal", "host.hyper.internal"];

/// The name service of one container; ends when it is dropped.
#[derive(Debug)]
pub(crate) struct NameService {
    task: JoinHandle<()>,
}

impl Drop for NameService {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Who is asked.
#[derive(Debug)]
pub(crate) struct Resolver {
    /// Whose containers have names.
    pub(crate) home: Home,
    /// The host, as containers see it.
    pub(crate) gateway: IpAddr,
    /// For everybody else's names.
    pub(crate) upstreams: Vec<SocketAddr>,
    /// Which of those may be asked for; `None`: all.
    pub(crate) names: Option<Names>,
}

impl NameService {
    /// Answers what comes in at `callers`.
    pub(crate) fn start(callers: Callers, resolver: Resolver) -> Self {
        let resolver = Arc::new(resolver);
        Self { task: tokio::spawn(async move { serve(&callers, &resolver).await }) }
    }
}

/// Until no machine can call any more.
async fn serve(callers: &Callers, resolver: &Arc<Resolver>) {
    let places = Arc::new(Semaphore::new(MAX_QUESTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match callers.next().await {
            Ok(Some(stream)) => {
                let resolver = Arc::clone(resolver);
                tokio::spawn(async move {
                    let _place = place;
                    let done = timeout(scaled_ms(QUESTION_MS), resolver.converse(stream)).await;
                    if let Ok(Err(error)) = done {
                        tracing::debug!(%error, "a question broke off");
                    }
                });
            }
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%error, "cannot take a question");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

/// What the fuzzer asks, with an answer of each kind.
#[cfg(feature = "fuzz")]
pub(crate) fn answer_all(query: &[u8]) {
    let bounded =
        |answer: Vec<u8>| assert!(answer.len() <= query.len() + 512, "{} bytes of answer", answer.len());
    if !message::is_query(query) {
        return;
    }
    if let Some(question) = Question::parse(query) {
        let addresses = vec![IpAddr::from([127, 0, 0, 1]), IpAddr::from([0_u16; 8])];
        let name = question.name.clone();
        for answer in [Answer::Addresses(addresses), Answer::Addresses(Vec::new()), Answer::Name(name)] {
            bounded(question.reply(query, &answer));
        }
        let _address = message::reverse_address(&question.name);
    }
    if let Some(answer) = message::failure(query, SERVFAIL) {
        bounded(answer);
    }
    let found = message::addresses(query);
    assert!(found.len() * 16 <= query.len(), "{} addresses in {} bytes", found.len(), query.len());
}

impl Resolver {
    async fn converse(&self, mut stream: UnixStream) -> std::io::Result<()> {
        let len = usize::from(stream.read_u16().await?);
        let mut query = vec![0; len];
        stream.read_exact(&mut query).await?;
        let Some(answer) = self.answer(&query).await else { return Ok(()) };
        let len = u16::try_from(answer.len().min(MAX_DNS_MESSAGE_BYTES)).unwrap_or(u16::MAX);
        stream.write_u16(len).await?;
        stream.write_all(answer.get(..usize::from(len)).unwrap_or(&answer)).await
    }

    /// The answer to a query; `None` if it is so broken that it cannot be answered.
    async fn answer(&self, query: &[u8]) -> Option<Vec<u8>> {
        if !message::is_query(query) {
            return None;
        }
        let question = Question::parse(query);
        if let Some(question) = &question
            && let Some(answer) = self.known(question)
        {
            return Some(question.reply(query, &answer));
        }
        match &self.names {
            Some(names) => self.ask_by_the_rules(names, question?, query).await,
            None => match forward::forward(query, &self.upstreams).await {
                Some(answer) => Some(answer),
                None => message::failure(query, SERVFAIL),
            },
        }
    }

    /// For a container that may not connect to everything: nothing but the question is passed on, and what its name has can be connected
    /// to before the answer is given.
    async fn ask_by_the_rules(&self, names: &Names, question: Question, query: &[u8]) -> Option<Vec<u8>> {
        let Some(rules) = names.may_ask(&question.name) else {
            tracing::debug!(name = question.name, "no rule has this name");
            return message::failure(query, NXDOMAIN);
        };
        let bare = question.bare(query)?;
        let Some(answer) = forward::forward(&bare, &self.upstreams).await else {
            return message::failure(query, SERVFAIL);
        };
        match names.learn(&rules, &message::addresses(&answer)).await {
            Ok(()) => Some(answer),
            Err(error) => {
                tracing::warn!(%error, name = question.name, "what a name has cannot be let through");
                message::failure(query, SERVFAIL)
            }
        }
    }

    /// What our own state says; `None` when it is somebody else's name.
    fn known(&self, question: &Question) -> Option<Answer> {
        match question.kind {
            Kind::A | Kind::Aaaa => {
                let addresses = self.addresses(&question.name)?;
                let wanted = |ip: &IpAddr| {
                    matches!((ip, question.kind), (IpAddr::V4(_), Kind::A) | (IpAddr::V6(_), Kind::Aaaa))
                };
                Some(Answer::Addresses(addresses.into_iter().filter(wanted).collect()))
            }
            Kind::Ptr => self.name_of(message::reverse_address(&question.name)?).map(Answer::Name),
            Kind::Other => self.addresses(&question.name).map(|_| Answer::Addresses(Vec::new())),
        }
    }

    fn addresses(&self, name: &str) -> Option<Vec<IpAddr>> {
        if HOST_NAMES.contains(&name) {
            return Some(vec![self.gateway]);
        }
        let all = self.home.containers().unwrap_or_default();
        let mut found = Vec::new();
        for container in all.iter().filter(|container| container.is_live()) {
            let config = container.config();
            let host = config.hostname_for(container.id());
            let named = name.eq_ignore_ascii_case(container.name())
                || name == container.short_id()
                || name == container.id();
            let hosted = name.eq_ignore_ascii_case(host)
                || (!config.domainname.is_empty()
                    && name.eq_ignore_ascii_case(&format!("{host}.{}", config.domainname)));
            if (named || hosted)
                && config.network == NetworkMode::Bridge
                && let Some(network) = &container.state().network
            {
                found.push(network.ip);
            }
        }
        (!found.is_empty()).then_some(found)
    }

    fn name_of(&self, ip: IpAddr) -> Option<String> {
        if ip == self.gateway {
            return HOST_NAMES.first().map(|name| (*name).to_owned());
        }
        let all = self.home.containers().ok()?;
        let has = |container: &&crate::Container| {
            container.state().network.as_ref().is_some_and(|net| net.ip == ip)
        };
        all.iter().find(has).map(|container| container.name().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::callers_testing;
    use crate::state::{NetworkState, Status};
    use crate::store::FileLock;
    use crate::store::tests::{config, home};

    fn running(home: &Home, name: &str, ip: &str) {
        let mut wish = config(name);
        wish.hostname = format!("{name}-host");
        let mut container = home.create(wish).unwrap();
        let lock = FileLock::try_take(&home.container_lock(container.id())).unwrap().unwrap();
        let network = NetworkState {
            ip: ip.parse().unwrap(),
            prefix_len: 16,
            gateway: "10.120.0.1".parse().unwrap(),
            mac: String::new(),
            tap: String::new(),
            bridge: String::new(),
        };
        let change = |state: &mut crate::ContainerState| {
            state.status = Status::Running;
            state.network = Some(network);
        };
        container.change_state(&lock, change).unwrap();
    }

    fn resolver(home: &Home) -> Resolver {
        Resolver {
            home: home.clone(),
            gateway: "10.120.0.1".parse().unwrap(),
            upstreams: Vec::new(),
            names: None,
        }
    }

    fn ask(resolver: &Resolver, name: &str, kind: Kind) -> Option<Answer> {
        resolver.known(&Question { name: name.to_owned(), kind, end: 0 })
    }

    #[test]
    fn containers_are_found_by_name_hostname_and_id() {
        let (_dir, home) = home();
        running(&home, "db", "10.120.0.7");
        home.create(config("stopped")).unwrap();
        let resolver = resolver(&home);
        let seven = Some(Answer::Addresses(vec!["10.120.0.7".parse().unwrap()]));
        let id = home.find("db").unwrap();
        for name in ["db", "DB", "db-host", id.short_id(), id.id()] {
            assert_eq!(ask(&resolver, name, Kind::A), seven, "{name}");
        }
        assert_eq!(
            ask(&resolver, "db", Kind::Aaaa),
            Some(Answer::Addresses(vec![])),
            "no such record, but ours"
        );
        for name in ["stopped", "example.org", ""] {
            assert_eq!(ask(&resolver, name, Kind::A), None, "{name}");
        }
        let host = Answer::Addresses(vec!["10.120.0.1".parse().unwrap()]);
        assert_eq!(ask(&resolver, "host.docker.internal", Kind::A), Some(host));
        assert_eq!(ask(&resolver, "7.0.120.10.in-addr.arpa", Kind::Ptr), Some(Answer::Name("db".into())));
        assert_eq!(ask(&resolver, "8.0.120.10.in-addr.arpa", Kind::Ptr), None);
    }

    #[tokio::test]
    async fn questions_are_answered_over_the_socket() {
        let (_dir, home) = home();
        running(&home, "db", "10.120.0.7");
        let (callers, port) = Callers::of_port(1027).unwrap();
        let _service = NameService::start(callers, resolver(&home));
        let call = || {
            let guest = callers_testing::call(&port);
            guest.set_nonblocking(true).unwrap();
            UnixStream::from_std(guest).unwrap()
        };
        let query = message::tests::query("db", 1);
        let mut stream = call();
        stream.write_u16(u16::try_from(query.len()).unwrap()).await.unwrap();
        stream.write_all(&query).await.unwrap();
        let len = stream.read_u16().await.unwrap();
        let mut answer = vec![0; usize::from(len)];
        stream.read_exact(&mut answer).await.unwrap();
        assert!(answer.ends_with(&[10, 120, 0, 7]));
        assert_eq!(answer[..2], query[..2]);
        let mut broken = call();
        broken.write_all(&[0, 3, 1, 2, 3]).await.unwrap();
        assert!(broken.read_u16().await.is_err(), "closed without an answer");
    }

    #[tokio::test]
    async fn without_servers_others_names_fail() {
        let (_dir, home) = home();
        let answer = resolver(&home).answer(&message::tests::query("example.org", 1)).await.unwrap();
        assert_eq!(answer[3] & 0x0f, 2, "SERVFAIL");
    }
}
