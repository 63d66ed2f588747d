//! Applies the entries of one layer to the tree: OCI image specification, "Image Layer Filesystem Changeset".
//!
//! - An entry replaces what had its name, with two exceptions: a directory over a directory keeps what is below and
//!   takes the new attributes; a hard link to itself changes nothing.
//! - A whiteout hides what older layers put there and nothing of its own layer, wherever in the archive it stands.
//! - A hard link shares the inode of its target, of whatever layer. Its own attributes are ignored: they are those
//!   of the target in any archive that was made from a file system.

use crate::erofs::{self, Image};
use crate::error::{EntryError, Fault, printable};
use crate::limits::{Budget, Limits};
use crate::output::BlockSink;
use crate::resolve::{self, Missing};
use crate::tar::{Content, Entry, EntryKind};
use crate::tree::{Attributes, InodeId, Kind, Tree};
use crate::xattrs::XattrSets;

/// In front of the name of a file that is to be removed.
const WHITEOUT: &[u8] = b".wh.";
/// The name that hides everything older in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// In front of other names that AUFS kept for itself in the root, with all that is below.
const AUFS: &[u8] = b".wh..wh.";
/// Longest target of a symbolic link that Linux can read back.
const MAX_SYMLINK: usize = 4095;

/// The tree and what bounds it.
pub(crate) struct Applier<'l> {
    pub(crate) tree: Tree,
    pub(crate) xattrs: XattrSets,
    pub(crate) entries: Budget,
    /// Names, link targets, sets of attributes, maps of sparse files.
    memory: Budget,
    limits: &'l Limits,
    last_parent: Option<LastParent>,
}

/// Where the entry before was put: most entries follow one of the same directory.
struct LastParent {
    path: Vec<u8>,
    directory: InodeId,
    /// [`Tree::removals`] at that time.
    removals: u64,
}

impl<'l> Applier<'l> {
    pub(crate) fn new(limits: &'l Limits) -> Self {
        Self {
            tree: Tree::new(),
            xattrs: XattrSets::new(),
            entries: Budget::new("entries", limits.max_entries),
            memory: Budget::new("bytes of names and attributes", limits.max_metadata_bytes),
            limits,
            last_parent: None,
        }
    }

