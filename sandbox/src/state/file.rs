//! JSON files that are whole at every moment: written beside, synced, and renamed over.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::SandboxError;

/// Largest state file, bytes: what somebody else put there must not fill our memory.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// Replaces `path` by `value`, for its owner alone; a crash leaves the old file or the new one.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), SandboxError> {
    let text = serde_json::to_vec_pretty(value)
        .map_err(|source| SandboxError::Damaged { path: path.to_owned(), source })?;
    let fail = |source| SandboxError::io("write", path, source);
    // Of two processes that write the same file at once each has its own; the later rename wins.
    let beside = path.with_extension(format!("json.{}.tmp", std::process::id()));
    let mut options = File::options();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(&beside).map_err(fail)?;
    file.write_all(&text).map_err(fail)?;
    file.sync_data().map_err(fail)?;
    fs::rename(&beside, path).map_err(fail)?;
    path.parent().map_or(Ok(()), sync_dir)
}

/// Makes the names in a directory last, whatever happens to the power.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), SandboxError> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|source| SandboxError::io("sync", dir, source))
}

/// Reads `path`; `None` when there is none.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, SandboxError> {
    let fail = |source| SandboxError::io("read", path, source);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail(error)),
    };
    let mut text = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut text).map_err(fail)?;
    let value = serde_json::from_slice(&text);
    value.map(Some).map_err(|source| SandboxError::Damaged { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_is_none_and_half_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        assert!(read_json::<Vec<u32>>(&path).unwrap().is_none());
        write_json(&path, &vec![1, 2, 3]).unwrap();
        assert_eq!(read_json::<Vec<u32>>(&path).unwrap(), Some(vec![1, 2, 3]));
        let whole = fs::read(&path).unwrap();
        for len in 0..whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            let error = read_json::<Vec<u32>>(&path).unwrap_err();
            assert!(matches!(error, SandboxError::Damaged { .. }), "{len}");
        }
    }

    #[test]
    fn crash_before_the_rename_keeps_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        write_json(&path, &vec![1]).unwrap();
        let next = serde_json::to_vec(&vec![2, 3]).unwrap();
        for len in 0..=next.len() {
            fs::write(path.with_extension("json.tmp"), &next[..len]).unwrap();
            assert_eq!(read_json::<Vec<u32>>(&path).unwrap(), Some(vec![1]));
        }
        write_json(&path, &vec![2, 3]).unwrap();
        assert_eq!(read_json::<Vec<u32>>(&path).unwrap(), Some(vec![2, 3]));
    }
}
