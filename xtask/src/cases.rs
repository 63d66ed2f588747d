//! Runs the black-box cases: one process per case, one lab machine per group, a few machines at a time.
//!
//! A case that hangs is ended by its own limit. When a whole machine dies, the case that it died in has failed and the
//! rest of the group goes on in a fresh one. When a case has failed and the machine is seen to read the product's files otherwise than they
//! are, the case has said nothing of the product: it is told, and the case is run again in a fresh machine, once.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, bail};

use crate::cache;
use crate::command;
use crate::lab;
use crate::peers;
use crate::product::{Product, cargo};
use crate::test::Options;

/// Seconds that one case may take.
const CASE_LIMIT: u64 = 900;
/// Seconds that one machine may take: a whole group.
const MACHINE_LIMIT: u64 = 2400;
/// What the job prints before the result of each case.
const MARK: &str = "@case ";
/// What the job prints, and ends with, when the machine reads the product's files otherwise than they are.
const DAMAGED: &str = "@damaged ";
/// How often a group may begin again because its machine was damaged.
const MOST_DAMAGED: usize = 1;
/// Groups that take longest; they start first.
const LONGEST: [&str; 16] = [
    "kubernetes_faults",
    "kubernetes_many",
    "cluster",
    "faults",
    "services",
    "injected",
    "interrupted",
    "fork",
    "rootless",
    "power",
    "network",
    "many",
    "options",
    "kubernetes",
    "containers",
    "containerd",
];

/// How many passed and failed.
#[derive(Default, Clone, Copy)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    /// Cases that were left out because they are on trial.
    pub(crate) on_trial: usize,
    /// Cases that were left out because their programs could not be built here.
    pub(crate) without_peers: usize,
    /// Cases that were left out because the programs that they drive are not on the path.
    pub(crate) not_on_path: usize,
}

/// Cases that have not been seen to pass yet: they do not decide, and the count says how many they are.
const TRIAL_LIST: &str = "tests/trial.txt";

/// What the cases are run with.
pub(crate) struct Inputs<'a> {
    pub(crate) product: &'a Product,
    pub(crate) fixtures: &'a Path,
    /// A guest's initramfs that turns against its agent.
    pub(crate) sabotaged: &'a Path,
    /// A program that tries to get out of the VMM's jail.
    pub(crate) stand_in: &'a Path,
    /// A program for bare metal that misbehaves in place of a guest's kernel.
    pub(crate) rude_guest: &'a Path,
}

/// Names in the list; a line is a name, or begins with `#`.
fn trial_names() -> Result<Vec<String>> {
    let path = cache::root().join(TRIAL_LIST);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    Ok(lines.map(str::to_owned).collect())
}

