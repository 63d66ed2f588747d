//! Templates as they lie in the home, and how a container's machine came to be.
#![expect(clippy::panic, reason = "assertions of the cases; a panic is how a case fails")]

use std::fs;
use std::path::{Path, PathBuf};

use crate::container::Container;
use crate::given;

/// Folders of the templates that there are.
#[must_use]
pub fn templates() -> Vec<PathBuf> {
    let kept = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("vm-") && path.join("memory").is_file()
    };
    let entries = fs::read_dir(given("HYPER_ROOT").join("templates")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(kept).collect()
}

/// Whether the machine of a running container booted a kernel, by the steps of its start.
///
/// # Panics
/// When its state cannot be read.
#[must_use]
pub fn booted(container: &Container) -> bool {
    let state = given("HYPER_ROOT").join("containers").join(&container.id).join("state.json");
    let text = fs::read_to_string(&state).unwrap_or_default();
    let state: serde_json::Value = match serde_json::from_str(&text) {
        Ok(state) => state,
        Err(error) => panic!("{}: {error}: {text}", state.display()),
    };
    match state.pointer("/boot/steps") {
        Some(steps) => steps.to_string().contains("\"doorbell\""),
        None => panic!("no steps of a start in {text}"),
    }
}

/// Gives a file another length.
///
/// # Panics
/// When that fails.
pub fn cut(file: &Path, bytes: u64) {
    let changed = fs::File::options().write(true).open(file).and_then(|file| file.set_len(bytes));
    if let Err(error) = changed {
        panic!("cutting {}: {error}", file.display());
    }
}

/// Turns one bit in the middle of a file.
///
/// # Panics
/// When that fails.
pub fn garble(file: &Path) {
    let changed = fs::read(file).and_then(|mut bytes| {
        let middle = bytes.len() / 2;
        if let Some(byte) = bytes.get_mut(middle) {
            *byte ^= 1;
        }
        fs::write(file, bytes)
    });
    if let Err(error) = changed {
        panic!("garbling {}: {error}", file.display());
    }
}
