//! Containers of one image under each runtime: hyper, and the OCI runtimes that the machine has on a copy of the same files.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::program::{self, Waited, ms_since, now_us, quiet, text, timed};

/// OCI runtimes that are compared when they are on the path.
const OCI: [&str; 2] = ["runc", "crun"];
/// What tells hyper whether to start from a template.
const TEMPLATE: &str = "HYPER_TEMPLATE";
/// What an idle container does.
const IDLE: [&str; 2] = ["sleep", "1000000"];
/// Folders of a root that are not part of the image.
const MADE_AT_START: [&str; 3] = ["proc", "sys", "dev"];

/// The contenders, ready to run.
pub(crate) struct Bench {
    pub(crate) contenders: Vec<Contender>,
    /// Bundles of the OCI runtimes.
    _folder: tempfile::TempDir,
}

/// One way to run a container.
pub(crate) struct Contender {
    name: String,
    program: PathBuf,
    kind: Kind,
    count: AtomicU32,
}

enum Kind {
    Hyper {
        image: String,
        /// `HYPER_TEMPLATE`: whether it starts from a machine that was booted once.
        template: &'static str,
    },
    /// Bundles that run `true`, and that are idle.
    Oci { once: PathBuf, idle: PathBuf },
}

/// A container that is idle; removed when dropped.
pub(crate) struct Idle<'a> {
    contender: &'a Contender,
    id: String,
}

impl Bench {
    /// Brings in the image, and copies its files for the others.
    pub(crate) fn prepare(prefix: &Path, image: &str) -> Result<Self> {
        let folder = tempfile::tempdir().context("making a folder")?;
        let [cloned, booted] =
            [("hyper, template", "always"), ("hyper, booted", "never")].map(|(name, template)| {
                let kind = Kind::Hyper { image: image.to_owned(), template };
                let program = prefix.join("bin/hyper");
                Contender { name: name.to_owned(), program, kind, count: AtomicU32::new(0) }
            });
        booted.run().context("trying the image with hyper")?;
        cloned.run().context("making a template with hyper")?;
        let mut contenders = Vec::new();
        let peers: Vec<_> = OCI.iter().filter_map(|name| Some((*name, program::on_path(name)?))).collect();
        if !peers.is_empty() {
            let root = folder.path().join("root");
            copy_root(&booted, &root).context("copying the image's files for the other runtimes")?;
            for (name, program) in peers {
                let base: Value = {
                    let bundle = folder.path().join(format!("{name}-spec"));
                    std::fs::create_dir(&bundle)?;
                    text(&program, &["spec", "--bundle", &bundle.to_string_lossy()])
                        .or_else(|_| spec_here(&program, &bundle))?;
                    serde_json::from_slice(&std::fs::read(bundle.join("config.json"))?)?
                };
                let bundle = |what: &str, arguments: Value| -> Result<PathBuf> {
                    let bundle = folder.path().join(format!("{name}-{what}"));
                    std::fs::create_dir(&bundle)?;
                    let mut config = base.clone();
                    if let Some(process) = config.get_mut("process").and_then(Value::as_object_mut) {
                        process.insert("terminal".to_owned(), json!(false));
                        process.insert("args".to_owned(), arguments);
                    }
                    if let Some(config) = config.as_object_mut() {
                        config.insert("root".to_owned(), json!({ "path": root, "readonly": true }));
                    }
                    std::fs::write(bundle.join("config.json"), config.to_string())?;
                    Ok(bundle)
                };
                let kind =
                    Kind::Oci { once: bundle("once", json!(["true"]))?, idle: bundle("idle", json!(IDLE))? };
                contenders.push(Contender { name: name.to_owned(), program, kind, count: AtomicU32::new(0) });
            }
        }
        contenders.splice(0..0, [cloned, booted]);
        Ok(Self { contenders, _folder: folder })
    }
}

/// crun writes its specification into the working directory.
fn spec_here(program: &Path, bundle: &Path) -> Result<String> {
    timed(quiet(program, &["spec"]).current_dir(bundle))?;
    Ok(String::new())
}