/// Builds the cases and runs those that the filter picks.
pub(crate) fn run(options: &Options, inputs: &Inputs<'_>) -> Result<Tally> {
    let program = build()?;
    let list = command::text(Command::new(&program).args(["--list", "--format", "terse"]))?;
    let trial = trial_names()?;
    let all: Vec<&str> = list.lines().filter_map(|line| line.strip_suffix(": test")).collect();
    if let Some(unknown) = trial.iter().find(|name| !all.contains(&name.as_str())) {
        bail!("{TRIAL_LIST} names {unknown}, which is no case");
    }
    let on_trial = if options.filter.is_empty() && !options.trial { trial.len() } else { 0 };
    let mut names: Vec<String> = all
        .into_iter()
        .filter(|name| {
            let listed = trial.iter().any(|other| other == name);
            if options.trial { listed } else { on_trial == 0 || !listed }
        })
        .filter(|name| {
            options.filter.is_empty() || options.filter.iter().any(|part| name.contains(part.as_str()))
        })
        .map(str::to_owned)
        .collect();
    if names.is_empty() {
        bail!("no case fits {:?}", options.filter);
    }
    let (peers, without_peers, not_on_path) = with_peers(&mut names)?;
    if names.is_empty() {
        return Ok(Tally { on_trial, without_peers, not_on_path, ..Tally::default() });
    }
    let groups = group(&names);
    crate::say(format!("test: {} lab cases in {} groups", names.len(), groups.len()));
    let folder = cache::dir()?.join(format!("lab-cases/{}", std::process::id()));
    cache::remove_dir(&folder)?;
    let files = command::text(Command::new("bash").args(["-c", &sums(&inputs.product.prefix)]))?;
    let bench =
        Bench { inputs, peers: &peers, program: &program, folder: &folder, here: options.here, files };
    let lanes = if options.here { 1 } else { options.jobs.clamp(1, groups.len()) };
    let queue = Mutex::new(groups);
    let tally = thread::scope(|scope| {
        let workers: Vec<_> = (0..lanes)
            .map(|lane| {
                scope.spawn({
                    let (bench, queue) = (&bench, &queue);
                    move || work(bench, queue, lane)
                })
            })
            .collect();
        let mut tally = Tally { on_trial, without_peers, not_on_path, ..Tally::default() };
        for worker in workers {
            let part = worker.join().map_err(|_| anyhow::anyhow!("a lane of cases broke"))??;
            tally.passed += part.passed;
            tally.failed += part.failed;
        }
        Ok::<_, anyhow::Error>(tally)
    })?;
    if tally.passed + tally.failed != names.len() {
        bail!("{} cases were chosen, but {} have a result", names.len(), tally.passed + tally.failed);
    }
    if tally.failed == 0 {
        cache::remove_dir(&folder)?;
    } else {
        crate::say(format!("test: logs of the cases are in {}", folder.display()));
    }
    Ok(tally)
}

/// Variables, and the programs of others that they name.
type Peers = Vec<(&'static str, PathBuf)>;

/// The programs of others that these cases need. Cases are left out whose programs cannot be built here, or are not on the path: so many.
fn with_peers(names: &mut Vec<String>) -> Result<(Peers, usize, usize)> {
    let chosen = names.len();
    let mut peers = Vec::new();
    for module in &peers::MODULES {
        let needs = |name: &String| module.groups.contains(&name.split("::").next().unwrap_or_default());
        if !names.iter().any(needs) {
            continue;
        }
        match module.make()? {
            Some(folder) => peers.push((module.variable, folder)),
            None => names.retain(|name| !needs(name)),
        }
    }
    let without_peers = chosen - names.len();
    let chosen = names.len();
    for other in &peers::ON_PATH {
        let needs = |name: &String| name.split("::").next() == Some(other.group);
        match command::find(other.program) {
            Some(program) => peers.push((other.variable, program)),
            None => names.retain(|name| !needs(name)),
        }
    }
    let not_on_path = chosen - names.len();
    Ok((peers, without_peers, not_on_path))
}

/// Name of the file with the product's checksums, in the folder of logs.
const FILES: &str = "files";

/// A function of the job: looks at the product's files, and ends the job when they are not what they are outside.
fn damage(prefix: &Path, logs: &Path) -> String {
    let logs = logs.display();
    format!(
        "damage() {{\n\
           ( {sums} ) >{logs}/files.seen\n\
           cmp -s {logs}/{FILES} {logs}/files.seen && return\n\
           diff {logs}/{FILES} {logs}/files.seen | sed 's/^/{DAMAGED}/'\n\
           echo 1 >/proc/sys/vm/drop_caches; ( {sums} ) >{logs}/files.again\n\
           cmp -s {logs}/{FILES} {logs}/files.again && echo '{DAMAGED}read once more, they are right'\n\
           exit\n\
         }}\n",
        sums = sums(prefix),
    )
}

/// A script that prints a checksum of each file of the product.
fn sums(prefix: &Path) -> String {
    format!("cd '{}' && find . -type f -exec cksum {{}} + | sort -k 3", prefix.display())
}

/// Builds the program with all cases; its path.
fn build() -> Result<PathBuf> {
    let text = command::text(cargo()?.args([
        "test",
        "--package",
        "hyper-tests",
        "--test",
        "cases",
        "--no-run",
        "--message-format",
        "json",
    ]))?;
    for line in text.lines() {
        let message: serde_json::Value = serde_json::from_str(line).context("reading cargo's messages")?;
        let name = message.pointer("/target/name").and_then(|name| name.as_str());
        if let (Some("cases"), Some(path)) = (name, message.get("executable").and_then(|path| path.as_str()))
        {
            return Ok(PathBuf::from(path));
        }
    }
    bail!("cargo built no program with the cases")
}

/// Cases by module, the longest groups first.
fn group(names: &[String]) -> VecDeque<(String, Vec<String>)> {
    let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for name in names {
        let module = name.split("::").next().unwrap_or_default();
        groups.entry(module.to_owned()).or_default().push(name.clone());
    }
    let mut order: Vec<_> = groups.into_iter().collect();
    order.sort_by_key(|(module, _)| LONGEST.iter().position(|name| name == module).unwrap_or(LONGEST.len()));
    order.into()
}

/// What every machine needs to know.
struct Bench<'a> {
    inputs: &'a Inputs<'a>,
    peers: &'a Peers,
    program: &'a Path,
    folder: &'a Path,
    here: bool,
    /// Checksums of the product's files, as [`sums`] prints them.
    files: String,
}

