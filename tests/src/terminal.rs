//! A real terminal: tmux on a socket of its own.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::program::{Run, host, hyper};
use crate::{image, wait_for};

/// A terminal with a command in it; ended when dropped.
#[derive(Debug)]
pub struct Terminal {
    socket: String,
}

impl Terminal {
    /// Starts `hyper` with these words (`@name` is an image) in a terminal of 80 by 24. The pane stays when it ends.
    #[must_use]
    pub fn start(words: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let terminal = Self { socket: format!("hyper-{}-{number}", std::process::id()) };
        let words: Vec<String> = words
            .split_whitespace()
            .map(|word| word.strip_prefix('@').map_or_else(|| word.to_owned(), image))
            .collect();
        let line = format!("{} {}; echo ended with $?; exec sleep 1000", hyper("").shell(), words.join(" "));
        terminal.tmux(&["-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", &line]).ok();
        terminal
    }

    /// Types text.
    pub fn type_in(&self, text: &str) {
        self.tmux(&["send-keys", "-l", text]).ok();
    }

    /// Presses keys by tmux's names, such as `Enter` or `C-c`.
    pub fn press(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat()).ok();
    }

    /// Types a line.
    pub fn enter(&self, line: &str) {
        self.type_in(line);
        self.press(&["Enter"]);
    }

    /// Makes the window that large.
    pub fn resize(&self, columns: u32, rows: u32) {
        self.tmux(&["resize-window", "-x", &columns.to_string(), "-y", &rows.to_string()]).ok();
    }

    /// What is on the screen.
    #[must_use]
    pub fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"]).ok().text()
    }

    /// Waits until the screen shows a text; the screen then.
    pub fn wait_for(&self, text: &str) -> String {
        let mut last = String::new();
        wait_for(&format!("{text:?} on the screen"), || {
            let screen = self.screen();
            if screen != last {
                last.clone_from(&screen);
                // Shown when the case fails.
                show(&last);
            }
            screen.contains(text).then_some(screen)
        })
    }

    fn tmux(&self, arguments: &[&str]) -> Run {
        let quoted: Vec<String> =
            arguments.iter().map(|argument| format!("'{}'", argument.replace('\'', r"'\''"))).collect();
        host(&format!("exec tmux -L {} {}", self.socket, quoted.join(" ")))
    }
}

#[expect(clippy::print_stdout, reason = "libtest keeps it and shows it with the failure")]
fn show(screen: &str) {
    println!("--- screen\n{screen}");
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Nothing is left to say when it has ended already.
        drop(self.tmux(&["kill-server"]).done());
    }
}
