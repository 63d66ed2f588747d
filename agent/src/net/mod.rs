//! The sandbox's network: interfaces and routes by netlink, names by a proxy to the host.

pub(crate) mod address;
pub(crate) mod configure;
pub(crate) mod dns;
pub(crate) mod loopback;
mod netlink;
