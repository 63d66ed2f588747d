//! What was done for requests that asked to be traced, kept until the supervisor takes it.
//!
//! Nothing is kept, and no clock is read, unless a request has the metadata [`TRACE_KEY`]. The steps of such a request are in a record of
//! its task; those of the child program that it starts come with the child's reports.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use hyper_protocol::rpc::agent::Span as Wire;
use hyper_protocol::{MAX_SPAN_NAME_BYTES, MAX_TRACE_SPANS, TRACE_KEY};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use ttrpc::r#async::TtrpcContext;

/// Most requests whose steps are kept; the oldest are dropped. The supervisor takes each at once.
const MAX_RECORDS: usize = 32;

tokio::task_local! {
    static RECORD: Arc<Mutex<Record>>;
}

/// A step, on the clock of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Step {
    pub name: String,
    pub start_ns: u64,
    pub duration_ns: u64,
}

/// The steps of one request, in the order of their beginnings.
#[derive(Debug, Default)]
struct Record {
    began_ns: u64,
    /// Each with the number of the step that it is part of, from 1; 0: none.
    steps: Vec<(Step, u32)>,
    /// Number of the innermost step that has not ended.
    open: u32,
}

impl Record {
    /// Adds a step; its number, if there is room for it.
    fn add(&mut self, mut step: Step) -> Option<u32> {
        if self.steps.len() >= MAX_TRACE_SPANS {
            return None;
        }
        step.name.truncate(step.name.floor_char_boundary(MAX_SPAN_NAME_BYTES));
        self.steps.push((step, self.open));
        u32::try_from(self.steps.len()).ok()
    }

    fn step(&mut self, number: u32) -> Option<&mut (Step, u32)> {
        self.steps.get_mut(usize::try_from(number).ok()?.checked_sub(1)?)
    }

    fn wire(&self) -> Vec<Wire> {
        let spans = self.steps.iter().map(|(step, parent)| Wire {
            name: step.name.clone(),
            start_ns: step.start_ns.saturating_sub(self.began_ns),
            duration_ns: step.duration_ns,
            parent: *parent,
            ..Wire::default()
        });
        spans.collect()
    }
}

/// A step that is being done; it ends when this is dropped.
#[derive(Debug)]
#[must_use = "the step ends when this is dropped"]
pub(crate) struct Span(Option<(Arc<Mutex<Record>>, u32)>);

impl Drop for Span {
    fn drop(&mut self) {
        let Some((record, number)) = self.0.take() else { return };
        let Ok(mut record) = record.lock() else { return };
        let Some((step, parent)) = record.step(number) else { return };
        step.duration_ns = now_ns().saturating_sub(step.start_ns);
        let parent = *parent;
        record.open = parent;
    }
}

/// Steps that follow each other; the last one ends when this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Steps(Option<Span>);

impl Steps {
    /// The step so far has ended, and this one begins.
    pub(crate) fn next(&mut self, name: &str) {
        self.0 = None;
        self.0 = Some(span(name));
    }
}

/// Whether the request of this task is traced.
pub(crate) fn is_on() -> bool {
    RECORD.try_with(|_| ()).is_ok()
}

/// Begins a step of the request of this task, if it is traced.
pub(crate) fn span(name: &str) -> Span {
    let begun = RECORD.try_with(|shared| {
        let mut record = shared.lock().ok()?;
        let number = record.add(Step { name: name.to_owned(), start_ns: now_ns(), duration_ns: 0 })?;
        record.open = number;
        Some((Arc::clone(shared), number))
    });
    Span(begun.ok().flatten())
}

/// Adds steps that a child program has done for the request of this task.
pub(crate) fn add(steps: Vec<Step>) {
    // Nobody asked when there is no record.
    let _ = RECORD.try_with(|record| {
        if let Ok(mut record) = record.lock() {
            for step in steps {
                record.add(step);
            }
        }
    });
}

/// Nanoseconds on the clock that all processes of the machine share.
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or_default())
}

