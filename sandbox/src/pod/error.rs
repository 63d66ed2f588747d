//! Why something was refused or failed, by what a runtime's caller wants to know: which gRPC code it is.

use crate::SandboxError;
use crate::launch::VmError;
use crate::network::NetworkError;

/// Why an operation on a sandbox or a container failed.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// There is no such container or process, or it has ended already.
    #[error("{0}: not found")]
    NotFound(String),
    /// There is one already.
    #[error("{0}: already exists")]
    Exists(String),
    /// Not in this state.
    #[error("{0}")]
    State(String),
    /// The request cannot be right.
    #[error("{0}")]
    Invalid(String),
    /// Not done by this runtime.
    #[error("{0} is not supported by hyper")]
    Unsupported(String),
    /// A bound is reached.
    #[error("{0}")]
    Exhausted(String),
    /// Not done in time.
    #[error("{0}")]
    Deadline(String),
    /// The machine has ended.
    #[error("{0}")]
    Ended(String),
    /// Everything else.
    #[error(transparent)]
    Failed(#[from] SandboxError),
}

impl PodError {
    /// What the agent refused, or that it did not answer.
    pub(super) fn of_agent(call: &'static str, error: ttrpc::Error) -> Self {
        let ttrpc::Error::RpcStatus(status) = error else {
            return Self::Failed(VmError::Rpc { call, source: error }.into());
        };
        let code = status.code.enum_value_or(ttrpc::Code::UNKNOWN);
        let message = status.message;
        match code {
            ttrpc::Code::NOT_FOUND => Self::NotFound(message),
            ttrpc::Code::ALREADY_EXISTS => Self::Exists(message),
            ttrpc::Code::FAILED_PRECONDITION => Self::State(message),
            ttrpc::Code::INVALID_ARGUMENT => Self::Invalid(message),
            ttrpc::Code::RESOURCE_EXHAUSTED => Self::Exhausted(message),
            ttrpc::Code::DEADLINE_EXCEEDED => Self::Deadline(message),
            ttrpc::Code::UNIMPLEMENTED => Self::Unsupported(message),
            _ => Self::Failed(VmError::Agent { call, message }.into()),
        }
    }

    pub(super) fn io(
        what: &'static str,
        path: impl Into<std::path::PathBuf>,
        source: impl Into<std::io::Error>,
    ) -> Self {
        Self::Failed(SandboxError::io(what, path, source))
    }
}

impl From<VmError> for PodError {
    fn from(error: VmError) -> Self {
        Self::Failed(error.into())
    }
}

impl From<NetworkError> for PodError {
    fn from(error: NetworkError) -> Self {
        Self::Failed(error.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_codes_are_kept() {
        let of =
            |code| PodError::of_agent("X", ttrpc::Error::RpcStatus(ttrpc::get_status(code, "what it said")));
        assert!(matches!(of(ttrpc::Code::NOT_FOUND), PodError::NotFound(_)));
        assert!(matches!(of(ttrpc::Code::FAILED_PRECONDITION), PodError::State(_)));
        assert_eq!(of(ttrpc::Code::INTERNAL).to_string(), "what it said");
        let lost = PodError::of_agent("Stats", ttrpc::Error::RemoteClosed);
        assert!(lost.to_string().starts_with("the agent did not answer Stats"), "{lost}");
    }
}
