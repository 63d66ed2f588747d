//! The network of the bridge: which addresses there are.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use super::NetworkError;
use crate::config::mask;

/// An IPv4 network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Subnet {
    base: u32,
    prefix_len: u8,
}

/// What is used without `HYPER_SUBNET`.
pub(crate) const DEFAULT_SUBNET: &str = "10.120.0.0/16";

impl FromStr for Subnet {
    type Err = NetworkError;

    /// `a.b.c.d/len`, length 8 to 30; host bits must be 0.
    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let bad = || NetworkError::Subnet(text.chars().take(64).collect());
        let (address, len) = text.split_once('/').ok_or_else(bad)?;
        let base = u32::from(address.parse::<Ipv4Addr>().map_err(|_| bad())?);
        let prefix_len = len.parse::<u8>().ok().filter(|len| (8..=30).contains(len)).ok_or_else(bad)?;
        let subnet = Self { base, prefix_len };
        if base & !subnet.mask_bits() != 0 {
            return Err(bad());
        }
        Ok(subnet)
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.base), self.prefix_len)
    }
}

impl Subnet {
    fn mask_bits(self) -> u32 {
        mask(self.prefix_len)
    }

    pub(crate) fn mask(self) -> Ipv4Addr {
        self.mask_bits().into()
    }

    pub(crate) fn prefix_len(self) -> u8 {
        self.prefix_len
    }

    /// The host's address on the bridge: the first.
    pub(crate) fn gateway(self) -> Ipv4Addr {
        (self.base + 1).into()
    }

    /// Whether a container may have this address.
    pub(crate) fn has_host(self, ip: Ipv4Addr) -> bool {
        let ip = u32::from(ip);
        let last = self.base | !self.mask_bits();
        ip > self.base + 1 && ip < last
    }

    /// The addresses that containers may have, in order.
    pub(crate) fn hosts(self) -> impl Iterator<Item = Ipv4Addr> {
        (self.base + 2..self.base | !self.mask_bits()).map(Ipv4Addr::from)
    }
}

/// The hardware address that belongs to an address: locally administered, the same after every start.
pub(crate) fn mac_of(ip: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = ip.octets();
    [0x02, 0x48, a, b, c, d]
}

/// As people write it.
pub(crate) fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_a_small_network() {
        let net: Subnet = "192.168.7.8/29".parse().unwrap();
        assert_eq!(net.gateway(), Ipv4Addr::new(192, 168, 7, 9));
        assert_eq!(net.mask(), Ipv4Addr::new(255, 255, 255, 248));
        let hosts: Vec<_> = net.hosts().collect();
        assert_eq!(hosts.first(), Some(&Ipv4Addr::new(192, 168, 7, 10)));
        assert_eq!(hosts.last(), Some(&Ipv4Addr::new(192, 168, 7, 14)));
        assert_eq!(hosts.len(), 5);
        assert!(hosts.iter().all(|ip| net.has_host(*ip)));
        for outside in ["192.168.7.8", "192.168.7.9", "192.168.7.15", "192.168.7.16", "10.0.0.1"] {
            assert!(!net.has_host(outside.parse().unwrap()), "{outside}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in ["", "10.0.0.0", "10.0.0.1/16", "10.0.0.0/31", "10.0.0.0/7", "::/64", "a/16", "10.0.0.0/x"]
        {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
        assert_eq!(DEFAULT_SUBNET.parse::<Subnet>().unwrap().to_string(), DEFAULT_SUBNET);
    }

    #[test]
    fn hardware_addresses() {
        assert_eq!(mac_text(mac_of(Ipv4Addr::new(10, 120, 0, 2))), "02:48:0a:78:00:02");
    }
}
