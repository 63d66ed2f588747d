//! Named volumes: `volumes/<name>/_data`, which any container may mount, and `volumes/<name>/volume.json`.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::home::{NEW_PREFIX, REMOVED_PREFIX, RemoveDir, list, make_private_dir, remove_tree};
use super::lock::FileLock;
use super::names;
use crate::clock::Timestamp;
use crate::config::{MountConfig, check_volume_name};
use crate::state::{read_json, sync_dir, write_json};
use crate::{Home, SandboxError};

/// A named volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its name; 64 hexadecimal digits for an anonymous one.
    pub name: String,
    /// When it was made.
    pub created: Timestamp,
    /// Goes with the container that it was made for.
    pub anonymous: bool,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// The directory on the host that holds its content.
    #[serde(skip)]
    pub mountpoint: PathBuf,
}

impl Home {
    /// Makes a volume, or finds the one that has the name. An empty name is replaced by a made-up one (64 hexadecimal digits).
    ///
    /// # Errors
    /// [`SandboxError::Config`] for a bad name, or a failed write.
    pub fn create_volume(
        &self,
        name: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Volume, SandboxError> {
        let made = self.try_create_volume(name, labels);
        let name = made.as_ref().map_or(name, |volume| &volume.name).to_owned();
        self.audit().note("volume create", &name, "", made)
    }

    fn try_create_volume(
        &self,
        name: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Volume, SandboxError> {
        if !name.is_empty() {
            check_volume_name(name)?;
        }
        let lock = self.lock()?;
        self.make_volume(name, labels, &lock)
    }

    /// As [`Home::create_volume`], by the holder of the home's lock, with a checked name.
    pub(crate) fn make_volume(
        &self,
        name: &str,
        labels: BTreeMap<String, String>,
        _lock: &FileLock,
    ) -> Result<Volume, SandboxError> {
        let anonymous = name.is_empty();
        let name = if anonymous { names::new_id() } else { name.to_owned() };
        match self.volume(&name) {
            Err(SandboxError::NoSuchVolume(_)) => {}
            found => return found,
        }
        let dir = self.volumes_dir().join(&name);
        let beside = self.volumes_dir().join(format!("{NEW_PREFIX}{name}"));
        let undo = RemoveDir(Some(beside.clone()));
        make_private_dir(&beside)?;
        let content = beside.join("_data");
        fs::create_dir_all(&content).map_err(|source| SandboxError::io("make", &content, source))?;
        set_mode(&content, 0o755)?;
        let mountpoint = dir.join("_data");
        let volume = Volume { name, created: Timestamp::now(), anonymous, labels, mountpoint };
        write_json(&beside.join("volume.json"), &volume)?;
        fs::rename(&beside, &dir).map_err(|source| SandboxError::io("make", &dir, source))?;
        undo.release();
        sync_dir(&self.volumes_dir())?;
        Ok(volume)
    }

    /// All volumes, by name.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn volumes(&self) -> Result<Vec<Volume>, SandboxError> {
        let mut all = Vec::new();
        for name in list(&self.volumes_dir())?.iter().filter(|name| !name.starts_with('.')) {
            match self.volume(name) {
                Ok(volume) => all.push(volume),
                Err(error) => tracing::warn!(name, %error, "volume left out"),
            }
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// One volume.
    ///
    /// # Errors
    /// [`SandboxError::NoSuchVolume`].
    pub fn volume(&self, name: &str) -> Result<Volume, SandboxError> {
        let missing = || SandboxError::NoSuchVolume(name.to_owned());
        check_volume_name(name).map_err(|_| missing())?;
        let dir = self.volumes_dir().join(name);
        let mut volume: Volume = read_json(&dir.join("volume.json"))?.ok_or_else(missing)?;
        volume.mountpoint = dir.join("_data");
        Ok(volume)
    }

    /// Removes a volume and its content.
    ///
    /// # Errors
    /// [`SandboxError::NoSuchVolume`], [`SandboxError::VolumeInUse`] when a container (running or not) names it.
    pub fn remove_volume(&self, name: &str) -> Result<(), SandboxError> {
        self.audit().note("volume remove", name, "", self.try_remove_volume(name))
    }

    fn try_remove_volume(&self, name: &str) -> Result<(), SandboxError> {
        let _lock = self.lock()?;
        self.volume(name)?;
        for container in self.containers()? {
            let names_it =
                |mount: &MountConfig| matches!(mount, MountConfig::Volume { name: used, .. } if used == name);
            if container.config().mounts.iter().any(names_it) {
                let container = container.short_id().to_owned();
                return Err(SandboxError::VolumeInUse { name: name.to_owned(), container });
            }
        }
        let (dir, beside) =
            (self.volumes_dir().join(name), self.volumes_dir().join(format!("{REMOVED_PREFIX}{name}")));
        fs::rename(&dir, &beside).map_err(|source| SandboxError::io("remove", &dir, source))?;
        sync_dir(&self.volumes_dir())?;
        remove_tree(&beside)
    }
}

fn set_mode(path: &std::path::Path, mode: u32) -> Result<(), SandboxError> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(|source| SandboxError::io("set the mode of", path, source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::{config, home};

    #[test]
    fn volumes_live_and_die() {
        let (_dir, home) = home();
        let made = home.create_volume("data", BTreeMap::new()).unwrap();
        fs::write(made.mountpoint.join("file"), "x").unwrap();
        assert_eq!(home.create_volume("data", BTreeMap::new()).unwrap(), made, "found again");
        assert_eq!(home.volumes().unwrap(), [made]);
        home.remove_volume("data").unwrap();
        assert!(matches!(home.volume("data"), Err(SandboxError::NoSuchVolume(_))));
        assert!(matches!(home.remove_volume("data"), Err(SandboxError::NoSuchVolume(_))));
        assert!(home.create_volume("../x", BTreeMap::new()).is_err());
        assert!(matches!(home.volume("../x"), Err(SandboxError::NoSuchVolume(_))));
    }

    #[test]
    fn volume_in_use_stays() {
        let (_dir, home) = home();
        let mut wish = config("db");
        let mount = |name: &str, target: &str| MountConfig::Volume {
            name: name.into(),
            anonymous: false,
            target: target.into(),
            read_only: false,
        };
        wish.mounts = vec![mount("pgdata", "/d"), mount("", "/e")];
        let container = home.create(wish).unwrap();
        assert!(matches!(home.remove_volume("pgdata"), Err(SandboxError::VolumeInUse { .. })));
        let volumes = home.volumes().unwrap();
        assert_eq!(volumes.iter().filter(|v| v.anonymous).count(), 1);
        assert_eq!(volumes.len(), 2);
        assert!(
            container
                .config()
                .mounts
                .iter()
                .all(|m| matches!(m, MountConfig::Volume { name, .. } if !name.is_empty()))
        );
    }
}
