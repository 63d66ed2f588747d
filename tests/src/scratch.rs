//! A folder of a case's own, removed when it ends.
#![expect(clippy::panic, reason = "assertions of the cases; a panic is how a case fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Where there is room.
pub(crate) fn scratch_base() -> PathBuf {
    std::env::var_os("HYPER_TEST_SCRATCH").map_or_else(std::env::temp_dir, PathBuf::from)
}

/// A folder of a case's own, on the scratch disk.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes an empty one.
    ///
    /// # Panics
    /// When that fails.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it touches the disk, which a default should not")]
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = scratch_base().join(format!("case-{}-{number}", std::process::id()));
        if let Err(error) = fs::create_dir_all(&path) {
            panic!("creating {}: {error}", path.display());
        }
        Self(path)
    }

    /// Leaves it where it is, for what outlives it; it goes with the machine.
    #[must_use]
    pub fn keep(self) -> PathBuf {
        std::mem::ManuallyDrop::new(self).0.clone()
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A path in it, as text.
    #[must_use]
    pub fn join(&self, name: &str) -> String {
        self.0.join(name).to_string_lossy().into_owned()
    }

    /// Writes a file in it and gives its path.
    ///
    /// # Panics
    /// When that fails.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.join(name);
        if let Err(error) = fs::write(&path, content) {
            panic!("writing {path}: {error}");
        }
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // The machine and its disk are thrown away anyhow.
        drop(fs::remove_dir_all(&self.0));
    }
}