/// Copies what the image has through `hyper cp`, which lets nothing of a hostile image out of the folder.
fn copy_root(hyper: &Contender, root: &Path) -> Result<()> {
    std::fs::create_dir(root)?;
    let container = hyper.idle()?;
    let names = text(&hyper.program, &["exec", &container.id, "ls", "/"])?;
    for name in names.split_whitespace() {
        if MADE_AT_START.contains(&name) {
            std::fs::create_dir(root.join(name))?;
            continue;
        }
        let source = format!("{}:/{name}", container.id);
        text(&hyper.program, &["cp", "-a", &source, &root.to_string_lossy()])
            .or_else(|_| text(&hyper.program, &["cp", &source, &root.to_string_lossy()]))?;
    }
    Ok(())
}

impl Contender {
    /// What the table calls it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn new_id(&self) -> String {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let name: String = self.name.chars().filter(char::is_ascii_alphanumeric).collect();
        format!("bench-{name}-{}-{number}", std::process::id())
    }

    /// A run of `true`, not yet started. Without a network, which OCI runtimes leave to others.
    fn once(&self) -> std::process::Command {
        match &self.kind {
            Kind::Hyper { image, template } => {
                let mut command = quiet(&self.program, &["run", "--rm", "--network", "none", image, "true"]);
                command.env(TEMPLATE, template);
                command
            }
            Kind::Oci { once, .. } => {
                quiet(&self.program, &["run", "--bundle", &once.to_string_lossy(), &self.new_id()])
            }
        }
    }

    /// Runs `true`; milliseconds from start to exit.
    pub(crate) fn run(&self) -> Result<f64> {
        timed(&mut self.once())
    }

    /// Starts several at once; milliseconds until all have ended.
    pub(crate) fn run_at_once(&self, count: u32) -> Result<f64> {
        let start = now_us();
        let running: Vec<_> = (0..count).map(|_| Waited::start(&mut self.once())).collect::<Result<_>>()?;
        for mut one in running {
            one.end()?;
        }
        Ok(ms_since(start))
    }

    /// Starts one that is idle.
    pub(crate) fn idle(&self) -> Result<Idle<'_>> {
        let id = self.new_id();
        match &self.kind {
            Kind::Hyper { image, template } => {
                let words = ["run", "-d", "--network", "none", "--name", &id, image, IDLE[0], IDLE[1]];
                timed(quiet(&self.program, &words).env(TEMPLATE, template))?;
            }
            Kind::Oci { idle, .. } => {
                // A pipe would stay open in the container.
                let mut command =
                    quiet(&self.program, &["run", "-d", "--bundle", &idle.to_string_lossy(), &id]);
                timed(command.stderr(std::process::Stdio::null()))?;
            }
        }
        Ok(Idle { contender: self, id })
    }
}

impl Idle<'_> {
    /// Runs `true` in it; milliseconds from start to exit.
    pub(crate) fn exec(&self) -> Result<f64> {
        timed(&mut quiet(&self.contender.program, &["exec", &self.id, "true"]))
    }

    /// Process ids on the host from which all others of the container descend.
    pub(crate) fn roots(&self) -> Result<Vec<u32>> {
        let program = &self.contender.program;
        if matches!(self.contender.kind, Kind::Oci { .. }) {
            let state: Value = serde_json::from_str(&text(program, &["state", &self.id])?)?;
            let pid = state.get("pid").and_then(Value::as_u64).and_then(|pid| u32::try_from(pid).ok());
            return Ok(vec![pid.context("the runtime names no process")?]);
        }
        let id = text(program, &["inspect", "--format", "{{.Id}}", &self.id])?;
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").context("reading /proc")?.flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let words: Vec<_> = line.split(|byte| *byte == 0).collect();
            if words.contains(&&b"supervise"[..]) && words.contains(&id.as_bytes()) {
                found.push(pid);
            }
        }
        if found.is_empty() {
            bail!("the supervisor of {} is not there", self.id);
        }
        Ok(found)
    }
}

impl Drop for Idle<'_> {
    fn drop(&mut self) {
        let words: &[&str] = match self.contender.kind {
            Kind::Hyper { .. } => &["rm", "-f", &self.id],
            Kind::Oci { .. } => &["delete", "-f", &self.id],
        };
        // What cannot be removed shows in the lists of the runtime.
        drop(timed(&mut quiet(&self.contender.program, words)));
    }
}
