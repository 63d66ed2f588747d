//! `doctor`: one screen that tells whether this host can run virtual machines, and what to do if not.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use hyper_sandbox::{Dirs, Parts, rootless};
use serde::Deserialize;
use serde_json::json;
use tokio::process::Command;

use crate::args::DoctorArgs;
use crate::error::CliError;
use crate::output;

/// How long one probe may take. The slowest runs a hundred thousand emulated instructions twice: 0.2 s.
const PROBE_PATIENCE: Duration = Duration::from_secs(20);
/// Where virtual machines come from.
const KVM: &str = "/dev/kvm";
/// Free space below which pulls and writable layers will soon fail, bytes.
const LOW_SPACE_BYTES: u64 = 2 << 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Good,
    /// Containers run, but something will not work.
    Limited,
    /// No container runs.
    Bad,
}

#[derive(Debug)]
struct Finding {
    what: &'static str,
    verdict: Verdict,
    text: String,
    mend: String,
}

impl Finding {
    fn good(what: &'static str, text: impl Into<String>) -> Self {
        Self { what, verdict: Verdict::Good, text: text.into(), mend: String::new() }
    }

    fn limited(what: &'static str, text: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { what, verdict: Verdict::Limited, text: text.into(), mend: mend.into() }
    }

    fn bad(what: &'static str, text: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { what, verdict: Verdict::Bad, text: text.into(), mend: mend.into() }
    }
}

/// `hyper doctor`: exit code 0 when containers can run, else 1.
///
/// # Errors
/// Only when the program cannot find itself.
pub(crate) async fn doctor(args: &DoctorArgs) -> Result<i32, CliError> {
    if let Some(container) = &args.jail {
        return super::jail::jail(container, args);
    }
    let parts = Parts::locate()?;
    let mut findings = vec![kvm(&parts).await];
    findings.extend(programs(&parts));
    findings.extend(host_tools());
    findings.push(tun());
    if rootless::is_needed() {
        findings.extend(users());
    }
    findings.push(space(&Dirs::from_env().data));
    let fit = findings.iter().all(|f| f.verdict != Verdict::Bad);
    if args.json {
        let list: Vec<_> = findings.iter().map(to_json).collect();
        output::line(json!({"fit": fit, "findings": list}));
    } else if !args.quiet {
        findings.iter().for_each(show);
        output::line(if fit {
            "This host can run containers."
        } else {
            "This host cannot run containers yet."
        });
    }
    Ok(i32::from(!fit))
}

fn show(finding: &Finding) {
    let mark = match finding.verdict {
        Verdict::Good => "ok  ",
        Verdict::Limited => "warn",
        Verdict::Bad => "FAIL",
    };
    output::line(format!("{mark}  {:<14} {}", finding.what, finding.text));
    if !finding.mend.is_empty() {
        output::line(format!("{:21}-> {}", "", finding.mend));
    }
}

fn to_json(finding: &Finding) -> serde_json::Value {
    let verdict = match finding.verdict {
        Verdict::Good => "ok",
        Verdict::Limited => "warn",
        Verdict::Bad => "fail",
    };
    json!({"what": finding.what, "verdict": verdict, "text": finding.text, "mend": finding.mend})
}

/// What `hyper-vmm --probe` prints.
#[derive(Debug, Deserialize)]
struct Probe {
    #[serde(default)]
    kind: Option<String>,
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    missing: Vec<String>,
    #[serde(default)]
    guest_ring0_ps: Option<u64>,
}

async fn kvm(parts: &Parts) -> Finding {
    let probe = Command::new(&parts.vmm).arg("--probe").stdin(Stdio::null()).kill_on_drop(true).output();
    let out = match tokio::time::timeout(PROBE_PATIENCE, probe).await {
        Ok(Ok(out)) => out,
        Ok(Err(error)) => {
            return Finding::bad(
                "kvm",
                format!("cannot run {}: {error}", parts.vmm.display()),
                "reinstall hyper",
            );
        }
        Err(_) => {
            return Finding::bad(
                "kvm",
                "the probe did not end",
                "look for a hung /dev/kvm in the kernel log",
            );
        }
    };
    match serde_json::from_slice::<Probe>(&out.stdout) {
        Ok(probe) => judge(&probe, is_forbidden(Path::new(KVM))),
        Err(error) => {
            Finding::bad("kvm", format!("the probe's answer is not understood: {error}"), "reinstall hyper")
        }
    }
}

/// Whether a device is there, and not for this user.
fn is_forbidden(device: &Path) -> bool {
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(device);
    opened.is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied)
}

fn judge(probe: &Probe, forbidden: bool) -> Finding {
    if forbidden {
        return Finding::bad(
            "kvm",
            format!("no permission to open {KVM}"),
            "an administrator lets you in: `usermod -aG kvm USER`, then log in again (a group or a list of the device: `getfacl /dev/kvm`)",
        );
    }
    if let Some(error) = &probe.error {
        return Finding::bad(
            "kvm",
            error.clone(),
            "hyper needs /dev/kvm: enable virtualisation in the firmware (or nested virtualisation in the outer VM), load kvm_intel or kvm_amd, and join the group kvm",
        );
    }
    if !probe.missing.is_empty() {
        return Finding::bad("kvm", format!("lacks {}", probe.missing.join(", ")), "use Linux 5.10 or later");
    }
    let per_instruction = probe
        .guest_ring0_ps
        .map_or_else(String::new, |ps| format!(", {}.{:03} ns a ring 0 instruction", ps / 1000, ps % 1000));
    match probe.kind.as_deref() {
        Some("hardware") => Finding::good("kvm", format!("hardware virtualisation{per_instruction}")),
        Some("emulated") => Finding::bad(
            "kvm",
            format!(
                "/dev/kvm is emulated in software{per_instruction}: a kernel takes minutes to boot on it"
            ),
            "use a host with hardware virtualisation; from the source tree `cargo xtask lab` runs a machine that has it, slowly",
        ),
        _ => Finding::limited("kvm", "its speed could not be measured", ""),
    }
}

