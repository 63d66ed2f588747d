//! Events: in order, each until containerd has taken it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use containerd_shim_protos::protobuf::{Message, MessageFull};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::ttrpc::context;
use hyper_sandbox::Timestamp;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::encode;

/// Events that wait while containerd is away. More are dropped: when it comes back it asks for the state of every task.
const QUEUE_EVENTS: usize = 4096;
/// How long containerd may take to take one.
const FORWARD_LIMIT: Duration = Duration::from_secs(10);
/// Pauses between attempts while it is away.
const PAUSES: [Duration; 4] =
    [Duration::from_millis(50), Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(3)];
/// How long the last events may take when the shim ends.
const LAST_LIMIT: Duration = Duration::from_secs(5);
/// How often that is looked at.
const LOOK_PAUSE: Duration = Duration::from_millis(10);

/// Where events are put. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    queue: mpsc::Sender<Envelope>,
    /// Events that containerd has not taken yet.
    pending: Arc<AtomicUsize>,
    namespace: String,
}

/// The task that delivers them.
#[derive(Debug)]
pub(crate) struct Delivery {
    task: JoinHandle<()>,
    pending: Arc<AtomicUsize>,
}

impl Publisher {
    /// Starts to deliver to containerd's ttrpc socket.
    pub(crate) fn start(socket: &str, namespace: &str) -> (Self, Delivery) {
        let (queue, events) = mpsc::channel(QUEUE_EVENTS);
        let address = if socket.contains("://") { socket.to_owned() } else { format!("unix://{socket}") };
        let pending = Arc::new(AtomicUsize::new(0));
        let task = tokio::spawn(deliver(address, events, Arc::clone(&pending)));
        let publisher = Self { queue, pending: Arc::clone(&pending), namespace: namespace.to_owned() };
        (publisher, Delivery { task, pending })
    }

    /// containerd's namespace.
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Puts an event into the queue.
    pub(crate) fn publish<M: MessageFull>(&self, topic: &str, event: &M) {
        let event = match encode::any(event) {
            Ok(event) => event,
            Err(error) => {
                tracing::error!(topic, %error, "an event cannot be encoded");
                return;
            }
        };
        let mut envelope = Envelope::new();
        envelope.timestamp = encode::time(Timestamp::now());
        envelope.namespace.clone_from(&self.namespace);
        envelope.topic = topic.to_owned();
        envelope.event = Some(event).into();
        self.pending.fetch_add(1, Ordering::SeqCst);
        if self.queue.try_send(envelope).is_err() {
            self.pending.fetch_sub(1, Ordering::SeqCst);
            tracing::error!(topic, "an event is dropped");
        }
    }
}

impl Delivery {
    /// Waits until the last event has been taken, for a while.
    pub(crate) async fn finish(self) {
        let taken = async {
            while self.pending.load(Ordering::SeqCst) > 0 {
                sleep(LOOK_PAUSE).await;
            }
        };
        if timeout(LAST_LIMIT, taken).await.is_err() {
            tracing::warn!("containerd does not take the last events");
        }
        self.task.abort();
    }
}

async fn deliver(address: String, mut events: mpsc::Receiver<Envelope>, pending: Arc<AtomicUsize>) {
    let mut client = None;
    while let Some(envelope) = events.recv().await {
        let mut request = ForwardRequest::new();
        tracing::debug!(topic = envelope.topic, bytes = envelope.compute_size(), "event");
        request.envelope = Some(envelope).into();
        let mut pauses = PAUSES.iter();
        while let Err(error) = forward(&address, &mut client, &request).await {
            client = None;
            let pause = pauses.next().or(PAUSES.last()).copied().unwrap_or(FORWARD_LIMIT);
            tracing::debug!(%error, "containerd is away");
            sleep(pause).await;
        }
        pending.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn forward(
    address: &str,
    client: &mut Option<EventsClient>,
    request: &ForwardRequest,
) -> containerd_shim_protos::ttrpc::Result<()> {
    if client.is_none() {
        *client = Some(EventsClient::new(Client::connect(address).await?));
    }
    if let Some(client) = client {
        client.forward(context::with_duration(FORWARD_LIMIT), request).await?;
    }
    Ok(())
}
