//! Docker's notations: `-p`, `-v`, `--tmpfs`, `--ulimit`, `--restart`, `--add-host`, and back where they are shown.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::path::PathBuf;
use std::str::FromStr;

use super::{ConfigError, ExtraHost, MountConfig, PortConfig, Protocol, RestartPolicy, UlimitConfig};

/// Most ports that one `-p` range may publish: the supervisor opens a listener for each.
const MAX_PORT_RANGE: u16 = 1024;

fn port_error(text: &str, why: &'static str) -> ConfigError {
    ConfigError::Port { text: text.to_owned(), why }
}

fn range(whole: &str, text: &str) -> Result<(u16, u16), ConfigError> {
    let one = |text: &str| {
        let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        plain
            .then(|| text.parse::<u16>().ok())
            .flatten()
            .ok_or_else(|| port_error(whole, "ports are numbers from 0 to 65535"))
    };
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (one(first)?, one(last)?),
        None => (one(text)?, one(text)?),
    };
    if last < first {
        return Err(port_error(whole, "the range runs backwards"));
    }
    if last - first >= MAX_PORT_RANGE {
        return Err(port_error(whole, "at most 1024 ports in a range"));
    }
    Ok((first, last))
}

/// Splits `[ip:][host]:container` from the right; IPv6 addresses stand in brackets.
fn split_address(whole: &str, text: &str) -> Result<(Option<IpAddr>, Option<String>, String), ConfigError> {
    let bad_ip = || port_error(whole, "the address is neither IPv4 nor [IPv6]");
    if let Some(rest) = text.strip_prefix('[') {
        let (address, rest) = rest.split_once("]:").ok_or_else(bad_ip)?;
        let address: Ipv6Addr = address.parse().map_err(|_| bad_ip())?;
        let (host, container) =
            rest.split_once(':').ok_or_else(|| port_error(whole, "the container's port is missing"))?;
        return Ok((Some(IpAddr::V6(address)), Some(host.to_owned()), container.to_owned()));
    }
    let parts: Vec<&str> = text.split(':').collect();
    match parts.as_slice() {
        [container] => Ok((None, None, (*container).to_owned())),
        [host, container] => Ok((None, Some((*host).to_owned()), (*container).to_owned())),
        [ip, host, container] => {
            let ip = if ip.is_empty() { None } else { Some(ip.parse().map_err(|_| bad_ip())?) };
            Ok((ip, Some((*host).to_owned()), (*container).to_owned()))
        }
        _ => Err(bad_ip()),
    }
}

impl PortConfig {
    /// Reads `[[ip:][hostPort[-last]]:]containerPort[-last][/tcp|/udp]`; a range becomes one entry for each port.
    ///
    /// # Errors
    /// [`ConfigError::Port`] with the reason.
    pub fn parse(text: &str) -> Result<Vec<Self>, ConfigError> {
        let (ports, protocol) = match text.rsplit_once('/') {
            None => (text, Protocol::Tcp),
            Some((ports, name)) if name.eq_ignore_ascii_case("tcp") => (ports, Protocol::Tcp),
            Some((ports, name)) if name.eq_ignore_ascii_case("udp") => (ports, Protocol::Udp),
            Some(_) => return Err(port_error(text, "the protocol is neither tcp nor udp")),
        };
        let (host_ip, host, container) = split_address(text, ports)?;
        let (first, last) = range(text, &container)?;
        if first == 0 {
            return Err(port_error(text, "the container's port is 1 to 65535"));
        }
        let host = host.filter(|host| !host.is_empty()).map(|host| range(text, &host)).transpose()?;
        if host.is_some_and(|(from, to)| to - from != last - first) {
            return Err(port_error(text, "the two ranges differ in length"));
        }
        let published = |n: u16| host.map_or(0, |(from, to)| if from == 0 && to == 0 { 0 } else { from + n });
        let ports = (0..=last - first)
            .map(|n| Self { host_ip, host_port: published(n), container_port: first + n, protocol })
            .collect();
        Ok(ports)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl FromStr for RestartPolicy {
    type Err = ConfigError;

    /// `no`, `on-failure[:n]`, `always`, `unless-stopped`.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = || ConfigError::RestartPolicy(text.to_owned());
        let (name, count) = match text.split_once(':') {
            Some((name, count)) => (name, Some(count)),
            None => (text, None),
        };
        let max_retries = count.map_or(Ok(0), str::parse).map_err(|_| bad())?;
        match (name, count) {
            ("on-failure", _) => Ok(Self::OnFailure { max_retries }),
            ("no" | "", None) => Ok(Self::No),
            ("always", None) => Ok(Self::Always),
            ("unless-stopped", None) => Ok(Self::UnlessStopped),
            _ => Err(bad()),
        }
    }
}

impl fmt::Display for RestartPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::No => f.write_str("no"),
            Self::OnFailure { max_retries: 0 } => f.write_str("on-failure"),
            Self::OnFailure { max_retries } => write!(f, "on-failure:{max_retries}"),
            Self::Always => f.write_str("always"),
            Self::UnlessStopped => f.write_str("unless-stopped"),
        }
    }
}

