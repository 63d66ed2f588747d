//! The one error of the command line: a line for a person and an exit code.

use std::fmt::Display;

/// Exit code of a failure of ours in `run`, `create`, `exec` and of every misused flag.
pub(crate) const CODE_OURS: i32 = 125;
/// Exit code of every other failed verb.
pub(crate) const CODE_FAILED: i32 = 1;

/// What went wrong, in one line, and the code to leave with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct CliError {
    /// The line, without the program's name.
    pub(crate) message: String,
    /// The exit code.
    pub(crate) code: i32,
}

impl CliError {
    /// A failure with exit code 1.
    pub(crate) fn failed(message: impl Display) -> Self {
        Self { message: message.to_string(), code: CODE_FAILED }
    }

    /// A bad flag or argument: exit code 125.
    pub(crate) fn usage(message: impl Display) -> Self {
        Self { message: message.to_string(), code: CODE_OURS }
    }

    /// The same with another exit code.
    pub(crate) fn with_code(mut self, code: i32) -> Self {
        self.code = code;
        self
    }

    /// An error and its sources in one line.
    pub(crate) fn from_chain(error: &(dyn std::error::Error + 'static)) -> Self {
        Self::failed(chain(error))
    }
}

/// Joins an error and its sources with `: `, leaving out what a source only repeats.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let text = source.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        next = source.source();
    }
    line.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_is_one_line_and_does_not_repeat() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot read x: {source}")]
        struct Outer {
            source: std::io::Error,
        }
        let outer = Outer { source: std::io::Error::other("a\nb") };
        assert_eq!(chain(&outer), "cannot read x: a b");
    }
}
