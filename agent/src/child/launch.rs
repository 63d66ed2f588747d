//! From a created process to the user's program: the search for it, and exec with Docker's exit codes.

use std::ffi::CString;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::fs::{Access, AtFlags, FileType, OFlags};
use rustix::io::Errno;

use super::confine::{self, Capabilities};
use super::terminal::Terminal;
use super::user::{Databases, Identity, MAX_DATABASE_BYTES};
use super::{path, send};
use crate::error::{AgentError, Tried};
use crate::plan::{ProcessPlan, Report};
use crate::seccomp::Program;
use crate::sys;

/// Where programs are looked for when the process has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Exit code of a command that was not found.
const NOT_FOUND: u32 = 127;
/// Exit code of a command that cannot be invoked.
const CANNOT_INVOKE: u32 = 126;

/// A process that is created: everything that can fail early has been tried.
#[derive(Debug)]
pub(crate) struct Created {
    plan: ProcessPlan,
    identity: Identity,
    capabilities: Capabilities,
    seccomp: Option<Program>,
    terminal: Option<Terminal>,
}

/// A command that could not be executed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ExecError {
    exit_code: u32,
    error: String,
}

impl ExecError {
    fn not_found(error: &str) -> Self {
        Self { exit_code: NOT_FOUND, error: error.to_owned() }
    }

    fn cannot(error: impl Into<String>) -> Self {
        Self { exit_code: CANNOT_INVOKE, error: error.into() }
    }

    fn of(errno: Errno) -> Self {
        match errno {
            Errno::NOENT => Self::not_found("no such file or directory"),
            Errno::ACCESS | Errno::PERM => Self::cannot("permission denied"),
            Errno::ISDIR => Self::cannot("is a directory"),
            Errno::NOEXEC => Self::cannot("exec format error"),
            Errno::NOTDIR => Self::not_found("not a directory"),
            other => Self::cannot(std::io::Error::from(other).to_string()),
        }
    }
}

impl Created {
    /// Resolves the user, opens the terminal and compiles the filter. `root` is the container's root; `last_capability` the
    /// kernel's highest.
    ///
    /// # Errors
    /// What of it cannot be.
    pub(crate) fn new(
        plan: ProcessPlan,
        root: std::os::fd::BorrowedFd<'_>,
        last_capability: u32,
    ) -> Result<Self, AgentError> {
        let identity = identity(&plan, root)?;
        let capabilities = Capabilities::parse(&plan.capabilities, last_capability)?;
        let seccomp = plan.seccomp.as_ref().map(Program::compile).transpose()?;
        let terminal = plan.terminal.map(|window| super::terminal::open(root, window)).transpose()?;
        if let Some(terminal) = &terminal {
            terminal.give_to(identity.uid)?;
        }
        Ok(Self { plan, identity, capabilities, seccomp, terminal })
    }

    /// The terminal.
    pub(crate) fn terminal(&self) -> Option<&Terminal> {
        self.terminal.as_ref()
    }

    /// The command, for an init to show.
    pub(crate) fn args(&self) -> &[String] {
        &self.plan.process.args
    }

    /// Becomes the program. Returns only when that failed, with the exit code; the agent has been told.
    pub(crate) fn run(self, control: &UnixStream) -> u8 {
        let Err(failed) = self.try_run();
        let code = u8::try_from(failed.exit_code).unwrap_or(u8::MAX);
        // Whether anyone still listens makes no difference to the exit code.
        let _ = send(control, &Report::ExecFailed { exit_code: failed.exit_code, error: failed.error }, None);
        code
    }

