//! The guest's root: an initramfs that holds the agent and what `rootfs/layout.txt` lists, nothing else.
//!
//! Not compressed: the kernel copies it once, which costs fewer instructions than unpacking would
//! (figures in `rootfs/README.md`).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cache;
use crate::cpio::Archive;

/// Changes when equal inputs give other bytes.
const RECIPE: &str = "1";

/// Packs the static agent program into an initramfs in the cache and gives its path; equal agents give equal bytes.
///
/// Fails when `agent` cannot be read or is no ELF program, or when the layout is malformed.
pub(crate) fn build(agent: &Path) -> Result<PathBuf> {
    build_with(agent, None)
}

/// The same with another first program, for cases in which the guest turns against its agent; the agent is `/agent` then.
pub(crate) fn sabotaged(agent: &Path, saboteur: &Path) -> Result<PathBuf> {
    build_with(agent, Some(saboteur))
}

fn build_with(agent: &Path, saboteur: Option<&Path>) -> Result<PathBuf> {
    let layout_path = cache::root().join("rootfs/layout.txt");
    let layout =
        fs::read_to_string(&layout_path).with_context(|| format!("reading {}", layout_path.display()))?;
    let program = read_program(agent)?;
    let first = saboteur.map(read_program).transpose()?;
    let mut key = cache::Key::new("rootfs").text(RECIPE).file(agent)?.file(&layout_path)?;
    if let Some(saboteur) = saboteur {
        key = key.text("sabotaged").file(saboteur)?;
    }
    let folder = cache::folder("rootfs", key, |making| {
        let image = pack(&parse(&layout)?, &program, first.as_deref())?;
        let path = making.join("initramfs.cpio");
        fs::write(&path, image).with_context(|| format!("writing {}", path.display()))
    })?;
    Ok(folder.join("initramfs.cpio"))
}

fn read_program(path: &Path) -> Result<Vec<u8>> {
    let program = fs::read(path).with_context(|| format!("reading the program {}", path.display()))?;
    if !program.starts_with(b"\x7fELF") {
        bail!("{} is no ELF program", path.display());
    }
    Ok(program)
}

/// One line of the layout.
#[derive(Debug, PartialEq, Eq)]
enum Entry {
    Directory { name: String, mode: u32 },
    Character { name: String, mode: u32, device: (u32, u32) },
    Agent { name: String, mode: u32 },
}

/// `dir MODE NAME`, `char MODE NAME MAJOR MINOR`, `agent MODE NAME`, each with ` # reason`.
fn parse(layout: &str) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for (index, line) in layout.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let entry = entry(line).with_context(|| format!("rootfs/layout.txt line {}: {line}", index + 1))?;
        entries.push(entry);
    }
    Ok(entries)
}

fn entry(line: &str) -> Result<Entry> {
    let (line, _reason) = line.split_once(" # ").context("gives no reason")?;
    let words: Vec<_> = line.split_whitespace().collect();
    let mode = |octal: &str| u32::from_str_radix(octal, 8).context("the mode is not octal");
    Ok(match words.as_slice() {
        ["dir", octal, name] => Entry::Directory { name: (*name).to_owned(), mode: mode(octal)? },
        ["agent", octal, name] => Entry::Agent { name: (*name).to_owned(), mode: mode(octal)? },
        ["char", octal, name, major, minor] => Entry::Character {
            name: (*name).to_owned(),
            mode: mode(octal)?,
            device: (major.parse().context("major number")?, minor.parse().context("minor number")?),
        },
        _ => bail!("is neither dir, char nor agent"),
    })
}

fn pack(entries: &[Entry], agent: &[u8], first: Option<&[u8]>) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::with_capacity(agent.len() + first.map_or(0, <[u8]>::len) + 4096));
    for entry in entries {
        match entry {
            Entry::Directory { name, mode } => archive.directory(name, *mode),
            Entry::Character { name, mode, device } => archive.character(name, *mode, *device),
            Entry::Agent { name, mode } => archive.file(name, *mode, first.unwrap_or(agent)),
        }
        .with_context(|| format!("packing {entry:?}"))?;
    }
    if first.is_some() {
        archive.file("agent", 0o755, agent).context("packing the agent")?;
    }
    archive.finish().context("finishing the initramfs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_in_the_clone_has_an_init_and_a_console() {
        let layout = fs::read_to_string(cache::root().join("rootfs/layout.txt")).unwrap();
        let entries = parse(&layout).unwrap();
        assert!(entries.contains(&Entry::Agent { name: "init".into(), mode: 0o755 }));
        assert!(entries.contains(&Entry::Character {
            name: "dev/console".into(),
            mode: 0o600,
            device: (5, 1)
        }));
    }

    #[test]
    fn equal_agents_give_equal_bytes() {
        let entries = parse("dir 0755 dev # x\nagent 0755 init # x\n").unwrap();
        let one = pack(&entries, b"\x7fELF-a", None).unwrap();
        assert_eq!(one, pack(&entries, b"\x7fELF-a", None).unwrap());
        assert_ne!(one, pack(&entries, b"\x7fELF-b", None).unwrap());
        assert!(one.starts_with(b"070701"));
    }

    #[test]
    fn malformed_lines_are_refused() {
        for line in ["dir 0755 dev", "dir 0999 dev # x", "file 0755 a # x", "char 0600 a 5 # x"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
