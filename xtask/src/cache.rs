//! Where slow results live: folders named after the hash of what they were made from, outside the clone.
//!
//! A folder appears under its final name by one rename, so it is either whole or absent. A file lock per kind
//! keeps two runs from building the same thing twice.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// Hex digits of a hash that name a folder.
const KEY_DIGITS: usize = 20;

/// The root of this clone.
pub(crate) fn root() -> PathBuf {
    // `cargo run` sets the variable at run time, which is right even when two clones share a target folder.
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest.parent().map(Path::to_path_buf).unwrap_or(manifest)
}

/// `$XDG_CACHE_HOME/hyper`, or `~/.cache/hyper`; created when absent.
pub(crate) fn dir() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(base) => PathBuf::from(base),
        None => PathBuf::from(std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache"),
    };
    let dir = base.join("hyper");
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    Ok(dir)
}

/// Cargo's target folder: `CARGO_TARGET_DIR` when set, else inside the cache.
pub(crate) fn target_dir() -> Result<PathBuf> {
    match std::env::var_os("CARGO_TARGET_DIR").filter(|value| !value.is_empty()) {
        Some(dir) => {
            let dir = PathBuf::from(dir);
            fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
            dir.canonicalize().with_context(|| format!("resolving {}", dir.display()))
        }
        None => Ok(dir()?.join("target")),
    }
}

/// A hash over everything that a result depends on.
#[derive(Clone)]
pub(crate) struct Key(Sha256);

impl Key {
    /// A key for one kind of result.
    pub(crate) fn new(kind: &str) -> Self {
        Self(Sha256::new()).text(kind)
    }

    /// Mixes in a text; its length is mixed in too, so neighbours cannot run together.
    pub(crate) fn text(mut self, text: &str) -> Self {
        self.0.update((text.len() as u64).to_le_bytes());
        self.0.update(text);
        self
    }

    /// Mixes in a file's content.
    pub(crate) fn file(mut self, path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(&bytes);
        Ok(self)
    }

    /// The hex name that stands for everything mixed in.
    pub(crate) fn name(self) -> String {
        let mut name = hex(&self.0.finalize());
        name.truncate(KEY_DIGITS);
        name
    }
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Holds a file lock until dropped.
pub(crate) struct Lock {
    _file: File,
}

/// Waits for the lock of that name.
pub(crate) fn lock(name: &str) -> Result<Lock> {
    let path = dir()?.join(format!("{name}.lock"));
    let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(_) => {
            crate::say(format!("waiting for another run ({})", path.display()));
            file.lock().with_context(|| format!("locking {}", path.display()))?;
        }
    }
    Ok(Lock { _file: file })
}

/// The folder `<cache>/<kind>/<key>`, made by `make` in a folder beside it when it is not there yet.
pub(crate) fn folder(kind: &str, key: Key, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let parent = dir()?.join(kind);
    let path = parent.join(key.name());
    if path.is_dir() {
        return Ok(path);
    }
    let _lock = lock(kind)?;
    if path.is_dir() {
        return Ok(path);
    }
    let making = path.with_extension("making");
    remove_dir(&making)?;
    fs::create_dir_all(&making).with_context(|| format!("creating {}", making.display()))?;
    make(&making)?;
    fs::rename(&making, &path).with_context(|| format!("putting {} in place", path.display()))?;
    Ok(path)
}

/// Copies a file to its place by way of a rename; running programs keep the old one.
pub(crate) fn install(from: &Path, to: &Path) -> Result<()> {
    let parent = to.parent().with_context(|| format!("{} has no parent", to.display()))?;
    fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    let staged = to.with_extension(format!("new{}", std::process::id()));
    fs::copy(from, &staged).with_context(|| format!("copying {} to {}", from.display(), staged.display()))?;
    fs::rename(&staged, to).with_context(|| format!("putting {} in place", to.display()))
}

/// Removes a folder if it is there.
pub(crate) fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_texts_do_not_run_together() {
        let one = Key::new("t").text("ab").text("c").name();
        let two = Key::new("t").text("a").text("bc").name();
        assert_ne!(one, two);
        assert_eq!(one, Key::new("t").text("ab").text("c").name());
        assert_eq!(one.len(), KEY_DIGITS);
    }
}
