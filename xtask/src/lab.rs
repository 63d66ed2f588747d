//! The lab machine (L1): QEMU in software emulating a processor with SVM, under Debian's stock kernel.
//!
//! `/dev/kvm` there is the real interface with nested paging, whatever this host has. L1's root is this host's `/`
//! under an overlay that is thrown away; a command in it sees the same paths, and its status is ours.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cache;
use crate::command;
use crate::lab_parts::{self, Parts};
use crate::tsc;

/// What `timeout(1)` returns too.
const STATUS_TIMED_OUT: u8 = 124;
/// L1 ended, but its command left no status.
const STATUS_LOST: u8 = 125;

/// On the instruction clock one tick of the counter is one instruction, and that is one nanosecond.
const ICOUNT_KHZ: u64 = 1_000_000;

/// How the lab machine is made.
#[derive(clap::Args, Clone)]
pub(crate) struct Options {
    /// The instruction clock: 1 ns of guest time is one instruction of L1 and L2 together.
    #[arg(long)]
    pub(crate) icount: bool,
    /// Memory of the lab machine, as QEMU writes it.
    #[arg(long, default_value = "6G")]
    pub(crate) mem: String,
    /// Size of the scratch disk at /var/lib/hyper (sparse), as truncate(1) writes it.
    #[arg(long, default_value = "32G")]
    pub(crate) disk: String,
    /// Seconds after which the machine is stopped and the status is 124.
    #[arg(long, default_value_t = 600)]
    pub(crate) timeout: u64,
    /// A folder to share as /lab, kept afterwards; a fresh one that is removed otherwise.
    #[arg(long)]
    pub(crate) share: Option<PathBuf>,
    /// A file for the scratch disk, kept afterwards and used as it is when it is there.
    #[arg(long)]
    pub(crate) disk_file: Option<PathBuf>,
    /// More kernel arguments for the lab machine.
    #[arg(long, default_value = "")]
    pub(crate) append: String,
    /// What to run: words for bash, joined by spaces.
    #[arg(last = true, required = true)]
    pub(crate) command: Vec<String>,
}

impl Options {
    /// The usual machine for a script.
    pub(crate) fn script(script: String, timeout: u64) -> Self {
        Self {
            icount: false,
            mem: "6G".to_owned(),
            disk: "32G".to_owned(),
            timeout,
            share: None,
            disk_file: None,
            append: String::new(),
            command: vec![script],
        }
    }
}

/// Runs the command with our own output and returns its status.
pub(crate) fn run(options: &Options) -> Result<u8> {
    let mut stdout = std::io::stdout();
    run_with(options, &mut |bytes| {
        stdout.write_all(bytes)?;
        stdout.flush()
    })
}

/// Runs the command, hands over what it prints, and returns its status.
pub(crate) fn run_with(options: &Options, seen: &mut dyn FnMut(&[u8]) -> std::io::Result<()>) -> Result<u8> {
    if !command::exists("qemu-system-x86_64") {
        bail!("the lab needs qemu-system-x86_64; `make setup` installs it");
    }
    let parts = lab_parts::make()?;
    let folder = RunFolder::new(options)?;
    write_job(&folder.shared, &options.command)?;
    make_disk(&folder.disk, &options.disk)?;
    let mut machine = Machine::start(options, &parts, &folder)?;
    let ended = machine.pump(Duration::from_secs(options.timeout), seen)?;
    if !ended {
        crate::say(format!("lab: stopped after {} s", options.timeout));
        return Ok(STATUS_TIMED_OUT);
    }
    let status =
        fs::read_to_string(folder.shared.join("status")).ok().and_then(|text| text.trim().parse().ok());
    if status.is_none() {
        crate::say("lab: the machine ended without a status");
    }
    Ok(status.unwrap_or(STATUS_LOST))
}

/// The run's own files, removed at the end.
struct RunFolder {
    own: PathBuf,
    shared: PathBuf,
    disk: PathBuf,
}

impl RunFolder {
    fn new(options: &Options) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let own = cache::dir()?.join(format!("lab-run/{}-{number}", std::process::id()));
        cache::remove_dir(&own)?;
        let shared = match &options.share {
            Some(share) => share.clone(),
            None => own.join("share"),
        };
        for folder in [&own, &shared] {
            fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        }
        let shared = shared.canonicalize().context("resolving the shared folder")?;
        let disk = options.disk_file.clone().unwrap_or_else(|| own.join("disk"));
        Ok(Self { own, shared, disk })
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if let Err(error) = cache::remove_dir(&self.own) {
            crate::say(format!("lab: {error:#}"));
        }
    }
}

