//! `cp`: files between a container and this host, as tar streams.
//!
//! What comes out of a container is hostile: it is unpacked with no entry outside the destination, no devices, no
//! ownership, and moved into place only when whole.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use hyper_sandbox::{ArchiveInOptions, Container, PathStat};
use tokio::io::AsyncWriteExt;
use tokio_util::io::SyncIoBridge;

use crate::args::CpArgs;
use crate::context;
use crate::error::CliError;
use crate::output;

/// Bytes of an archive under way between two tasks.
const PIPE_BYTES: usize = 256 * 1024;
/// `S_IFMT` and the type of a directory in `st_mode`.
const TYPE_MASK: u32 = 0o170_000;
const TYPE_DIRECTORY: u32 = 0o040_000;

/// `hyper cp`.
///
/// # Errors
/// When a side is missing or cannot be read or written; what was there before stays.
pub(crate) async fn cp(args: CpArgs) -> Result<i32, CliError> {
    match (side(&args.source), side(&args.destination)) {
        (Side::Container(name, path), Side::Local(local)) => out_of(&args, &name, &path, &local).await,
        (Side::Local(local), Side::Container(name, path)) => into(&args, &local, &name, &path).await,
        (Side::Local(_), Side::Local(_)) => Err(CliError::failed(
            "must specify at least one container source: give CONTAINER:PATH on one side",
        )),
        (Side::Container(..), Side::Container(..)) => {
            Err(CliError::failed("copying between containers is not supported"))
        }
    }?;
    Ok(0)
}

enum Side {
    Local(PathBuf),
    Container(String, String),
}

/// `NAME:PATH` is a container's, unless it begins like a path.
fn side(text: &str) -> Side {
    if text == "-" || text.starts_with('/') || text.starts_with('.') {
        return Side::Local(PathBuf::from(text));
    }
    match text.split_once(':') {
        Some((name, path)) if !name.is_empty() && !name.contains('/') => {
            let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
            Side::Container(name.to_owned(), path)
        }
        _ => Side::Local(PathBuf::from(text)),
    }
}

async fn out_of(args: &CpArgs, name: &str, path: &str, local: &Path) -> Result<(), CliError> {
    let container = context::home()?.find(name)?;
    let (stat, mut tar) = container.archive_out(path, args.follow_link).await?;
    if local == Path::new("-") {
        let mut stdout = tokio::io::stdout();
        let copied = tokio::io::copy(&mut tar, &mut stdout).await;
        return copied
            .map(drop)
            .map_err(|e| CliError::failed(format!("cannot copy from {name}:{path}: {e}")));
    }
    let target = target_of(local, &stat, path)?;
    let bridge = SyncIoBridge::new(tar);
    let done = tokio::task::spawn_blocking(move || unpack(bridge, &target)).await;
    done.map_err(|e| CliError::failed(format!("cannot copy from {name}:{path}: {e}")))??;
    note(args, &format!("Successfully copied {name}:{path} to {}", local.display()));
    Ok(())
}

/// Where the copied thing itself goes: into an existing directory under its own name, else to the given name.
fn target_of(local: &Path, stat: &PathStat, path: &str) -> Result<PathBuf, CliError> {
    let text = local.to_string_lossy();
    if local.is_dir() {
        let contents_only = path.ends_with("/.");
        let name = Path::new(&stat.name).file_name().filter(|_| !contents_only);
        return Ok(name.map_or_else(|| local.to_owned(), |name| local.join(name)));
    }
    let directory = stat.mode & TYPE_MASK == TYPE_DIRECTORY;
    if text.ends_with('/') && !directory {
        return Err(CliError::failed(format!("destination directory {text} does not exist: make it first")));
    }
    if directory && local.exists() {
        return Err(CliError::failed(format!("cannot copy a directory onto the file {text}")));
    }
    Ok(local.to_owned())
}

/// Unpacks an archive with one thing at its top beside `target`, then moves that thing there.
fn unpack(tar: impl Read, target: &Path) -> Result<(), CliError> {
    let parent = target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let fail = |what: &str, error: std::io::Error| {
        CliError::failed(format!("cannot {what} {}: {error}", target.display()))
    };
    let staging = tempfile::Builder::new().prefix(".hyper-cp-").tempdir_in(parent);
    let staging = staging.map_err(|e| fail("copy to", e))?;
    let mut archive = tar::Archive::new(tar);
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    archive.set_unpack_xattrs(false);
    for entry in archive.entries().map_err(|e| fail("read the archive for", e))? {
        let mut entry = entry.map_err(|e| fail("read the archive for", e))?;
        let kind = entry.header().entry_type();
        if !(kind.is_file() || kind.is_dir() || kind.is_symlink() || kind.is_hard_link()) {
            continue;
        }
        let inside = entry.unpack_in(staging.path()).map_err(|e| fail("copy to", e))?;
        if !inside {
            return Err(CliError::failed(
                "the container sent an archive entry with '..' in its path: refused",
            ));
        }
    }
    for found in std::fs::read_dir(staging.path()).map_err(|e| fail("copy to", e))? {
        let found = found.map_err(|e| fail("copy to", e))?;
        place(&found.path(), target).map_err(|e| fail("copy to", e))?;
    }
    Ok(())
}

