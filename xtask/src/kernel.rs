//! The guest kernel: from a pinned Debian source package and `guest-kernel/config` to a `vmlinux` in the cache.
//!
//! Everything that can change one byte of the result is in the key of the cache folder: source, fragments, recipe,
//! compiler and linker. Two builds in two folders give the same file (`guest-kernel/README.md` says how to check).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::{cache, command, say};

/// Debian packages that the build needs besides the source, each with the program or file that shows it is there.
const TOOLS: [(&str, &str); 9] = [
    ("gcc", "/usr/bin/gcc"),
    ("binutils", "/usr/bin/objcopy"),
    ("make", "/usr/bin/make"),
    ("bc", "/usr/bin/bc"),
    ("bison", "/usr/bin/bison"),
    ("flex", "/usr/bin/flex"),
    ("libelf-dev", "/usr/include/libelf.h"),
    ("perl-base", "/usr/bin/perl"),
    ("xz-utils", "/usr/bin/xz"),
];

/// What the kernel says of who built it and when; the date comes from `source.txt`.
const IDENTITY: [(&str, &str); 6] = [
    ("KBUILD_BUILD_USER", "hyper"),
    ("KBUILD_BUILD_HOST", "hyper"),
    ("KBUILD_BUILD_VERSION", "1"),
    ("ARCH", "x86_64"),
    ("LC_ALL", "C"),
    ("TZ", "UTC"),
];

/// Changes when the steps in this file change in a way that changes the result.
const RECIPE: &str = "1: allnoconfig, make vmlinux, objcopy --strip-all";

/// Builds the guest kernel if the cache does not have it, and gives the path of its uncompressed ELF `vmlinux`.
///
/// Beside it lie `config`, the whole configuration, and `System.map`. The first build takes minutes and about
/// 2 GiB in the cache folder, which are given back. Fails when a package is missing and cannot be installed, when an
/// option of a fragment or of `required.txt` is not in the final configuration, or when the compiler fails.
pub(crate) fn build() -> Result<PathBuf> {
    let recipe = Recipe::read(&cache::root().join("guest-kernel"))?;
    install_missing(&TOOLS)?;
    let toolchain = toolchain()?;
    // The pinned kernel, when it is there, needs neither the package nor the time to hash it.
    if let Some(pin) = recipe.known.first() {
        let vmlinux = kept(&recipe.key(pin, &toolchain))?;
        if vmlinux.is_file() {
            return Ok(vmlinux);
        }
    }
    let source = recipe.source()?;
    let key = recipe.key(&source, &toolchain);
    let folder = cache::folder("kernel", key, |making| {
        let tree = making.join("tree");
        let made = recipe.make(&source, &tree, making);
        cache::remove_dir(&tree)?;
        made
    })?;
    Ok(folder.join("vmlinux"))
}

/// Where the kernel of that key is, or would be.
fn kept(key: &cache::Key) -> Result<PathBuf> {
    Ok(cache::dir()?.join("kernel").join(key.clone().name()).join("vmlinux"))
}

/// All inputs that lie in the clone.
struct Recipe {
    /// Debian's source package.
    package: String,
    /// Versions of it that were tried, the pin first.
    known: Vec<Source>,
    /// `CONFIG_X` to the asked value, of all fragments.
    options: BTreeMap<String, String>,
    /// Names, without `CONFIG_`, that must be `y` at the end.
    required: Vec<String>,
}

/// One version of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Source {
    sha256: String,
    version: String,
    /// The day that `uname -v` shows.
    date: String,
}

impl Recipe {
    fn read(dir: &Path) -> Result<Self> {
        let (package, known) = parse_source(&text(&dir.join("source.txt"))?)?;
        let mut options = BTreeMap::new();
        for path in fragments(&dir.join("config"))? {
            for (name, value) in parse_fragment(&text(&path)?).with_context(|| path.display().to_string())? {
                if options.insert(name.clone(), value).is_some() {
                    bail!("{}: {name} is already set in another place", path.display());
                }
            }
        }
        let required = parse_required(&text(&dir.join("required.txt"))?)?;
        Ok(Self { package, known, options, required })
    }

    fn key(&self, source: &Source, toolchain: &str) -> cache::Key {
        let mut key = cache::Key::new("kernel").text(RECIPE).text(toolchain);
        for text in [&source.sha256, &source.version, &source.date] {
            key = key.text(text);
        }
        for (name, value) in IDENTITY {
            key = key.text(name).text(value);
        }
        for (name, value) in &self.options {
            key = key.text(name).text(value);
        }
        for name in &self.required {
            key = key.text(name);
        }
        key
    }

