//! Which network namespace the bridge is in: that of the host, or one of a user who is not root.
//!
//! The supervisor stays in the host's either way: it listens on published ports there, and asks the host's name servers. What has to be
//! done where the containers are is done by a thread or a program that goes there for it; without root's power nobody could come back.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::sys::enter_network;

/// Where the bridge is.
#[derive(Debug, Clone, Default)]
pub(crate) enum Place {
    /// In the network namespace of this process, which is the host's.
    #[default]
    Host,
    /// In a user's, whose way out leads through processes of that user on the host.
    Users(Arc<OwnedFd>),
}

impl Place {
    /// Does something there.
    pub(crate) fn within<T: Send>(&self, what: impl FnOnce() -> T + Send) -> io::Result<T> {
        let Self::Users(namespace) = self else { return Ok(what()) };
        let there = || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(what())
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("network".to_owned()).spawn_scoped(scope, there)?;
            thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread broke")))
        })
    }

    /// Has a program run there.
    pub(super) fn send(&self, command: &mut tokio::process::Command) {
        if let Self::Users(namespace) = self {
            enter_network(command, Arc::clone(namespace));
        }
    }

    /// Where packets for the host have to go: on the host, it is the host itself.
    pub(super) fn door(&self) -> Option<Ipv4Addr> {
        match self {
            Self::Host => None,
            Self::Users(_) => Some(crate::rootless::DOOR),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_the_host_nothing_moves() {
        let own = std::thread::current().id();
        assert_eq!(Place::Host.within(|| std::thread::current().id()).unwrap(), own);
        assert_eq!(Place::Host.door(), None);
    }

    #[test]
    fn a_descriptor_that_is_no_network_is_an_error() {
        let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        assert!(Place::Users(Arc::new(null)).within(|| ()).is_err());
    }
}
