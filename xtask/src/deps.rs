//! Who may name whom: the edges between our crates, and versions from the one table.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::cache;

/// Each of our packages and those of ours that it may name.
const EDGES: &[(&str, &[&str])] = &[
    ("hyper-cli", &["hyper-sandbox", "hyper-image"]),
    ("hyper-sandbox", &["hyper-vmm-spec", "hyper-protocol", "hyper-image", "hyper-jail"]),
    ("hyper-shim", &["hyper-sandbox"]),
    (
        "hyper-fuzz",
        &[
            "hyper-image",
            "hyper-protocol",
            "hyper-sandbox",
            "hyper-unpack",
            "hyper-vmm",
            "hyper-vmm-devices",
            "hyper-vmm-hv",
            "hyper-vmm-spec",
        ],
    ),
    ("hyper-image", &[]),
    ("hyper-jail", &[]),
    ("hyper-protocol", &[]),
    ("hyper-unpack", &[]),
    ("hyper-vmm", &["hyper-vmm-spec", "hyper-vmm-hv", "hyper-vmm-devices", "hyper-jail"]),
    ("hyper-vmm-spec", &[]),
    ("hyper-vmm-hv", &[]),
    ("hyper-vmm-devices", &["hyper-vmm-spec"]),
    ("hyper-fileserver", &["hyper-vmm-spec", "hyper-jail"]),
    ("hyper-agent", &["hyper-protocol", "hyper-unpack"]),
    ("hyper-tests", &["hyper-vmm-spec"]),
    ("hyper-bench", &["hyper-vmm-spec"]),
    ("hyper-lab-init", &[]),
    ("hyper-rude-guest", &[]),
    ("hyper-saboteur", &[]),
    ("hyper-stand-in", &["hyper-jail"]),
    ("xtask", &[]),
];

/// Checks every package's manifest.
pub(crate) fn run() -> Result<()> {
    let root = cache::root();
    let workspace = fs::read_to_string(root.join("Cargo.toml")).context("reading Cargo.toml")?;
    let members = workspace.split_once("members = [").and_then(|(_, rest)| rest.split_once(']'));
    let (members, _) = members.context("Cargo.toml lists no members")?;
    let mut broken = Vec::new();
    let mut count = 0;
    for member in members.split('"').skip(1).step_by(2) {
        let name = format!("{member}/Cargo.toml");
        let text = fs::read_to_string(root.join(&name)).with_context(|| format!("reading {name}"))?;
        broken.extend(manifest(&name, &text).into_iter().map(|what| format!("{name}: {what}")));
        count += 1;
    }
    if !broken.is_empty() {
        bail!("forbidden edges:\n  {}", broken.join("\n  "));
    }
    crate::say(format!("deps: {count} packages name only what they may"));
    Ok(())
}

/// Rules for one manifest.
pub(crate) fn manifest(name: &str, text: &str) -> Vec<String> {
    let mut broken = Vec::new();
    let mut section = String::new();
    let mut package = None;
    let mut named = Vec::new();
    // A comment opens a run of versions of a package's own: it says why the table's do not do.
    let mut reasoned = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with('#') {
            reasoned = true;
        } else if let Some(header) = line.strip_prefix('[') {
            section = header.trim_end_matches(']').to_owned();
            reasoned = false;
        } else if section == "package" && line.starts_with("name") {
            package = line.split('"').nth(1).map(str::to_owned);
        } else if section.ends_with("dependencies")
            && !section.starts_with("workspace")
            && let Some((left, right)) = line.split_once('=')
        {
            let dependency = left.trim().trim_end_matches(".workspace").trim_matches('"');
            if left.trim().ends_with(".workspace") || right.contains("workspace = true") {
                reasoned = false;
            } else if !reasoned {
                broken.push(format!(
                    "{dependency} is neither from the workspace's table nor under a comment that says why"
                ));
            }
            named.push(dependency.to_owned());
        }
    }
    let Some(package) = package else { return broken };
    let Some((_, allowed)) = EDGES.iter().find(|(from, _)| *from == package) else {
        broken.push(format!("package {package} of {name} has no line in the table of edges (xtask deps)"));
        return broken;
    };
    for dependency in named {
        if dependency.starts_with("hyper-") && !allowed.contains(&dependency.as_str()) {
            broken.push(format!("{package} may not name {dependency}"));
        }
    }
    broken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forbidden_edges_are_found() {
        let text = "[package]\nname = \"hyper-image\"\n[dependencies]\nhyper-sandbox.workspace = true\n";
        assert_eq!(manifest("image/Cargo.toml", text), ["hyper-image may not name hyper-sandbox"]);
    }

    #[test]
    fn versions_come_from_the_table() {
        let text = "[package]\nname = \"hyper-image\"\n[dependencies]\nserde = \"1\"\n\
                    libc = { workspace = true, optional = true }\nsha2.workspace = true\n";
        let broken = manifest("image/Cargo.toml", text);
        assert!(broken.len() == 1 && broken[0].starts_with("serde "), "{broken:?}");
    }

    #[test]
    fn a_reason_covers_the_run_below_it() {
        let text = "[package]\nname = \"hyper-image\"\n[dependencies]\n# Why.\na = \"1\"\nb = \"2\"\n\
                    sha2.workspace = true\nc = \"3\"\n";
        let broken = manifest("image/Cargo.toml", text);
        assert!(broken.len() == 1 && broken[0].starts_with("c "), "{broken:?}");
    }

    #[test]
    fn unknown_packages_are_found() {
        assert_eq!(manifest("new/Cargo.toml", "[package]\nname = \"hyper-new\"\n").len(), 1);
    }
}