    fn tarball(&self) -> PathBuf {
        PathBuf::from(format!("/usr/src/{}.tar.xz", self.package))
    }

    /// The source on this machine, installed when missing; the pin when the archive still has it.
    fn source(&self) -> Result<Source> {
        let tarball = self.tarball();
        let pin = self.known.first().context("source.txt has no `known` line")?;
        if !tarball.is_file() && install(&[&format!("{}={}", self.package, pin.version)]).is_err() {
            say(format!("guest kernel: the archive no longer has {} {}", self.package, pin.version));
            install(&[&self.package])?;
        }
        let sha256 = checksum(&tarball)?;
        if let Some(source) = self.known.iter().find(|known| known.sha256 == sha256) {
            return Ok(source.clone());
        }
        let version =
            command::text(Command::new("dpkg-query").args(["-W", "-f", "${Version}", &self.package]))?;
        let date = command::text(Command::new("date").args(["-u", "+%F", "-r"]).arg(&tarball))?;
        let source = Source { sha256, version, date: date.trim().to_owned() };
        say(format!(
            "guest kernel: NOTE: building from a source that is not pinned: {} {} instead of {}.\n\
             guest kernel: the result is cached under its own key. When it is good, put this line above the other\n\
             guest kernel: `known` lines of guest-kernel/source.txt:\n\
             known {} {} {}",
            self.package, source.version, pin.version, source.sha256, source.version, source.date
        ));
        Ok(source)
    }

    /// Unpacks, configures, checks, compiles and strips into `out`.
    fn make(&self, source: &Source, tree: &Path, out: &Path) -> Result<()> {
        say(format!("guest kernel: building {} {} (once; minutes)", self.package, source.version));
        fs::create_dir_all(tree).with_context(|| format!("creating {}", tree.display()))?;
        command::quiet(
            Command::new("tar")
                .args(["--extract", "--strip-components=1", "--no-same-owner", "--file"])
                .arg(self.tarball())
                .arg("--directory")
                .arg(tree),
        )?;
        let asked = tree.join("hyper.config");
        let lines: String = self.options.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
        fs::write(&asked, lines).with_context(|| format!("writing {}", asked.display()))?;
        let mut configure = kbuild(tree, &source.date);
        command::quiet(configure.env("KCONFIG_ALLCONFIG", &asked).arg("allnoconfig"))?;
        let config = text(&tree.join(".config"))?;
        self.check(&parse_config(&config))?;
        compile(kbuild(tree, &source.date).arg(jobs()?).arg("vmlinux"), &out.join("build.log"))?;
        let vmlinux = out.join("vmlinux");
        command::quiet(Command::new("objcopy").arg("--strip-all").arg(tree.join("vmlinux")).arg(&vmlinux))?;
        fs::write(out.join("config"), config).context("writing config")?;
        fs::copy(tree.join("System.map"), out.join("System.map")).context("copying System.map")?;
        fs::remove_file(out.join("build.log")).context("removing build.log")?;
        say(format!("guest kernel: sha256 {}", checksum(&vmlinux)?));
        Ok(())
    }

    /// Every asked option must have survived Kconfig's dependencies, and every required one must be on.
    fn check(&self, config: &BTreeMap<String, String>) -> Result<()> {
        let mut wrong = Vec::new();
        for (name, asked) in &self.options {
            let got = config.get(name).map_or("n", String::as_str);
            if got != asked {
                wrong.push(format!("{name}={asked} became {got}"));
            }
        }
        for name in &self.required {
            if config.get(&format!("CONFIG_{name}")).map(String::as_str) != Some("y") {
                wrong.push(format!("CONFIG_{name} is required and off"));
            }
        }
        ensure!(
            wrong.is_empty(),
            "guest-kernel/config does not give what it asks for:\n  {}",
            wrong.join("\n  ")
        );
        Ok(())
    }
}

/// `make` in the source tree with everything fixed that would otherwise leak into the result.
fn kbuild(tree: &Path, date: &str) -> Command {
    let mut make = Command::new("make");
    let map = format!("-ffile-prefix-map={}/=", tree.display());
    make.arg("--directory")
        .arg(tree)
        .envs(IDENTITY)
        .env("KBUILD_BUILD_TIMESTAMP", format!("{date} 00:00:00 UTC"));
    for variable in ["MAKEFLAGS", "MFLAGS", "CFLAGS", "LDFLAGS", "CROSS_COMPILE", "KCONFIG_CONFIG", "O"] {
        make.env_remove(variable);
    }
    make.arg(format!("KCFLAGS={map}")).arg(format!("KAFLAGS={map}"));
    make
}

