//! Spans of what guests do, below those of the requests that made them do it.
//!
//! ```text
//! call (span `agent`) -- request with TRACE_KEY --> agent: keeps its steps
//!   | <-- answer ----------------------------------|
//!   | .. TakeSpans, in the background: nobody waits for it; two seconds, a few at a time
//!   \- GuestSpan, placed within the span --> whoever exports spans
//! ```
//! Without somebody who exports them ([`trace_guests`]) no request asks for it, and guests keep nothing.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use hyper_protocol::rpc::agent::{Span as Wire, TakeSpansRequest};
use hyper_protocol::{MAX_SPAN_NAME_BYTES, MAX_TRACE_SPANS, TRACED_CALLS};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::Instrument;

use crate::launch::{Agent, scaled_ms, untraced};

/// Most requests whose steps are on their way from guests; those of further ones are dropped.
const MAX_PENDING: u32 = 16;
/// How long the agent may take to hand over steps, ms.
const TAKE_MS: u64 = 2_000;

/// Something that was done in a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestSpan {
    /// What, printable, at most [`MAX_SPAN_NAME_BYTES`] long.
    pub name: String,
    /// When it began: not before the request's span.
    pub start: SystemTime,
    /// When it ended: not after the request's span.
    pub end: SystemTime,
    /// Index of the one that it is part of, less than its own; `None`: the request's span.
    pub parent: Option<usize>,
}

/// Exports what guests did, below the span that it was made for.
pub type Export = Box<dyn FnOnce(Vec<GuestSpan>) + Send>;

/// Gives the way to export what is below a span; `None` for a span that is not exported itself. Called often: it must be quick.
pub type Exporter = fn(&tracing::Span) -> Option<Export>;

static EXPORTER: OnceLock<Exporter> = OnceLock::new();
static PENDING: Semaphore = Semaphore::const_new(MAX_PENDING as usize);
static LOST: AtomicU64 = AtomicU64::new(0);

/// Has guests be asked what they do, from now on, in all sandboxes of this process. The first one counts.
pub fn trace_guests(exporter: Exporter) {
    // There is one subscriber of spans in a process, and so one of these.
    let _ = EXPORTER.set(exporter);
}

/// Waits until what guests did has been exported, at most as long as given; how many requests are lacking for good.
pub async fn settle_guest_spans(limit: Duration) -> u64 {
    // Who has it all is the last one; nothing is begun after that.
    drop(timeout(limit, PENDING.acquire_many(MAX_PENDING)).await);
    LOST.load(Ordering::Relaxed)
}

/// What a request that is made now has as its trace: the number of the span that it is made in.
pub(crate) fn key() -> Option<u64> {
    let exporter = EXPORTER.get()?;
    let span = tracing::Span::current();
    drop(exporter(&span)?);
    span.id().map(|id| id.into_u64())
}

/// The answer of an agent, in a span of its own; what the agent did is exported below it. To be called where the request was made.
pub(crate) async fn traced<T>(
    agent: &Arc<Agent>,
    call: &'static str,
    answer: impl Future<Output = ttrpc::Result<T>>,
) -> ttrpc::Result<T> {
    let key = key();
    let span = tracing::debug_span!("agent", call, otel.name = tracing::field::Empty);
    if key.is_some() {
        span.record("otel.name", call);
    }
    let exported = key.filter(|_| TRACED_CALLS.contains(&call)).zip(EXPORTER.get().and_then(|to| to(&span)));
    let start = SystemTime::now();
    let answer = answer.instrument(span).await;
    if let Some((trace, export)) = exported {
        take(Arc::clone(agent), trace, call, (start, SystemTime::now()), export);
    }
    answer
}

/// Fetches what the agent did and exports it, in the background.
fn take(
    agent: Arc<Agent>,
    trace: u64,
    call: &'static str,
    request: (SystemTime, SystemTime),
    export: Export,
) {
    let Ok(place) = PENDING.try_acquire() else {
        LOST.fetch_add(1, Ordering::Relaxed);
        return;
    };
    tokio::spawn(async move {
        let asked = TakeSpansRequest { trace, call: call.to_owned(), ..Default::default() };
        match agent.rpc.take_spans(untraced(scaled_ms(TAKE_MS)), &asked).await {
            Ok(answer) => export(placed(&answer.spans, request)),
            Err(error) => {
                LOST.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(%error, call, "what the guest did is not known");
            }
        }
        drop(place);
    });
}

