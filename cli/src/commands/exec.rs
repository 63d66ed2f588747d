//! `exec`.

use hyper_sandbox::ExecConfig;

use crate::args::ExecArgs;
use crate::context;
use crate::error::CliError;
use crate::options::env;
use crate::session::{Ended, Manners};
use crate::terminal::DetachKeys;

/// `hyper exec`.
///
/// # Errors
/// 126 and 127 when the command cannot be run, 1 for the rest.
pub(crate) async fn exec(args: ExecArgs) -> Result<i32, CliError> {
    let Some((name, command)) = args.container_and_args.split_first() else {
        return Err(CliError::usage("give a container and a command"));
    };
    let container = context::home()?.find(name)?;
    let caller = |key: &str| std::env::var(key).ok();
    let config = ExecConfig {
        args: command.to_vec(),
        env: env::merge_env(&[], &args.env_file, &args.env, &caller)?,
        working_dir: args.workdir.unwrap_or_default(),
        user: args.user.unwrap_or_default(),
        terminal: args.tty,
        open_stdin: args.interactive && !args.detach,
        privileged: args.privileged,
    };
    let manners = Manners {
        stdin: args.interactive,
        terminal: args.tty,
        sig_proxy: false,
        detach_keys: args
            .detach_keys
            .as_deref()
            .map_or_else(|| Ok(DetachKeys::default()), DetachKeys::parse)?,
    };
    let attach = if args.detach {
        None
    } else {
        manners.check()?;
        Some(manners.attach_options(true, true))
    };
    let started = container.exec(config, attach).await;
    let attached = started.map_err(|error| {
        let code = i32::from(error.exit_code());
        let ours = code == crate::error::CODE_OURS;
        CliError::from_chain(&error).with_code(if ours { crate::error::CODE_FAILED } else { code })
    })?;
    let Some(attached) = attached else { return Ok(0) };
    match manners.converse(attached).await? {
        Ended::Exit(code) => Ok(i32::from(code)),
        Ended::Detached => Ok(0),
        Ended::Lost => Err(super::run::lost(&container)),
    }
}
