//! The init of `--init`: PID 1 of a container that reaps what is orphaned and forwards signals to the one process it started.
//!
//! The container's first process forks the user's program and then becomes this, by executing the agent's binary again under the
//! name of [`NAME`]: nothing of the specification stays in its memory.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::{Mode, OFlags};
use rustix::io::FdFlags;
use rustix::process::{DumpableBehavior, Pid, Signal, WaitOptions};

use super::Outcome;
use super::launch::Created;
use crate::error::{AgentError, Tried};
use crate::sys::{self, Fork};

/// Its name in the process list.
pub(crate) const NAME: &str = "hyper-init";
/// Names the pid of the user's program.
const CHILD: &str = "HYPER_INIT_CHILD";

/// Opens the agent's own binary, before the root changes.
///
/// # Errors
/// What `open` answers.
pub(crate) fn open_self() -> Result<OwnedFd, AgentError> {
    rustix::fs::open("/proc/self/exe", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .tried(|| "open /proc/self/exe".to_owned())
}

/// Forks the user's program and becomes the init.
///
/// # Errors
/// The fork failed, or the binary cannot be executed.
pub(crate) fn run(control: &UnixStream, created: Created, program: &OwnedFd) -> Result<Outcome, AgentError> {
    // Signals that arrive before the init waits for them stay pending.
    sys::block_signals();
    match sys::fork().tried(|| "fork the command".to_owned())? {
        Fork::Child => {
            rustix::process::setsid().tried(|| "start a session".to_owned())?;
            Ok(Outcome::Exit(created.run(control)))
        }
        Fork::Parent(child) => {
            // Held open here, the command's standard streams would never end.
            for stream in [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()] {
                rustix::io::fcntl_setfd(stream, FdFlags::CLOEXEC)
                    .tried(|| "let go of standard streams".to_owned())?;
            }
            let argv: Vec<CString> = [NAME, "--"]
                .into_iter()
                .chain(created.args().iter().map(String::as_str))
                .filter_map(|a| CString::new(a).ok())
                .collect();
            let env: Vec<CString> =
                CString::new(format!("{CHILD}={}", child.as_raw_nonzero())).into_iter().collect();
            let error = sys::fexecve(program.as_fd(), &argv, &env);
            Err(AgentError::System { tried: format!("execute {NAME}"), source: error })
        }
    }
}

/// The init's own main. Returns the exit code of the user's program.
pub(crate) fn main() -> u8 {
    // Its binary is the agent's: nobody in the container is to open it through /proc.
    let _ = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let _ = rustix::thread::set_name(c"hyper-init");
    let child = std::env::var(CHILD).ok().and_then(|c| c.parse().ok()).and_then(Pid::from_raw);
    let Some(child) = child else { return 1 };
    sys::block_signals();
    loop {
        if let Some(code) = reap(child) {
            return code;
        }
        let Ok(number) = sys::wait_signal() else { continue };
        if number == Signal::CHILD.as_raw() {
            continue;
        }
        // Gone already: the next round reaps it.
        let _ = sys::kill(child, number);
    }
}

/// Reaps all that has ended; the exit code when the program is among them or there is nothing to wait for.
fn reap(child: Pid) -> Option<u8> {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) if pid == child => {
                let code = status
                    .exit_status()
                    .or_else(|| status.terminating_signal().map(|s| s.saturating_add(128)));
                return Some(code.and_then(|c| u8::try_from(c).ok()).unwrap_or(u8::MAX));
            }
            Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
            Ok(None) => return None,
            Err(_) => return Some(1),
        }
    }
}