/// Moves `from` to `to`; directories that are there already are merged, files replaced.
fn place(from: &Path, to: &Path) -> std::io::Result<()> {
    let is_dir = |path: &Path| path.symlink_metadata().is_ok_and(|m| m.is_dir());
    if !(is_dir(from) && is_dir(to)) {
        return std::fs::rename(from, to);
    }
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        place(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

async fn into(args: &CpArgs, local: &Path, name: &str, path: &str) -> Result<(), CliError> {
    let container = context::home()?.find(name)?;
    let options = ArchiveInOptions { strict: true, keep_owner: args.archive };
    if local == Path::new("-") {
        container.archive_in(path, &mut tokio::io::stdin(), options).await?;
        return Ok(());
    }
    let meta = if args.follow_link { local.metadata() } else { local.symlink_metadata() };
    let meta = meta.map_err(|e| CliError::failed(format!("cannot copy {}: {e}", local.display())))?;
    let (directory, member) = placement(&container, local, meta.is_dir(), path).await?;
    let (mut writer, mut reader) = tokio::io::duplex(PIPE_BYTES);
    let (source, follow) = (local.to_owned(), args.follow_link);
    let (bytes_tx, mut bytes_rx) = tokio::sync::mpsc::channel::<std::io::Result<Vec<u8>>>(4);
    let packer = tokio::task::spawn_blocking(move || pack(&source, &member, follow, &bytes_tx));
    let pump = async {
        while let Some(chunk) = bytes_rx.recv().await {
            writer.write_all(&chunk?).await?;
        }
        drop(writer);
        Ok::<_, std::io::Error>(())
    };
    let (sent, taken) = tokio::join!(pump, container.archive_in(&directory, &mut reader, options));
    let packed =
        packer.await.map_err(|e| CliError::failed(format!("cannot read {}: {e}", local.display())))?;
    packed.and(sent).map_err(|e| CliError::failed(format!("cannot read {}: {e}", local.display())))?;
    taken?;
    note(args, &format!("Successfully copied {} to {name}:{path}", local.display()));
    Ok(())
}

/// The directory in the container that the archive is unpacked in, and the name of the copied thing in it.
async fn placement(
    container: &Container,
    local: &Path,
    is_dir: bool,
    path: &str,
) -> Result<(String, String), CliError> {
    let contents_only = is_dir && local.to_string_lossy().ends_with("/.");
    let own_name =
        local.canonicalize().ok().and_then(|p| p.file_name().map(|n| n.to_string_lossy().into_owned()));
    let own_name = if contents_only { ".".to_owned() } else { own_name.unwrap_or_else(|| ".".to_owned()) };
    match container.stat_path(path).await {
        Ok(stat) if stat.mode & TYPE_MASK == TYPE_DIRECTORY => Ok((path.to_owned(), own_name)),
        Ok(_) if is_dir => Err(CliError::failed(format!("cannot copy a directory onto the file {path}"))),
        found => {
            if found.is_err() && path.ends_with('/') && !is_dir {
                return Err(CliError::failed(format!(
                    "destination directory {path} does not exist: make it first"
                )));
            }
            let clean = path.trim_end_matches('/');
            let (parent, member) = clean.rsplit_once('/').unwrap_or(("", clean));
            let parent = if parent.is_empty() { "/" } else { parent };
            Ok((parent.to_owned(), member.to_owned()))
        }
    }
}

fn pack(
    source: &Path,
    member: &str,
    follow: bool,
    to: &tokio::sync::mpsc::Sender<std::io::Result<Vec<u8>>>,
) -> std::io::Result<()> {
    let out = std::io::BufWriter::with_capacity(PIPE_BYTES / 4, ChannelWriter(to));
    let mut builder = tar::Builder::new(out);
    builder.follow_symlinks(false);
    let meta = if follow { source.metadata()? } else { source.symlink_metadata()? };
    if meta.is_dir() {
        builder.append_dir_all(member, source)?;
    } else if follow {
        builder.append_file(member, &mut std::fs::File::open(source)?)?;
    } else {
        builder.append_path_with_name(source, member)?;
    }
    builder.into_inner()?.flush()
}

struct ChannelWriter<'a>(&'a tokio::sync::mpsc::Sender<std::io::Result<Vec<u8>>>);

impl Write for ChannelWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let gone = |_| std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        self.0.blocking_send(Ok(bytes.to_vec())).map_err(gone)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn note(args: &CpArgs, text: &str) {
    if !args.quiet && output::stdout_is_terminal() {
        output::note(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_told_apart() {
        assert!(matches!(side("web:/etc"), Side::Container(n, p) if n == "web" && p == "/etc"));
        assert!(matches!(side("web:etc"), Side::Container(_, p) if p == "/etc"));
        for local in ["-", "/a:b", "./a:b", "plain", "a/b:c"] {
            assert!(matches!(side(local), Side::Local(_)), "{local}");
        }
    }

    fn archive(entries: &[(&str, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            // Written raw: the crate refuses to make what a hostile guest would.
            header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
            header.set_cksum();
            builder.append(&header, content.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn a_file_lands_under_its_target_name() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("renamed");
        unpack(archive(&[("a", "x")]).as_slice(), &target).unwrap();
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "x");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn nothing_lands_outside() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let error = unpack(archive(&[("../evil", "x")]).as_slice(), &inner.join("t")).unwrap_err();
        assert!(error.message.contains("refused"), "{error}");
        assert!(!dir.path().join("evil").exists());
        assert_eq!(std::fs::read_dir(&inner).unwrap().count(), 0);
    }
}
