//! Files that are written without end and cannot fill a disk: at a size the file becomes `<name>.1`, and a new one is begun.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// A file of at most `max_bytes`, with one predecessor of at most that size.
#[derive(Debug)]
pub(crate) struct RotatingFile {
    path: PathBuf,
    max_bytes: u64,
    file: File,
    len: u64,
}

/// Where the predecessor of `path` is.
pub(super) fn predecessor(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".1");
    PathBuf::from(name)
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).read(true).append(true).open(path)
}

impl RotatingFile {
    /// Opens or makes the file; writes go to its end. A last line that a crash cut off is ended.
    pub(crate) fn open(path: &Path, max_bytes: u64) -> io::Result<Self> {
        let mut file = open(path)?;
        let mut len = file.metadata()?.len();
        if len > 0 {
            file.seek(SeekFrom::Start(len - 1))?;
            let mut last = [0];
            file.read_exact(&mut last)?;
            if last != *b"\n" {
                file.write_all(b"\n")?;
                len += 1;
            }
        }
        Ok(Self { path: path.to_owned(), max_bytes, file, len })
    }

    /// Appends `bytes` (whole lines, if readers shall find whole lines); they are never split over two files.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let more = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if self.len > 0 && self.len.saturating_add(more) > self.max_bytes {
            fs::rename(&self.path, predecessor(&self.path))?;
            self.file = open(&self.path)?;
            self.len = 0;
        }
        self.file.write_all(bytes)?;
        self.len = self.len.saturating_add(more);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_files_of_bounded_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut file = RotatingFile::open(&path, 100).unwrap();
        for n in 0..100 {
            file.write(format!("line number {n:04}\n").as_bytes()).unwrap();
        }
        let (old, new) =
            (fs::read_to_string(predecessor(&path)).unwrap(), fs::read_to_string(&path).unwrap());
        assert!(old.len() <= 100 && new.len() <= 100);
        assert!(new.ends_with("line number 0099\n"));
        assert!(old.ends_with('\n') && old.len() > 50);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn cut_off_line_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, "whole\nhal").unwrap();
        RotatingFile::open(&path, 100).unwrap().write(b"next\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "whole\nhal\nnext\n");
    }
}
