//! The one place where errors become gRPC codes, as containerd's clients expect them from runc's shim.

use containerd_shim_protos::ttrpc::{self, Code};
use hyper_sandbox::pod::PodError;

use crate::bundle::BundleError;
use crate::config::ConfigError;

/// Longest message, characters: it is shown to a person.
const MAX_MESSAGE_CHARS: usize = 2000;

/// A status with a message of one line.
pub(crate) fn status(code: Code, message: &str) -> ttrpc::Error {
    let line: String =
        message.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_MESSAGE_CHARS).collect();
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, line))
}

/// What a call is answered with when the sandbox refuses.
pub(crate) fn of_pod(error: PodError) -> ttrpc::Error {
    let code = match &error {
        PodError::NotFound(_) => Code::NOT_FOUND,
        PodError::Exists(_) => Code::ALREADY_EXISTS,
        PodError::State(_) => Code::FAILED_PRECONDITION,
        PodError::Invalid(_) => Code::INVALID_ARGUMENT,
        PodError::Unsupported(_) => Code::UNIMPLEMENTED,
        PodError::Exhausted(_) => Code::RESOURCE_EXHAUSTED,
        PodError::Deadline(_) => Code::DEADLINE_EXCEEDED,
        PodError::Ended(_) => Code::UNAVAILABLE,
        PodError::Failed(_) => Code::UNKNOWN,
    };
    status(code, &error.to_string())
}

/// A bundle that cannot be used.
pub(crate) fn of_bundle(error: BundleError) -> ttrpc::Error {
    let code = match &error {
        BundleError::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Code::NOT_FOUND,
        BundleError::Read { .. } => Code::UNKNOWN,
        BundleError::Size { .. } | BundleError::Json { .. } => Code::INVALID_ARGUMENT,
    };
    status(code, &error.to_string())
}

/// A configuration that cannot be used, or that a pod may not change.
pub(crate) fn of_config(error: ConfigError) -> ttrpc::Error {
    let code = match &error {
        ConfigError::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Code::NOT_FOUND,
        ConfigError::Read { .. } => Code::UNKNOWN,
        ConfigError::Size { .. }
        | ConfigError::Wrong { .. }
        | ConfigError::Options(_)
        | ConfigError::Annotation { .. }
        | ConfigError::TooMuch { .. } => Code::INVALID_ARGUMENT,
    };
    status(code, &error.to_string())
}

/// What this shim does not do.
pub(crate) fn unimplemented(what: &str) -> ttrpc::Error {
    status(Code::UNIMPLEMENTED, &format!("{what} is not supported by hyper"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_that_containerd_expects() {
        let code = |error| match of_pod(error) {
            ttrpc::Error::RpcStatus(status) => status.code(),
            other => panic!("not a status: {other:?}"),
        };
        assert_eq!(code(PodError::NotFound("x".into())), Code::NOT_FOUND);
        assert_eq!(code(PodError::Exists("x".into())), Code::ALREADY_EXISTS);
        assert_eq!(code(PodError::State("x".into())), Code::FAILED_PRECONDITION);
        assert_eq!(code(PodError::Unsupported("x".into())), Code::UNIMPLEMENTED);
        assert_eq!(code(PodError::Ended("x".into())), Code::UNAVAILABLE);
    }

    #[test]
    fn messages_are_one_line() {
        let ttrpc::Error::RpcStatus(status) = status(Code::UNKNOWN, &"a\n".repeat(5000)) else { panic!() };
        assert!(!status.message().contains('\n') && status.message().len() == MAX_MESSAGE_CHARS);
    }
}