/// What came of a machine.
#[derive(Default)]
struct Results {
    /// Of the cases that came to an end, in order.
    passed: Vec<bool>,
    damaged: bool,
}

/// Takes groups until none is left. The lane's disk goes from machine to machine, so an image is unpacked once.
fn work(bench: &Bench<'_>, queue: &Mutex<VecDeque<(String, Vec<String>)>>, lane: usize) -> Result<Tally> {
    let mut tally = Tally::default();
    let disk = bench.folder.join(format!("disk-{lane}"));
    loop {
        let next = queue.lock().map_err(|_| anyhow::anyhow!("another lane broke"))?.pop_front();
        let Some((module, mut left)) = next else { break };
        let mut damaged = 0;
        while !left.is_empty() {
            let results = bench.machine(&module, &left, &disk)?;
            let done = results.passed.len();
            for (name, passed) in left.iter().zip(&results.passed) {
                bench.report(&module, name, *passed, &mut tally)?;
            }
            left.drain(..done);
            damaged += usize::from(results.damaged);
            if results.damaged && damaged <= MOST_DAMAGED {
                crate::say(format!(
                    "{module}: the machine read files wrong, so the group goes on in another"
                ));
            } else if !left.is_empty() {
                let lost = left.remove(0);
                crate::say(format!("{lost}: the machine ended in it"));
                bench.report(&module, &lost, false, &mut tally)?;
            }
        }
    }
    match fs::remove_file(&disk) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", disk.display()))
        }
        _ => Ok(tally),
    }
}

