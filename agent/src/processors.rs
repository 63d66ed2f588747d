//! Processors that come online and go offline while the guest runs. The machine has made those that are to come.

use std::path::Path;

use crate::error::{AgentError, Tried};

/// Where the kernel has them.
const FOLDER: &str = "/sys/devices/system/cpu";
/// Most processors of a guest (`CONFIG_NR_CPUS`).
const MAX_PROCESSORS: u32 = 32;

/// Has the first `count` processors online, and no others. The first is always online.
///
/// # Errors
/// There are not so many, or the kernel refuses one; those before it stay as they were set.
pub(crate) fn set_online(count: u32) -> Result<(), AgentError> {
    set_online_in(Path::new(FOLDER), count)
}

fn set_online_in(folder: &Path, count: u32) -> Result<(), AgentError> {
    if count == 0 || count > MAX_PROCESSORS {
        return Err(AgentError::invalid(format!("{count} processors: give 1 to {MAX_PROCESSORS}")));
    }
    let file = |number: u32| folder.join(format!("cpu{number}/online"));
    // The first has no such file where it cannot go offline.
    for number in 1..count {
        set(&file(number), "1")?;
    }
    for number in (count..MAX_PROCESSORS).rev().filter(|number| file(*number).exists()) {
        set(&file(number), "0")?;
    }
    Ok(())
}

/// Writing what is so already is no work, but a processor that goes offline stops all others for a moment.
fn set(file: &Path, digit: &str) -> Result<(), AgentError> {
    let now = std::fs::read_to_string(file).tried(|| format!("read {}", file.display()))?;
    if now.trim() == digit {
        return Ok(());
    }
    std::fs::write(file, digit).tried(|| format!("write {digit} to {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ones_are_online() {
        let folder = std::env::temp_dir().join(format!("hyper-agent-processors-{}", std::process::id()));
        for number in 1..4 {
            std::fs::create_dir_all(folder.join(format!("cpu{number}"))).unwrap();
            std::fs::write(folder.join(format!("cpu{number}/online")), "0\n").unwrap();
        }
        let online = || {
            let read = |n| std::fs::read_to_string(folder.join(format!("cpu{n}/online"))).unwrap();
            [1, 2, 3].map(|n: u32| read(n).trim() == "1")
        };
        for (count, expected) in
            [(3, [true, true, false]), (4, [true; 3]), (2, [true, false, false]), (1, [false; 3])]
        {
            set_online_in(&folder, count).unwrap();
            assert_eq!(online(), expected, "{count}");
        }
        for bad in [0, 33, u32::MAX] {
            assert_eq!(set_online_in(&folder, bad).unwrap_err().kind(), crate::error::ErrorKind::Invalid);
        }
        assert!(set_online_in(&folder, 5).is_err(), "there is no fifth");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
