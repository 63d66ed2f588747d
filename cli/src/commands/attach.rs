//! `attach` and `start`.

use hyper_sandbox::Container;

use crate::args::{AttachArgs, StartArgs};
use crate::context;
use crate::error::CliError;
use crate::output;
use crate::session::{Ended, Manners};
use crate::terminal::DetachKeys;

/// `hyper attach`.
///
/// # Errors
/// When the container does not run.
pub(crate) async fn attach(args: AttachArgs) -> Result<i32, CliError> {
    let container = context::home()?.find(&args.container)?;
    let manners = manners(&container, !args.no_stdin, args.sig_proxy, args.detach_keys.as_deref())?;
    let attached = container.attach(manners.attach_options(true, true)).await?;
    ended(&container, manners.converse(attached).await?)
}

/// `hyper start`.
///
/// # Errors
/// Exit code 1 when one did not start; with `--attach` the container's own code.
pub(crate) async fn start(args: StartArgs) -> Result<i32, CliError> {
    if !args.attach && !args.interactive {
        return context::for_each(&args.containers, async |container| {
            container.start(None).await.map(drop).map_err(|error| CliError::from_chain(&error))
        })
        .await;
    }
    let [name] = args.containers.as_slice() else {
        return Err(CliError::failed("you cannot start and attach multiple containers at once"));
    };
    let container = context::home()?.find(name)?;
    let manners = manners(&container, args.interactive, true, args.detach_keys.as_deref())?;
    let started = container.start(Some(manners.attach_options(true, true))).await;
    let attached = started.map_err(|e| CliError::from_chain(&e).with_code(i32::from(e.exit_code())))?;
    match attached {
        Some(attached) => ended(&container, manners.converse(attached).await?),
        None => {
            output::line(name);
            Ok(0)
        }
    }
}

fn manners(container: &Container, stdin: bool, proxy: bool, keys: Option<&str>) -> Result<Manners, CliError> {
    let process = &container.config().process;
    let manners = Manners {
        stdin: stdin && process.open_stdin,
        terminal: process.terminal,
        sig_proxy: proxy && !process.terminal,
        detach_keys: keys.map_or_else(|| Ok(DetachKeys::default()), DetachKeys::parse)?,
    };
    manners.check()?;
    Ok(manners)
}

fn ended(container: &Container, ended: Ended) -> Result<i32, CliError> {
    match ended {
        Ended::Exit(code) => Ok(i32::from(code)),
        Ended::Detached => Ok(0),
        Ended::Lost => Err(super::run::lost(container)),
    }
}
