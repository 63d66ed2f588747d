//! `run` and `create`.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use hyper_sandbox::{Container, RemoveOptions, Snapshot, WaitCondition};

use super::{configure, provide};
use crate::args::{ContainerOptions, CreateArgs, RunArgs};
use crate::context;
use crate::error::{CODE_OURS, CliError};
use crate::output;
use crate::session::{Ended, Manners};
use crate::terminal::DetachKeys;

/// `hyper run`.
///
/// # Errors
/// Our own failures with 125; 126 and 127 when the command cannot be run.
pub(crate) async fn run(args: RunArgs) -> Result<i32, CliError> {
    let streams = Streams::of(&args)?;
    let keys = args.detach_keys.as_deref().map_or_else(|| Ok(DetachKeys::default()), DetachKeys::parse)?;
    let terminal = match &args.options.from_snapshot {
        Some(name) => saved(name)?.saved_config().process.terminal,
        None => args.options.tty,
    };
    let manners = Manners {
        stdin: streams.stdin && args.options.interactive,
        terminal,
        sig_proxy: args.sig_proxy && !terminal,
        detach_keys: keys,
    };
    if !args.detach {
        manners.check()?;
    }
    let container = make(&args.options, !args.detach).await.map_err(|e| e.with_code(CODE_OURS))?;
    if args.detach {
        if let Err(error) = container.start(None).await {
            return Err(given_up(&container, &args.options, error).await);
        }
        output::line(container.id());
        return Ok(0);
    }
    let attach = manners.attach_options(streams.stdout, streams.stderr);
    let attached = match container.start(Some(attach)).await {
        Ok(attached) => attached,
        Err(error) => return Err(given_up(&container, &args.options, error).await),
    };
    let Some(attached) = attached else {
        return Err(CliError::usage("the container runs but cannot be attached to"));
    };
    match manners.converse(attached).await? {
        Ended::Exit(code) => {
            if args.options.rm
                && let Err(error) = container.wait(WaitCondition::Removed).await
            {
                // The job is done, and its code is what counts; that something is left is said.
                output::error(CliError::from(error));
            }
            Ok(i32::from(code))
        }
        Ended::Detached => Ok(0),
        Ended::Lost => Err(lost(&container)),
    }
}

/// `hyper create`.
///
/// # Errors
/// Exit code 125 for bad flags, 1 for the rest.
pub(crate) async fn create(args: CreateArgs) -> Result<i32, CliError> {
    // Docker's `create -i` counts as foreground: the first `start -i` that ends its input ends the container's.
    let container = make(&args.options, true).await?;
    output::line(container.id());
    Ok(0)
}

/// What the caller is told when the supervisor of a container went away under it.
pub(crate) fn lost(container: &Container) -> CliError {
    let mut again = container.clone();
    let why = match again.refresh() {
        Ok(()) if !again.state().error.is_empty() => again.state().error.clone(),
        _ => format!("its supervisor went away: see {}", container.dir().join("supervisor.log").display()),
    };
    CliError::usage(format!("container {} was lost: {why}", container.short_id()))
}

async fn given_up(
    container: &Container,
    options: &ContainerOptions,
    error: hyper_sandbox::StartError,
) -> CliError {
    let code = i32::from(error.exit_code());
    let error = CliError::from_chain(&error).with_code(code);
    // What was to go on does so at its first start or not at all.
    if options.rm || options.from_snapshot.is_some() {
        // The supervisor may have removed it already; what matters to the caller is why it did not start.
        let _ = container.remove(RemoveOptions { force: true, volumes: true }).await;
    }
    error
}

async fn make(options: &ContainerOptions, foreground: bool) -> Result<Container, CliError> {
    if let Some(path) = &options.cidfile
        && path.exists()
    {
        return Err(CliError::usage(format!(
            "container ID file found, make sure the other container isn't running or delete {}",
            path.display()
        )));
    }
    let container = match &options.from_snapshot {
        Some(name) => continued(options, name).await?,
        None => fresh(options, foreground).await?,
    };
    if let Some(path) = &options.cidfile
        && let Err(error) = write_cidfile(path, container.id())
    {
        container.remove(RemoveOptions { force: true, volumes: true }).await?;
        return Err(CliError::usage(format!("cannot write container ID file {}: {error}", path.display())));
    }
    Ok(container)
}

fn saved(name: &str) -> Result<Snapshot, CliError> {
    context::home()?.snapshot(name).map_err(|error| CliError::from(error).with_code(CODE_OURS))
}

/// Of a snapshot.
async fn continued(options: &ContainerOptions, name: &str) -> Result<Container, CliError> {
    let (home, store) = (context::home()?, context::images()?);
    let snapshot = saved(name)?;
    let config = configure::going_on(options, &snapshot)?;
    let _hold = store.hold().await?;
    Ok(home.go_on(&snapshot, config).await?)
}

/// Of an image.
async fn fresh(options: &ContainerOptions, foreground: bool) -> Result<Container, CliError> {
    configure::check(options)?;
    let (home, store) = (context::home()?, context::images()?);
    let wish = provide::options(options.platform.as_deref(), &options.verify_key, options.quiet)?;
    let image = provide::image(&store, &configure::name(options), options.pull, &wish, options.quiet).await?;
    let hold = store.hold().await?;
    let mut config = configure::configure(options, &image)?;
    config.process.stdin_once = foreground && options.interactive;
    config.image.disk = provide::disk(&home, &store, &image, options.quiet).await?;
    let container = home.create(config)?;
    drop(hold);
    Ok(container)
}

fn write_cidfile(path: &Path, id: &str) -> std::io::Result<()> {
    OpenOptions::new().write(true).create_new(true).open(path)?.write_all(id.as_bytes())
}

/// Which streams the caller wants.
#[derive(Debug, Clone, Copy)]
struct Streams {
    stdin: bool,
    stdout: bool,
    stderr: bool,
}

impl Streams {
    fn of(args: &RunArgs) -> Result<Self, CliError> {
        if args.attach.is_empty() {
            return Ok(Self { stdin: true, stdout: true, stderr: true });
        }
        if args.detach {
            return Err(CliError::usage("conflicting options: cannot specify both --attach and --detach"));
        }
        let mut streams = Self { stdin: false, stdout: false, stderr: false };
        for name in &args.attach {
            match name.to_ascii_lowercase().as_str() {
                "stdin" => streams.stdin = true,
                "stdout" => streams.stdout = true,
                "stderr" => streams.stderr = true,
                _ => {
                    return Err(CliError::usage(format!(
                        "invalid stream {name:?} for --attach: give stdin, stdout or stderr"
                    )));
                }
            }
        }
        Ok(streams)
    }
}
