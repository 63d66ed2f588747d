//! What a pod uses: for the Sandbox API, and as Prometheus text on a Unix socket in its run directory, when that is configured.
//!
//! Nothing here can end the pod: a call has a deadline, connections are counted and bounded, and what goes wrong is a line in the log.

use std::fmt::Write;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use hyper_sandbox::ContainerStats;
use hyper_sandbox::pod::Sandbox;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Name of the socket in the run directory.
pub(crate) const SOCKET: &str = "metrics";
/// Connections at a time; more wait.
const MAX_CONNECTIONS: usize = 4;
/// How long one may take, from its first byte to its last.
const CONNECTION_LIMIT: Duration = Duration::from_secs(10);
/// How long the guest may take to answer for one container.
const STATS_LIMIT: Duration = Duration::from_secs(2);
/// Longest request, bytes: what it says makes no difference.
const MAX_REQUEST_BYTES: usize = 4096;
/// Pause after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// The use of each container that answers, by id.
pub(crate) async fn of_containers(sandbox: &Sandbox) -> Vec<(String, ContainerStats)> {
    let mut all = Vec::new();
    for id in sandbox.containers() {
        // One that is being made or has gone meanwhile has none.
        if let Ok(Ok(stats)) = timeout(STATS_LIMIT, sandbox.stats(&id)).await {
            all.push((id, stats));
        }
    }
    all
}

/// The use of a pod: sums over its containers, which have the network in common.
pub(crate) fn sum(all: &[(String, ContainerStats)]) -> ContainerStats {
    let mut sum = ContainerStats::default();
    for (_, one) in all {
        sum.cpu_usage_ns = sum.cpu_usage_ns.saturating_add(one.cpu_usage_ns);
        sum.cpu_user_ns = sum.cpu_user_ns.saturating_add(one.cpu_user_ns);
        sum.cpu_system_ns = sum.cpu_system_ns.saturating_add(one.cpu_system_ns);
        sum.memory_usage_bytes = sum.memory_usage_bytes.saturating_add(one.memory_usage_bytes);
        sum.memory_inactive_file_bytes =
            sum.memory_inactive_file_bytes.saturating_add(one.memory_inactive_file_bytes);
        sum.pids = sum.pids.saturating_add(one.pids);
        sum.block_read_bytes = sum.block_read_bytes.saturating_add(one.block_read_bytes);
        sum.block_write_bytes = sum.block_write_bytes.saturating_add(one.block_write_bytes);
        sum.oom_kills = sum.oom_kills.saturating_add(one.oom_kills);
        if sum.networks.is_empty() {
            sum.networks.clone_from(&one.networks);
        }
    }
    sum
}

/// As Prometheus reads it (text format 0.0.4). Ids need no escapes: they are of `[a-zA-Z0-9_.-]`.
pub(crate) fn text(all: &[(String, ContainerStats)]) -> String {
    type Value = fn(&ContainerStats) -> f64;
    #[expect(clippy::cast_precision_loss, reason = "Prometheus has no other numbers")]
    let metrics: [(&str, &str, &str, Value); 5] = [
        ("hyper_container_cpu_seconds_total", "counter", "Processor time.", |s| s.cpu_usage_ns as f64 / 1e9),
        ("hyper_container_memory_bytes", "gauge", "Memory, with the page cache.", |s| {
            s.memory_usage_bytes as f64
        }),
        ("hyper_container_processes", "gauge", "Processes.", |s| s.pids as f64),
        ("hyper_container_oom_kills_total", "counter", "Processes killed for want of memory.", |s| {
            s.oom_kills as f64
        }),
        ("hyper_container_block_bytes_total", "counter", "Bytes read and written.", |s| {
            s.block_read_bytes.saturating_add(s.block_write_bytes) as f64
        }),
    ];
    let mut text = String::new();
    // Writing to a String does not fail.
    let _ = writeln!(text, "# HELP hyper_containers Containers of the pod.\n# TYPE hyper_containers gauge");
    let _ = writeln!(text, "hyper_containers {}", all.len());
    for (name, kind, help, value) in metrics {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (id, stats) in all {
            let _ = writeln!(text, "{name}{{container=\"{id}\"}} {}", value(stats));
        }
    }
    text
}

/// Serves the text on a socket until the sandbox is gone or the task is aborted.
///
/// # Errors
/// The socket cannot be made.
pub(crate) fn serve(sandbox: Weak<Sandbox>, run_dir: &Path) -> std::io::Result<JoinHandle<()>> {
    let listener = UnixListener::bind(run_dir.join(SOCKET))?;
    Ok(tokio::spawn(accept(listener, move || {
        let sandbox = sandbox.upgrade();
        async move {
            match sandbox {
                Some(sandbox) => text(&of_containers(&sandbox).await),
                None => String::new(),
            }
        }
    })))
}

async fn accept<F: Future<Output = String> + Send + 'static>(
    listener: UnixListener,
    text: impl Fn() -> F + Send + Sync + 'static,
) {
    let (text, places) = (Arc::new(text), Arc::new(Semaphore::new(MAX_CONNECTIONS)));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let text = Arc::clone(&text);
                tokio::spawn(async move {
                    let answered = timeout(CONNECTION_LIMIT, answer(stream, text())).await;
                    tracing::debug!(?answered, "metrics");
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "metrics cannot be asked for");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One request of HTTP, whatever it asks for, and its answer.
async fn answer(mut stream: UnixStream, text: impl Future<Output = String>) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        if request.len() >= MAX_REQUEST_BYTES {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        request.push(stream.read_u8().await?);
    }
    let text = text.await;
    let head = format!(
        "HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\n\r\n",
        text.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(cpu_usage_ns: u64, memory_usage_bytes: u64) -> ContainerStats {
        ContainerStats { cpu_usage_ns, memory_usage_bytes, pids: 2, ..ContainerStats::default() }
    }

    #[test]
    fn pods_are_the_sum_of_their_containers() {
        let all = [("a".to_owned(), stats(1_500_000_000, 10)), ("b".to_owned(), stats(u64::MAX, 20))];
        let pod = sum(&all);
        assert_eq!((pod.cpu_usage_ns, pod.memory_usage_bytes, pod.pids), (u64::MAX, 30, 4));
        let text = text(&all);
        for line in [
            "hyper_containers 2",
            "hyper_container_cpu_seconds_total{container=\"a\"} 1.5",
            "# TYPE hyper_container_memory_bytes gauge",
            "hyper_container_memory_bytes{container=\"b\"} 20",
        ] {
            assert!(text.lines().any(|have| have == line), "{line}: {text}");
        }
    }

    async fn ask(path: &Path, request: &[u8]) -> String {
        let mut stream = UnixStream::connect(path).await.unwrap();
        // A request that is cut off is answered before its end.
        let _ = stream.write_all(request).await;
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        answer
    }

    #[tokio::test]
    async fn requests_are_bounded_and_answered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SOCKET);
        let listener = UnixListener::bind(&path).unwrap();
        let serving = tokio::spawn(accept(listener, || async { "x 1\n".to_owned() }));
        // More than there are places, all of them silent until they are gone.
        for _ in 0..=MAX_CONNECTIONS {
            drop(UnixStream::connect(&path).await.unwrap());
        }
        assert_eq!(ask(&path, &[b'x'; MAX_REQUEST_BYTES + 1]).await, "");
        let answer = ask(&path, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.0 200 OK\r\n") && answer.ends_with("\r\n\r\nx 1\n"), "{answer}");
        serving.abort();
    }
}
