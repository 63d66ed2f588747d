//! `logs`.

use hyper_sandbox::{LogOptions, LogSource, Timestamp};

use crate::args::LogsArgs;
use crate::context;
use crate::error::CliError;
use crate::options::time;
use crate::output;

/// `hyper logs`.
///
/// # Errors
/// When the container is not there or its log cannot be read.
pub(crate) async fn logs(args: LogsArgs) -> Result<i32, CliError> {
    let now = Timestamp::now();
    let point = |text: &Option<String>| text.as_deref().map(|t| time::parse(t, now)).transpose();
    let tail = match args.tail.as_str() {
        "all" => None,
        text if text.starts_with('-') => None,
        text => Some(
            text.parse()
                .map_err(|_| CliError::failed(format!("invalid --tail {text:?}: give a number or all")))?,
        ),
    };
    let options = LogOptions {
        follow: args.follow,
        tail,
        since: point(&args.since)?,
        until: point(&args.until)?,
        no_stdout: false,
        no_stderr: false,
    };
    let mut stream = context::home()?.find(&args.container)?.logs(options)?;
    while let Some(entry) = stream.next().await? {
        let mut bytes = Vec::with_capacity(entry.bytes.len() + 32);
        if args.timestamps {
            bytes.extend_from_slice(entry.time.to_string().as_bytes());
            bytes.push(b' ');
        }
        bytes.extend_from_slice(&entry.bytes);
        match entry.source {
            LogSource::Stdout => output::bytes_out(&bytes),
            LogSource::Stderr => output::bytes_err(&bytes),
        }
    }
    Ok(0)
}
