//! Values of flags that are the command line's own; what belongs to a container's configuration is parsed by the sandbox crate.

pub(crate) mod env;
pub(crate) mod quantity;
pub(crate) mod signal;
pub(crate) mod time;
