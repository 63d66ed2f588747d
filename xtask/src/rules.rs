//! House rules that no other tool checks. Each gives lines of the form `path: what is wrong`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cache;
use crate::deps;

/// Lines that a file may have, tests not counted.
const MOST_LINES: usize = 600;
/// Folders that are not ours to check.
const SKIPPED: [&str; 4] = [".git", "target", "node_modules", ".cargo"];

/// Checks the whole clone; an error lists everything that breaks a rule.
pub(crate) fn run() -> Result<()> {
    let root = cache::root();
    let mut files = Vec::new();
    walk(&root, &mut files)?;
    let mut broken = Vec::new();
    for path in &files {
        let name = path.strip_prefix(&root).unwrap_or(path).to_string_lossy().into_owned();
        let found = match path.extension().and_then(|extension| extension.to_str()) {
            Some("rs") => source(&name, &read(path)?),
            Some("md") => prose(&root, path, &read(path)?),
            Some("toml") if name.ends_with("Cargo.toml") => deps::manifest(&name, &read(path)?),
            _ => Vec::new(),
        };
        broken.extend(found.into_iter().map(|what| format!("{name}: {what}")));
        if name.ends_with(".rs") && is_orphan(path)? {
            broken.push(format!("{name}: no module names this file"));
        }
    }
    if !broken.is_empty() {
        bail!("house rules broken:\n  {}", broken.join("\n  "));
    }
    crate::say(format!("rules: {} files keep the house rules", files.len()));
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut paths: Vec<_> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    paths.sort();
    for path in paths {
        if path.file_name().is_some_and(|name| SKIPPED.iter().any(|skipped| name == *skipped)) {
            continue;
        }
        // A link would lead round in circles or out of the clone.
        let kind = path.symlink_metadata().with_context(|| format!("looking at {}", path.display()))?;
        if kind.is_dir() {
            walk(&path, files)?;
        } else if kind.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

/// Rules for one Rust file.
fn source(name: &str, text: &str) -> Vec<String> {
    let mut broken = Vec::new();
    if !text.lines().next().is_some_and(|line| line.starts_with("//!")) {
        broken.push("does not open with //! and what the file is for".to_owned());
    }
    let lines: Vec<&str> = text.lines().collect();
    let own = lines.iter().position(|line| line.trim() == "#[cfg(test)]").unwrap_or(lines.len());
    let is_test = name.starts_with("tests/cases/") || name.contains("/tests/") || name.ends_with("/tests.rs");
    if own > MOST_LINES && !is_test {
        broken.push(format!("{own} lines without tests, more than {MOST_LINES}"));
    }
    for (number, line) in lines.iter().enumerate() {
        let line = line.trim_start();
        if line.starts_with("#![expect(unsafe_code") || line.starts_with("#[expect(unsafe_code") {
            let near = lines.get(number.saturating_sub(6)..lines.len().min(number + 3)).unwrap_or_default();
            if !near.iter().any(|line| line.trim_start().starts_with("// UNSAFETY:")) {
                broken.push(format!("line {}: no `// UNSAFETY:` beside expect(unsafe_code)", number + 1));
            }
        }
    }
    broken
}

/// Whether no `mod` leads to a file under `src` or `cases`.
fn is_orphan(path: &Path) -> Result<bool> {
    let (Some(folder), Some(stem)) = (path.parent(), path.file_stem().and_then(|stem| stem.to_str())) else {
        return Ok(false);
    };
    let inside = path.components().any(|part| part.as_os_str() == "src" || part.as_os_str() == "cases");
    if !inside || ["main", "lib", "build"].contains(&stem) || folder.ends_with("bin") {
        return Ok(false);
    }
    let (module, parents) = if stem == "mod" {
        let module = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        (module, parents_in(folder.parent().unwrap_or(folder), None))
    } else {
        (stem, parents_in(folder, Some(folder)))
    };
    for parent in parents {
        if parent.is_file() && names_module(&read(&parent)?, module) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Files that may declare the modules of a folder.
fn parents_in(folder: &Path, with_own: Option<&Path>) -> Vec<PathBuf> {
    let mut parents: Vec<_> = ["main.rs", "lib.rs", "mod.rs"].iter().map(|name| folder.join(name)).collect();
    parents.push(with_own.unwrap_or(folder).with_extension("rs"));
    parents
}

fn names_module(text: &str, module: &str) -> bool {
    text.lines().any(|line| {
        let line = line.trim_start();
        let line =
            line.strip_prefix("pub(crate) ").or_else(|| line.strip_prefix("pub(super) ")).unwrap_or(line);
        let line = line.strip_prefix("pub ").unwrap_or(line);
        line.strip_prefix("mod ").is_some_and(|rest| rest.trim_end_matches([';', '{', ' ']) == module)
    })
}

/// Rules for one page: paths in backticks exist.
fn prose(root: &Path, page: &Path, text: &str) -> Vec<String> {
    let folder = page.parent().unwrap_or(root);
    let mut broken = Vec::new();
    let mut fenced = false;
    for (number, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        if fenced {
            continue;
        }
        for quoted in line.split('`').skip(1).step_by(2) {
            if is_lost_path(root, folder, quoted) {
                broken.push(format!("line {}: `{quoted}` does not exist", number + 1));
            }
        }
    }
    broken
}

/// Whether the words are a path in this clone that is not there. What does not start with something that exists here is
/// taken for a path in a guest, on another host, or no path at all.
fn is_lost_path(root: &Path, folder: &Path, quoted: &str) -> bool {
    let plain = quoted.chars().all(|letter| letter.is_ascii_alphanumeric() || "/._-".contains(letter));
    if !plain || quoted.starts_with(['/', '-']) {
        return false;
    }
    let is_page = quoted.ends_with(".md");
    let Some((first, rest)) = quoted.split_once('/') else {
        return is_page && !root.join(quoted).exists() && !folder.join(quoted).exists();
    };
    if first.is_empty() || (rest.is_empty() && !is_page) {
        return false;
    }
    let known = root.join(first).is_dir() || folder.join(first).is_dir();
    known && !root.join(quoted).exists() && !folder.join(quoted).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_its_purpose_is_found() {
        assert!(source("a/src/lib.rs", "//! What it is for.\n").is_empty());
        assert_eq!(source("a/src/lib.rs", "fn main() {}\n").len(), 1);
    }

    #[test]
    fn long_files_are_found_but_tests_do_not_count() {
        let long = format!("//! x\n{}", "fn f() {}\n".repeat(MOST_LINES));
        assert_eq!(source("a/src/lib.rs", &long).len(), 1);
        let tested = format!("//! x\n#[cfg(test)]\n{}", "fn f() {}\n".repeat(MOST_LINES));
        assert!(source("a/src/lib.rs", &tested).is_empty());
    }

    #[test]
    fn unsafe_code_needs_its_reason() {
        let bare = "//! x\n#![expect(unsafe_code, reason = \"r\")]\n";
        assert_eq!(source("a/src/sys.rs", bare).len(), 1);
        let told = "//! x\n// UNSAFETY: because\n#![expect(unsafe_code, reason = \"r\")]\n";
        assert!(source("a/src/sys.rs", told).is_empty());
    }

    #[test]
    fn modules_are_recognised() {
        assert!(names_module("pub(crate) mod a;\n", "a"));
        assert!(names_module("    mod a {", "a"));
        assert!(!names_module("// mod a;\nmod ab;", "a"));
    }

    #[test]
    fn lost_paths_are_found() {
        let root = cache::root();
        assert!(!is_lost_path(&root, &root, "xtask/src/main.rs"));
        assert!(is_lost_path(&root, &root, "xtask/src/no-such.rs"));
        assert!(is_lost_path(&root, &root, "NO-SUCH.md"));
        for other in ["/etc/passwd", "application/json", "--flag/x", "cargo xtask", "xtask/*.rs"] {
            assert!(!is_lost_path(&root, &root, other), "{other}");
        }
    }
}