impl FromStr for UlimitConfig {
    type Err = ConfigError;

    /// `name=soft[:hard]`, -1 or `unlimited` for none.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = |why| ConfigError::Ulimit { text: text.to_owned(), why };
        let (name, limits) = text.split_once('=').ok_or_else(|| bad("give name=soft[:hard]"))?;
        let value = |text: &str| match text {
            "unlimited" => Ok(-1),
            _ => text
                .parse::<i64>()
                .ok()
                .filter(|n| *n >= -1)
                .ok_or_else(|| bad("limits are numbers, or -1 for none")),
        };
        let (soft, hard) = match limits.split_once(':') {
            Some((soft, hard)) => (value(soft)?, value(hard)?),
            None => (value(limits)?, value(limits)?),
        };
        if hard != -1 && (soft == -1 || soft > hard) {
            return Err(bad("the soft limit is above the hard limit"));
        }
        Ok(Self { name: name.to_owned(), soft, hard })
    }
}

impl FromStr for ExtraHost {
    type Err = ConfigError;

    /// `name:address`, `name=address`, or `name:host-gateway`.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = || ConfigError::ExtraHost(text.to_owned());
        let (name, address) = text.split_once(['=', ':']).ok_or_else(bad)?;
        if name.is_empty() || name.len() > 253 || !name.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(bad());
        }
        if address == "host-gateway" {
            return Ok(Self { name: name.to_owned(), address: None });
        }
        let address = address.strip_prefix('[').and_then(|a| a.strip_suffix(']')).unwrap_or(address);
        Ok(Self { name: name.to_owned(), address: Some(address.parse().map_err(|_| bad())?) })
    }
}

