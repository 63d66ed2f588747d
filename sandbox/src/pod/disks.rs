//! A root of disks: what a snapshotter describes with EROFS and ext4 images is put together in the guest, not on the host.
//!
//! containerd 2 names such a root as a list of mounts, of which the last uses those before it by templates:
//!
//! ```text
//!  erofs                 /…/2/layer.erofs   ro,loop                                      -> mount 0, a disk
//!  erofs                 /…/1/layer.erofs   ro,loop                                      -> mount 1, a disk
//!  format/mkdir/overlay  overlay            lowerdir={{ overlay 0 1 }},upperdir=…        -> the root
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper_protocol::rpc::agent::{
    CreateContainerRequest, DiskFolder, DiskMount, DiskName, DiskOverlay, DiskPath, DiskRoot, Rootfs,
    disk_root,
};
use protobuf::MessageField;

use super::bays::{self, BayDisk};
use super::container::BundleConfig;
use super::devices::HostDevice;
use super::live::LiveMount;
use super::mounts::RootMount;
use super::translate::Translated;
use super::{PodError, Sandbox};
use crate::storage;

/// What containerd puts before a kind when parts of the mount are still to be worked out.
const FORMAT: &str = "format";
const MKDIR: &str = "mkdir";
/// Option: a folder to make, with its mode.
const MKDIR_OPTION: &str = "X-containerd.mkdir.path=";
/// Mode of such a folder when none is given.
const MKDIR_MODE: u32 = 0o700;
/// Options that ask for what is not done here: a root without them would be another one.
const REFUSED: [&str; 3] = ["uidmap=", "gidmap=", "X-containerd.dmverity="];
/// Writable layer of a snapshot that brings folders of the host for it, in its work folder: it lives as long as the snapshot.
const RW_FILE: &str = "hyper-rw.img";

/// A file or block device to be attached.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Source {
    path: PathBuf,
    write: bool,
}

/// A root, before its disk has a serial: where `root` names disks, `part` is an index of `sources`.
#[derive(Debug, PartialEq)]
struct Parsed {
    sources: Vec<Source>,
    root: DiskRoot,
    /// Folder of the host in which the writable layer is kept, instead of on one of the disks.
    work_dir: Option<PathBuf>,
}

/// A folder that a template names.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Disk(u32, String),
    Host(PathBuf),
}

fn unsupported(what: impl Into<String>) -> PodError {
    PodError::Unsupported(what.into())
}

/// Whether a root is to be put together in the guest.
pub(super) fn is_of_disks(mounts: &[RootMount]) -> bool {
    mounts.iter().any(|one| matches!(base(&one.kind), "erofs" | "ext4"))
}

/// The kind without what is to be worked out first.
fn base(kind: &str) -> &str {
    kind.rsplit('/').next().unwrap_or(kind)
}

fn check_prefixes(kind: &str) -> Result<(), PodError> {
    let mut parts: Vec<&str> = kind.split('/').collect();
    parts.pop();
    match parts.iter().find(|part| ![FORMAT, MKDIR].contains(part)) {
        Some(_) => Err(unsupported(format!("a root of kind {kind:?}"))),
        None => Ok(()),
    }
}

fn parse(mounts: &[RootMount]) -> Result<Parsed, PodError> {
    let mut parsed = Parsed { sources: Vec::new(), root: DiskRoot::new(), work_dir: None };
    for (index, one) in mounts.iter().enumerate() {
        check_prefixes(&one.kind)?;
        if let Some(refused) = one.options.iter().find(|o| REFUSED.iter().any(|r| o.starts_with(r))) {
            return Err(unsupported(format!("the option {refused} of a root")));
        }
        let last = index + 1 == mounts.len();
        match base(&one.kind) {
            kind @ ("erofs" | "ext4") => parsed.add_disk(one, kind),
            "bind" | "rbind" if last => parsed.finish_bind(one)?,
            "overlay" if last => parsed.finish_overlay(one)?,
            kind => return Err(unsupported(format!("a root of disks with a mount of kind {kind:?}"))),
        }
    }
    if parsed.root.root.is_none() {
        if mounts.len() != 1 {
            return Err(PodError::Invalid(format!(
                "a root of {} disks and nothing that joins them",
                mounts.len()
            )));
        }
        parsed.root.root = Some(disk_root::Root::Folder(DiskPath::new()));
    }
    Ok(parsed)
}

impl Parsed {
    fn add_source(&mut self, path: &str, write: bool) -> DiskName {
        let part = u32::try_from(self.sources.len()).unwrap_or(u32::MAX);
        self.sources.push(Source { path: path.into(), write });
        DiskName { part, ..Default::default() }
    }