/// `-j` for all processors of this machine.
fn jobs() -> Result<String> {
    Ok(format!("-j{}", std::thread::available_parallelism().context("counting processors")?))
}

/// Runs the compiler into a log file; counts on a terminal, silent elsewhere, and shows the log's end on failure.
fn compile(make: &mut Command, log: &Path) -> Result<()> {
    let mut file = File::create(log).with_context(|| format!("creating {}", log.display()))?;
    let errors = file.try_clone().context("sharing the build log")?;
    let mut child =
        make.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors).spawn().context("starting make")?;
    let output = child.stdout.take().context("reading the output of make")?;
    let terminal = std::io::stderr().is_terminal();
    let mut steps = 0_u32;
    for line in BufReader::new(output).lines() {
        let line = line.context("reading the output of make")?;
        writeln!(file, "{line}").with_context(|| format!("writing {}", log.display()))?;
        steps += 1;
        if terminal {
            // A closed terminal is no reason to stop.
            drop(write!(std::io::stderr(), "\rguest kernel: {steps} steps\x1b[K"));
        }
    }
    if terminal {
        drop(writeln!(std::io::stderr()));
    }
    let status = child.wait().context("waiting for make")?;
    if !status.success() {
        let log_text = text(log)?;
        let lines: Vec<_> = log_text.lines().collect();
        let end = lines.get(lines.len().saturating_sub(LOG_TAIL)..).unwrap_or_default();
        bail!("compiling the guest kernel: {status}; the whole log is {}\n{}", log.display(), end.join("\n"));
    }
    Ok(())
}

/// Lines of the build log that a failure shows.
const LOG_TAIL: usize = 25;

/// What compiles and links, as far as it shows in the result.
fn toolchain() -> Result<String> {
    let compiler = command::text(Command::new("gcc").arg("--version").env("LC_ALL", "C"))?;
    let linker = command::text(Command::new("ld").arg("--version").env("LC_ALL", "C"))?;
    let first = |text: &str| text.lines().next().unwrap_or_default().to_owned();
    Ok(format!("{}\n{}", first(&compiler), first(&linker)))
}

/// Installs those packages whose file is not there.
fn install_missing(tools: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<_> =
        tools.iter().filter(|(_, file)| !Path::new(file).exists()).map(|(package, _)| *package).collect();
    if missing.is_empty() { Ok(()) } else { install(&missing) }
}

fn install(packages: &[&str]) -> Result<()> {
    say(format!("guest kernel: installing {}", packages.join(" ")));
    let apt = || {
        let mut apt = Command::new("apt-get");
        apt.env("DEBIAN_FRONTEND", "noninteractive");
        apt
    };
    command::quiet(apt().args(["-qq", "update"]))
        .and_then(|()| {
            command::quiet(apt().args(["-qq", "-y", "--no-install-recommends", "install"]).args(packages))
        })
        .with_context(|| {
            format!("as root, run: apt-get install --no-install-recommends {}", packages.join(" "))
        })
}

fn checksum(path: &Path) -> Result<String> {
    let line = command::text(Command::new("sha256sum").arg("--binary").arg(path))?;
    Ok(line.split_whitespace().next().unwrap_or_default().to_owned())
}

