//! What a pull tells while it runs, and three ways to show it: bars, lines, nothing.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::digest::Digest;
use crate::reference::Reference;

/// Receives what a pull tells. Called from several threads, often; must not block for long.
pub trait Progress: Send + Sync {
    /// Takes note of an event.
    fn event(&self, event: &Event<'_>);
}

/// Something that happened during a pull.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// The registry knows the image; its layers come next.
    Started {
        /// What is pulled.
        reference: &'a Reference,
    },
    /// A layer got on.
    Layer {
        /// Which layer.
        digest: &'a Digest,
        /// How far it is.
        state: LayerState,
    },
}

/// How far a layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerState {
    /// It has to be downloaded.
    PullingFsLayer,
    /// Another process downloads it already.
    Waiting,
    /// Bytes are coming in.
    Downloading {
        /// Bytes so far, with those of earlier pulls.
        current: u64,
        /// Bytes of the whole layer.
        total: u64,
    },
    /// The connection was lost; another try follows.
    Retrying {
        /// Milliseconds until then.
        pause_ms: u64,
    },
    /// Its digest is being checked.
    Verifying,
    /// It is stored.
    DownloadComplete,
    /// It was stored before.
    AlreadyExists,
    /// It belongs to an image now.
    PullComplete,
}

impl LayerState {
    /// The word that Docker uses.
    pub fn label(&self) -> &'static str {
        match self {
            Self::PullingFsLayer => "Pulling fs layer",
            Self::Waiting => "Waiting",
            Self::Downloading { .. } => "Downloading",
            Self::Retrying { .. } => "Retrying",
            Self::Verifying => "Verifying Checksum",
            Self::DownloadComplete => "Download complete",
            Self::AlreadyExists => "Already exists",
            Self::PullComplete => "Pull complete",
        }
    }
}

/// Shows nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl Progress for Quiet {
    fn event(&self, _event: &Event<'_>) {}
}

/// Writes one line per step of a layer, without the bytes: for logs and pipes.
pub struct Plain {
    out: Mutex<Box<dyn Write + Send>>,
}

impl Plain {
    /// Lines go to `out`; a failure to write them is no reason to fail a pull.
    pub fn new(out: Box<dyn Write + Send>) -> Self {
        Self { out: Mutex::new(out) }
    }
}

impl std::fmt::Debug for Plain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Plain")
    }
}

impl Progress for Plain {
    fn event(&self, event: &Event<'_>) {
        let line = match event {
            Event::Started { reference } => heading(reference),
            Event::Layer { state: LayerState::Downloading { .. }, .. } => return,
            Event::Layer { digest, state: LayerState::Retrying { pause_ms } } => {
                format!("{}: Retrying in {:.1} seconds", digest.short(), *pause_ms as f64 / 1000.0)
            }
            Event::Layer { digest, state } => format!("{}: {}", digest.short(), state.label()),
        };
        let mut out = locked(&self.out);
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

/// Draws one bar per layer on the terminal that is standard error.
pub struct Bars {
    all: MultiProgress,
    layers: Mutex<HashMap<Digest, ProgressBar>>,
    text: ProgressStyle,
    bar: ProgressStyle,
}

impl std::fmt::Debug for Bars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bars")
    }
}

impl Default for Bars {
    fn default() -> Self {
        Self::new(ProgressDrawTarget::stderr())
    }
}

impl Bars {
    /// Bars on another target, which decides itself whether it is worth drawing on.
    fn new(target: ProgressDrawTarget) -> Self {
        let style = |template: &str| {
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
        };
        Self {
            all: MultiProgress::with_draw_target(target),
            layers: Mutex::default(),
            text: style("{prefix}: {msg}"),
            bar: style("{prefix}: {msg} [{bar:50}]  {decimal_bytes}/{decimal_total_bytes}")
                .progress_chars("=> "),
        }
    }
}

