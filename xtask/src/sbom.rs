//! What the shipped programs are made of: a bill of materials (CycloneDX 1.5, JSON) beside them, and the rules for what may be in it.
//!
//! Features of packages are those of the whole workspace together, so that the list has rather one too many than one too few.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::cache;
use crate::product::{HOST_PACKAGES, HOST_TARGET, cargo};
use crate::setup::STATIC_TARGET;

/// Target of the programs that run on the host.
/// Where all code of others comes from: how Cargo names the index begins and ends.
const REGISTRY: (&str, &str) = ("registry+", "/crates.io-index");
/// Licences that code of others may have: none that asks for more than to be named.
const LICENCES: [&str; 9] = [
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Zlib",
    "BSL-1.0",
];

/// A package that a program is made of.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Part {
    name: String,
    version: String,
    licence: String,
    /// Not ours.
    source: Option<String>,
}

impl Part {
    fn purl(&self) -> String {
        format!("pkg:cargo/{}@{}", self.name, self.version)
    }
}

/// The packages of one target, and what each is made of.
struct Graph {
    parts: BTreeMap<String, Part>,
    edges: BTreeMap<String, BTreeSet<String>>,
}

impl Graph {
    fn of_target(target: &str) -> Result<Self> {
        let mut command = cargo()?;
        command.args(["metadata", "--format-version", "1", "--locked", "--filter-platform", target]);
        let output = command.current_dir(cache::root()).output().context("starting cargo metadata")?;
        if !output.status.success() {
            bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Self::read(&serde_json::from_slice(&output.stdout)?).context("cargo metadata says something unknown")
    }

    fn read(metadata: &Value) -> Option<Self> {
        let text = |value: &Value, key: &str| Some(value.get(key)?.as_str()?.to_owned());
        let mut parts = BTreeMap::new();
        for package in metadata.get("packages")?.as_array()? {
            let part = Part {
                name: text(package, "name")?,
                version: text(package, "version")?,
                licence: text(package, "license").unwrap_or_default(),
                source: text(package, "source"),
            };
            parts.insert(text(package, "id")?, part);
        }
        let mut edges = BTreeMap::new();
        for node in metadata.pointer("/resolve/nodes")?.as_array()? {
            let linked = |dep: &&Value| {
                let kinds = dep.get("dep_kinds").and_then(Value::as_array);
                kinds.is_some_and(|kinds| {
                    kinds.iter().any(|kind| kind.get("kind").is_some_and(Value::is_null))
                })
            };
            let deps = node.get("deps")?.as_array()?.iter().filter(linked);
            edges.insert(text(node, "id")?, deps.filter_map(|dep| text(dep, "pkg")).collect());
        }
        Some(Self { parts, edges })
    }

    /// All that a program is made of, itself left out.
    fn below(&self, program: &str) -> Result<BTreeSet<Part>> {
        let start = self.parts.iter().find(|(_, part)| part.name == program && part.source.is_none());
        let (start, _) = start.with_context(|| format!("there is no package {program}"))?;
        let (mut seen, mut left) = (BTreeSet::from([start]), vec![start]);
        while let Some(id) = left.pop() {
            for next in self.edges.get(id).into_iter().flatten() {
                if seen.insert(next) {
                    left.push(next);
                }
            }
        }
        seen.remove(start);
        Ok(seen.into_iter().filter_map(|id| self.parts.get(id)).cloned().collect())
    }
}

/// The programs, each with what it is made of.
fn programs() -> Result<BTreeMap<&'static str, BTreeSet<Part>>> {
    let mut programs = BTreeMap::new();
    let targets = [(HOST_TARGET, &HOST_PACKAGES[..]), (STATIC_TARGET, &["hyper-agent"])];
    for (target, packages) in targets {
        let graph = Graph::of_target(target)?;
        for package in packages {
            programs.insert(*package, graph.below(package)?);
        }
    }
    Ok(programs)
}

