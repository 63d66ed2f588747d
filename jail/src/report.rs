//! What a process has left, as the kernel says, beside what it should have. For the owner, outside of the jail.
//!
//! Nothing here asks the process: everything is read from its folder in `/proc`, which needs root's power, or that of the user who owns it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::privileges::FILE_SERVER;
use crate::{ids, vmm};

/// Which promise holds for a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// hyper-vmm.
    Vmm,
    /// hyper-fs: it acts for the guest's users, so it is root, with the capabilities for that, and has shares in its root.
    FileServer,
}

/// One layer of the jail of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Which layer.
    pub layer: &'static str,
    /// What there is.
    pub found: String,
    /// Whether that is what was promised.
    pub holds: bool,
}

/// Namespaces of a process's own.
const NAMESPACES: [&str; 7] = ["mnt", "pid", "net", "ipc", "uts", "cgroup", "user"];
/// The smallest memory of a guest. Nothing else of a VMM is as long in one piece.
const LEAST_MEMORY_BYTES: u64 = 32 << 20;
/// Threads that the kernel makes for KVM: they have no program.
const KERNEL_THREADS: &str = "kvm-";

/// What `/proc` says of one process.
#[derive(Debug)]
struct Process {
    folder: PathBuf,
    status: BTreeMap<String, String>,
    owner: u32,
}

/// Looks at a process of the user `owner`. Where that is not root, no ids can be given up, and the promise is another.
///
/// # Errors
/// It has ended, or may not be looked at.
pub fn look(pid: u32, role: Role, owner: u32) -> io::Result<Vec<Finding>> {
    let folder = PathBuf::from(format!("/proc/{pid}"));
    let process = Process { status: fields(&fs::read_to_string(folder.join("status"))?), folder, owner };
    let mut findings = vec![process.namespaces(role)?, process.ids(role)];
    findings.extend(process.capabilities(role));
    findings.extend([
        process.is("no new privileges", "NoNewPrivs", "1"),
        process.filters()?,
        process.root(role)?,
        process.limits(role)?,
        process.descriptors(role)?,
    ]);
    if role == Role::Vmm {
        findings.extend([process.dumps()?, process.memory()?]);
    }
    Ok(findings)
}

/// `Name:<tab>value` lines.
fn fields(text: &str) -> BTreeMap<String, String> {
    let split =
        |line: &str| line.split_once(':').map(|(name, value)| (name.to_owned(), value.trim().to_owned()));
    text.lines().filter_map(split).collect()
}

impl Process {
    fn field(&self, name: &str) -> &str {
        self.status.get(name).map_or("", String::as_str)
    }

    fn is(&self, layer: &'static str, name: &str, wanted: &str) -> Finding {
        let found = self.field(name).to_owned();
        Finding { layer, holds: found == wanted, found }
    }

    fn namespaces(&self, role: Role) -> io::Result<Finding> {
        let (mut own, mut shared) = (Vec::new(), Vec::new());
        for name in NAMESPACES {
            let theirs = fs::read_link(self.folder.join("ns").join(name))?;
            let ours = fs::read_link(format!("/proc/self/ns/{name}"))?;
            if theirs == ours { shared.push(name) } else { own.push(name) }
        }
        let roots = role == Role::FileServer && self.owner == 0;
        let allowed: &[&str] = if roots { &["user"] } else { &[] };
        let mut found = format!("own {}", own.join(" "));
        if !shared.is_empty() {
            found.push_str(&format!("; the host's {}", shared.join(" ")));
        }
        Ok(Finding { layer: "namespaces", found, holds: shared.iter().all(|name| allowed.contains(name)) })
    }

    fn ids(&self, role: Role) -> Finding {
        let (users, groups) = (self.field("Uid"), self.field("Gid"));
        let nobodys = |text: &str| {
            let mut numbers = text.split_whitespace().map(|word| word.parse::<u32>().unwrap_or(0));
            let first = numbers.next().unwrap_or(0);
            (ids::FIRST..ids::FIRST + ids::COUNT).contains(&first) && numbers.all(|id| id == first)
        };
        let spaced = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let mapped = spaced(&fs::read_to_string(self.folder.join("uid_map")).unwrap_or_default());
        let others = spaced(self.field("Groups"));
        let owners = || users.split_whitespace().all(|word| word == self.owner.to_string());
        let holds = match (role, self.owner) {
            (Role::Vmm, 0) => nobodys(users) && users == groups && mapped.is_empty() && others.is_empty(),
            (Role::FileServer, 0) => others.is_empty(),
            // A user's other groups cannot be given up.
            (Role::Vmm, _) => owners() && mapped.is_empty(),
            (Role::FileServer, owner) => owners() && mapped == format!("0 {owner} 1"),
        };
        let mut found = format!("user {}, group {}", spaced(users), spaced(groups));
        if !others.is_empty() {
            found.push_str(&format!(", other groups {others}"));
        }
        if mapped.is_empty() {
            found.push_str("; no id is mapped");
        } else if self.owner != 0 {
            found.push_str(&format!("; of ids {mapped} is mapped"));
        }
        Finding { layer: "ids", found, holds }
    }

