//! A program run to its end under a deadline, and assertions on what came of it.
#![expect(clippy::panic, reason = "assertions of the cases; a panic is how a case fails")]

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use crate::{DEADLINE, given, image, user};

/// Longest part of an output that a failure shows.
const SHOWN_BYTES: usize = 4000;

/// How long the pipes of a program that has ended may stay open.
const LINGER: Duration = Duration::from_secs(20);

/// What `HYPER_TEMPLATE` is for the programs that a case starts.
static TEMPLATE: OnceLock<&'static str> = OnceLock::new();

/// Runs a case whose containers all start from a template: what cannot, fails.
pub fn from_template(case: fn()) {
    // Each case has a process of its own, and is run once in it.
    TEMPLATE.get_or_init(|| "always");
    case();
}

/// A command line of `hyper`: words are split at white space, and `@name` stands for that image in the registry.
///
/// Arguments with spaces in them follow with [`Run::arg`].
#[must_use]
pub fn hyper(words: &str) -> Run {
    let mut run = match user::acting() {
        Some(user) => user.hyper(),
        None => Run::new(&given("HYPER_TEST_PREFIX").join("bin/hyper").to_string_lossy()),
    };
    if let Some(mode) = TEMPLATE.get() {
        run = run.env("HYPER_TEMPLATE", mode);
    }
    for word in words.split_whitespace() {
        run = match word.strip_prefix('@') {
            Some(name) => run.arg(&image(name)),
            None => run.arg(word),
        };
    }
    run
}

/// A shell command on the host.
#[must_use]
pub fn host(script: &str) -> Run {
    let run = Run::new("bash").arg("-c").arg(script);
    match user::acting() {
        Some(user) => run.env("HYPER_ROOT", user.data()),
        None => run,
    }
}

/// Who is killed, by the command that finds it. `$cli` is the process of the command line, `$id` the container's id.
pub const VICTIMS: [(&str, &str); 4] = [
    ("command line", "echo $cli"),
    ("supervisor", "pgrep -f \"supervise $id\""),
    ("file server", "pgrep -x hyper-fs"),
    ("machine", "pgrep -x hyper-vmm"),
];

/// What of ours is left in the machine: processes, TAPs, mounts.
#[must_use]
pub fn left_over() -> String {
    host("pgrep -a 'hyper-vmm|hyper-fs'; pgrep -fa '[h]yper supervise'; ip -o link | grep -o 'hys[0-9a-f]\\{8\\}'; \
          grep /hyper/containers/ /proc/mounts; true")
        .ok()
        .text()
}

/// A program about to be started.
#[derive(Debug)]
pub struct Run {
    command: Command,
    stdin: Vec<u8>,
    deadline: Duration,
}

impl Run {
    pub(crate) fn new(program: &str) -> Self {
        let mut command = Command::new(program);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::piped());
        Self { command, stdin: Vec::new(), deadline: DEADLINE }
    }

    /// One more argument, as it is.
    #[must_use]
    pub fn arg(mut self, argument: &str) -> Self {
        self.command.arg(argument);
        self
    }

    /// More arguments, as they are.
    #[must_use]
    pub fn args(mut self, arguments: &[&str]) -> Self {
        self.command.args(arguments);
        self
    }

    /// A variable of the environment.
    #[must_use]
    pub fn env(mut self, key: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Not this variable of ours.
    #[must_use]
    pub fn without(mut self, key: &str) -> Self {
        self.command.env_remove(key);
        self
    }

    /// State of its own instead of the one that the cases share: images are pulled anew, containers are unknown.
    #[must_use]
    pub fn state(self, folder: &Path) -> Self {
        let run = folder.join("run");
        self.env("HYPER_ROOT", folder.join("data")).env("HYPER_RUN", run)
    }

    /// As a shell reads it; no word of it needs quotes.
    pub(crate) fn shell(&self) -> String {
        let mut words = vec!["env".to_owned()];
        for (key, value) in self.command.get_envs() {
            let key = key.to_string_lossy();
            words.push(match value {
                Some(value) => format!("{key}={}", value.to_string_lossy()),
                None => format!("--unset={key}"),
            });
        }
        words.push(line(&self.command));
        words.join(" ")
    }

    /// What standard input holds before it ends.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Another deadline than the usual one.
    #[must_use]
    pub fn within(mut self, seconds: u64) -> Self {
        self.deadline = Duration::from_secs(seconds);
        self
    }

    /// Starts it and comes back at once.
    ///
    /// # Panics
    /// When the program cannot be started.
    #[must_use]
    pub fn start(mut self) -> Running {
        let line = line(&self.command);
        let start = Instant::now();
        let mut child = match self.command.spawn() {
            Ok(child) => child,
            Err(error) => panic!("cannot start {line}: {error}"),
        };
        let stdout = child.stdout.take().map(collect);
        let stderr = child.stderr.take().map(collect);
        let stdin = child.stdin.take();
        let bytes = std::mem::take(&mut self.stdin);
        // The program may end without reading; that is for the case to judge, not an error here.
        let feeder = std::thread::spawn(move || drop(stdin.map(|mut stdin| stdin.write_all(&bytes))));
        drop(feeder);
        Running { line, child, stdout, stderr, start, deadline: self.deadline }
    }

    /// Runs it, and holds a conversation with it: `talk` is given a function that says a line and hears the one that answers.
    ///
    /// # Panics
    /// When the program cannot be started, or does not answer within the deadline.
    pub fn talking(mut self, talk: impl FnOnce(&mut dyn FnMut(&str) -> String)) {
        let (line, deadline) = (line(&self.command), self.deadline);
        let mut child = match self.command.stderr(Stdio::null()).spawn() {
            Ok(child) => child,
            Err(error) => panic!("cannot start {line}: {error}"),
        };
        let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            panic!("{line} has no pipes")
        };
        let (sender, answers) = mpsc::channel();
        std::thread::spawn(move || {
            for answer in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(answer).is_err() {
                    return;
                }
            }
        });
        talk(&mut |words| {
            let said = writeln!(stdin, "{words}");
            match said.ok().and_then(|()| answers.recv_timeout(deadline).ok()) {
                Some(answer) => answer,
                None => panic!("no answer to {words:?} from {line}"),
            }
        });
        drop(stdin);
        drop(child.wait());
    }

    /// Runs it to its end.
    #[must_use]
    pub fn done(self) -> Done {
        self.start().done()
    }

    /// Runs it to its end; it must succeed.
    pub fn ok(self) -> Done {
        self.done().code(0)
    }

    /// Runs it to its end; it must leave with this code.
    pub fn fails(self, code: i32) -> Done {
        self.done().code(code)
    }
}