    /// Applies one entry; `content` yields that of a file.
    pub(crate) fn apply<W: BlockSink>(
        &mut self,
        entry: &Entry,
        content: &mut impl Content,
        image: &mut Image<'_, W>,
    ) -> Result<(), Fault> {
        self.entries.take(1)?;
        if is_of_aufs(&entry.path) {
            return Ok(());
        }
        let mut components = Vec::new();
        let (parent_path, name) = match split_plain(&entry.path) {
            Some((parent, name)) => (Some(parent), name),
            None => {
                components = resolve::clean(&entry.path)?;
                let Some(name) = components.pop() else { return self.apply_root(entry) };
                (None, name)
            }
        };
        resolve::check_component(name)?;
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if let Some(path) = parent_path {
                components = resolve::clean(path)?;
            }
            return self.white_out(&components, name, hidden);
        }
        let parent = match parent_path {
            Some(path) => self.parent(path)?,
            None => self.make_directory(&components)?,
        };
        if entry.kind == EntryKind::HardLink {
            return self.hard_link(entry, parent, name);
        }
        self.add(entry, parent, name, content, image)
    }

    /// Adds or replaces anything but a hard link.
    fn add<W: BlockSink>(
        &mut self,
        entry: &Entry,
        parent: InodeId,
        name: &[u8],
        content: &mut impl Content,
        image: &mut Image<'_, W>,
    ) -> Result<(), Fault> {
        let attributes = self.attributes(entry)?;
        let xattr_bytes = self.xattrs.body(attributes.xattrs).len();
        self.memory.take(name.len() as u64)?;
        let mut tail = Vec::new();
        let kind = match entry.kind {
            EntryKind::Directory => {
                self.directory(parent, name, attributes);
                return Ok(());
            }
            EntryKind::File => {
                let written = image.write_content(entry.size, xattr_bytes, content, &mut self.memory)?;
                tail = written.tail;
                Kind::File(written.data)
            }
            EntryKind::Symlink => {
                if entry.link.is_empty() || entry.link.len() > MAX_SYMLINK || entry.link.contains(&0) {
                    return Err(EntryError::LinkTarget.into());
                }
                self.memory.take(entry.link.len() as u64)?;
                Kind::Symlink(image.write_symlink(&entry.link, xattr_bytes)?)
            }
            EntryKind::CharDevice => Kind::CharDevice(device_number(entry)?),
            EntryKind::BlockDevice => Kind::BlockDevice(device_number(entry)?),
            EntryKind::Fifo | EntryKind::HardLink => Kind::Fifo,
        };
        let inode = self.tree.add(attributes, kind);
        self.tree.link(parent, name, inode);
        image.place_file(&mut self.tree, &self.xattrs, inode, &tail)
    }

    /// An entry for the root can only change its attributes.
    fn apply_root(&mut self, entry: &Entry) -> Result<(), Fault> {
        if entry.kind != EntryKind::Directory {
            return Err(EntryError::RootNotDirectory.into());
        }
        let attributes = self.attributes(entry)?;
        if let Some(root) = self.tree.get_mut(InodeId::ROOT) {
            root.attributes = attributes;
        }
        Ok(())
    }

    fn directory(&mut self, parent: InodeId, name: &[u8], attributes: Attributes) {
        let found = self.tree.lookup(parent, name).filter(|found| self.tree.directory(found.inode).is_some());
        let Some(found) = found else {
            let inode = self.tree.add_directory(attributes, parent);
            self.tree.link(parent, name, inode);
            return;
        };
        self.tree.touch(parent, name);
        if let Some(inode) = self.tree.get_mut(found.inode) {
            inode.attributes = attributes;
        }
    }

    fn hard_link(&mut self, entry: &Entry, parent: InodeId, name: &[u8]) -> Result<(), Fault> {
        let missing = || EntryError::LinkTargetMissing(printable(&entry.link));
        let mut components = resolve::clean(&entry.link)?;
        let target_name = components.pop().ok_or_else(missing)?;
        let directory = resolve::directory(&mut self.tree, &components, self.limits, &mut Missing::Report)?
            .ok_or_else(missing)?;
        let target = self.tree.lookup(directory, target_name).ok_or_else(missing)?.inode;
        if self.tree.directory(target).is_some() {
            return Err(EntryError::LinkToDirectory(printable(&entry.link)).into());
        }
        if (directory, target_name) == (parent, name) {
            self.tree.touch(parent, name);
            return Ok(());
        }
        self.memory.take(name.len() as u64)?;
        self.tree.link(parent, name, target);
        Ok(())
    }

    /// `name` is the whole name of a whiteout, `hidden` what follows its prefix.
    fn white_out(&mut self, parent: &[&[u8]], name: &[u8], hidden: &[u8]) -> Result<(), Fault> {
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(EntryError::Whiteout.into());
        }
        let directory = resolve::directory(&mut self.tree, parent, self.limits, &mut Missing::Report)?;
        match directory {
            Some(directory) if name == OPAQUE => self.tree.clear(directory),
            Some(directory) => self.tree.white_out(directory, hidden),
            // Nothing is there to be hidden.
            None => {}
        }
        Ok(())
    }

    /// The directory of the entry's parent, made if it is not there. `path` is not empty.
    fn parent(&mut self, path: &[u8]) -> Result<InodeId, Fault> {
        if let Some(last) = &self.last_parent
            && last.path == path
            && last.removals == self.tree.removals()
        {
            return Ok(last.directory);
        }
        let directory = self.make_directory(&resolve::clean(path)?)?;
        let removals = self.tree.removals();
        self.last_parent = Some(LastParent { path: path.to_vec(), directory, removals });
        Ok(directory)
    }

    fn make_directory(&mut self, components: &[&[u8]]) -> Result<InodeId, Fault> {
        let mut missing = Missing::Create { entries: &mut self.entries, memory: &mut self.memory };
        let found = resolve::directory(&mut self.tree, components, self.limits, &mut missing)?;
        found.ok_or_else(|| EntryError::ParentNotDirectory.into())
    }

    fn attributes(&mut self, entry: &Entry) -> Result<Attributes, Fault> {
        let xattrs = self.xattrs.intern(&entry.xattrs, self.limits, &mut self.memory)?;
        Ok(Attributes { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: entry.mtime, xattrs })
    }
}

fn device_number(entry: &Entry) -> Result<u32, EntryError> {
    let (major, minor) = (entry.dev_major, entry.dev_minor);
    erofs::device_number(major, minor).ok_or(EntryError::DeviceNumber { major, minor })
}

/// Whether AUFS made this for itself.
fn is_of_aufs(path: &[u8]) -> bool {
    let first = path.split(|byte| *byte == b'/').find(|component| !matches!(*component, b"" | b"."));
    first.is_some_and(|first| first.starts_with(AUFS) && first != OPAQUE)
}

/// Splits a name at its last slash, when what follows is an ordinary component; `None` for all other names. The
/// parent's path is as the archive spells it.
fn split_plain(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let path = path.strip_suffix(b"/").unwrap_or(path);
    let slash = path.iter().rposition(|byte| *byte == b'/')?;
    let (parent, name) = path.split_at_checked(slash)?;
    match name.get(1..)? {
        b"" | b"." | b".." => None,
        name => Some((parent, name)),
    }
}