    fn capabilities(&self, role: Role) -> Vec<Finding> {
        let most = if role == Role::FileServer { FILE_SERVER.bits() } else { 0 };
        let sets = [
            ("capabilities, permitted", "CapPrm", most),
            ("capabilities, effective", "CapEff", most),
            ("capabilities, bounding", "CapBnd", most),
            ("capabilities, inheritable", "CapInh", 0),
            ("capabilities, ambient", "CapAmb", 0),
        ];
        let look = |(layer, name, most): (&'static str, &str, u64)| {
            let held = u64::from_str_radix(self.field(name), 16);
            Finding {
                layer,
                found: self.field(name).to_owned(),
                holds: held.is_ok_and(|held| held & !most == 0),
            }
        };
        sets.into_iter().map(look).collect()
    }

    /// Of all threads: one without a filter would be a way out for all.
    fn filters(&self) -> io::Result<Finding> {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        let mut holds = true;
        for task in fs::read_dir(self.folder.join("task"))? {
            // A thread that ends meanwhile.
            let Ok(text) = fs::read_to_string(task?.path().join("status")) else { continue };
            let thread = fields(&text);
            let get = |name: &str| thread.get(name).map_or("", String::as_str);
            if get("Name").starts_with(KERNEL_THREADS) {
                continue;
            }
            holds &= get("Seccomp") == "2";
            // Kernels before 5.10 do not count.
            let filters = if get("Seccomp_filters").is_empty() { "?" } else { get("Seccomp_filters") };
            *counts.entry(format!("{} with {filters}", get("Name"))).or_default() += 1;
        }
        let found: Vec<_> = counts.iter().map(|(thread, count)| format!("{count} {thread}")).collect();
        Ok(Finding {
            layer: "filters of system calls",
            found: found.join(", "),
            holds: holds && !found.is_empty(),
        })
    }

    fn root(&self, role: Role) -> io::Result<Finding> {
        let entries = fs::read_dir(self.folder.join("root"))?.count();
        let mounts = fs::read_to_string(self.folder.join("mountinfo"))?;
        let (mut root, mut others) = ("", 0);
        for line in mounts.lines() {
            let words: Vec<_> = line.split(' ').collect();
            match (words.get(4), words.get(5)) {
                (Some(&"/"), Some(options)) => root = options,
                _ => others += 1,
            }
        }
        let read_only = root.split(',').any(|option| option == "ro");
        let holds = read_only && (role == Role::FileServer || (entries == 0 && others == 0));
        Ok(Finding {
            layer: "root",
            found: format!("{entries} entries, {root}; {others} other mounts"),
            holds,
        })
    }

    fn limits(&self, role: Role) -> io::Result<Finding> {
        let text = fs::read_to_string(self.folder.join("limits"))?;
        let hard = |name: &str| {
            let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
            rest.split_whitespace().nth(1).map(str::to_owned)
        };
        let mut holds = true;
        let mut found = Vec::new();
        let shown = vmm::LIMITS.iter().map(|(name, most)| (*name, Some(*most)));
        let more = [("Max processes", Some(vmm::TASKS)), ("Max data size", None), ("Max file size", None)];
        for (name, most) in shown.chain(more) {
            let value = hard(name).unwrap_or_default();
            if let (Role::Vmm, Some(most)) = (role, most) {
                holds &= value.parse::<u64>().is_ok_and(|value| value <= most);
            }
            found.push(format!("{} {value}", name.trim_start_matches("Max ")));
        }
        if role == Role::FileServer {
            holds = hard("Max core file size").as_deref() == Some("0");
        }
        Ok(Finding { layer: "limits", found: found.join(", "), holds })
    }

