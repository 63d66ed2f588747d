//! One file a verb, or a few that belong together. Each takes its parsed flags and returns the exit code.

mod archive;
mod attach;
mod audit;
mod configure;
mod doctor;
mod exec;
mod fork;
mod image;
mod inspect;
mod install;
mod jail;
mod lifecycle;
mod list;
mod logs;
mod provide;
mod run;
mod snapshot;
mod stats;
mod top;
mod volume;

use hyper_sandbox::{Dirs, Parts, rootless};

use crate::args::{FormatArgs, Verb};
use crate::error::{CODE_FAILED, CODE_OURS, CliError};
use crate::format::{Column, Format};

/// Does what the verb says.
///
/// # Errors
/// One line and an exit code.
pub(crate) async fn dispatch(verb: Verb) -> Result<i32, CliError> {
    match verb {
        Verb::Run(args) => run::run(*args).await,
        Verb::Create(args) => run::create(*args).await,
        Verb::Start(args) => attach::start(args).await,
        Verb::Attach(args) => attach::attach(args).await,
        Verb::Exec(args) => exec::exec(args).await,
        Verb::Stop(args) => lifecycle::stop(args).await,
        Verb::Restart(args) => lifecycle::restart(args).await,
        Verb::Kill(args) => lifecycle::kill(args).await,
        Verb::Pause(args) => lifecycle::pause(args).await,
        Verb::Unpause(args) => lifecycle::unpause(args).await,
        Verb::Rm(args) => lifecycle::rm(args).await,
        Verb::Fork(args) => fork::fork(&args).await,
        Verb::Snapshot(verb) => snapshot::snapshot(verb).await,
        Verb::Wait(args) => lifecycle::wait(args).await,
        Verb::Rename(args) => lifecycle::rename(&args),
        Verb::Port(args) => lifecycle::port(&args),
        Verb::Ps(args) => list::ps(&args),
        Verb::Logs(args) => logs::logs(args).await,
        Verb::Inspect(args) => inspect::inspect(&args),
        Verb::Cp(args) => archive::cp(args).await,
        Verb::Stats(args) => stats::stats(args).await,
        Verb::Top(args) => top::top(&args).await,
        Verb::Pull(args) => image::pull(args).await,
        Verb::Images(args) => image::images(&args),
        Verb::Tag(args) => image::tag(&args),
        Verb::Rmi(args) => image::rmi(&args),
        Verb::Load(args) => image::load(args).await,
        Verb::Volume(verb) => volume::volume(verb),
        Verb::Audit(args) => audit::audit(&args),
        Verb::Version(args) => version(&args),
        Verb::Doctor(args) => doctor::doctor(&args).await,
        Verb::Install(args) => install::install(&args),
        Verb::Bench { flags } => bench(&flags),
        Verb::Supervise { id } => {
            Err(CliError::failed(format!("{id} is supervised by a process of its own")))
        }
        Verb::Keep { .. } => Err(CliError::failed("namespaces are kept by a process of its own")),
    }
}

/// Lives as long as one container's machine; makes a runtime of its own.
///
/// # Errors
/// When the container's state cannot be used.
pub(crate) fn supervise(id: &str) -> Result<i32, CliError> {
    hyper_sandbox::supervise(&crate::context::home()?, id)?;
    Ok(0)
}

/// Lives as long as somebody is in the namespaces of a user who is not root, or makes them; makes a runtime of its own.
///
/// # Errors
/// When it was not started by hyper itself.
pub(crate) fn keep(anchor: bool) -> Result<i32, CliError> {
    if anchor {
        rootless::anchor().map_err(CliError::failed)?;
    } else {
        rootless::keep(&Dirs::from_env())?;
    }
    Ok(0)
}

/// Goes on in the namespace of this user, who is not root. Comes back only when that fails.
pub(crate) fn enter(verb: &Verb) -> CliError {
    let code = if matches!(verb, Verb::Run(_)) { CODE_OURS } else { CODE_FAILED };
    match rootless::enter(&Dirs::from_env()) {
        Err(error) => CliError::from(error).with_code(code),
        Ok(never) => match never {},
    }
}

/// Becomes the benchmark's own program, which few have a use for.
fn bench(flags: &[std::ffi::OsString]) -> Result<i32, CliError> {
    use std::os::unix::process::CommandExt;
    let program = Parts::locate()?.vmm.with_file_name("hyper-bench");
    let error = std::process::Command::new(&program).args(flags).exec();
    Err(CliError::failed(format!("cannot run {}: {error}", program.display())))
}

fn version(args: &FormatArgs) -> Result<i32, CliError> {
    const COLUMNS: [Column; 3] = [
        Column { heading: "VERSION", key: "Version" },
        Column { heading: "OS", key: "Os" },
        Column { heading: "ARCH", key: "Arch" },
    ];
    let row = serde_json::json!({
        "Version": env!("CARGO_PKG_VERSION"),
        "Os": std::env::consts::OS,
        "Arch": std::env::consts::ARCH,
    });
    Format::parse(args.format.as_deref())?.print(&COLUMNS, &[row])?;
    Ok(0)
}
