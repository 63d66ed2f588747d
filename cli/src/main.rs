//! The `hyper` command line: argv in, calls to the sandbox and image crates out, an exit code.

mod args;
mod commands;
mod context;
mod error;
mod format;
mod options;
mod output;
mod session;
mod terminal;

use std::process::ExitCode;

use clap::Parser;

use crate::args::Cli;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return misused(&error),
    };
    log_to_stderr(cli.debug);
    std::panic::set_hook(Box::new(give_up));
    match &cli.verb {
        args::Verb::Supervise { id } => return finish(commands::supervise(id)),
        args::Verb::Keep { anchor } => return finish(commands::keep(*anchor)),
        // While this process has one thread.
        verb if verb.starts_machines() && hyper_sandbox::rootless::is_needed() => {
            return finish(Err(commands::enter(verb)));
        }
        _ => {}
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::error(format!("cannot start: {error}"));
            return exit_code(error::CODE_OURS);
        }
    };
    let outcome = runtime.block_on(commands::dispatch(cli.verb));
    // A thread may still be in a read of standard input; the process ends without it.
    runtime.shutdown_background();
    finish(outcome)
}

/// What libraries give up on, such as a host that has no more threads for them, is a line and an exit code, too.
#[expect(clippy::exit, reason = "there is nobody left to return to")]
fn give_up(panic: &std::panic::PanicHookInfo<'_>) {
    let what = panic.payload_as_str().unwrap_or("it is not known why").replace('\n', " ");
    let place = panic.location().map(|at| format!(" ({}:{})", at.file(), at.line())).unwrap_or_default();
    output::error(format!("cannot go on: {what}{place}"));
    std::process::exit(error::CODE_OURS);
}

fn finish(outcome: Result<i32, error::CliError>) -> ExitCode {
    exit_code(outcome.unwrap_or_else(|error| {
        output::error(&error);
        error.code
    }))
}

fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}

/// Help and version go to standard output with code 0; a misused flag is one line and Docker's code 125.
fn misused(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind;
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        output::bytes_out(error.to_string().as_bytes());
        return ExitCode::SUCCESS;
    }
    if matches!(error.kind(), ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand) {
        output::bytes_err(error.to_string().as_bytes());
        return exit_code(error::CODE_FAILED);
    }
    let text = error.to_string();
    let lines =
        text.lines().map(str::trim).take_while(|l| !l.starts_with("Usage:") && !l.starts_with("For more"));
    let line: Vec<&str> = lines.filter(|l| !l.is_empty()).collect();
    let line = line.join(" ");
    output::error(format!("{}: see 'hyper --help'", line.strip_prefix("error: ").unwrap_or(&line)));
    exit_code(error::CODE_OURS)
}

fn log_to_stderr(debug: u8) {
    let level = match debug {
        0 => "warn",
        1 => "debug",
        _ => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("HYPER_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
}