/// A request that has been answered.
#[derive(Debug)]
struct Answered {
    trace: u64,
    call: &'static str,
    spans: Vec<Wire>,
}

/// The steps of requests that have been answered.
#[derive(Debug, Default)]
pub(crate) struct Traces(Mutex<VecDeque<Answered>>);

impl Traces {
    /// Does the work of a request, and keeps its steps if it asks for that.
    pub(crate) async fn record<T>(
        &self,
        context: &TtrpcContext,
        call: &'static str,
        work: impl Future<Output = T>,
    ) -> T {
        let trace = context.metadata.get(TRACE_KEY).and_then(|values| values.first());
        let Some(trace) = trace.and_then(|text| text.parse().ok()).filter(|trace| *trace != 0) else {
            return work.await;
        };
        let record = Arc::new(Mutex::new(Record { began_ns: now_ns(), ..Record::default() }));
        let whole = async {
            let _whole = span("guest");
            work.await
        };
        let done = RECORD.scope(Arc::clone(&record), whole).await;
        if let (Ok(mut answered), Ok(record)) = (self.0.lock(), record.lock()) {
            if answered.len() >= MAX_RECORDS {
                answered.pop_front();
            }
            answered.push_back(Answered { trace, call, spans: record.wire() });
        }
        done
    }

    /// Takes the steps of the oldest such request.
    pub(crate) fn take(&self, trace: u64, call: &str) -> Vec<Wire> {
        let Ok(mut answered) = self.0.lock() else { return Vec::new() };
        let place = answered.iter().position(|one| one.trace == trace && one.call == call);
        place.and_then(|place| answered.remove(place)).map(|one| one.spans).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asking(trace: &str) -> TtrpcContext {
        let metadata = [(TRACE_KEY.to_owned(), vec![trace.to_owned()])].into();
        TtrpcContext { metadata, ..TtrpcContext::default() }
    }

    #[tokio::test]
    async fn steps_are_nested_and_taken_once() {
        let traces = Traces::default();
        let work = async {
            let mut steps = Steps::default();
            steps.next("one");
            {
                let _inner = span("inner");
                tokio::task::yield_now().await;
                add(vec![Step { name: "child".into(), start_ns: now_ns(), duration_ns: 5 }]);
            }
            steps.next("two");
            assert!(is_on());
            7
        };
        assert_eq!(traces.record(&asking("9"), "X", work).await, 7);
        assert!(traces.take(8, "X").is_empty() && traces.take(9, "Y").is_empty());
        let spans = traces.take(9, "X");
        let shape: Vec<_> = spans.iter().map(|span| (span.name.as_str(), span.parent)).collect();
        assert_eq!(shape, [("guest", 0), ("one", 1), ("inner", 2), ("child", 3), ("two", 1)]);
        assert!(spans[1].duration_ns <= spans[0].duration_ns);
        assert!(traces.take(9, "X").is_empty(), "taken once");
    }

    #[tokio::test]
    async fn nothing_is_kept_for_who_does_not_ask() {
        let traces = Traces::default();
        for context in [TtrpcContext::default(), asking("0"), asking("x")] {
            traces.record(&context, "X", async { assert!(!is_on() && span("a").0.is_none()) }).await;
        }
        assert!(traces.0.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn records_and_steps_are_bounded() {
        let traces = Traces::default();
        let many = || async {
            for _ in 0..1000 {
                drop(span(&"ä".repeat(MAX_SPAN_NAME_BYTES)));
            }
        };
        for trace in 1..100 {
            traces.record(&asking(&trace.to_string()), "X", many()).await;
        }
        assert_eq!(traces.0.lock().unwrap().len(), MAX_RECORDS);
        let spans = traces.take(99, "X");
        assert_eq!(spans.len(), MAX_TRACE_SPANS);
        assert!(spans.iter().all(|span| span.name.len() <= MAX_SPAN_NAME_BYTES));
    }
}