    fn add_disk(&mut self, one: &RootMount, kind: &str) {
        let read_only = kind == "erofs" || one.options.iter().any(|option| option == "ro");
        let disk = MessageField::some(self.add_source(&one.source, !read_only));
        let further = one.options.iter().filter_map(|option| option.strip_prefix("device="));
        let devices = further.map(|path| self.add_source(path, false)).collect();
        let kind = kind.to_owned();
        self.root.mounts.push(DiskMount { disk, kind, read_only, devices, ..Default::default() });
    }

    fn finish_bind(&mut self, one: &RootMount) -> Result<(), PodError> {
        self.add_folders(one)?;
        let Place::Disk(mount, path) = self.place(&one.source)? else {
            return Err(PodError::Invalid(format!("a root of disks that is {} of the host", one.source)));
        };
        self.root.root = Some(disk_root::Root::Folder(DiskPath { mount, path, ..Default::default() }));
        Ok(())
    }

    fn finish_overlay(&mut self, one: &RootMount) -> Result<(), PodError> {
        self.add_folders(one)?;
        let value = |name: &str| one.options.iter().find_map(|option| option.strip_prefix(name));
        let mut overlay = DiskOverlay::new();
        for place in self.places(value("lowerdir=").unwrap_or_default())? {
            overlay.lower.push(on_disk(place)?);
        }
        if let (Some(upper), Some(work)) = (value("upperdir="), value("workdir=")) {
            match (self.place(upper)?, self.place(work)?) {
                // The disk for it is made when the root is.
                (Place::Host(_), Place::Host(work)) => self.work_dir = Some(work),
                (upper, work) => {
                    overlay.upper = MessageField::some(on_disk(upper)?);
                    overlay.work = MessageField::some(on_disk(work)?);
                }
            }
        }
        self.root.root = Some(disk_root::Root::Overlay(overlay));
        Ok(())
    }

    fn add_folders(&mut self, one: &RootMount) -> Result<(), PodError> {
        for wish in one.options.iter().filter_map(|option| option.strip_prefix(MKDIR_OPTION)) {
            let (path, mode) = wish.split_once(':').unwrap_or((wish, ""));
            let mode = match mode.split(':').next().unwrap_or_default() {
                "" => MKDIR_MODE,
                digits => u32::from_str_radix(digits, 8)
                    .map_err(|_| PodError::Invalid(format!("{wish:?} names no mode")))?,
            };
            // Folders of the host are there, or the snapshotter's business.
            if let Place::Disk(mount, path) = self.place(path)? {
                let at = MessageField::some(DiskPath { mount, path, ..Default::default() });
                self.root.folders.push(DiskFolder { at, mode, ..Default::default() });
            }
        }
        Ok(())
    }

    fn place(&self, text: &str) -> Result<Place, PodError> {
        let mut all = self.places(text)?;
        match (all.pop(), all.is_empty()) {
            (Some(place), true) => Ok(place),
            _ => Err(PodError::Invalid(format!("{text:?} is not one folder"))),
        }
    }

    /// The folders that a list with templates names.
    fn places(&self, text: &str) -> Result<Vec<Place>, PodError> {
        let bad = || PodError::Invalid(format!("{text:?} does not name folders of a root"));
        let mut places = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            if let Some(inside) = rest.strip_prefix("{{") {
                let (words, after) = inside.split_once("}}").ok_or_else(bad)?;
                let (path, after) = after.split_once(':').unwrap_or((after, ""));
                let numbers = self.template(words).ok_or_else(bad)?;
                places.extend(numbers.into_iter().map(|n| Place::Disk(n, relative(path))));
                rest = after;
            } else {
                let (path, after) = rest.split_once(':').unwrap_or((rest, ""));
                if !path.starts_with('/') || path.contains("{{") {
                    return Err(bad());
                }
                places.push(Place::Host(path.into()));
                rest = after;
            }
        }
        Ok(places)
    }

    /// Numbers of the mounts that `mount N` or `overlay FROM TO` names, in that order.
    fn template(&self, words: &str) -> Option<Vec<u32>> {
        let words: Vec<&str> = words.split_whitespace().collect();
        let number = |word: &str| word.parse().ok().filter(|n| self.root.mounts.get(*n as usize).is_some());
        match words.as_slice() {
            ["mount", one] => Some(vec![number(one)?]),
            ["overlay", from, to] => {
                let (from, to): (u32, u32) = (number(from)?, number(to)?);
                Some(if from <= to { (from..=to).collect() } else { (to..=from).rev().collect() })
            }
            _ => None,
        }
    }

    /// The writable layer on a disk of its own: the last one.
    fn add_writable(&mut self, path: &Path) {
        let disk = MessageField::some(self.add_source(&path.to_string_lossy(), true));
        let mount = u32::try_from(self.root.mounts.len()).unwrap_or(u32::MAX);
        let kind = "ext4".to_owned();
        self.root.mounts.push(DiskMount { disk, kind, ..Default::default() });
        let at =
            |path: &str| MessageField::some(DiskPath { mount, path: path.to_owned(), ..Default::default() });
        for path in ["upper", "work"] {
            self.root.folders.push(DiskFolder { at: at(path), mode: 0o755, ..Default::default() });
        }
        if let Some(disk_root::Root::Overlay(overlay)) = &mut self.root.root {
            (overlay.upper, overlay.work) = (at("upper"), at("work"));
        }
    }

    /// The root with its files named as parts of the disk that they have become.
    fn on_disk(mut self, disk: &BayDisk) -> DiskRoot {
        for mount in &mut self.root.mounts {
            for name in mount.disk.as_mut().into_iter().chain(&mut mount.devices) {
                *name = disk.name(name.part as usize);
            }
        }
        self.root
    }
}