fn text(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

/// The configuration fragments, in order of name.
fn fragments(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let path = entry.with_context(|| format!("reading {}", dir.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "config") {
            paths.push(path);
        }
    }
    paths.sort();
    ensure!(!paths.is_empty(), "{} holds no *.config", dir.display());
    Ok(paths)
}

/// Lines that are neither empty nor a comment, with their numbers.
fn meaningful(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .map(|(index, line)| (index + 1, line.trim()))
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
}

/// `CONFIG_NAME=value # reason`; the reason may not be missing.
fn parse_fragment(text: &str) -> Result<Vec<(String, String)>> {
    meaningful(text)
        .map(|(number, line)| {
            let (setting, reason) =
                line.split_once(" # ").with_context(|| format!("line {number} gives no reason"))?;
            ensure!(!reason.trim().is_empty(), "line {number} gives no reason");
            let (name, value) =
                setting.trim().split_once('=').with_context(|| format!("line {number} has no `=`"))?;
            ensure!(
                name.starts_with("CONFIG_") && !value.is_empty(),
                "line {number} is not CONFIG_NAME=value"
            );
            Ok((name.to_owned(), value.to_owned()))
        })
        .collect()
}

/// `NAME who[,who] # what breaks without it`.
fn parse_required(text: &str) -> Result<Vec<String>> {
    meaningful(text)
        .map(|(number, line)| {
            let (entry, reason) = line
                .split_once(" # ")
                .with_context(|| format!("required.txt line {number} gives no reason"))?;
            let words: Vec<_> = entry.split_whitespace().collect();
            match words.as_slice() {
                [name, _who] if !reason.trim().is_empty() => Ok((*name).to_owned()),
                _ => bail!("required.txt line {number} is not `NAME who # reason`"),
            }
        })
        .collect()
}

/// `package NAME` once, and `known SHA256 VERSION DATE` at least once.
fn parse_source(text: &str) -> Result<(String, Vec<Source>)> {
    let mut package = None;
    let mut known = Vec::new();
    for (number, line) in meaningful(text) {
        let words: Vec<_> = line.split_whitespace().collect();
        match words.as_slice() {
            ["package", name] if package.is_none() => package = Some((*name).to_owned()),
            ["known", sha256, version, date] if sha256.len() == 64 => known.push(Source {
                sha256: (*sha256).to_owned(),
                version: (*version).to_owned(),
                date: (*date).to_owned(),
            }),
            _ => bail!("source.txt line {number} is not understood: {line}"),
        }
    }
    ensure!(!known.is_empty(), "source.txt has no `known` line");
    Ok((package.context("source.txt names no package")?, known))
}

/// The options that are on in a `.config`.
fn parse_config(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter(|line| line.starts_with("CONFIG_"))
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe() -> Recipe {
        Recipe::read(&cache::root().join("guest-kernel")).unwrap()
    }

    #[test]
    fn the_fragments_in_the_clone_are_well_formed() {
        let recipe = recipe();
        assert!(recipe.options.len() > 300);
        assert_eq!(recipe.options.get("CONFIG_MODULES").map(String::as_str), Some("n"));
        assert!(recipe.required.iter().any(|name| name == "CGROUP_BPF"));
    }

    #[test]
    fn an_option_without_a_reason_is_refused() {
        let error = parse_fragment("CONFIG_A=y # why\nCONFIG_B=y\n").unwrap_err();
        assert_eq!(error.to_string(), "line 2 gives no reason");
        assert_eq!(
            parse_fragment("# x\nCONFIG_A=\"b c\" # why").unwrap(),
            [("CONFIG_A".into(), "\"b c\"".into())]
        );
    }

    #[test]
    fn options_that_did_not_survive_are_all_named() {
        let mut recipe = recipe();
        recipe.options = BTreeMap::from([
            ("CONFIG_A".to_owned(), "y".to_owned()),
            ("CONFIG_B".to_owned(), "n".to_owned()),
            ("CONFIG_C".to_owned(), "n".to_owned()),
        ]);
        recipe.required = vec!["D".to_owned()];
        let error =
            recipe.check(&parse_config("# CONFIG_A is not set\nCONFIG_B=y\n")).unwrap_err().to_string();
        for expected in ["CONFIG_A=y became n", "CONFIG_B=n became y", "CONFIG_D is required"] {
            assert!(error.contains(expected), "{error}");
        }
        assert!(!error.contains("CONFIG_C"));
        recipe.check(&parse_config("CONFIG_A=y\nCONFIG_D=y\n")).unwrap();
    }

    #[test]
    fn the_key_follows_source_compiler_and_options() {
        let mut recipe = recipe();
        let pin = recipe.known.first().unwrap().clone();
        let base = recipe.key(&pin, "gcc 12").name();
        assert_eq!(base, recipe.key(&pin, "gcc 12").name());
        assert_ne!(base, recipe.key(&pin, "gcc 13").name());
        let other = Source { sha256: "0".repeat(64), ..pin.clone() };
        assert_ne!(base, recipe.key(&other, "gcc 12").name());
        recipe.options.insert("CONFIG_NEW".into(), "y".into());
        assert_ne!(base, recipe.key(&pin, "gcc 12").name());
    }

    #[test]
    fn a_source_file_without_a_pin_is_refused() {
        assert!(parse_source("package p\n").is_err());
        assert!(parse_source("known short 1 2\n").is_err());
        let line = format!("package p\nknown {} 6.12 2026-01-01\n", "a".repeat(64));
        assert_eq!(parse_source(&line).unwrap().1.first().unwrap().version, "6.12");
    }
}
