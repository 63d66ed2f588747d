//! `top`.

use std::time::Duration;

use hyper_sandbox::Timestamp;

use crate::args::TopArgs;
use crate::context;
use crate::error::CliError;
use crate::format::render_table;
use crate::options::time;
use crate::output;

/// `hyper top`.
///
/// # Errors
/// When the container does not run.
pub(crate) async fn top(args: &TopArgs) -> Result<i32, CliError> {
    let container = context::home()?.find(&args.container)?;
    let processes = container.top().await?;
    let headings = ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"].map(str::to_owned);
    let now = Timestamp::now();
    let rows = processes.into_iter().map(|p| {
        let alive = time::since(p.started, now).as_millis().max(1);
        let share = u128::from(p.cpu_ms) * 100 / alive;
        let started = p.started.to_string();
        let clock = started.get(11..16).unwrap_or("?").to_owned();
        vec![
            p.user,
            p.pid.to_string(),
            p.ppid.to_string(),
            share.to_string(),
            clock,
            p.tty,
            cpu_time(Duration::from_millis(p.cpu_ms)),
            p.command,
        ]
    });
    output::bytes_out(render_table(headings.to_vec(), rows.collect()).as_bytes());
    Ok(0)
}

fn cpu_time(time: Duration) -> String {
    let s = time.as_secs();
    format!("{:02}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
}