/// Checks where the code of others comes from and what it may be used for.
pub(crate) fn check() -> Result<()> {
    let all: BTreeSet<Part> = programs()?.into_values().flatten().collect();
    let broken: Vec<String> = all.iter().filter_map(wrong).collect();
    if !broken.is_empty() {
        bail!("packages that cannot be shipped:\n  {}", broken.join("\n  "));
    }
    let others = all.iter().filter(|part| part.source.is_some()).count();
    crate::say(format!("deps: {others} packages of others have a known source and licence"));
    Ok(())
}

/// What is wrong with a package.
fn wrong(part: &Part) -> Option<String> {
    let purl = part.purl();
    match &part.source {
        None => None,
        Some(source) if !(source.starts_with(REGISTRY.0) && source.ends_with(REGISTRY.1)) => {
            Some(format!("{purl} comes from {source}"))
        }
        Some(_) if !is_allowed(&part.licence) => Some(format!("{purl} has the licence {:?}", part.licence)),
        Some(_) => None,
    }
}

/// Whether an expression of licences (SPDX, and the older form with slashes) leaves a choice that is allowed.
fn is_allowed(expression: &str) -> bool {
    let known = |requirement: &spdx::LicenseReq| LICENCES.contains(&requirement.to_string().as_str());
    spdx::Expression::parse_mode(expression, spdx::ParseMode::LAX)
        .is_ok_and(|expression| expression.evaluate(known))
}

/// Writes the bill; the kernel's version is the one that `vmlinux` has in it.
pub(crate) fn write(path: &Path, vmlinux: &Path) -> Result<()> {
    let image = std::fs::read(vmlinux).with_context(|| format!("reading {}", vmlinux.display()))?;
    let kernel = kernel_version(&image).with_context(|| format!("{} names no version", vmlinux.display()))?;
    let lock = std::fs::read_to_string(cache::root().join("Cargo.lock")).context("reading Cargo.lock")?;
    let bill = bill(&programs()?, &checksums(&lock), &kernel);
    let text = serde_json::to_string_pretty(&bill)? + "\n";
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// The version in a kernel's banner.
fn kernel_version(image: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    let at = image.windows(BANNER.len()).position(|window| window == BANNER)?;
    let rest = image.get(at + BANNER.len()..)?;
    let version: String =
        rest.iter().map(|byte| char::from(*byte)).take_while(|c| c.is_ascii_graphic()).collect();
    version.starts_with(|first: char| first.is_ascii_digit()).then_some(version)
}

fn bill(
    programs: &BTreeMap<&str, BTreeSet<Part>>,
    checksums: &BTreeMap<(String, String), String>,
    kernel: &str,
) -> Value {
    let version = env!("CARGO_PKG_VERSION");
    let own = programs.keys().map(
        |program| json!({ "type": "application", "bom-ref": program, "name": program, "version": version }),
    );
    let linux = json!({
        "type": "operating-system", "bom-ref": "linux", "name": "linux", "version": kernel,
        "licenses": [{ "expression": "GPL-2.0-only WITH Linux-syscall-note" }],
    });
    let all: BTreeSet<&Part> = programs.values().flatten().collect();
    let parts = all.into_iter().map(|part| {
        let mut component = json!({
            "type": "library", "bom-ref": part.purl(), "name": part.name, "version": part.version,
            "purl": part.purl(),
        });
        let Some(fields) = component.as_object_mut() else { return component };
        if !part.licence.is_empty() {
            let expression = part.licence.replace(" / ", " OR ").replace('/', " OR ");
            fields.insert("licenses".to_owned(), json!([{ "expression": expression }]));
        }
        if let Some(sum) = checksums.get(&(part.name.clone(), part.version.clone())) {
            fields.insert("hashes".to_owned(), json!([{ "alg": "SHA-256", "content": sum }]));
        }
        component
    });
    let dependencies = programs.iter().map(|(program, parts)| {
        json!({ "ref": program, "dependsOn": parts.iter().map(Part::purl).collect::<Vec<_>>() })
    });
    json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": { "component": { "type": "application", "name": "hyper", "version": version } },
        "components": own.chain([linux]).chain(parts).collect::<Vec<_>>(),
        "dependencies": dependencies.collect::<Vec<_>>(),
    })
}

