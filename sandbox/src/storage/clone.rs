//! Copies of sparse files that stay sparse.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;

use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate, ioctl_ficlone, seek};
use rustix::io::Errno;

/// Most bytes that are copied by one call, so that a deadline is looked at now and then.
const COPIED_AT_ONCE: u64 = 64 << 20;

/// Makes `to` (replacing what is there) a copy of `from`: shared extents where the file system can, else only the data is copied.
///
/// # Errors
/// What the file system answers, and `TimedOut` after the deadline, if there is one.
pub(super) fn clone_sparse(from: &Path, to: &Path, deadline: Option<Instant>) -> io::Result<()> {
    let source = File::open(from)?;
    let target = File::options().read(true).write(true).create(true).truncate(true).mode(0o600).open(to)?;
    if ioctl_ficlone(&target, &source).is_ok() {
        return Ok(());
    }
    target.set_len(source.metadata()?.len())?;
    let mut at = 0;
    while let Some((start, end)) = next_data(&source, at)? {
        let end = end.min(start.saturating_add(COPIED_AT_ONCE));
        copy_extent(&source, &target, start, end)?;
        at = end;
        if deadline.is_some_and(|deadline| Instant::now() > deadline) {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    Ok(())
}

/// Start and end of the first data of a file from `at` on.
fn next_data(file: &File, at: u64) -> io::Result<Option<(u64, u64)>> {
    match seek(file, SeekFrom::Data(at)) {
        Ok(start) => Ok(Some((start, seek(file, SeekFrom::Hole(start))?))),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Most bytes that are looked at at once.
const AT_ONCE: usize = 1 << 20;
/// What is a hole or not.
const BLOCK_BYTES: usize = 4096;

/// Makes holes where a file has blocks of zeroes. Where the file system cannot, they stay.
pub(super) fn dig_holes(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let file = File::options().read(true).write(true).open(path)?;
    let mut buffer = vec![0; AT_ONCE];
    let mut at = 0;
    while let Some((start, end)) = next_data(&file, at)? {
        let want = usize::try_from(end - start).unwrap_or(usize::MAX).min(buffer.len());
        let part = buffer.get_mut(..want).unwrap_or_default();
        file.read_exact_at(part, start)?;
        let is_zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
        let mut offset = start;
        let blocks: Vec<&[u8]> = part.chunks(BLOCK_BYTES).collect();
        for run in blocks.chunk_by(|one, next| is_zero(one) == is_zero(next)) {
            let bytes = run.iter().map(|block| block.len() as u64).sum();
            if run.first().is_some_and(|block| is_zero(block)) {
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                match fallocate(&file, how, offset, bytes) {
                    Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            offset += bytes;
        }
        at = offset;
    }
    Ok(())
}

fn copy_extent(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut from, mut to) = (start, start);
    while from < end {
        let want = usize::try_from(end - from).unwrap_or(usize::MAX);
        match copy_file_range(source, Some(&mut from), target, Some(&mut to), want) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            // Not on this file system, or not between these two.
            Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => {
                return copy_bytes(source, target, from, end);
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_bytes(source: &File, target: &File, mut at: u64, end: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0; 1 << 20];
    while at < end {
        let want = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
        let Some(part) = buffer.get_mut(..want) else { return Ok(()) };
        source.read_exact_at(part, at)?;
        target.write_all_at(part, at)?;
        at += u64::try_from(want).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn holes_stay_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(b"middle", 10 << 20).unwrap();
        clone_sparse(&from, &to, None).unwrap();
        assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(&to).unwrap());
        let data = std::fs::metadata(&to).unwrap();
        assert_eq!(data.len(), 64 << 20);
        assert!(data.blocks() * 512 < 1 << 20, "{} bytes on disk", data.blocks() * 512);
    }

    #[test]
    fn empty_and_plain_files() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        for text in ["", "plain"] {
            std::fs::write(&from, text).unwrap();
            clone_sparse(&from, &to, None).unwrap();
            assert_eq!(std::fs::read_to_string(&to).unwrap(), text);
        }
    }

    #[test]
    fn zeroes_become_holes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let mut content = vec![0; 3 << 20];
        for at in [0, 4095, 5 * 4096 + 7, (1 << 20) - 1, (2 << 20) + 9] {
            content[at] = 1;
        }
        std::fs::write(&path, &content).unwrap();
        dig_holes(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), content);
        let blocks = std::fs::metadata(&path).unwrap().blocks() * 512;
        assert!(blocks <= 5 * 4096, "{blocks} bytes for five blocks");
    }
}