impl Bench<'_> {
    /// Runs cases in one machine, in order.
    fn machine(&self, module: &str, names: &[String], disk: &Path) -> Result<Results> {
        let share = self.folder.join(module);
        fs::create_dir_all(&share).with_context(|| format!("creating {}", share.display()))?;
        let files = share.join(FILES);
        fs::write(&files, &self.files).with_context(|| format!("writing {}", files.display()))?;
        let mut results = Results::default();
        let mut rest = String::new();
        let mut seen = |bytes: &[u8]| {
            rest.push_str(&String::from_utf8_lossy(bytes));
            while let Some((line, more)) = rest.split_once('\n') {
                match line.strip_prefix(MARK) {
                    Some(result) => {
                        crate::say(format!("  {result}"));
                        results.passed.push(result.starts_with("ok "));
                    }
                    None if line.starts_with(DAMAGED) => {
                        crate::say(format!("  {module}: {line}"));
                        results.damaged = true;
                    }
                    None if !line.trim().is_empty() => crate::say(format!("  {module}: {line}")),
                    None => {}
                }
                rest = more.to_owned();
            }
            Ok(())
        };
        if self.here {
            let output = Command::new("bash").args(["-c", &self.job(names, &share, false)]).output();
            seen(&output.context("starting bash")?.stdout).context("reading the results")?;
        } else {
            let mut options = lab::Options::script(self.job(names, Path::new("/lab"), true), MACHINE_LIMIT);
            options.share = Some(share);
            options.disk_file = Some(disk.to_path_buf());
            lab::run_with(&options, &mut seen)?;
        }
        Ok(results)
    }

    /// One process per case, its output in a file, one line per result.
    fn job(&self, names: &[String], logs: &Path, machine_is_ours: bool) -> String {
        let Inputs { product, fixtures, sabotaged, stand_in, rude_guest } = self.inputs;
        let hyper = product.hyper();
        let mut job = format!(
            "export HYPER_TEST_PREFIX='{}' HYPER_TEST_FIXTURES='{}' HYPER_TEST_SABOTAGED='{}' HYPER_TEST_STAND_IN='{}' \
             HYPER_TEST_RUDE_GUEST='{}'\n",
            product.prefix.display(),
            fixtures.display(),
            sabotaged.display(),
            stand_in.display(),
            rude_guest.display(),
        );
        for (variable, folder) in self.peers {
            job.push_str(&format!("export {variable}='{}'\n", folder.display()));
        }
        if machine_is_ours {
            job.push_str("export HYPER_TIMEOUT_SCALE=10 HYPER_TEST_SCRATCH=/var/lib/hyper HYPER_TEST_KEEP_REGISTRY=1 HYPER_ROOT=/var/lib/hyper/state\n");
        } else {
            job.push_str(
                "state=$(mktemp -d); trap 'rm -rf \"$state\"' EXIT\n\
                 export HYPER_ROOT=\"$state/data\" HYPER_RUN=\"$state/run\"\n",
            );
        }
        // Cases of templates ask for them; with the others a machine that is made for later would be taken for one that was left over.
        job.push_str("export HYPER_TEMPLATE=never\n");
        job.push_str(&damage(&product.prefix, logs));
        for name in names {
            // After a failure nothing may be left that makes the next case fail too.
            job.push_str(&format!(
                "start=$SECONDS; timeout -k 10 {CASE_LIMIT} '{program}' --exact {name} --nocapture >'{logs}/{name}.log' 2>&1 </dev/null && \
                 verdict=ok || verdict=FAILED\n\
                 [ $verdict = ok ] || damage\n\
                 grep -a '^@note ' '{logs}/{name}.log'\n\
                 echo \"{MARK}$verdict {name} ($((SECONDS - start)) s)\"\n\
                 [ $verdict = ok ] || {{ timeout 120 '{hyper}' rm -f $(timeout 60 '{hyper}' ps -aq) >/dev/null 2>&1; true; }}\n",
                program = self.program.display(),
                logs = logs.display(),
                hyper = hyper.display(),
            ));
        }
        job
    }

    fn report(&self, module: &str, name: &str, passed: bool, tally: &mut Tally) -> Result<()> {
        if passed {
            tally.passed += 1;
            return Ok(());
        }
        tally.failed += 1;
        let log = self.folder.join(module).join(format!("{name}.log"));
        let text = fs::read(&log).unwrap_or_default();
        crate::say(format!("---- {name}\n{}\n----", String::from_utf8_lossy(&text)));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn longest_groups_start_first() {
        let names = ["run::a", "options::b", "run::c", "limits::d"].map(str::to_owned);
        let groups = super::group(&names);
        let order: Vec<_> = groups.iter().map(|(module, cases)| (module.as_str(), cases.len())).collect();
        assert_eq!(order, [("options", 1), ("limits", 1), ("run", 2)]);
    }
}
