//! A conversation between the caller's terminal or pipes and a process in a container.
//!
//! ```text
//! stdin --thread--> detach keys --> process      signals --> process (unless a terminal sends them as keys)
//! stdout, stderr <-- process                     SIGWINCH --> size of the process's terminal
//! ```

use std::io::IsTerminal;

use hyper_sandbox::{AttachInput, AttachOptions, AttachOutput, Attached, Output, TerminalSize};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::error::CliError;
use crate::output;
use crate::terminal::{DetachKeys, RawMode, Scan, window_size};

/// Bytes read from standard input at once.
const READ_BYTES: usize = 64 * 1024;
/// Reads that may wait for a process that does not read its input.
const READS_AHEAD: usize = 4;
/// Signals that are passed on: those a user or a scheduler sends to make a program do something.
const PROXIED: [i32; 8] = [1, 2, 3, 10, 12, 14, 15, 18];

/// How to converse.
#[derive(Debug)]
pub(crate) struct Manners {
    /// Pass standard input on.
    pub(crate) stdin: bool,
    /// The process has a terminal.
    pub(crate) terminal: bool,
    /// Pass signals on.
    pub(crate) sig_proxy: bool,
    /// Keys that detach.
    pub(crate) detach_keys: DetachKeys,
}

/// How a conversation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The process ended with this code.
    Exit(u8),
    /// The user detached.
    Detached,
    /// The supervisor went away.
    Lost,
}

impl Manners {
    /// Checks that a process with a terminal gets its input from one, as Docker does.
    ///
    /// # Errors
    /// Exit code 1 when `-i -t` is given and standard input is not a terminal.
    pub(crate) fn check(&self) -> Result<(), CliError> {
        if self.stdin && self.terminal && !std::io::stdin().is_terminal() {
            return Err(CliError::failed("the input device is not a TTY"));
        }
        Ok(())
    }

    /// What to ask of the supervisor.
    pub(crate) fn attach_options(&self, stdout: bool, stderr: bool) -> AttachOptions {
        let size = if self.terminal { window_size() } else { None };
        AttachOptions {
            stdin: self.stdin,
            stdout,
            stderr: stderr && !self.terminal,
            size: size.map(|(rows, cols)| TerminalSize { rows, cols }),
        }
    }

    /// Converses until the process ends, the user detaches, or the supervisor goes away. A process that did not end by itself is
    /// explained on standard error.
    ///
    /// # Errors
    /// When the terminal cannot be set up or the conversation breaks.
    pub(crate) async fn converse(self, attached: Attached) -> Result<Ended, CliError> {
        let Attached { input, output } = attached;
        let raw = if self.stdin && self.terminal {
            Some(RawMode::enter().map_err(|e| CliError::failed(format!("cannot set up the terminal: {e}")))?)
        } else {
            None
        };
        let proxy = self.sig_proxy.then(|| tokio::spawn(pass_signals(input.clone())));
        let resize = self.terminal.then(|| tokio::spawn(pass_sizes(input.clone())));
        let typed = self.stdin.then(|| read_stdin(raw.is_some().then_some(self.detach_keys)));
        // The writing half stays open to the end: its close would tell the supervisor that we have gone.
        let ended = exchange(input.clone(), output, typed).await;
        drop(input);
        for task in [proxy, resize].into_iter().flatten() {
            task.abort();
        }
        drop(raw);
        let (ended, reason) = ended?;
        if !reason.is_empty() {
            output::error(reason);
        }
        Ok(ended)
    }
}

async fn exchange(
    input: AttachInput,
    mut output: AttachOutput,
    typed: Option<mpsc::Receiver<Typed>>,
) -> Result<(Ended, String), CliError> {
    let (detached_tx, mut detached) = mpsc::channel(1);
    let feeder = typed.map(|typed| tokio::spawn(feed(input, typed, detached_tx)));
    let ended = loop {
        let event = tokio::select! {
            event = output.next() => event?,
            Some(()) = detached.recv() => break (Ended::Detached, String::new()),
        };
        match event {
            Output::Stdout(bytes) => output::bytes_out(&bytes),
            Output::Stderr(bytes) => output::bytes_err(&bytes),
            Output::Exit { code, reason } => break (Ended::Exit(code), reason),
            Output::Detached => break (Ended::Lost, String::new()),
        }
    };
    if let Some(feeder) = feeder {
        feeder.abort();
    }
    Ok(ended)
}

#[derive(Debug)]
enum Typed {
    Bytes(Vec<u8>),
    Detach,
    End,
}

async fn feed(input: AttachInput, mut typed: mpsc::Receiver<Typed>, detached: mpsc::Sender<()>) {
    while let Some(event) = typed.recv().await {
        let sent = match event {
            Typed::Bytes(bytes) => input.write(&bytes).await,
            Typed::End => input.close_stdin().await,
            Typed::Detach => {
                let _ = detached.send(()).await;
                return;
            }
        };
        // The process or its supervisor has gone: the output half hears of it and ends the conversation.
        if sent.is_err() {
            return;
        }
    }
}

/// Reads standard input on a thread of its own: a read of a terminal cannot be cancelled, and must not keep the program from ending.
fn read_stdin(mut keys: Option<DetachKeys>) -> mpsc::Receiver<Typed> {
    let (to, typed) = mpsc::channel(READS_AHEAD);
    std::thread::spawn(move || {
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let read = match rustix::io::read(std::io::stdin(), buffer.as_mut_slice()) {
                Err(rustix::io::Errno::INTR) => continue,
                Ok(n) if n > 0 => n,
                _ => {
                    let _ = to.blocking_send(Typed::End);
                    return;
                }
            };
            let bytes = buffer.get(..read).unwrap_or_default();
            let (bytes, detach) = match keys.as_mut().map(|k| k.scan(bytes)) {
                None => (bytes.to_vec(), false),
                Some(Scan::Pass(bytes)) => (bytes, false),
                Some(Scan::Detach(bytes)) => (bytes, true),
            };
            if !bytes.is_empty() && to.blocking_send(Typed::Bytes(bytes)).is_err() {
                return;
            }
            if detach {
                let _ = to.blocking_send(Typed::Detach);
                return;
            }
        }
    });
    typed
}

async fn pass_signals(input: AttachInput) {
    let (caught_tx, mut caught) = mpsc::channel(8);
    for number in PROXIED {
        let Ok(stream) = signal(SignalKind::from_raw(number)) else { continue };
        let caught_tx = caught_tx.clone();
        tokio::spawn(async move { forward(stream, number, caught_tx).await });
    }
    while let Some(number) = caught.recv().await {
        if input.signal(number.unsigned_abs()).await.is_err() {
            return;
        }
    }
}

async fn forward(mut stream: Signal, number: i32, to: mpsc::Sender<i32>) {
    while stream.recv().await.is_some() {
        if to.send(number).await.is_err() {
            return;
        }
    }
}

async fn pass_sizes(input: AttachInput) {
    let Ok(mut changes) = signal(SignalKind::window_change()) else { return };
    loop {
        if let Some((rows, cols)) = window_size()
            && input.resize(TerminalSize { rows, cols }).await.is_err()
        {
            return;
        }
        if changes.recv().await.is_none() {
            return;
        }
    }
}
