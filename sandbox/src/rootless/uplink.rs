//! The way out of a user's network namespace: pasta, which makes connections on the host as that user.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};
use tokio::sync::watch;

use crate::launch::{last_words, scaled_ms};
use crate::sys::die_with_parent;

/// What to do when it is not there.
pub(super) const MISSING: &str =
    "pasta is missing on this host: install the package passt, or use --network none";
/// The namespace's own address on the link to pasta, of the network that RFC 7335 sets aside for such links.
const OWN: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 2);
/// Pasta's address on it. What connects to it reaches the loopback of the host; the rules of each container say who may.
pub(crate) const DOOR: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 1);
/// Length of the network's prefix.
const PREFIX_LEN: &str = "29";
/// Its hardware address, and what the interface is called.
const DOOR_MAC: &str = "02:48:c0:00:00:01";
const INTERFACE: &str = "uplink";
/// How long a start may take.
const START_MS: u64 = 10_000;
/// How often it is looked whether it is ready.
const RETRY: Duration = Duration::from_millis(5);
/// Pause before one that has ended is started again.
const PAUSE: Duration = Duration::from_secs(1);

/// Nothing yet, ready, or why not.
pub(super) type Condition = Option<Result<(), String>>;

/// Where pasta is.
pub(super) fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/bin", "/usr/local/bin"].map(PathBuf::from));
    folders.map(|folder| folder.join("pasta")).find(|program| program.is_file())
}

/// Keeps pasta running for the namespaces of the process `anchor`. Ends when it cannot be started; it ends with the task.
pub(super) async fn run(anchor: u32, dir: PathBuf, condition: watch::Sender<Condition>) {
    loop {
        match start(anchor, &dir).await {
            Ok(mut pasta) => {
                condition.send_replace(Some(Ok(())));
                let ended = pasta.wait().await;
                condition.send_replace(None);
                tracing::warn!(?ended, "pasta has ended: {}", last_words(&log(&dir)));
            }
            Err(why) => {
                condition.send_replace(Some(Err(why)));
                return;
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn log(dir: &Path) -> PathBuf {
    dir.join("pasta.log")
}

async fn start(anchor: u32, dir: &Path) -> Result<Child, String> {
    let failed = |error: std::io::Error| format!("cannot start pasta: {error}");
    let program = find().ok_or(MISSING)?;
    let ready = dir.join("pasta.pid");
    match fs::remove_file(&ready) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let mut command = Command::new(program);
    // Addresses of its own, so that none of the host's has to be known, or changes: it needs an interface to look at all the same, and
    // every host has a loopback. It stays in the foreground, as a child; no port is forwarded in either direction, and no names.
    command
        .args(["--foreground", "--quiet", "--ipv4-only", "--config-net", "--no-dhcp"])
        .args(["--interface", "lo", "--mac-addr", DOOR_MAC, "--ns-ifname", INTERFACE])
        .args(["--address", &OWN.to_string(), "--netmask", PREFIX_LEN])
        .args(["--gateway", &DOOR.to_string(), "--dns", "none"])
        .args(["-t", "none", "-u", "none", "-T", "none", "-U", "none"])
        .arg("--pid")
        .arg(&ready)
        .arg(anchor.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(log(dir)).map_err(failed)?)
        .current_dir("/")
        .kill_on_drop(true);
    die_with_parent(&mut command);
    let mut pasta = command.spawn().map_err(failed)?;
    let deadline = Instant::now() + scaled_ms(START_MS);
    // The file is written when the interface is configured.
    while fs::read(&ready).unwrap_or_default().is_empty() {
        if let Ok(Some(status)) = pasta.try_wait() {
            return Err(format!("pasta has ended with {status}: {}", last_words(&log(dir))));
        }
        if Instant::now() >= deadline {
            return Err(format!("pasta is not ready after {START_MS} ms: {}", last_words(&log(dir))));
        }
        tokio::time::sleep(RETRY).await;
    }
    Ok(pasta)
}