fn programs(parts: &Parts) -> Vec<Finding> {
    let list: [(&'static str, &Path); 4] = [
        ("vmm", &parts.vmm),
        ("file server", &parts.fs),
        ("guest kernel", &parts.kernel),
        ("guest root", &parts.initramfs),
    ];
    let look = |(what, path): (&'static str, &Path)| match path.metadata() {
        Ok(meta) if meta.is_file() => Finding::good(what, path.display().to_string()),
        Ok(_) => Finding::bad(what, format!("{} is not a file", path.display()), "reinstall hyper"),
        Err(error) => Finding::bad(what, format!("{}: {error}", path.display()), "reinstall hyper"),
    };
    list.into_iter().map(look).collect()
}

fn host_tools() -> Vec<Finding> {
    let list = [
        ("writable layer", "mkfs.ext4", "e2fsprogs", Verdict::Bad),
        ("nat", "nft", "nftables", Verdict::Limited),
        ("links", "ip", "iproute2", Verdict::Limited),
    ];
    let look = |(what, program, package, severity): (&'static str, &str, &str, Verdict)| match find(program) {
        Some(path) => Finding::good(what, path),
        None => Finding {
            what,
            verdict: severity,
            text: format!("{program} is not on PATH"),
            mend: format!("install the package {package}"),
        },
    };
    list.into_iter().map(look).collect()
}

fn find(program: &str) -> Option<String> {
    let path = std::env::var("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/sbin"].map(str::to_owned);
    path.split(':')
        .map(str::to_owned)
        .chain(more)
        .map(|d| format!("{d}/{program}"))
        .find(|p| Path::new(p).is_file())
}

/// What a user who is not root needs besides.
fn users() -> Vec<Finding> {
    let namespaces = match rootless::try_namespaces() {
        Ok(()) => Finding::good("namespaces", "of this user's own can be made"),
        Err(error) => Finding::bad("namespaces", error, "or run hyper as root"),
    };
    let uplink = match rootless::find_uplink() {
        Ok(path) => Finding::good("way out", path.display().to_string()),
        Err(error) => Finding::limited("way out", error, ""),
    };
    let dirs = Dirs::from_env();
    let run = match rootless::make_run_dir(&dirs) {
        Ok(()) => Finding::good("sockets", dirs.run.display().to_string()),
        Err(error) => {
            Finding::bad("sockets", crate::error::chain(&error), "set XDG_RUNTIME_DIR or HYPER_RUN")
        }
    };
    vec![namespaces, uplink, run]
}

fn tun() -> Finding {
    let node = "/dev/net/tun";
    match std::fs::OpenOptions::new().read(true).write(true).open(node) {
        Ok(_) => Finding::good("tap", node),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Finding::limited(
            "tap",
            format!("{node}: {error}"),
            "an administrator makes it everybody's, as udev does: `chmod 666 /dev/net/tun`; until then only --network none works",
        ),
        Err(error) => Finding::limited(
            "tap",
            format!("{node}: {error}"),
            "`modprobe tun` as root; until then only --network none works",
        ),
    }
}

fn space(data: &Path) -> Finding {
    let existing = data.ancestors().find(|p| p.exists()).unwrap_or_else(|| Path::new("/"));
    match rustix::fs::statvfs(existing) {
        Ok(fs) => {
            let free = fs.f_bavail.saturating_mul(fs.f_frsize);
            let text = format!("{} free at {}", crate::options::quantity::human(free), existing.display());
            if free < LOW_SPACE_BYTES {
                Finding::limited("space", text, "free some, or set HYPER_ROOT to a larger file system")
            } else {
                Finding::good("space", text)
            }
        }
        Err(error) => Finding::limited("space", format!("{}: {error}", existing.display()), ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(text: &str) -> Finding {
        judge(&serde_json::from_str(text).unwrap(), false)
    }

    #[test]
    fn emulated_kvm_is_refused_and_explained() {
        let finding = probe(r#"{"kind":"emulated","guest_ring0_ps":600000}"#);
        assert_eq!(finding.verdict, Verdict::Bad);
        assert!(finding.text.contains("600.000 ns"), "{}", finding.text);
        assert!(!finding.mend.is_empty());
    }

    #[test]
    fn who_may_not_open_kvm_is_told_how_to() {
        let finding = judge(&serde_json::from_str(r#"{"error":"cannot open /dev/kvm"}"#).unwrap(), true);
        assert!(finding.verdict == Verdict::Bad && finding.mend.contains("usermod -aG kvm"), "{finding:?}");
    }

    #[test]
    fn hardware_is_good_and_errors_are_bad() {
        assert_eq!(probe(r#"{"kind":"hardware","guest_ring0_ps":300}"#).verdict, Verdict::Good);
        assert_eq!(probe(r#"{"error":"cannot open /dev/kvm"}"#).verdict, Verdict::Bad);
        assert_eq!(probe(r#"{"kind":"hardware","missing":["irqfd"]}"#).verdict, Verdict::Bad);
    }
}
