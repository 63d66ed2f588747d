//! The process that makes the namespaces and stays in them: pasta finds them by it. It does nothing else.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Stdio};

use rustix::process::Signal;
use rustix::thread::UnshareFlags;

use crate::network::bring_up;

/// What it says when it is done.
const READY: &str = "ready";
/// Longest reason why it is not, bytes.
const MAX_WORDS_BYTES: u64 = 512;
/// Why a host may allow no user namespaces, each with what an administrator does about it.
const SWITCHES: [(&str, &str, &str); 3] = [
    ("/proc/sys/user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=10000"),
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
    (
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or a profile for hyper that allows userns",
    ),
];

/// A user namespace in which this user is 0 and nobody else is anybody, and a network namespace of it.
#[derive(Debug)]
pub(super) struct Anchor {
    child: Child,
    pub(super) user: OwnedFd,
    pub(super) network: OwnedFd,
}

impl Anchor {
    /// Has the namespaces made.
    pub(super) fn start() -> Result<Self, String> {
        let failed = |error: io::Error| format!("cannot make namespaces: {error}");
        let mut child = super::this_program()
            .map_err(failed)?
            .args(["keep", "--anchor"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let stdout = child.stdout.take().ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
        let mut words = String::new();
        let heard = BufReader::new(stdout.take(MAX_WORDS_BYTES)).read_line(&mut words);
        let opened = heard.and_then(|_| {
            let open = |name: &str| {
                let path = format!("/proc/{}/ns/{name}", child.id());
                fs::File::open(path).map(OwnedFd::from)
            };
            Ok((open("user")?, open("net")?))
        });
        match (words.trim(), opened) {
            (READY, Ok((user, network))) => Ok(Self { child, user, network }),
            (said, opened) => {
                let why = match opened {
                    Err(error) if said.is_empty() || said == READY => error.to_string(),
                    _ => said.to_owned(),
                };
                end(&mut child);
                Err(why)
            }
        }
    }

    /// Whom pasta finds the namespaces by. It is not waited for before this is dropped, so the number is nobody else's.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Anchor {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn end(child: &mut Child) {
    if let Err(error) = child.kill().and_then(|()| child.wait()) {
        tracing::warn!(%error, "the anchor stays");
    }
}

/// Body of the hidden verb `keep --anchor`: makes the namespaces, says so on standard output, and stays until standard input ends.
///
/// # Errors
/// When it cannot say so. Why there are no namespaces is said there, too.
pub fn anchor() -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let mut stdout = io::stdout();
    match make() {
        Ok(()) => writeln!(stdout, "{READY}")?,
        Err(why) => return writeln!(stdout, "{why}"),
    }
    stdout.flush()?;
    io::stdin().read_to_end(&mut Vec::new()).map(drop)
}

fn make() -> Result<(), String> {
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    hyper_jail::namespaces(UnshareFlags::NEWUSER)
        .map_err(|error| format!("cannot make a user namespace: {error}{}", reason()))?;
    // Others' ids cannot be mapped without a helper that is root's; and who maps a group must give up the change of groups.
    let maps = [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("0 {} 1", user.as_raw())),
        ("gid_map", format!("0 {} 1", group.as_raw())),
    ];
    for (file, text) in maps {
        let path = format!("/proc/self/{file}");
        fs::write(&path, text)
            .map_err(|error| format!("cannot write to {path} of a user namespace: {error}{}", reason()))?;
    }
    hyper_jail::namespaces(UnshareFlags::NEWNET)
        .map_err(|error| format!("cannot make a network namespace: {error}{}", reason()))?;
    bring_up("lo").map_err(|error| error.to_string())
}

/// What of the host's settings is in the way.
fn reason() -> String {
    let is_set =
        |path: &str, value: &str| fs::read_to_string(Path::new(path)).is_ok_and(|text| text.trim() == value);
    let found = SWITCHES.iter().find(|(path, value, _)| is_set(path, value));
    found.map_or_else(String::new, |(path, value, mend)| {
        format!("; {path} is {value}: an administrator allows it with {mend}")
    })
}