/// Bytes of `64`, `64k`, `64m`, `1g`, with or without a `b` after the letter.
fn size(text: &str) -> Option<u64> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match lower.get(digits.len()..)? {
        "" | "b" => 0,
        "k" | "kb" => 10,
        "m" | "mb" => 20,
        "g" | "gb" => 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

impl MountConfig {
    /// Reads `-v`: `[source:]target[:ro|rw|z|Z|…]`. A source with a slash or a leading dot is a host path (which `absolute` makes
    /// absolute), any other a volume's name; without source the volume is anonymous.
    ///
    /// # Errors
    /// [`ConfigError::Mount`] with the reason.
    pub fn parse_volume(text: &str, absolute: &dyn Fn(&str) -> PathBuf) -> Result<Self, ConfigError> {
        let bad = |why| ConfigError::Mount { text: text.to_owned(), why };
        let parts: Vec<&str> = text.split(':').collect();
        let (source, target, options) = match parts.as_slice() {
            [target] => ("", *target, ""),
            [source, target] => (*source, *target, ""),
            [source, target, options] => (*source, *target, *options),
            _ => return Err(bad("give [source:]target[:options]")),
        };
        if parts.len() > 1 && source.is_empty() {
            return Err(bad("the source is empty"));
        }
        let mut read_only = false;
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option {
                "ro" | "readonly" => read_only = true,
                "rw" | "z" | "Z" | "cached" | "delegated" | "consistent" | "rprivate" | "private"
                | "rslave" | "slave" | "rshared" | "shared" | "nocopy" => {}
                _ => return Err(bad("options are ro and rw")),
            }
        }
        let target = target.to_owned();
        if source.contains('/') || source.starts_with('.') || source.starts_with('~') {
            return Ok(Self::Bind { source: absolute(source), target, read_only, create: true });
        }
        Ok(Self::Volume { name: source.to_owned(), anonymous: source.is_empty(), target, read_only })
    }

    /// Reads `--tmpfs`: `target[:size=64m,mode=1777,exec,noexec,ro,rw,nosuid,nodev]`.
    ///
    /// # Errors
    /// [`ConfigError::Mount`] with the reason.
    pub fn parse_tmpfs(text: &str) -> Result<Self, ConfigError> {
        let bad = |why| ConfigError::Mount { text: text.to_owned(), why };
        let (target, options) = text.split_once(':').unwrap_or((text, ""));
        let (mut size_bytes, mut mode, mut noexec) = (0, 0, true);
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some(("size", value)) => {
                    size_bytes = size(value).ok_or_else(|| bad("the size is a number with k, m or g"))?
                }
                Some(("mode", value)) => {
                    mode = u32::from_str_radix(value, 8)
                        .ok()
                        .filter(|m| *m <= 0o7777)
                        .ok_or_else(|| bad("the mode is octal"))?;
                }
                None if option == "exec" => noexec = false,
                None if option == "noexec" => noexec = true,
                None if matches!(option, "rw" | "nosuid" | "nodev" | "suid" | "dev") => {}
                _ => return Err(bad("options are size=, mode=, exec and noexec")),
            }
        }
        Ok(Self::Tmpfs { target: target.to_owned(), size_bytes, mode, noexec })
    }

    /// Reads `--mount`: `type=bind|volume|tmpfs,source=…,target=…[,readonly][,tmpfs-size=…][,tmpfs-mode=…]`.
    ///
    /// # Errors
    /// [`ConfigError::Mount`] with the reason.
    pub fn parse_mount(text: &str, absolute: &dyn Fn(&str) -> PathBuf) -> Result<Self, ConfigError> {
        let bad = |why| ConfigError::Mount { text: text.to_owned(), why };
        let (mut kind, mut source, mut target, mut read_only, mut size_bytes, mut mode) =
            ("volume", "", "", false, 0, 0);
        for field in text.split(',') {
            let (key, value) = field.split_once('=').unwrap_or((field, ""));
            match key {
                "type" => kind = value,
                "source" | "src" => source = value,
                "target" | "dst" | "destination" => target = value,
                "readonly" | "ro" => read_only = matches!(value, "" | "1" | "true"),
                "tmpfs-size" => {
                    size_bytes = size(value).ok_or_else(|| bad("the size is a number with k, m or g"))?
                }
                "tmpfs-mode" => mode = u32::from_str_radix(value, 8).map_err(|_| bad("the mode is octal"))?,
                "bind-propagation" | "consistency" | "volume-nocopy" => {}
                _ => return Err(bad("fields are type, source, target, readonly, tmpfs-size and tmpfs-mode")),
            }
        }
        let target = target.to_owned();
        match kind {
            "bind" if source.is_empty() => Err(bad("a bind mount needs a source")),
            "bind" => Ok(Self::Bind { source: absolute(source), target, read_only, create: false }),
            "volume" => {
                Ok(Self::Volume { name: source.to_owned(), anonymous: source.is_empty(), target, read_only })
            }
            "tmpfs" => Ok(Self::Tmpfs { target, size_bytes, mode, noexec: false }),
            _ => Err(bad("the type is bind, volume or tmpfs")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> PortConfig {
        let mut ports = PortConfig::parse(text).unwrap();
        assert_eq!(ports.len(), 1, "{text}");
        ports.remove(0)
    }

    #[test]
    fn ports() {
        let port = |host_ip: Option<&str>, host_port, container_port, protocol| PortConfig {
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
            host_port,
            container_port,
            protocol,
        };
        assert_eq!(one("80"), port(None, 0, 80, Protocol::Tcp));
        assert_eq!(one("8080:80"), port(None, 8080, 80, Protocol::Tcp));
        assert_eq!(one("8080:80/UDP"), port(None, 8080, 80, Protocol::Udp));
        assert_eq!(one("127.0.0.1::80"), port(Some("127.0.0.1"), 0, 80, Protocol::Tcp));
        assert_eq!(one("[::1]:8080:80/tcp"), port(Some("::1"), 8080, 80, Protocol::Tcp));
        assert_eq!(one("0:80"), port(None, 0, 80, Protocol::Tcp));
        let range = PortConfig::parse("8000-8002:80-82").unwrap();
        assert_eq!(
            range.iter().map(|p| (p.host_port, p.container_port)).collect::<Vec<_>>(),
            [(8000, 80), (8001, 81), (8002, 82)]
        );
    }

    #[test]
    fn bad_ports() {
        for bad in [
            "",
            "a",
            "0",
            "80:",
            "80:0",
            "65536",
            "1:2:3:4",
            "x:1:2",
            "[::1]:80",
            "8000-8001:80",
            "81-80",
            "80/sctp",
            "+80",
            "1-2000",
            "-1:80",
        ] {
            assert!(PortConfig::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn restart_policies() {
        for text in ["no", "on-failure", "on-failure:3", "always", "unless-stopped"] {
            assert_eq!(text.parse::<RestartPolicy>().unwrap().to_string(), text);
        }
        for bad in ["sometimes", "always:3", "on-failure:x", "on-failure:-1"] {
            assert!(bad.parse::<RestartPolicy>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ulimits() {
        let limit: UlimitConfig = "nofile=1024:2048".parse().unwrap();
        assert_eq!((limit.soft, limit.hard), (1024, 2048));
        assert_eq!("core=-1".parse::<UlimitConfig>().unwrap().hard, -1);
        for bad in ["nofile", "nofile=a", "nofile=2:1", "nofile=-1:5", "nofile=-2"] {
            assert!(bad.parse::<UlimitConfig>().is_err(), "{bad}");
        }
    }

    #[test]
    fn hosts() {
        assert_eq!("db:10.0.0.1".parse::<ExtraHost>().unwrap().address, Some("10.0.0.1".parse().unwrap()));
        assert_eq!("db:::1".parse::<ExtraHost>().unwrap().address, Some("::1".parse().unwrap()));
        assert_eq!("db=[::1]".parse::<ExtraHost>().unwrap().address, Some("::1".parse().unwrap()));
        assert_eq!("up:host-gateway".parse::<ExtraHost>().unwrap().address, None);
        for bad in ["db", "db:", ":1.2.3.4", "db:nowhere", "a\nb:1.2.3.4"] {
            assert!(bad.parse::<ExtraHost>().is_err(), "{bad}");
        }
    }

    fn volume(text: &str) -> Result<MountConfig, ConfigError> {
        MountConfig::parse_volume(text, &|path| PathBuf::from("/cwd").join(path))
    }

    #[test]
    fn volumes() {
        assert_eq!(
            volume("./src:/dst:ro").unwrap(),
            MountConfig::Bind {
                source: "/cwd/./src".into(),
                target: "/dst".into(),
                read_only: true,
                create: true
            }
        );
        let named = MountConfig::Volume {
            name: "data".into(),
            anonymous: false,
            target: "/d".into(),
            read_only: false,
        };
        assert_eq!(volume("data:/d").unwrap(), named);
        assert!(matches!(volume("/d").unwrap(), MountConfig::Volume { anonymous: true, .. }));
        for bad in [":/d", "a:b:c:d", "a:/b:nope"] {
            assert!(volume(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn tmpfs_and_mount() {
        let tmpfs =
            MountConfig::Tmpfs { target: "/t".into(), size_bytes: 64 << 20, mode: 0o700, noexec: false };
        assert_eq!(MountConfig::parse_tmpfs("/t:size=64m,mode=700,exec").unwrap(), tmpfs);
        assert!(MountConfig::parse_tmpfs("/t:size=lots").is_err());
        let absolute = |path: &str| PathBuf::from(path);
        assert_eq!(
            MountConfig::parse_mount("type=bind,src=/a,dst=/b,readonly", &absolute).unwrap(),
            MountConfig::Bind { source: "/a".into(), target: "/b".into(), read_only: true, create: false }
        );
        assert!(MountConfig::parse_mount("type=nfs,dst=/b", &absolute).is_err());
        assert!(MountConfig::parse_mount("type=bind,dst=/b", &absolute).is_err());
    }
}
