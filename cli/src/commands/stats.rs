//! `stats`.

use std::time::Duration;

use hyper_sandbox::{Container, ContainerStats};
use serde_json::{Value, json};

use crate::args::StatsArgs;
use crate::context;
use crate::error::CliError;
use crate::format::{Column, Format};
use crate::options::quantity::{human, human_binary};
use crate::output;

const COLUMNS: [Column; 8] = [
    Column { heading: "CONTAINER ID", key: "ID" },
    Column { heading: "NAME", key: "Name" },
    Column { heading: "CPU %", key: "CPUPerc" },
    Column { heading: "MEM USAGE / LIMIT", key: "MemUsage" },
    Column { heading: "MEM %", key: "MemPerc" },
    Column { heading: "NET I/O", key: "NetIO" },
    Column { heading: "BLOCK I/O", key: "BlockIO" },
    Column { heading: "PIDS", key: "PIDs" },
];

/// Time between two samples.
const INTERVAL: Duration = Duration::from_secs(1);

/// `hyper stats`.
///
/// # Errors
/// When a named container is not there; with one sample, when it does not run.
pub(crate) async fn stats(args: StatsArgs) -> Result<i32, CliError> {
    let format = Format::parse(args.format.as_deref())?;
    let mut before: Vec<(String, ContainerStats)> = Vec::new();
    loop {
        let containers = chosen(&args)?;
        let mut rows = Vec::new();
        let mut samples = Vec::new();
        if before.is_empty() {
            // Two samples make one figure of processor use.
            before = sample(&containers).await;
            tokio::time::sleep(INTERVAL).await;
        }
        for (id, now) in sample(&containers).await {
            let Some(container) = containers.iter().find(|c| c.id() == id) else { continue };
            let earlier = before.iter().find(|(other, _)| *other == id).map(|(_, s)| s);
            rows.push(row(container, &now, earlier, args.no_trunc));
            samples.push((id, now));
        }
        let text = format.render(&COLUMNS, &rows)?;
        if args.no_stream {
            output::bytes_out(text.as_bytes());
            return Ok(0);
        }
        // Home and clear on a terminal, as top does; a pipe gets one block after the other.
        let clear = if output::stdout_is_terminal() { "\x1b[H\x1b[2J" } else { "" };
        output::bytes_out(format!("{clear}{text}").as_bytes());
        before = samples;
        tokio::time::sleep(INTERVAL).await;
    }
}

fn chosen(args: &StatsArgs) -> Result<Vec<Container>, CliError> {
    let home = context::home()?;
    if args.containers.is_empty() {
        let mut all = home.containers()?;
        all.retain(|c| args.all || c.state().status.is_live());
        return Ok(all);
    }
    Ok(args.containers.iter().map(|name| home.find(name)).collect::<Result<_, _>>()?)
}

/// One sample of each that runs; one that has just ended is left out.
async fn sample(containers: &[Container]) -> Vec<(String, ContainerStats)> {
    let mut samples = Vec::new();
    for container in containers.iter().filter(|c| c.state().status.is_live()) {
        match container.stats().await {
            Ok(stats) => samples.push((container.id().to_owned(), stats)),
            Err(error) => tracing::debug!(container = container.short_id(), %error, "no sample"),
        }
    }
    samples
}

#[expect(clippy::cast_precision_loss, reason = "percentages of two digits")]
fn row(
    container: &Container,
    now: &ContainerStats,
    earlier: Option<&ContainerStats>,
    no_trunc: bool,
) -> Value {
    let cpu = earlier.map_or(0.0, |then| {
        let wall = now.sampled.unix_ns().saturating_sub(then.sampled.unix_ns()).max(1) as f64;
        now.cpu_usage_ns.saturating_sub(then.cpu_usage_ns) as f64 / wall * 100.0
    });
    let used = now.memory_usage_bytes.saturating_sub(now.memory_inactive_file_bytes);
    let share = used as f64 / now.memory_limit_bytes.max(1) as f64 * 100.0;
    let received: u64 = now.networks.iter().map(|n| n.rx_bytes).sum();
    let sent: u64 = now.networks.iter().map(|n| n.tx_bytes).sum();
    json!({
        "ID": if no_trunc { container.id() } else { container.short_id() },
        "Container": container.id(),
        "Name": container.name(),
        "CPUPerc": format!("{cpu:.2}%"),
        "MemUsage": format!("{} / {}", human_binary(used), human_binary(now.memory_limit_bytes)),
        "MemPerc": format!("{share:.2}%"),
        "NetIO": format!("{} / {}", human(received), human(sent)),
        "BlockIO": format!("{} / {}", human(now.block_read_bytes), human(now.block_write_bytes)),
        "PIDs": now.pids.to_string(),
    })
}
