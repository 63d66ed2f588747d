//! The processes that serve a container's machine, and what is left to each of them.

use std::io;

use hyper_jail::report::{Finding, Role, look};

use super::Container;
use crate::SandboxError;

/// A process in a jail, as it was just now.
#[derive(Debug, Clone)]
pub struct Jailed {
    /// Name of its program.
    pub program: &'static str,
    /// Its id on the host.
    pub pid: u32,
    /// Layer by layer.
    pub findings: Vec<Finding>,
}

/// Who is in a jail.
const PROGRAMS: [(&str, Role); 2] = [("hyper-vmm", Role::Vmm), ("hyper-fs", Role::FileServer)];

impl Container {
    /// Looks at the processes of its machine from outside, which takes the power of their owner.
    ///
    /// # Errors
    /// [`SandboxError::WrongStatus`] when it does not run, or `/proc` cannot be read.
    pub fn jailed(&self) -> Result<Vec<Jailed>, SandboxError> {
        let stopped = || SandboxError::WrongStatus {
            container: self.name().to_owned(),
            status: self.state().status,
            hint: "start it first",
        };
        // The id is that of the VMM as its supervisor wrote it down; the supervisor is its parent, and has the others.
        if !self.is_live() || self.state().pid == 0 {
            return Err(stopped());
        }
        let (_, supervisor, _) = about(self.state().pid).ok_or_else(stopped)?;
        let (_, _, owner) = about(supervisor).ok_or_else(stopped)?;
        let mut found = Vec::new();
        for pid in processes().map_err(|source| SandboxError::io("read", "/proc", source))? {
            let Some((name, parent, _)) = about(pid) else { continue };
            let known = PROGRAMS.iter().find(|(program, _)| *program == name);
            if let (Some((program, role)), true) = (known, parent == supervisor) {
                let findings = look(pid, *role, owner)
                    .map_err(|source| SandboxError::io("look at", format!("/proc/{pid}"), source))?;
                found.push(Jailed { program, pid, findings });
            }
        }
        if found.iter().any(|process| process.pid == self.state().pid) { Ok(found) } else { Err(stopped()) }
    }
}

/// Name, parent and user of a process.
fn about(pid: u32) -> Option<(String, u32, u32)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let user = field("Uid:")?.split_whitespace().next()?.parse().ok()?;
    Some((field("Name:")?.to_owned(), field("PPid:")?.parse().ok()?, user))
}

fn processes() -> io::Result<Vec<u32>> {
    let names = std::fs::read_dir("/proc")?.map(|entry| Ok(entry?.file_name().into_string().ok()));
    let names: io::Result<Vec<_>> = names.collect();
    Ok(names?.into_iter().flatten().filter_map(|name| name.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::{config, home};

    #[test]
    fn this_process_is_found_with_its_parent() {
        let (name, parent, user) = about(std::process::id()).unwrap();
        assert!(!name.is_empty() && parent == std::os::unix::process::parent_id());
        assert_eq!(user, rustix::process::getuid().as_raw());
        assert!(processes().unwrap().contains(&std::process::id()));
    }

    #[test]
    fn a_container_that_does_not_run_has_none() {
        let (_dir, home) = home();
        let container = home.create(config("still")).unwrap();
        assert!(matches!(container.jailed(), Err(SandboxError::WrongStatus { .. })));
    }
}