/// Digests of packages by name and version, as Cargo.lock has them.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let field = |block: &str, name: &str| {
        let line = block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(" = \""));
        line.map(|rest| rest.trim_end_matches('"').to_owned())
    };
    let packages = lock.split("[[package]]").skip(1);
    packages
        .filter_map(|block| {
            Some(((field(block, "name")?, field(block, "version")?), field(block, "checksum")?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = "registry+https://index/crates.io-index";

    fn part(licence: &str, source: Option<&str>) -> Part {
        Part {
            name: "one".into(),
            version: "1.2.3".into(),
            licence: licence.into(),
            source: source.map(str::to_owned),
        }
    }

    #[test]
    fn licences_leave_a_choice_or_not() {
        for fine in ["MIT", "MIT/Apache-2.0", "GPL-3.0-only OR MIT", "(MIT OR Apache-2.0) AND Unicode-3.0"] {
            assert!(is_allowed(fine), "{fine}");
        }
        for bad in ["", "GPL-3.0-only", "MIT AND GPL-3.0-only", "Apache-2.0 WITH GCC-exception-2.0"] {
            assert!(!is_allowed(bad), "{bad}");
        }
    }

    #[test]
    fn packages_have_a_known_source_and_licence() {
        assert_eq!(wrong(&part("MIT", Some(INDEX))), None);
        assert_eq!(wrong(&part("", None)), None, "ours");
        assert!(wrong(&part("GPL-3.0-only", Some(INDEX))).unwrap().contains("pkg:cargo/one@1.2.3"));
        assert!(wrong(&part("MIT", Some("git+https://x"))).unwrap().contains("git+https://x"));
    }

    #[test]
    fn what_is_linked_is_found_and_what_builds_it_is_not() {
        let dep = |name: &str, kind: Value| json!({ "pkg": name, "dep_kinds": [{ "kind": kind }] });
        let package = |name: &str, source: Value| json!({ "id": name, "name": name, "version": "1.0.0", "license": "MIT", "source": source });
        let metadata = json!({
            "packages": [package("ours", Value::Null), package("a", json!(INDEX)), package("b", json!(INDEX)), package("c", json!(INDEX))],
            "resolve": { "nodes": [
                { "id": "ours", "deps": [dep("a", Value::Null), dep("c", json!("build"))] },
                { "id": "a", "deps": [dep("b", Value::Null)] },
                { "id": "b", "deps": [dep("a", Value::Null)] },
                { "id": "c", "deps": [] },
            ]},
        });
        let below = Graph::read(&metadata).unwrap().below("ours").unwrap();
        assert_eq!(below.iter().map(|part| part.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn the_bill_names_packages_with_their_digests() {
        let lock = "version = 4\n\n[[package]]\nname = \"one\"\nversion = \"1.2.3\"\nsource = \"x\"\nchecksum = \"abc\"\n";
        let programs = BTreeMap::from([("hyper-vmm", BTreeSet::from([part("MIT/Apache-2.0", Some(INDEX))]))]);
        let bill = bill(&programs, &checksums(lock), "6.12.1");
        let components = bill["components"].as_array().unwrap();
        let one = components.iter().find(|component| component["name"] == "one").unwrap();
        assert_eq!(one["hashes"][0]["content"], "abc");
        assert_eq!(one["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert!(components.iter().any(|component| component["version"] == "6.12.1"));
        assert_eq!(
            bill["dependencies"][0],
            json!({ "ref": "hyper-vmm", "dependsOn": ["pkg:cargo/one@1.2.3"] })
        );
    }

    #[test]
    fn kernels_name_their_version() {
        assert_eq!(kernel_version(b"\0\0Linux version 6.12.1-hyper (x@y)").as_deref(), Some("6.12.1-hyper"));
        assert_eq!(kernel_version(b"Linux version %s"), None);
        assert_eq!(kernel_version(b"none"), None);
    }
}