/// A program that runs; killed when dropped.
#[derive(Debug)]
pub struct Running {
    line: String,
    child: Child,
    stdout: Option<Receiver<Vec<u8>>>,
    stderr: Option<Receiver<Vec<u8>>>,
    start: Instant,
    deadline: Duration,
}

impl Running {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by name, such as `TERM`.
    pub fn signal(&self, name: &str) {
        host(&format!("kill -{name} {}", self.pid())).ok();
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When the deadline passes; the program is killed then.
    #[must_use]
    pub fn done(mut self) -> Done {
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break Some(status),
                Ok(None) if self.start.elapsed() > self.deadline => {
                    // What it printed so far helps; `collect` ends when the pipes do.
                    drop(self.child.kill());
                    drop(self.child.wait());
                    break None;
                }
                Ok(None) => std::thread::sleep(Duration::from_millis(20)),
                Err(error) => panic!("waiting for {}: {error}", self.line),
            }
        };
        let elapsed = self.start.elapsed();
        let stdout = gather(self.stdout.take(), &self.line);
        let stderr = gather(self.stderr.take(), &self.line);
        let code = status.map(|status| {
            use std::os::unix::process::ExitStatusExt;
            status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
        });
        let done =
            Done { line: std::mem::take(&mut self.line), code: code.unwrap_or(-1), stdout, stderr, elapsed };
        if code.is_none() {
            done.complain(&format!("still running after {} s", self.deadline.as_secs()));
        }
        done
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // It may end by itself in between.
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}

/// A program that has ended.
#[derive(Debug)]
pub struct Done {
    line: String,
    code: i32,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
    /// From start to end.
    pub elapsed: Duration,
}

impl Done {
    /// Standard output as text, without the white space at its end.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }

    /// Standard error as text, without the white space at its end.
    #[must_use]
    pub fn error(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim_end().to_owned()
    }

    fn checked(self, good: bool, what: &str) -> Self {
        if !good {
            self.complain(what);
        }
        self
    }

    /// Whether it left with this code.
    #[must_use]
    pub fn code_is(&self, code: i32) -> bool {
        self.code == code
    }

    /// Asserts the exit code; 128 and more is the signal that ended it.
    pub fn code(self, code: i32) -> Self {
        let good = self.code == code;
        self.checked(good, &format!("expected code {code}"))
    }

    /// Asserts the whole standard output, but for white space at its end.
    pub fn says(self, text: &str) -> Self {
        let good = self.text() == text;
        self.checked(good, &format!("expected output {text:?}"))
    }

    /// Asserts a part of the standard output.
    pub fn shows(self, part: &str) -> Self {
        let good = self.text().contains(part);
        self.checked(good, &format!("expected {part:?} in the output"))
    }

    /// Asserts that one line of standard error is an error, and that it has these parts. Docker's lines about a pull may
    /// come before it.
    pub fn complains(self, parts: &[&str]) -> Self {
        let error = self.error().to_lowercase();
        let lines: Vec<_> = error.lines().filter(|line| line.starts_with("hyper: ")).collect();
        let lacking: Vec<_> = parts
            .iter()
            .filter(|part| !lines.iter().any(|line| line.contains(&part.to_lowercase())))
            .collect();
        let good = lines.len() == 1 && lacking.is_empty() && !error.contains("panicked");
        let what = format!("expected one line of error, lacking {lacking:?} in {} lines", lines.len());
        self.checked(good, &what)
    }

    fn complain(&self, what: &str) {
        panic!(
            "{what}\n  {}\n  ended with {} after {:.1} s\n--- stdout\n{}\n--- stderr\n{}",
            self.line,
            self.code,
            self.elapsed.as_secs_f32(),
            shown(&self.stdout),
            shown(&self.stderr)
        );
    }
}

fn shown(bytes: &[u8]) -> String {
    let tail = bytes.get(bytes.len().saturating_sub(SHOWN_BYTES)..).unwrap_or_default();
    String::from_utf8_lossy(tail).into_owned()
}

/// Reads to the end in a thread of its own, so that neither pipe can fill up.
fn collect(mut pipe: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // A pipe that breaks has given what it had; a receiver that is gone has no use for it.
        drop(pipe.read_to_end(&mut bytes));
        drop(sender.send(bytes));
    });
    receiver
}

/// What was collected from a program that has ended.
fn gather(pipe: Option<Receiver<Vec<u8>>>, line: &str) -> Vec<u8> {
    let Some(pipe) = pipe else { return Vec::new() };
    match pipe.recv_timeout(LINGER) {
        Ok(bytes) => bytes,
        Err(_) => panic!("{line} has ended, but something it started still holds its output open"),
    }
}

fn line(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect();
    words.join(" ")
}