    fn try_run(self) -> Result<std::convert::Infallible, ExecError> {
        let setup = |error: AgentError| ExecError::cannot(error.to_string());
        let system =
            |what: &str, errno: Errno| ExecError::cannot(format!("{what}: {}", std::io::Error::from(errno)));
        if let Some(terminal) = &self.terminal {
            terminal.take().map_err(|errno| system("take the terminal", errno))?;
        }
        own_pipes(self.identity.uid);
        let process = &self.plan.process;
        confine::set_rlimits(process.rlimits.as_deref().unwrap_or_default()).map_err(setup)?;
        sys::close_on_exec_from(3).tried(|| "mark descriptors".to_owned()).map_err(setup)?;
        let cwd = if process.cwd.is_empty() { "/" } else { &process.cwd };
        let entered = rustix::process::chdir(cwd);
        confine::become_user(
            &self.identity,
            &self.capabilities,
            self.plan.no_new_privileges,
            self.seccomp.as_ref(),
        )
        .map_err(setup)?;
        // Root without CAP_DAC_OVERRIDE on a share may not enter what the user may.
        entered
            .or_else(|_| rustix::process::chdir(cwd))
            .map_err(|errno| system(&format!("chdir to cwd {cwd:?}"), errno))?;
        let umask = process.user.umask.unwrap_or(0o022);
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(umask & 0o777));
        let env = environment(&process.env, self.identity.home.as_deref());
        let program = process.args.first().map(String::as_str).unwrap_or_default();
        let search = variable(&env, "PATH").unwrap_or(DEFAULT_PATH);
        let found = find(program, search, &mut look)?;
        let c = |s: &str| CString::new(s).map_err(|_| ExecError::cannot("an argument holds a NUL byte"));
        let found = c(&found)?;
        let args = process.args.iter().map(|a| c(a)).collect::<Result<Vec<_>, _>>()?;
        let env = env.iter().map(|e| c(e)).collect::<Result<Vec<_>, _>>()?;
        sys::reset_signals();
        let error = sys::execve(&found, &args, &env);
        Err(ExecError::of(Errno::from_io_error(&error).unwrap_or(Errno::IO)))
    }
}

fn identity(plan: &ProcessPlan, root: std::os::fd::BorrowedFd<'_>) -> Result<Identity, AgentError> {
    let read = |name: &str| path::read_in(root, name, MAX_DATABASE_BYTES).tried(|| format!("read {name}"));
    let databases = Databases { passwd: read("/etc/passwd")?, group: read("/etc/group")? };
    let user = &plan.process.user;
    let by_number = user.uid != 0 || user.gid != 0 || !user.additional_gids.is_empty();
    if plan.user.is_empty() && by_number {
        databases.by_number(user.uid, user.gid, &user.additional_gids)
    } else {
        databases.resolve(&plan.user, &plan.additional_groups)
    }
}

/// Lets the user open its own standard streams again, by /dev/stdout: pipes belong to who made them, the agent.
fn own_pipes(uid: u32) {
    let uid = Some(rustix::fs::Uid::from_raw(uid));
    for stream in [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()] {
        let is_pipe =
            rustix::fs::fstat(stream).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Fifo);
        if is_pipe {
            // Without it all but opening again works; no reason not to start.
            let _ = rustix::fs::fchown(stream, uid, None);
        }
    }
}

fn variable<'a>(env: &'a [String], name: &str) -> Option<&'a str> {
    env.iter().rev().find_map(|e| e.strip_prefix(name)?.strip_prefix('='))
}

/// The environment in the order given, with HOME when it lacks one.
fn environment(given: &[String], home: Option<&str>) -> Vec<String> {
    let mut env: Vec<String> = given.iter().filter(|e| e.contains('=')).cloned().collect();
    if variable(&env, "HOME").is_none_or(str::is_empty) {
        env.retain(|e| !e.starts_with("HOME="));
        env.push(format!("HOME={}", home.unwrap_or("/")));
    }
    env
}

/// What a candidate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Candidate {
    Executable,
    Refused(Errno),
}

fn look(candidate: &str) -> Candidate {
    let path = Path::new(candidate);
    match rustix::fs::stat(path) {
        Err(errno) => Candidate::Refused(errno),
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
            Candidate::Refused(Errno::ISDIR)
        }
        Ok(stat) => {
            let allowed = rustix::fs::accessat(rustix::fs::CWD, path, Access::EXEC_OK, AtFlags::EACCESS);
            // Kernels and filters without faccessat2 leave the mode to go by; exec has the last word.
            let by_mode = || if stat.st_mode & 0o111 == 0 { Err(Errno::ACCESS) } else { Ok(()) };
            let allowed = match allowed {
                Err(Errno::NOSYS | Errno::INVAL | Errno::PERM) => by_mode(),
                other => other,
            };
            allowed.map_or_else(Candidate::Refused, |()| Candidate::Executable)
        }
    }
}