/// Puts what a guest says into the time of its request. Its clock is not trusted: nothing begins before the request or what it is part
/// of, or ends after that. The way there is taken to be as long as the way back.
fn placed(spans: &[Wire], (start, end): (SystemTime, SystemTime)) -> Vec<GuestSpan> {
    let whole = end.duration_since(start).unwrap_or_default();
    let spans = spans.get(..spans.len().min(MAX_TRACE_SPANS)).unwrap_or_default();
    let guest = spans.first().map_or(0, |span| span.start_ns.saturating_add(span.duration_ns));
    let way = whole.saturating_sub(Duration::from_nanos(guest)) / 2;
    let mut placed: Vec<(GuestSpan, Duration, Duration)> = Vec::with_capacity(spans.len());
    for span in spans {
        let parent = usize::try_from(span.parent).ok().and_then(|number| number.checked_sub(1));
        let parent = parent.filter(|index| *index < placed.len());
        let (least, most) =
            parent.and_then(|index| placed.get(index)).map_or((Duration::ZERO, whole), |p| (p.1, p.2));
        let from = way.saturating_add(Duration::from_nanos(span.start_ns)).clamp(least, most);
        let to = from.saturating_add(Duration::from_nanos(span.duration_ns)).min(most);
        let at = |offset| start.checked_add(offset).unwrap_or(start);
        placed.push((GuestSpan { name: name(&span.name), start: at(from), end: at(to), parent }, from, to));
    }
    placed.into_iter().map(|(span, _, _)| span).collect()
}

/// A name that is fit for logs and pages.
fn name(text: &str) -> String {
    let fine = |letter: &char| letter.is_ascii_graphic() || *letter == ' ';
    text.chars().take(MAX_SPAN_NAME_BYTES).filter(fine).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(name: &str, start_ns: u64, duration_ns: u64, parent: u32) -> Wire {
        Wire { name: name.into(), start_ns, duration_ns, parent, ..Wire::default() }
    }

    fn offsets(spans: &[Wire], whole_ns: u64) -> Vec<(u128, u128, Option<usize>)> {
        let start = SystemTime::UNIX_EPOCH;
        let placed = placed(spans, (start, start + Duration::from_nanos(whole_ns)));
        let since = |time: SystemTime| time.duration_since(start).unwrap().as_nanos();
        placed.into_iter().map(|span| (since(span.start), since(span.end), span.parent)).collect()
    }

    #[test]
    fn spans_lie_in_the_middle_of_the_request() {
        let spans = [wire("guest", 0, 60, 0), wire("one", 10, 20, 1), wire("two", 30, 30, 1)];
        assert_eq!(offsets(&spans, 100), [(20, 80, None), (30, 50, Some(0)), (50, 80, Some(0))]);
    }

    #[test]
    fn clocks_of_guests_are_not_trusted() {
        let spans = [
            wire("guest", 50, u64::MAX, 9),
            wire("late", u64::MAX, u64::MAX, 1),
            wire("own parent", 0, 1, 3),
            wire("outside", 90, 90, 2),
        ];
        let found = offsets(&spans, 100);
        assert_eq!(found, [(50, 100, None), (100, 100, Some(0)), (0, 1, None), (100, 100, Some(1))]);
        // A clock that was set back in between gives a request no time at all.
        let (now, before) = (SystemTime::now(), SystemTime::UNIX_EPOCH);
        let none = placed(&spans, (now, before));
        assert!(none.iter().all(|span| (span.start, span.end) == (now, now)));
    }

    #[test]
    fn what_guests_send_is_bounded() {
        let many = vec![wire(&"x\n\u{1b}[2Jä".repeat(1000), 0, 1, 0); 10_000];
        let found = placed(&many, (SystemTime::UNIX_EPOCH, SystemTime::now()));
        assert_eq!(found.len(), MAX_TRACE_SPANS);
        let fine = |span: &GuestSpan| span.name.len() <= MAX_SPAN_NAME_BYTES && !span.name.contains('\u{1b}');
        assert!(found.iter().all(fine));
    }
}
