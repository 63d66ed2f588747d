//! First process of the lab machine (L1): mounts, runs one script, leaves its status in the shared folder.
//!
//! The host's root is shared over 9p, read-only, and becomes `/` under a tmpfs overlay. `/lab` is the run folder,
//! shared read-write: `/lab/job` is the script, `/lab/status` the result. The scratch disk is at `/var/lib/hyper`.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{Pid, WaitOptions};
use rustix::system::RebootCommand;
use rustix::termios::{OptionalActions, OutputModes};

const NINEP: &CStr = c"trans=virtio,version=9p2000.L,msize=524288,cache=loose";
/// The run folder is read by the host while we write it, so it is not cached.
const NINEP_SHARED: &CStr = c"trans=virtio,version=9p2000.L,msize=524288,cache=none";
/// What a command that could not be started counts as, like in a shell.
const STATUS_NOT_STARTED: i32 = 127;

fn main() {
    if let Err(error) = run() {
        report("lab-init", &error);
    }
    // Without a status file the other side knows that we failed.
    rustix::fs::sync();
    // The restart is announced at the highest level, and the console carries the command's output.
    if let Err(error) = fs::write("/proc/sys/kernel/printk", "0") {
        report("printk", &error);
    }
    if let Err(error) = rustix::system::reboot(RebootCommand::Restart) {
        report("restarting", &error.into());
    }
}

fn run() -> io::Result<()> {
    place("proc", "/proc", "proc", MountFlags::empty(), None);
    place("sys", "/sys", "sysfs", MountFlags::empty(), None);
    let arguments = fs::read_to_string("/proc/cmdline")?;
    load_modules(Path::new("/modules"))?;
    plain_terminal();
    build_root(&arguments);
    enter_root()?;
    finish_root(&arguments);
    let status = job();
    fs::write("/lab/status", format!("{status}\n"))
}

/// Loads the modules in the order of `list`.
fn load_modules(folder: &Path) -> io::Result<()> {
    for name in fs::read_to_string(folder.join("list"))?.lines() {
        let file = File::open(folder.join(name))?;
        if let Err(error) = rustix::system::finit_module(&file, c"", 0)
            && error != rustix::io::Errno::EXIST
        {
            report(name, &error.into());
        }
    }
    Ok(())
}

/// No carriage returns: the console's bytes are the command's bytes.
fn plain_terminal() {
    if let Ok(mut modes) = rustix::termios::tcgetattr(io::stdin()) {
        modes.output_modes.remove(OutputModes::OPOST);
        if let Err(error) = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &modes) {
            report("console", &error.into());
        }
    }
}

fn build_root(arguments: &str) {
    let none = MountFlags::empty();
    place("tmp", "/top", "tmpfs", none, Some(c"size=75%,mode=755"));
    for folder in ["/top/upper", "/top/work"] {
        if let Err(error) = fs::create_dir(folder) {
            report(folder, &error);
        }
    }
    place("root", "/lower", "9p", MountFlags::RDONLY, Some(NINEP));
    place("overlay", "/new", "overlay", none, Some(c"lowerdir=/lower,upperdir=/top/upper,workdir=/top/work"));
    place("proc", "/new/proc", "proc", none, None);
    place("sys", "/new/sys", "sysfs", none, None);
    place("dev", "/new/dev", "devtmpfs", none, None);
    place("pts", "/new/dev/pts", "devpts", none, Some(c"gid=5,mode=620,ptmxmode=666"));
    place("shm", "/new/dev/shm", "tmpfs", none, None);
    place("run", "/new/run", "tmpfs", none, Some(c"mode=755"));
    place("cgroup", "/new/sys/fs/cgroup", "cgroup2", none, None);
    place("lab", "/new/lab", "9p", none, Some(NINEP_SHARED));
    if argument(arguments, "lab.disk").is_some() {
        place("/new/dev/vda", "/new/var/lib/hyper", "ext4", none, None);
    }
}

fn enter_root() -> io::Result<()> {
    std::env::set_current_dir("/new")?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    std::env::set_current_dir("/")
}

fn finish_root(arguments: &str) {
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        link_to(target, link);
    }
    // So that modprobe, and the kernel's own requests, find what the initramfs did not carry.
    if let Some(modules) = argument(arguments, "lab.modules")
        && let Some(version) = Path::new(modules).file_name()
    {
        let link = Path::new("/usr/lib/modules").join(version);
        if let Err(error) = fs::create_dir_all("/usr/lib/modules") {
            report("/usr/lib/modules", &error);
        }
        if !link.exists() {
            link_to(modules, &link.to_string_lossy());
        }
    }
    for folder in ["/run/home", "/run/lock"] {
        if let Err(error) = fs::create_dir_all(folder) {
            report(folder, &error);
        }
    }
    if let Err(error) = rustix::system::sethostname(b"lab") {
        report("host name", &error.into());
    }
    tune("ip", &["link", "set", "lo", "up"]);
}

fn tune(program: &str, arguments: &[&str]) {
    match Command::new(program).args(arguments).env("PATH", PATH).status() {
        Ok(status) if status.success() => {}
        Ok(status) => report(program, &io::Error::other(status.to_string())),
        Err(error) => report(program, &error),
    }
}

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs the script in a session of its own; reaps everything until it ends.
fn job() -> i32 {
    let started = Command::new("setsid")
        .args(["bash", "/lab/job"])
        .stdin(Stdio::null())
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", "/run/home")
        .env("TERM", "dumb")
        .env("LANG", "C.UTF-8")
        .spawn();
    let child = match started {
        Ok(child) => i32::try_from(child.id()).ok().and_then(Pid::from_raw),
        Err(error) => {
            report("setsid", &error);
            return STATUS_NOT_STARTED;
        }
    };
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if Some(pid) == child => {
                return match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => code,
                    (None, signal) => 128 + signal.unwrap_or_default(),
                };
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                report("waiting", &error.into());
                return STATUS_NOT_STARTED;
            }
        }
    }
}

fn argument<'a>(arguments: &'a str, key: &str) -> Option<&'a str> {
    arguments.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

/// Mounts, and says so when it fails: the script finds out soon enough what is missing.
fn place(source: &str, target: &str, kind: &str, flags: MountFlags, options: Option<&CStr>) {
    let result = fs::create_dir_all(target).and_then(|()| {
        let options = options.map_or_else(CString::default, CStr::to_owned);
        Ok(mount(source, target, kind, flags, options.as_c_str())?)
    });
    if let Err(error) = result {
        report(target, &error);
    }
}

fn link_to(target: &str, link: &str) {
    if let Err(error) = symlink(target, link)
        && error.kind() != io::ErrorKind::AlreadyExists
    {
        report(link, &error);
    }
}

fn report(what: &str, error: &io::Error) {
    // Nobody is left to tell when the console is gone.
    drop(writeln!(io::stderr(), "lab-init: {what}: {error}"));
}
