//! Errors of the agent, and the one place where they become ttrpc statuses.

use std::io;

use serde::{Deserialize, Serialize};
use ttrpc::Code;

/// What kind of failure it is; decides the status that the supervisor sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ErrorKind {
    /// The request cannot be right: `INVALID_ARGUMENT`.
    Invalid,
    /// It names something that is not there: `NOT_FOUND`.
    NotFound,
    /// It would make something that is there: `ALREADY_EXISTS`.
    Exists,
    /// Not in this state: `FAILED_PRECONDITION`.
    State,
    /// A bound is reached: `RESOURCE_EXHAUSTED`.
    Limit,
    /// It took too long: `DEADLINE_EXCEEDED`.
    Deadline,
    /// A system call failed: `INTERNAL`.
    System,
}

/// A failure: what was tried on what, in one line for a person.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    /// A request was refused.
    #[error("{message}")]
    Refused {
        /// Decides the status.
        kind: ErrorKind,
        /// One line, lower case.
        message: String,
    },
    /// A system call failed.
    #[error("{tried}: {source}")]
    System {
        /// What was tried on what.
        tried: String,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
}

impl AgentError {
    /// A refusal.
    pub(crate) fn refused(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self::Refused { kind, message: message.into() }
    }

    /// A request that cannot be right.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::refused(ErrorKind::Invalid, message)
    }

    /// Something that is not there.
    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::refused(ErrorKind::NotFound, message)
    }

    /// Not in this state.
    pub(crate) fn state(message: impl Into<String>) -> Self {
        Self::refused(ErrorKind::State, message)
    }

    /// A bound is reached.
    pub(crate) fn limit(what: &str, max: usize) -> Self {
        Self::refused(ErrorKind::Limit, format!("{what}: at most {max}"))
    }

    /// Its kind.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Refused { kind, .. } => *kind,
            Self::System { .. } => ErrorKind::System,
        }
    }
}

/// Says what was tried when a system call fails.
pub(crate) trait Tried<T> {
    /// Adds what was tried on what.
    ///
    /// # Errors
    /// [`AgentError::System`] with it.
    fn tried(self, what: impl FnOnce() -> String) -> Result<T, AgentError>;
}

impl<T, E: Into<io::Error>> Tried<T> for Result<T, E> {
    fn tried(self, what: impl FnOnce() -> String) -> Result<T, AgentError> {
        self.map_err(|source| AgentError::System { tried: what(), source: source.into() })
    }
}

impl From<AgentError> for ttrpc::Error {
    fn from(error: AgentError) -> Self {
        let code = match error.kind() {
            ErrorKind::Invalid => Code::INVALID_ARGUMENT,
            ErrorKind::NotFound => Code::NOT_FOUND,
            ErrorKind::Exists => Code::ALREADY_EXISTS,
            ErrorKind::State => Code::FAILED_PRECONDITION,
            ErrorKind::Limit => Code::RESOURCE_EXHAUSTED,
            ErrorKind::Deadline => Code::DEADLINE_EXCEEDED,
            ErrorKind::System => Code::INTERNAL,
        };
        let line: String = error.to_string().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        Self::RpcStatus(ttrpc::get_status(code, line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_become_statuses_of_one_line() {
        let error: ttrpc::Error = AgentError::not_found("container a\nb").into();
        let ttrpc::Error::RpcStatus(status) = error else { panic!("not a status: {error:?}") };
        assert_eq!(status.code(), Code::NOT_FOUND);
        assert_eq!(status.message(), "container a b");
    }

    #[test]
    fn what_was_tried_comes_first() {
        let result: Result<(), rustix::io::Errno> = Err(rustix::io::Errno::NOENT);
        let error = result.tried(|| "open /x".to_owned()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::System);
        assert!(error.to_string().starts_with("open /x: "));
    }
}