fn relative(path: &str) -> String {
    path.trim_matches('/').to_owned()
}

fn on_disk(place: Place) -> Result<DiskPath, PodError> {
    match place {
        Place::Disk(mount, path) => Ok(DiskPath { mount, path, ..Default::default() }),
        Place::Host(path) => {
            Err(unsupported(format!("a root of disks and of {} on the host", path.display())))
        }
    }
}

impl Sandbox {
    /// Mounts the root below the live share, or attaches the disks that it is made of.
    pub(super) async fn add_root(
        &self,
        wish: &BundleConfig,
        translated: &Translated,
        request: &mut CreateContainerRequest,
        mounts: &mut Vec<Arc<LiveMount>>,
    ) -> Result<Vec<BayDisk>, PodError> {
        let mut rootfs = Rootfs::new();
        let mut attached = Vec::new();
        if is_of_disks(&wish.rootfs) {
            let (root, disk) = self.attach_root(&wish.rootfs).await?;
            rootfs.disks = MessageField::some(root);
            attached.push(disk);
        } else {
            let root = match wish.rootfs.as_slice() {
                [] => self.live.bind(&translated.root, false)?,
                all => self.live.root(all)?,
            };
            rootfs.share = MessageField::some(root.source());
            mounts.push(root);
        }
        request.rootfs = MessageField::some(rootfs);
        Ok(attached)
    }

    /// Attaches what a root is made of, all of it as one disk: a pod has few bays.
    async fn attach_root(&self, mounts: &[RootMount]) -> Result<(DiskRoot, BayDisk), PodError> {
        let mut parsed = parse(mounts)?;
        if let Some(work_dir) = parsed.work_dir.take() {
            let path = work_dir.join(RW_FILE);
            storage::make_rw(&path).await?;
            parsed.add_writable(&path);
        }
        let open = |source: &Source| bays::open(&source.path, source.write);
        let files = parsed.sources.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let disk = self.bays.attach(&files).await?;
        Ok((parsed.on_disk(&disk), disk))
    }

