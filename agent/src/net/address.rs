//! Hardware addresses and networks, as text.

use std::net::IpAddr;

use crate::error::AgentError;

/// An address with the length of its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cidr {
    pub address: IpAddr,
    pub prefix: u8,
}

impl Cidr {
    /// Reads `10.0.0.2/24` or `fd00::2/64`; without a length it is a single address.
    ///
    /// # Errors
    /// It is neither.
    pub(crate) fn parse(text: &str) -> Result<Self, AgentError> {
        let bad = || AgentError::invalid(format!("{text:?} is no address in CIDR notation"));
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address = parse_ip(address)?;
        let max = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.map_or(Ok(max), |p| p.parse().map_err(|_| bad()))?;
        if prefix > max {
            return Err(bad());
        }
        Ok(Self { address, prefix })
    }
}

/// Reads an address.
///
/// # Errors
/// It is none.
pub(crate) fn parse_ip(text: &str) -> Result<IpAddr, AgentError> {
    text.parse().map_err(|_| AgentError::invalid(format!("{text:?} is no IP address")))
}

/// Checks a hardware address and gives it in the kernel's form, lower case.
///
/// # Errors
/// It is none.
pub(crate) fn parse_mac(text: &str) -> Result<String, AgentError> {
    let parts: Vec<&str> = text.split(':').collect();
    let fine = |p: &&str| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit());
    if parts.len() != 6 || !parts.iter().all(fine) {
        return Err(AgentError::invalid(format!("{text:?} is no hardware address")));
    }
    Ok(text.to_ascii_lowercase())
}

/// The bytes of a hardware address that [`parse_mac`] has checked.
pub(crate) fn octets_of(mac: &str) -> [u8; 6] {
    let mut octets = [0; 6];
    for (octet, text) in octets.iter_mut().zip(mac.split(':')) {
        *octet = u8::from_str_radix(text, 16).unwrap_or_default();
    }
    octets
}

/// Checks an interface's name as the kernel does.
///
/// # Errors
/// Empty, 16 bytes or more, or with a slash, colon or space.
pub(crate) fn check_name(name: &str) -> Result<(), AgentError> {
    let fine = |b: u8| b.is_ascii_graphic() && b != b'/' && b != b':';
    if name.is_empty() || name.len() > 15 || matches!(name, "." | "..") || !name.bytes().all(fine) {
        return Err(AgentError::invalid(format!("{name:?} is no name of an interface")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_of_both_families() {
        assert_eq!(
            Cidr::parse("10.0.0.2/24").unwrap(),
            Cidr { address: "10.0.0.2".parse().unwrap(), prefix: 24 }
        );
        assert_eq!(
            Cidr::parse("fd00::2/64").unwrap(),
            Cidr { address: "fd00::2".parse().unwrap(), prefix: 64 }
        );
        assert_eq!(Cidr::parse("10.0.0.2").unwrap().prefix, 32);
        for bad in ["", "10.0.0.2/33", "fd00::/129", "10.0.0/8", "10.0.0.1/x", "/24"] {
            assert!(Cidr::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_and_hardware_addresses() {
        assert_eq!(parse_mac("02:AB:00:00:00:01").unwrap(), "02:ab:00:00:00:01");
        assert_eq!(octets_of("02:ab:00:00:00:01"), [2, 0xab, 0, 0, 0, 1]);
        assert!(parse_mac("02:ab:00:00:01").is_err());
        assert!(parse_mac("02:ab:00:00:00:0g").is_err());
        assert!(check_name("eth0").is_ok());
        for bad in ["", "a/b", "..", "sixteen-bytes-xx", "a b"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
