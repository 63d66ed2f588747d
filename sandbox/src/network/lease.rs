//! Addresses: a container has one for as long as its supervisor holds the lock on the file of that name.
//!
//! Nothing has to be given back: a lease ends with its holder, however that ended. The directory belongs to the bridge, not to a home:
//! all homes on a host share the bridge's addresses.

use std::net::Ipv4Addr;
use std::path::Path;

use super::NetworkError;
use super::subnet::Subnet;
use crate::SandboxError;
use crate::store::{FileLock, make_private_dir};

/// An address of a container; free again when it is dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) ip: Ipv4Addr,
    _lock: FileLock,
}

/// Takes a free address of `subnet`: `last`, if that is free (so that a restarted container keeps its own), else the lowest.
pub(crate) fn take(dir: &Path, subnet: Subnet, last: Option<Ipv4Addr>) -> Result<Lease, SandboxError> {
    make_private_dir(dir)?;
    let last = last.filter(|ip| subnet.has_host(*ip));
    for ip in last.into_iter().chain(subnet.hosts()) {
        if let Some(lock) = FileLock::try_take(&dir.join(ip.to_string()))? {
            return Ok(Lease { ip, _lock: lock });
        }
    }
    Err(NetworkError::NoAddress { subnet: subnet.to_string() }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_once_and_again_after_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let subnet: Subnet = "10.9.8.0/29".parse().unwrap();
        let leases: Vec<_> = (0..5).map(|_| take(dir.path(), subnet, None).unwrap()).collect();
        let ips: Vec<_> = leases.iter().map(|lease| lease.ip).collect();
        assert_eq!(ips, subnet.hosts().collect::<Vec<_>>());
        let error = take(dir.path(), subnet, None).unwrap_err();
        assert!(error.to_string().contains("10.9.8.0/29"), "{error}");
        drop(leases);
        let own = take(dir.path(), subnet, Some(ips[3])).unwrap();
        assert_eq!(own.ip, ips[3]);
        assert_eq!(take(dir.path(), subnet, Some(ips[3])).unwrap().ip, ips[0]);
        let stranger = "172.16.0.9".parse().ok();
        assert_eq!(take(dir.path(), subnet, stranger).unwrap().ip, ips[0]);
    }
}
