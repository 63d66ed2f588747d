//! Disks by serial number: the one name of a virtio disk that the host chooses.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;

use crate::error::{AgentError, ErrorKind, Tried};
use crate::plan::DiskName;

/// How long a disk may take to appear: those of a cold boot are there before PID 1, one that is attached takes milliseconds.
pub(crate) const APPEAR_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest serial (`VIRTIO_BLK_ID_BYTES`).
pub(crate) const MAX_SERIAL_BYTES: usize = 20;

/// Checks a serial's form.
///
/// # Errors
/// It is empty, too long or not printable.
pub(crate) fn check_serial(serial: &str) -> Result<(), AgentError> {
    if serial.is_empty() || serial.len() > MAX_SERIAL_BYTES || !serial.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(AgentError::invalid(format!(
            "disk serial {serial:?} is not 1 to {MAX_SERIAL_BYTES} printable characters"
        )));
    }
    Ok(())
}

/// Finds the device nodes of disks, in the order asked for; waits for those that are not there yet until `deadline`.
///
/// # Errors
/// Not there in time, or the kernel's tables cannot be read.
pub(crate) fn wait_for(serials: &[&str], deadline: Option<Instant>) -> Result<Vec<PathBuf>, AgentError> {
    let sys = Path::new("/sys/block");
    if let Some(found) = all_of(&scan(sys)?, serials) {
        return Ok(found);
    }
    // Watch first, then look again: nothing can slip through between.
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
        .tried(|| "watch /dev".to_owned())?;
    inotify::add_watch(&watch, "/dev", inotify::WatchFlags::CREATE).tried(|| "watch /dev".to_owned())?;
    loop {
        let known = scan(sys)?;
        if let Some(found) = all_of(&known, serials) {
            return Ok(found);
        }
        let left = deadline.map_or(Duration::ZERO, |d| d.saturating_duration_since(Instant::now()));
        if left.is_zero() {
            let missing: Vec<_> = serials.iter().filter(|s| !known.contains_key(**s)).copied().collect();
            return Err(AgentError::refused(
                ErrorKind::NotFound,
                format!(
                    "no disk with serial {} appeared within {} s",
                    missing.join(", "),
                    APPEAR_TIMEOUT.as_secs()
                ),
            ));
        }
        let timeout = Timespec::try_from(left).map_err(|_| AgentError::invalid("deadline out of range"))?;
        let mut events = [PollFd::new(&watch, PollFlags::IN)];
        match poll(&mut events, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).tried(|| "wait for a disk".to_owned()),
        }
        let mut buffer = [0; 4096];
        // Only the waking counts; what it was is read from the tables.
        let _ = rustix::io::read(&watch, &mut buffer);
    }
}

/// The same for disks and parts of disks. Parts are there as soon as their disk's driver is bound.
///
/// # Errors
/// As of [`wait_for`].
pub(crate) fn wait_for_names<'n>(
    names: impl Iterator<Item = &'n DiskName> + Clone,
    deadline: Option<Instant>,
) -> Result<Vec<PathBuf>, AgentError> {
    let serials: Vec<&str> = names.clone().map(|name| name.serial.as_str()).collect();
    let disks = wait_for(&serials, deadline)?;
    Ok(disks.into_iter().zip(names).map(|(disk, name)| node_of(disk, name.part)).collect())
}

/// The node of a part of a disk, or of all of it.
fn node_of(disk: PathBuf, part: u32) -> PathBuf {
    match part {
        0 => disk,
        part => PathBuf::from(format!("{}{part}", disk.display())),
    }
}

fn all_of(known: &BTreeMap<String, String>, serials: &[&str]) -> Option<Vec<PathBuf>> {
    serials.iter().map(|s| known.get(*s).map(|name| Path::new("/dev").join(name))).collect()
}

/// Serial to name of all disks that have one.
fn scan(sys: &Path) -> Result<BTreeMap<String, String>, AgentError> {
    let mut known = BTreeMap::new();
    let entries = std::fs::read_dir(sys).tried(|| format!("list {}", sys.display()))?;
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let Ok(serial) = std::fs::read_to_string(entry.path().join("serial")) else { continue };
        let serial = serial.trim_end_matches(['\n', '\0']);
        if check_serial(serial).is_ok() {
            known.insert(serial.to_owned(), name);
        }
    }
    Ok(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_are_bounded() {
        assert!(check_serial("image0").is_ok());
        assert!(check_serial("").is_err());
        assert!(check_serial("a b").is_err());
        assert!(check_serial(&"x".repeat(21)).is_err());
    }

    #[test]
    fn disks_are_found_by_serial() {
        let dir = std::env::temp_dir().join(format!("hyper-agent-disk-{}", std::process::id()));
        for (name, serial) in [("vda", "image\n"), ("vdb", "layer")] {
            std::fs::create_dir_all(dir.join(name)).unwrap();
            std::fs::write(dir.join(name).join("serial"), serial).unwrap();
        }
        std::fs::create_dir_all(dir.join("ram0")).unwrap();
        let known = scan(&dir).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(
            all_of(&known, &["layer", "image"]).unwrap(),
            [Path::new("/dev/vdb"), Path::new("/dev/vda")]
        );
        assert_eq!(all_of(&known, &["other"]), None);
    }
}
