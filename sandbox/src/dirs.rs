//! Where things are: the state directories of a user ([`Dirs`]) and the programs and images that a sandbox is made of ([`Parts`]).

use std::path::{Path, PathBuf};

use crate::SandboxError;

/// The two directories of one user's sandboxes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dirs {
    /// What survives a reboot: containers, volumes, templates.
    pub data: PathBuf,
    /// What does not: sockets.
    pub run: PathBuf,
}

impl Dirs {
    /// `HYPER_ROOT` and `HYPER_RUN`; else `/var/lib/hyper` and `/run/hyper` for root, and `$XDG_DATA_HOME/hyper` (`~/.local/share/hyper`)
    /// and `$XDG_RUNTIME_DIR/hyper` (`/tmp/hyper-UID`) for others.
    #[must_use]
    pub fn from_env() -> Self {
        Self::from_lookup(
            &|name| std::env::var_os(name).map(PathBuf::from),
            rustix::process::geteuid().as_raw(),
        )
    }

    fn from_lookup(var: &dyn Fn(&str) -> Option<PathBuf>, user: u32) -> Self {
        let root = user == 0;
        let var = |name: &str| var(name).filter(|path| path.is_absolute());
        let data = var("HYPER_ROOT").unwrap_or_else(|| {
            if root {
                return PathBuf::from("/var/lib/hyper");
            }
            let home = || var("HOME").unwrap_or_else(|| PathBuf::from("/")).join(".local/share");
            var("XDG_DATA_HOME").unwrap_or_else(home).join("hyper")
        });
        let run = var("HYPER_RUN").unwrap_or_else(|| {
            if root {
                return PathBuf::from("/run/hyper");
            }
            let own = || PathBuf::from(format!("/tmp/hyper-{user}"));
            var("XDG_RUNTIME_DIR").map_or_else(own, |dir| dir.join("hyper"))
        });
        Self { data, run }
    }
}

/// The programs and images that a sandbox is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parts {
    /// The virtual machine monitor.
    pub vmm: PathBuf,
    /// The file server; needed only when host directories are shared.
    pub fs: PathBuf,
    /// The guest kernel, an uncompressed ELF `vmlinux`.
    pub kernel: PathBuf,
    /// The guest's root, with the agent.
    pub initramfs: PathBuf,
    /// What is run as `<supervisor> supervise <id>`; its body is [`crate::supervise`].
    pub supervisor: PathBuf,
}

impl Parts {
    /// All in the directory `HYPER_PARTS` when that is set (`hyper-vmm`, `hyper-fs`, `vmlinux`, `initramfs.cpio`); else relative to the
    /// running executable: `../libexec/hyper/{hyper-vmm,hyper-fs}` and `../share/hyper/{vmlinux,initramfs.cpio}`. Nothing is opened:
    /// a part that is missing is reported by the start that needs it.
    ///
    /// # Errors
    /// When the path of the running executable is unknown.
    pub fn locate() -> Result<Self, SandboxError> {
        let exe = std::env::current_exe()
            .map_err(|source| SandboxError::io("find the running executable", "/proc/self/exe", source))?;
        let dir =
            std::env::var_os("HYPER_PARTS").map(PathBuf::from).filter(|dir| !dir.as_os_str().is_empty());
        Ok(dir.map_or_else(|| Self::beside(&exe), |dir| Self::in_dir(&dir, &exe)))
    }

    /// All parts in one directory.
    #[must_use]
    pub fn in_dir(dir: &Path, supervisor: &Path) -> Self {
        Self {
            vmm: dir.join("hyper-vmm"),
            fs: dir.join("hyper-fs"),
            kernel: dir.join("vmlinux"),
            initramfs: dir.join("initramfs.cpio"),
            supervisor: supervisor.to_owned(),
        }
    }

    fn beside(exe: &Path) -> Self {
        let prefix = exe.parent().and_then(Path::parent).unwrap_or_else(|| Path::new("/usr"));
        Self {
            vmm: prefix.join("libexec/hyper/hyper-vmm"),
            fs: prefix.join("libexec/hyper/hyper-fs"),
            kernel: prefix.join("share/hyper/vmlinux"),
            initramfs: prefix.join("share/hyper/initramfs.cpio"),
            supervisor: exe.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirs(pairs: &[(&str, &str)], user: u32) -> (String, String) {
        let look = |name: &str| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| PathBuf::from(v));
        let dirs = Dirs::from_lookup(&look, user);
        (dirs.data.display().to_string(), dirs.run.display().to_string())
    }

    #[test]
    fn root_and_users_have_their_own_places() {
        assert_eq!(dirs(&[], 0), ("/var/lib/hyper".into(), "/run/hyper".into()));
        let user = [("HOME", "/home/u"), ("XDG_RUNTIME_DIR", "/run/user/7")];
        assert_eq!(dirs(&user, 7), ("/home/u/.local/share/hyper".into(), "/run/user/7/hyper".into()));
        assert_eq!(
            dirs(&[("HOME", "/home/u")], 7),
            ("/home/u/.local/share/hyper".into(), "/tmp/hyper-7".into())
        );
    }

    #[test]
    fn environment_wins_unless_relative() {
        assert_eq!(dirs(&[("HYPER_ROOT", "/a"), ("HYPER_RUN", "/b")], 0), ("/a".into(), "/b".into()));
        assert_eq!(dirs(&[("HYPER_ROOT", "a")], 0).0, "/var/lib/hyper");
    }

    #[test]
    fn parts_are_beside_the_executable() {
        let parts = Parts::beside(Path::new("/opt/h/bin/hyper"));
        assert_eq!(parts.vmm, Path::new("/opt/h/libexec/hyper/hyper-vmm"));
        assert_eq!(parts.initramfs, Path::new("/opt/h/share/hyper/initramfs.cpio"));
        assert_eq!(parts.supervisor, Path::new("/opt/h/bin/hyper"));
    }
}
