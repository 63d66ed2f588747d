//! The writable layer of a container: a sparse ext4 file, cloned from a template that is formatted once.
//!
//! Formatting takes as long as a boot; a clone copies the few extents that a fresh file system has (and shares them where the host's
//! file system can). The disk is made at the first start and survives stops.

mod clone;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::state::sync_dir;
use crate::store::{FileLock, make_private_dir};
use crate::{Home, SandboxError};

/// Size of a writable layer without further wish, bytes; sparse.
const DEFAULT_RW_BYTES: u64 = 10 << 30;
/// Sizes of a writable layer: from what an ext4 with a journal fits into, to what ext4 and a sparse file of the host carry.
pub(crate) const RW_BYTES: std::ops::RangeInclusive<u64> = 16 << 20..=8 << 40;
/// How long formatting may take.
const MKFS_MS: u64 = 60_000;
/// Changed when the options of the template change.
const TEMPLATE_VERSION: u32 = 2;
/// Name of the writable layer in a container's directory.
const RW_FILE: &str = "rw.img";

/// Why a disk could not be made.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The formatting program is missing.
    #[error("mkfs.ext4 is missing on this host: install the package e2fsprogs")]
    NoMkfs,
    /// It failed.
    #[error("mkfs.ext4 on {path} failed: {message}")]
    Mkfs {
        /// The template.
        path: PathBuf,
        /// Last line of its standard error, or how it ended.
        message: String,
    },
    /// `HYPER_RW_SIZE` or the container's own size is out of range.
    #[error("writable layer of {0} bytes asked for: give 16 MiB to 8 TiB")]
    Size(u64),
    /// `HYPER_RW_SIZE` is no size.
    #[error("HYPER_RW_SIZE is {0:?}: give a number of bytes, or one with k, m, g or t")]
    SizeText(String),
    /// The image is missing.
    #[error("the image's disk {path} cannot be opened: {source}; pull the image again")]
    Image {
        /// The disk.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

/// Opens an image's disk so that nothing can write through the descriptor.
pub(crate) fn open_image(path: &Path) -> Result<File, SandboxError> {
    File::open(path).map_err(|source| StorageError::Image { path: path.to_owned(), source }.into())
}

/// Size of the writable layer: the container's wish, else `HYPER_RW_SIZE`, else the default.
pub(crate) fn rw_size(wish_bytes: u64, var: Option<&OsStr>) -> Result<u64, StorageError> {
    let bytes = match (wish_bytes, var) {
        (0, Some(text)) if !text.is_empty() => {
            let text = text.to_string_lossy();
            parse_size(&text).ok_or_else(|| StorageError::SizeText(text.into_owned()))?
        }
        (0, _) => DEFAULT_RW_BYTES,
        (wish, _) => wish,
    };
    if !RW_BYTES.contains(&bytes) {
        return Err(StorageError::Size(bytes));
    }
    Ok(bytes.next_multiple_of(4096))
}

fn parse_size(text: &str) -> Option<u64> {
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match lower.get(digits.len()..)? {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// The writable layer of a container, opened for reading and writing; made if it is not there. One that is to be `lasting` is there when the
/// power comes back, too.
pub(crate) async fn open_rw(
    home: &Home,
    id: &str,
    wish_bytes: u64,
    lasting: bool,
) -> Result<File, SandboxError> {
    let path = home.container_dir(id).join(RW_FILE);
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    match options.open(&path) {
        Ok(file) => return Ok(file),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(source) => return Err(SandboxError::io("open", path, source)),
    }
    let bytes = rw_size(wish_bytes, std::env::var_os("HYPER_RW_SIZE").as_deref())?;
    let template = template(home, bytes).await?;
    let beside = path.with_extension("img.tmp");
    clone::clone_sparse(&template, &beside, None)
        .map_err(|source| SandboxError::io("copy the template to", &beside, source))?;
    if lasting {
        // A guest that syncs later syncs blocks; that there is a file system around them is ours to keep.
        let synced = File::open(&beside).and_then(|file| file.sync_all());
        synced.map_err(|source| SandboxError::io("sync", &beside, source))?;
    }
    fs::rename(&beside, &path).map_err(|source| SandboxError::io("make", &path, source))?;
    if lasting {
        sync_dir(&home.container_dir(id))?;
    }
    options.open(&path).map_err(|source| SandboxError::io("open", path, source))
}

/// Copies a writable layer from one directory to another.
///
/// # Errors
/// What the file system answers, or that it takes longer than until `deadline`.
pub(crate) fn copy_rw(from: &Path, to: &Path, deadline: Option<Instant>) -> Result<(), SandboxError> {
    let (from, to) = (from.join(RW_FILE), to.join(RW_FILE));
    clone::clone_sparse(&from, &to, deadline)
        .map_err(|source| SandboxError::io("copy the writable layer to", to, source))
}

/// Gives a writable layer in one directory to another.
///
/// # Errors
/// What the file system answers.
pub(crate) fn move_rw(from: &Path, to: &Path) -> Result<(), SandboxError> {
    let to = to.join(RW_FILE);
    fs::rename(from.join(RW_FILE), &to).map_err(|source| SandboxError::io("make", to, source))
}

/// Makes a writable layer of the default size at `path`, unless it is there already.
pub(crate) async fn make_rw(path: &Path) -> Result<(), SandboxError> {
    if path.exists() {
        return Ok(());
    }
    let beside = path.with_extension("img.tmp");
    let fail = |source| SandboxError::io("make", &beside, source);
    let file = File::create(&beside).map_err(fail)?;
    file.set_len(rw_size(0, std::env::var_os("HYPER_RW_SIZE").as_deref())?).map_err(fail)?;
    format(&beside).await?;
    fs::rename(&beside, path).map_err(|source| SandboxError::io("make", path, source))
}

/// The template of a size; formatted once, by whoever comes first.
async fn template(home: &Home, bytes: u64) -> Result<PathBuf, SandboxError> {
    let dir = home.templates_dir();
    let path = dir.join(format!("rw-{bytes}-v{TEMPLATE_VERSION}.img"));
    if path.exists() {
        return Ok(path);
    }
    make_private_dir(&dir)?;
    let _lock = FileLock::take_within(&dir.join("lock"), crate::launch::scaled_ms(MKFS_MS)).await?;
    if path.exists() {
        return Ok(path);
    }
    let beside = path.with_extension("img.tmp");
    let fail = |source| SandboxError::io("make", &beside, source);
    let file = File::create(&beside).map_err(fail)?;
    file.set_len(bytes).map_err(fail)?;
    format(&beside).await?;
    file.sync_all().map_err(fail)?;
    fs::rename(&beside, &path).map_err(|source| SandboxError::io("make", &path, source))?;
    Ok(path)
}

/// Formats for one guest that owns the disk: no reserved blocks, a small journal, no room to grow, and nothing left to be initialised by
/// the guest. What is zero takes no space: of a journal and tables of 20 MiB, some 160 KiB are left to be copied for each container.
async fn format(path: &Path) -> Result<(), SandboxError> {
    mkfs(path).await?;
    clone::dig_holes(path).map_err(|source| SandboxError::io("make sparse", path, source))
}

async fn mkfs(path: &Path) -> Result<(), SandboxError> {
    let mut command = tokio::process::Command::new("mkfs.ext4");
    // Root's PATH may lack the sbin directories where Debian has it.
    let var = std::env::var_os("PATH").unwrap_or_default().to_string_lossy().into_owned();
    command
        .env("PATH", format!("{var}:/usr/sbin:/sbin"))
        .args(["-q", "-F", "-b", "4096", "-m", "0", "-I", "256", "-J", "size=16"])
        .args(["-E", "lazy_itable_init=0,lazy_journal_init=0,packed_meta_blocks=1", "-O", "^resize_inode"])
        .args(["-L", "hyper-rw"])
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let failed = |message: String| StorageError::Mkfs { path: path.to_owned(), message };
    let child = match command.spawn() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(StorageError::NoMkfs.into()),
        child => child.map_err(|error| failed(error.to_string()))?,
    };
    let limit: Duration = crate::launch::scaled_ms(MKFS_MS);
    let output = tokio::time::timeout(limit, child.wait_with_output()).await;
    let output =
        output.map_err(|_| failed("it takes too long".into()))?.map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let line = stderr
        .lines()
        .rfind(|line| !line.trim().is_empty())
        .map_or_else(|| output.status.to_string(), str::to_owned);
    Err(failed(line).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::{config, home};

    #[test]
    fn sizes() {
        let var = |text: &'static str| Some(OsStr::new(text));
        assert_eq!(rw_size(0, None).unwrap(), DEFAULT_RW_BYTES);
        assert_eq!(rw_size(0, var("2g")).unwrap(), 2 << 30);
        assert_eq!(rw_size(1 << 30, var("2g")).unwrap(), 1 << 30);
        assert!(matches!(rw_size(0, var("big")), Err(StorageError::SizeText(_))));
        assert!(matches!(rw_size(1, None), Err(StorageError::Size(1))));
        assert!(matches!(
            rw_size(0, var("99999999t")),
            Err(StorageError::SizeText(_) | StorageError::Size(_))
        ));
    }

    #[tokio::test]
    async fn disk_is_made_once_from_one_template() {
        if std::process::Command::new("mkfs.ext4").arg("-V").output().is_err() {
            return;
        }
        let (_dir, home) = home();
        let one = home.create(config("c1")).unwrap();
        let two = home.create(config("c2")).unwrap();
        let size = 64 << 20;
        let disk = open_rw(&home, one.id(), size, true).await.unwrap();
        assert_eq!(disk.metadata().unwrap().len(), size);
        let taken = std::os::unix::fs::MetadataExt::blocks(&disk.metadata().unwrap()) * 512;
        assert!(taken <= 512 << 10, "{taken} bytes for an empty file system");
        std::os::unix::fs::FileExt::write_at(&disk, b"mine", size - 4).unwrap();
        open_rw(&home, two.id(), size, false).await.unwrap();
        let again = fs::read(one.dir().join(RW_FILE)).unwrap();
        assert_eq!(&again[again.len() - 4..], b"mine");
        assert_eq!(fs::read_dir(home.templates_dir()).unwrap().count(), 2, "template and lock");
        let magic = again[1024 + 0x38..][..2].to_vec();
        assert_eq!(magic, [0x53, 0xef], "ext4's superblock");
    }

    #[test]
    fn missing_image_names_its_disk() {
        let error = open_image(Path::new("/nonexistent/disk")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/disk"), "{error}");
    }
}