fn write_job(shared: &Path, words: &[String]) -> Result<()> {
    let here = std::env::current_dir().context("the current folder is gone")?;
    let here = here.to_string_lossy().replace('\'', r"'\''");
    let job = format!("cd '{here}'\n{}\n", words.join(" "));
    fs::write(shared.join("job"), job).context("writing the lab's job")?;
    match fs::remove_file(shared.join("status")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context("removing an old status")
        }
        _ => Ok(()),
    }
}

fn make_disk(disk: &Path, size: &str) -> Result<()> {
    if disk.exists() {
        return Ok(());
    }
    command::quiet(Command::new("truncate").arg("--size").arg(size).arg(disk))?;
    command::quiet(Command::new("/sbin/mkfs.ext4").args(["-q", "-O", "^has_journal", "-m", "0"]).arg(disk))
}

struct Machine(Child);

impl Machine {
    fn start(options: &Options, parts: &Parts, folder: &RunFolder) -> Result<Self> {
        let log = File::create(folder.own.join("qemu.log")).context("creating QEMU's log")?;
        let child = qemu(options, parts, folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("starting QEMU")?;
        Ok(Self(child))
    }

    /// Hands output over until the machine ends (true) or the time is up (false).
    fn pump(&mut self, limit: Duration, seen: &mut dyn FnMut(&[u8]) -> std::io::Result<()>) -> Result<bool> {
        let deadline = Instant::now() + limit;
        let mut console = self.0.stdout.take().context("QEMU has no console")?;
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(length @ 1..) = console.read(&mut buffer) {
                if sender.send(buffer.get(..length).unwrap_or_default().to_vec()).is_err() {
                    break;
                }
            }
        });
        loop {
            match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(bytes) => seen(&bytes).context("passing on the lab's output")?,
                Err(RecvTimeoutError::Timeout) => return Ok(false),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        self.0.wait().context("waiting for QEMU")?;
        Ok(true)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It has ended already unless the time was up; then it is gone after this, whatever either says.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn qemu(options: &Options, parts: &Parts, folder: &RunFolder) -> Command {
    let thread = if options.icount { "single" } else { "multi" };
    // `panic=-1` and `-no-reboot`: a panic ends the machine at once. The rest shortens the boot.
    let arguments = format!(
        "console=ttyS0 quiet loglevel=1 mitigations=off nokaslr random.trust_cpu=on audit=0 cryptomgr.notests nowatchdog \
         tsc=reliable tsc_early_khz={} no_timer_check panic=-1 reboot=t lab.disk=1 lab.modules={} {}",
        if options.icount { ICOUNT_KHZ } else { tsc::khz() },
        parts.modules.display(),
        options.append
    );
    // The machine dies with us.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
    command.args(["-M", "microvm,acpi=on,rtc=on,pit=on,pic=on", "-global", "virtio-mmio.force-legacy=false"]);
    command.arg("-accel").arg(format!("tcg,tb-size=512,thread={thread}"));
    // One processor: with two, QEMU 7.2 hangs about once in 35 nested starts. EPYC is the quickest of the models.
    command.args(["-cpu", "EPYC,+svm", "-smp", "1", "-m", &options.mem]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]);
    command
        .arg("-kernel")
        .arg(&parts.vmlinux)
        .arg("-initrd")
        .arg(&parts.initramfs)
        .args(["-append", &arguments]);
    command.args(["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"]);
    command.args(["-device", "virtio-9p-device,fsdev=root,mount_tag=root"]);
    command
        .arg("-fsdev")
        .arg(format!("local,id=lab,path={},security_model=none", folder.shared.display()))
        .args(["-device", "virtio-9p-device,fsdev=lab,mount_tag=lab"]);
    command
        .arg("-drive")
        .arg(format!("id=disk,file={},format=raw,if=none,cache=unsafe,discard=unmap", folder.disk.display()))
        .args(["-device", "virtio-blk-device,drive=disk"]);
    if options.icount {
        command.args(["-icount", "shift=0,sleep=off"]);
    }
    command
}