    /// Descriptors by kind. No directory is among those of a VMM: it would lead somewhere.
    fn descriptors(&self, role: Role) -> io::Result<Finding> {
        let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
        let mut directories = 0;
        for fd in fs::read_dir(self.folder.join("fd"))? {
            let path = fd?.path();
            let Ok(target) = fs::read_link(&path) else { continue };
            if fs::metadata(&path).is_ok_and(|meta| meta.is_dir()) {
                directories += 1;
            }
            *kinds.entry(kind(&target.to_string_lossy())).or_default() += 1;
        }
        let found: Vec<_> = kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        let holds = role == Role::FileServer || directories == 0;
        Ok(Finding { layer: "descriptors", found: found.join(", "), holds })
    }

    /// A process that may not be dumped belongs to root in `/proc`, whoever it runs as: to the root of the user namespace in which its program
    /// was started. Of a user who is not root that is the same user, so it makes no difference to be seen.
    fn dumps(&self) -> io::Result<Finding> {
        if self.owner != 0 {
            let found = "cannot be told from outside of a user's own process".to_owned();
            return Ok(Finding { layer: "dumps", found, holds: true });
        }
        let owner = fs::metadata(self.folder.join("stat"))?.uid();
        let held = owner == 0 && !self.field("Uid").starts_with("0\t");
        let found = if held { "not to be dumped" } else { "may be dumped" };
        Ok(Finding { layer: "dumps", found: found.to_owned(), holds: held })
    }

    /// Guest memory has the flag that leaves it out of dumps.
    fn memory(&self) -> io::Result<Finding> {
        let (guest, left_out) = large_mappings(&fs::read_to_string(self.folder.join("smaps"))?);
        let found = format!("{left_out} of {guest} mappings are left out");
        Ok(Finding { layer: "guest memory in dumps", found, holds: guest > 0 && left_out == guest })
    }
}

/// Mappings that are as large as the smallest guest's memory and can be written to, and those of them that are left out of dumps.
fn large_mappings(smaps: &str) -> (usize, usize) {
    let (mut large, mut left_out, mut inside) = (0, 0, false);
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            left_out += usize::from(inside && flags.split(' ').any(|flag| flag == "dd"));
            inside = false;
        } else if let Some(bytes) = mapped_for_writing(line) {
            inside = bytes >= LEAST_MEMORY_BYTES;
            large += usize::from(inside);
        }
    }
    (large, left_out)
}

/// Length of a mapping that can be written to, by the line that it begins with: `55d0-55d4 rw-p …`.
fn mapped_for_writing(line: &str) -> Option<u64> {
    let mut words = line.split(' ');
    let (start, end) = words.next()?.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    let bytes = number(end)?.checked_sub(number(start)?)?;
    words.next().filter(|rights| rights.starts_with("rw")).map(|_| bytes)
}

fn kind(target: &str) -> String {
    match target.split_once(':') {
        Some(("anon_inode", what)) => what.trim_matches(['[', ']']).to_owned(),
        Some((what, _)) if !what.contains('/') => what.to_owned(),
        _ if target.starts_with("/memfd:") => "memfd".to_owned(),
        _ if target.starts_with("/dev/") => target.to_owned(),
        _ => "file".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_told_apart() {
        for (target, wanted) in [
            ("socket:[123]", "socket"),
            ("pipe:[5]", "pipe"),
            ("anon_inode:[eventfd]", "eventfd"),
            ("anon_inode:kvm-vm", "kvm-vm"),
            ("/memfd:guest-memory (deleted)", "memfd"),
            ("/dev/net/tun", "/dev/net/tun"),
            ("/var/lib/hyper/a:b", "file"),
        ] {
            assert_eq!(kind(target), wanted);
        }
    }

    #[test]
    fn guest_memory_is_told_by_its_size() {
        let smaps = "7f0000000000-7f0008000000 rw-p 00000000 00:00 0 \nSize: 131072 kB\nVmFlags: rd wr mr dd \n\
                     7f1000000000-7f1004000000 ---p 00000000 00:00 0 \nVmFlags: mr mw \n\
                     7f2000000000-7f2000021000 rw-p 00000000 00:00 0 \nVmFlags: rd wr \n";
        assert_eq!(large_mappings(smaps), (1, 1));
        assert_eq!(large_mappings(&smaps.replace(" dd", "")), (1, 0));
    }

    #[test]
    fn a_process_without_a_jail_is_seen_to_have_none() {
        let findings = look(std::process::id(), Role::Vmm, 0).unwrap();
        let holds = |layer| findings.iter().find(|finding| finding.layer == layer).unwrap().holds;
        for layer in ["namespaces", "ids", "root", "limits", "dumps", "filters of system calls"] {
            assert!(!holds(layer), "{layer}: {findings:#?}");
        }
    }
}
