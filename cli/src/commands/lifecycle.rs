//! `stop`, `restart`, `kill`, `pause`, `unpause`, `rm`, `wait`, `rename`, `port`.

use std::time::Duration;

use hyper_sandbox::{Protocol, RemoveOptions, SandboxError, WaitCondition};

use crate::args::{KillArgs, NamesArgs, PortArgs, RenameArgs, RestartArgs, RmArgs, StopArgs};
use crate::context::{self, for_each};
use crate::error::CliError;
use crate::options::signal;
use crate::output;

/// What stands for "for ever" in Docker's `--time -1`: a year.
const FOR_EVER: Duration = Duration::from_secs(365 * 86_400);

fn patience(seconds: Option<i64>) -> Option<Duration> {
    seconds.map(|s| u64::try_from(s).map_or(FOR_EVER, Duration::from_secs))
}

/// `hyper stop`.
///
/// # Errors
/// Exit code 1 when one of them could not be stopped.
pub(crate) async fn stop(args: StopArgs) -> Result<i32, CliError> {
    let number = args.signal.as_deref().map(signal::parse).transpose()?;
    let timeout = patience(args.time);
    for_each(&args.containers, async |container| {
        let Some(number) = number else { return Ok(container.stop(timeout).await?) };
        // Another signal first, and then what `stop` does, with no time left for it.
        container.kill(number.unsigned_abs()).await?;
        let patience =
            timeout.unwrap_or_else(|| Duration::from_secs(u64::from(container.config().stop_timeout_s)));
        let _ = tokio::time::timeout(patience, container.wait(WaitCondition::NotRunning)).await;
        Ok(container.stop(Some(Duration::ZERO)).await?)
    })
    .await
}

/// `hyper restart`.
///
/// # Errors
/// Exit code 1 when one of them could not be restarted.
pub(crate) async fn restart(args: RestartArgs) -> Result<i32, CliError> {
    let timeout = patience(args.time);
    for_each(&args.containers, async |container| {
        container.restart(timeout).await.map_err(|error| CliError::from_chain(&error))
    })
    .await
}

/// `hyper kill`.
///
/// # Errors
/// Exit code 1 when one of them does not run.
pub(crate) async fn kill(args: KillArgs) -> Result<i32, CliError> {
    let number = signal::parse(&args.signal)?.unsigned_abs();
    for_each(&args.containers, async |container| Ok(container.kill(number).await?)).await
}

/// `hyper pause`.
///
/// # Errors
/// Exit code 1 when one of them does not run.
pub(crate) async fn pause(args: NamesArgs) -> Result<i32, CliError> {
    for_each(&args.containers, async |container| Ok(container.pause().await?)).await
}

/// `hyper unpause`.
///
/// # Errors
/// Exit code 1 when one of them is not paused.
pub(crate) async fn unpause(args: NamesArgs) -> Result<i32, CliError> {
    for_each(&args.containers, async |container| Ok(container.unpause().await?)).await
}

/// `hyper rm`.
///
/// # Errors
/// Exit code 1 when one of them runs, or is not there without `--force`.
pub(crate) async fn rm(args: RmArgs) -> Result<i32, CliError> {
    let options = RemoveOptions { force: args.force, volumes: args.volumes };
    let home = context::home()?;
    let mut code = 0;
    for name in &args.containers {
        let removed = match home.find(name) {
            Ok(container) => container.remove(options).await,
            Err(SandboxError::NoSuchContainer(_)) if args.force => continue,
            Err(error) => Err(error),
        };
        match removed {
            Ok(()) => output::line(name),
            Err(error) => {
                output::error(CliError::from(error));
                code = 1;
            }
        }
    }
    Ok(code)
}

/// `hyper wait`: prints the exit code of each, in order.
///
/// # Errors
/// Exit code 1 when one of them is not there.
pub(crate) async fn wait(args: NamesArgs) -> Result<i32, CliError> {
    let home = context::home()?;
    let mut code = 0;
    for name in &args.containers {
        let waited = match home.find(name) {
            Ok(container) => container.wait(WaitCondition::NotRunning).await,
            Err(error) => Err(error),
        };
        match waited {
            Ok(exit) => output::line(exit),
            Err(error) => {
                output::error(CliError::from(error));
                code = 1;
            }
        }
    }
    Ok(code)
}

/// `hyper rename`.
///
/// # Errors
/// When the name is taken or malformed.
pub(crate) fn rename(args: &RenameArgs) -> Result<i32, CliError> {
    context::home()?.find(&args.container)?.rename(&args.new_name)?;
    Ok(0)
}

/// `hyper port`.
///
/// # Errors
/// When the port that was asked for is not published.
pub(crate) fn port(args: &PortArgs) -> Result<i32, CliError> {
    let container = context::home()?.find(&args.container)?;
    let wanted = args.port.as_deref().map(wanted_port).transpose()?;
    let mut found = false;
    for port in &container.state().ports {
        let protocol = protocol(port.wish.protocol);
        let bound = std::net::SocketAddr::new(port.bound_ip, port.bound_port);
        match &wanted {
            None => output::line(format!("{}/{protocol} -> {bound}", port.wish.container_port)),
            Some(w) if *w == (port.wish.container_port, protocol) => output::line(bound),
            Some(_) => continue,
        }
        found = true;
    }
    match wanted {
        Some((number, protocol)) if !found => Err(CliError::failed(format!(
            "no public port '{number}/{protocol}' published for {}",
            args.container
        ))),
        _ => Ok(0),
    }
}

fn wanted_port(text: &str) -> Result<(u16, &'static str), CliError> {
    let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let bad = || CliError::failed(format!("invalid port {text:?}: give PORT[/tcp|udp]"));
    let protocol = match protocol {
        "tcp" => "tcp",
        "udp" => "udp",
        _ => return Err(bad()),
    };
    Ok((number.parse().map_err(|_| bad())?, protocol))
}

/// The word for a protocol.
pub(crate) fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    }
}