impl Progress for Bars {
    fn event(&self, event: &Event<'_>) {
        let (digest, state) = match event {
            Event::Started { reference } => {
                let _ = self.all.println(heading(reference));
                return;
            }
            Event::Layer { digest, state } => (*digest, *state),
        };
        let mut layers = locked(&self.layers);
        let bar = layers.entry(digest.clone()).or_insert_with(|| {
            let bar = ProgressBar::new(0).with_style(self.text.clone()).with_message(state.label());
            self.all.add(bar.with_prefix(digest.short().to_owned()))
        });
        if let LayerState::Downloading { current, total } = state {
            if bar.message() != state.label() {
                bar.set_length(total);
                bar.set_message(state.label());
                bar.set_style(self.bar.clone());
            }
            bar.set_position(current);
            return;
        }
        bar.set_style(self.text.clone());
        match state {
            LayerState::AlreadyExists | LayerState::PullComplete => bar.finish_with_message(state.label()),
            _ => bar.set_message(state.label()),
        }
    }
}

/// What suits standard error: bars on a terminal, lines otherwise.
pub fn for_stderr() -> Arc<dyn Progress> {
    if std::io::stderr().is_terminal() {
        Arc::new(Bars::default())
    } else {
        Arc::new(Plain::new(Box::new(std::io::stderr())))
    }
}

/// Docker's first line: `latest: Pulling from library/nginx`.
fn heading(reference: &Reference) -> String {
    let path = match reference.domain() {
        "docker.io" => reference.path().to_owned(),
        _ => reference.repository(),
    };
    format!("{}: Pulling from {path}", reference.wanted())
}

/// A lock whose content stays usable if a thread died with it.
fn locked<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    const STATES: [LayerState; 6] = [
        LayerState::PullingFsLayer,
        LayerState::Downloading { current: 1, total: 2 },
        LayerState::Retrying { pause_ms: 500 },
        LayerState::Verifying,
        LayerState::DownloadComplete,
        LayerState::PullComplete,
    ];

    #[test]
    fn plain_lines() {
        let buffer = Buffer::default();
        let plain = Plain::new(Box::new(buffer.clone()));
        let (reference, digest) = (Reference::parse("nginx").unwrap(), Digest::of(b""));
        plain.event(&Event::Started { reference: &reference });
        for state in STATES {
            plain.event(&Event::Layer { digest: &digest, state });
        }
        let text = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
        assert_eq!(
            text,
            "latest: Pulling from library/nginx\ne3b0c44298fc: Pulling fs layer\n\
             e3b0c44298fc: Retrying in 0.5 seconds\ne3b0c44298fc: Verifying Checksum\n\
             e3b0c44298fc: Download complete\ne3b0c44298fc: Pull complete\n"
        );
    }

    /// A terminal that remembers all that was ever written to it.
    #[derive(Clone, Debug, Default)]
    struct Tape(Arc<Mutex<String>>);

    impl indicatif::TermLike for Tape {
        fn width(&self) -> u16 {
            120
        }
        fn move_cursor_up(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> std::io::Result<()> {
            self.write_str(text)
        }
        fn write_str(&self, text: &str) -> std::io::Result<()> {
            self.0.lock().unwrap().push_str(text.trim_end());
            self.0.lock().unwrap().push('\n');
            Ok(())
        }
        fn clear_line(&self) -> std::io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn bars() {
        let tape = Tape::default();
        let bars = Bars::new(ProgressDrawTarget::term_like_with_hz(Box::new(tape.clone()), 255));
        let (reference, digest) = (Reference::parse("nginx").unwrap(), Digest::of(b""));
        bars.event(&Event::Started { reference: &reference });
        for state in STATES {
            bars.event(&Event::Layer { digest: &digest, state });
            bars.layers.lock().unwrap()[&digest].force_draw();
        }
        let text = tape.0.lock().unwrap().clone();
        assert!(text.contains("latest: Pulling from library/nginx\n"), "{text}");
        assert!(text.contains("e3b0c44298fc: Downloading [=========================>"), "{text}");
        assert!(text.contains("]  1 B/2 B\n"), "{text}");
        assert!(text.trim_end().ends_with("e3b0c44298fc: Pull complete"), "{text}");
    }
}
