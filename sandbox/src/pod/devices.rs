//! Block devices of the host that a container is to have: Kubernetes' `volumeDevices`, `--device`.

use std::path::{Path, PathBuf};

use hyper_protocol::rpc::agent::BlockDevice;
use serde_json::{Map, Value};

use super::bays::BayDisk;
use super::{PodError, translate::text};

/// Mode of a device for which none is given.
const DEFAULT_MODE: u32 = 0o660;

/// A block device of the host, as a container is to have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HostDevice {
    path: String,
    major: u64,
    minor: u64,
    mode: u32,
    uid: u32,
    gid: u32,
    /// Of `r`, `w` and `m`.
    access: String,
}

impl HostDevice {
    /// An element of `linux.devices`.
    fn of(device: &Value) -> Result<Self, PodError> {
        let path = text(device, "/path").to_owned();
        if text(device, "/type") != "b" {
            return Err(PodError::Unsupported(format!("device {path} of the host")));
        }
        let number = |name: &str| device.get(name).and_then(Value::as_u64);
        let small = |name: &str| number(name).and_then(|number| u32::try_from(number).ok());
        Ok(Self {
            path,
            major: number("major").unwrap_or_default(),
            minor: number("minor").unwrap_or_default(),
            mode: small("fileMode").unwrap_or(DEFAULT_MODE),
            uid: small("uid").unwrap_or_default(),
            gid: small("gid").unwrap_or_default(),
            // What it is without any rules.
            access: "rwm".to_owned(),
        })
    }

    /// Whether a rule of `linux.resources.devices` is about it alone.
    fn is_named_by(&self, rule: &Value) -> bool {
        let number = |name: &str| rule.get(name).and_then(Value::as_u64);
        text(rule, "/type") == "b"
            && number("major") == Some(self.major)
            && number("minor") == Some(self.minor)
    }

    /// Whether it may be written to.
    pub(super) fn write(&self) -> bool {
        self.access.contains('w')
    }

    /// Its node on the host.
    pub(super) fn node(&self) -> Result<PathBuf, PodError> {
        let table = format!("/sys/dev/block/{}:{}/uevent", self.major, self.minor);
        let missing = || PodError::Invalid(format!("device {} is not there: no {table}", self.path));
        let words = std::fs::read_to_string(&table).map_err(|_| missing())?;
        let name = words.lines().find_map(|line| line.strip_prefix("DEVNAME=")).ok_or_else(missing)?;
        Ok(Path::new("/dev").join(name))
    }

    /// What the agent is told of it, now that it is a disk of the machine.
    pub(super) fn in_guest(&self, disk: &BayDisk) -> BlockDevice {
        BlockDevice {
            path: self.path.clone(),
            serial: disk.serial().to_owned(),
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            access: self.access.clone(),
            ..Default::default()
        }
    }
}

/// Takes block devices out of `linux`, with the rules that name them: the numbers are the host's, and in the guest they may be those of
/// another device. What is left of `foreign`, devices that no guest has, is refused.
pub(super) fn take(
    linux: &mut Map<String, Value>,
    is_foreign: impl Fn(&Value) -> bool,
) -> Result<Vec<HostDevice>, PodError> {
    let all = linux.get("devices").and_then(Value::as_array);
    let foreign = all.into_iter().flatten().filter(|device| is_foreign(device));
    let mut devices: Vec<_> = foreign.map(HostDevice::of).collect::<Result<_, _>>()?;
    let rules = linux.get_mut("resources").and_then(|resources| resources.get_mut("devices"));
    if let Some(rules) = rules.and_then(Value::as_array_mut).filter(|rules| !rules.is_empty()) {
        for device in &mut devices {
            let allows = |rule: &&Value| rule.get("allow").and_then(Value::as_bool) == Some(true);
            let named = rules.iter().filter(allows).filter(|rule| device.is_named_by(rule));
            device.access = named.map(|rule| text(rule, "/access")).collect();
        }
        rules.retain(|rule| !devices.iter().any(|device| device.is_named_by(rule)));
    }
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn block_devices_are_taken_with_their_rules() {
        let linux = json!({
            "devices": [
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
                {"path": "/dev/data", "type": "b", "major": 7, "minor": 3, "fileMode": 0o600, "gid": 6},
                {"path": "/dev/bare", "type": "b", "major": 8, "minor": 0},
            ],
            "resources": {"devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "b", "major": 7, "minor": 3, "access": "r"},
                {"allow": false, "type": "b", "major": 7, "minor": 3, "access": "w"},
                {"allow": true, "type": "b", "major": 7, "minor": 4, "access": "rwm"},
            ]},
        });
        let mut linux = linux.as_object().unwrap().clone();
        let devices = take(&mut linux, |device| text(device, "/path") != "/dev/fuse").unwrap();
        let seen: Vec<_> =
            devices.iter().map(|d| (d.path.as_str(), d.mode, d.gid, d.access.as_str())).collect();
        assert_eq!(seen, [("/dev/data", 0o600, 6, "r"), ("/dev/bare", 0o660, 0, "")]);
        assert!(!devices[0].write());
        assert_eq!(linux["resources"]["devices"].as_array().unwrap().len(), 2);
        let refused = take(&mut linux, |_| true).unwrap_err().to_string();
        assert!(refused.contains("/dev/fuse"), "{refused}");
    }
}