    /// Attaches a block device of the host.
    pub(super) async fn attach_device(&self, device: &HostDevice) -> Result<BayDisk, PodError> {
        let node = device.node()?;
        self.bays.attach(&[bays::open(&node, device.write())?]).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> RootMount {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        RootMount { kind: kind.into(), source: source.into(), options }
    }

    fn at(mount: u32, path: &str) -> DiskPath {
        DiskPath { mount, path: path.into(), ..Default::default() }
    }

    fn overlay(parsed: &Parsed) -> &DiskOverlay {
        match &parsed.root.root {
            Some(disk_root::Root::Overlay(overlay)) => overlay,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn layers_under_a_writable_image_are_an_overlay() {
        let all = [
            mount("ext4", "/s/9/rwlayer.img", &["X-containerd.mkfs.fs=ext4", "rw", "loop"]),
            mount("erofs", "/s/2/layer.erofs", &["ro", "loop"]),
            mount("erofs", "/s/1/layer.erofs", &["ro", "loop"]),
            mount(
                "format/mkdir/overlay",
                "overlay",
                &[
                    "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                    "X-containerd.mkdir.path={{ mount 0 }}/work:0711:0:0",
                    "workdir={{ mount 0 }}/work",
                    "upperdir={{ mount 0 }}/upper",
                    "lowerdir={{ overlay 1 2 }}",
                ],
            ),
        ];
        assert!(is_of_disks(&all));
        let parsed = parse(&all).unwrap();
        let sources: Vec<_> = parsed.sources.iter().map(|s| (s.path.to_str().unwrap(), s.write)).collect();
        assert_eq!(
            sources,
            [("/s/9/rwlayer.img", true), ("/s/2/layer.erofs", false), ("/s/1/layer.erofs", false)]
        );
        let overlay = overlay(&parsed);
        assert_eq!(overlay.lower, [at(1, ""), at(2, "")]);
        assert_eq!(
            (overlay.upper.as_ref(), overlay.work.as_ref()),
            (Some(&at(0, "upper")), Some(&at(0, "work")))
        );
        let modes: Vec<_> = parsed.root.folders.iter().map(|f| (f.at.path.as_str(), f.mode)).collect();
        assert_eq!(modes, [("upper", 0o755), ("work", 0o711)]);
    }

    #[test]
    fn folders_of_the_host_become_a_disk_of_our_own() {
        let mut parsed = parse(&[
            mount("erofs", "/s/1/fsmeta.erofs", &["ro", "loop", "device=/s/1/a", "device=/s/2/b"]),
            mount(
                "format/mkdir/overlay",
                "overlay",
                &["workdir=/s/9/work", "upperdir=/s/9/fs", "lowerdir={{ mount 0 }}"],
            ),
        ])
        .unwrap();
        assert_eq!(parsed.work_dir.as_deref(), Some(Path::new("/s/9/work")));
        let part = |name: &DiskName| name.part;
        assert_eq!(part(&parsed.root.mounts[0].disk), 0);
        assert_eq!(parsed.root.mounts[0].devices.iter().map(part).collect::<Vec<_>>(), [1, 2]);
        parsed.add_writable(Path::new("/s/9/work/rw"));
        let overlay = overlay(&parsed);
        assert_eq!(
            (overlay.lower.as_slice(), overlay.upper.as_ref()),
            (&[at(0, "")][..], Some(&at(1, "upper")))
        );
        assert_eq!(parsed.sources[3], Source { path: "/s/9/work/rw".into(), write: true });
    }

    #[test]
    fn views_are_folders_or_overlays_without_a_writable_layer() {
        let parsed = parse(&[mount("erofs", "/l", &["ro", "loop"])]).unwrap();
        assert_eq!(parsed.root.root, Some(disk_root::Root::Folder(at(0, ""))));
        let parsed = parse(&[
            mount("ext4", "/dev/vdb", &["rw"]),
            mount(
                "format/mkdir/bind",
                "{{ mount 0 }}/upper",
                &["X-containerd.mkdir.path={{ mount 0 }}/upper", "rbind"],
            ),
        ])
        .unwrap();
        assert_eq!(parsed.root.root, Some(disk_root::Root::Folder(at(0, "upper"))));
        assert_eq!(parsed.root.folders[0].mode, MKDIR_MODE);
        let parsed = parse(&[
            mount("erofs", "/a", &[]),
            mount("erofs", "/b", &[]),
            mount("format/mkdir/overlay", "overlay", &["lowerdir={{ overlay 1 0 }}", "ro"]),
        ])
        .unwrap();
        assert_eq!(overlay(&parsed).lower, [at(1, ""), at(0, "")]);
        assert!(overlay(&parsed).upper.is_none());
    }

    #[test]
    fn what_cannot_be_put_together_is_refused() {
        let disk = || mount("erofs", "/l", &["ro", "loop"]);
        let join = |options: &[&str]| mount("format/overlay", "overlay", options);
        for bad in [
            vec![disk(), disk()],
            vec![mount("erofs", "/l", &["X-containerd.dmverity=/m"])],
            vec![mount("mkfs/ext4", "/l", &[])],
            vec![disk(), join(&["lowerdir={{ overlay 0 1 }}"])],
            vec![disk(), join(&["lowerdir={{ mount 0 }}", "uidmap=0:1:1"])],
            vec![disk(), join(&["lowerdir={{ mount 0"])],
            vec![disk(), join(&["lowerdir={{ target 0 }}"])],
            vec![disk(), join(&["lowerdir=/host/folder"])],
            vec![disk(), join(&["lowerdir=relative"])],
            vec![disk(), mount("bind", "/host", &[])],
            vec![disk(), mount("tmpfs", "x", &[]), disk()],
            vec![disk(), join(&["X-containerd.mkdir.path={{ mount 0 }}/a:9"])],
        ] {
            assert!(parse(&bad).is_err(), "{bad:?}");
        }
        assert!(!is_of_disks(&[mount("overlay", "overlay", &[])]));
        assert!(!is_of_disks(&[mount("xfs", "/dev/x", &[])]));
    }
}