/// Finds a program: a name with a slash is a path, anything else is searched for.
fn find(program: &str, search: &str, look: &mut dyn FnMut(&str) -> Candidate) -> Result<String, ExecError> {
    if program.contains('/') {
        return match look(program) {
            Candidate::Executable => Ok(program.to_owned()),
            Candidate::Refused(errno) => Err(ExecError::of(errno)),
        };
    }
    if !program.is_empty() {
        for folder in search.split(':') {
            let candidate =
                if folder.is_empty() { format!("./{program}") } else { format!("{folder}/{program}") };
            if look(&candidate) == Candidate::Executable {
                return Ok(candidate);
            }
        }
    }
    Err(ExecError::not_found("executable file not found in $PATH"))
}

/// Opens the root of this mount namespace.
///
/// # Errors
/// What `open` answers.
pub(crate) fn open_root() -> Result<std::os::fd::OwnedFd, AgentError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open("/", flags, rustix::fs::Mode::empty()).tried(|| "open the container's root".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looked_up(program: &str, search: &str) -> Result<String, ExecError> {
        find(program, search, &mut |candidate| match candidate {
            "/bin/sh" | "/usr/bin/env" | "./here" => Candidate::Executable,
            "/bin/data" | "/data" => Candidate::Refused(Errno::ACCESS),
            "/bin" => Candidate::Refused(Errno::ISDIR),
            _ => Candidate::Refused(Errno::NOENT),
        })
    }

    #[test]
    fn programs_are_found_as_docker_finds_them() {
        assert_eq!(looked_up("sh", "/usr/bin:/bin").unwrap(), "/bin/sh");
        assert_eq!(looked_up("/usr/bin/env", "").unwrap(), "/usr/bin/env");
        assert_eq!(looked_up("here", "/bin:").unwrap(), "./here");
        let missing = ExecError::not_found("executable file not found in $PATH");
        assert_eq!(looked_up("nosuch", "/usr/bin:/bin").unwrap_err(), missing);
        assert_eq!(looked_up("data", "/bin").unwrap_err(), missing);
        assert_eq!(looked_up("", "/bin").unwrap_err(), missing);
        assert_eq!(looked_up("/nosuch", "").unwrap_err(), ExecError::not_found("no such file or directory"));
        assert_eq!(looked_up("/data", "").unwrap_err(), ExecError::cannot("permission denied"));
        assert_eq!(looked_up("/bin", "").unwrap_err(), ExecError::cannot("is a directory"));
    }

    #[test]
    fn the_real_look_sees_folders_and_modes() {
        assert_eq!(look("/"), Candidate::Refused(Errno::ISDIR));
        assert_eq!(look("/proc/self/exe"), Candidate::Executable);
        assert_eq!(look("/proc/version"), Candidate::Refused(Errno::ACCESS));
        assert_eq!(look("/no/such"), Candidate::Refused(Errno::NOENT));
    }

    #[test]
    fn home_is_added_only_when_missing() {
        let given = |env: &[&str]| env.iter().map(|e| (*e).to_owned()).collect::<Vec<_>>();
        assert_eq!(environment(&given(&["A=1", "HOME=/x"]), Some("/root")), given(&["A=1", "HOME=/x"]));
        assert_eq!(environment(&given(&["A=1"]), Some("/root")), given(&["A=1", "HOME=/root"]));
        assert_eq!(environment(&given(&["HOME="]), None), given(&["HOME=/"]));
        assert_eq!(environment(&given(&["broken", "B=2"]), None), given(&["B=2", "HOME=/"]));
        assert_eq!(variable(&given(&["PATH=/a", "PATH=/b"]), "PATH"), Some("/b"));
    }
}
