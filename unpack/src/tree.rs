//! The image's file tree while layers are applied: inodes, directories, and which layer each name came from.
//!
//! Nothing here recurses, since an image decides how deep its directories are.

use std::collections::BTreeMap;

use crate::tar::Timestamp;
use crate::xattrs::XattrId;

/// Index of an inode in its [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct InodeId(u32);

impl InodeId {
    /// The root directory, which always exists.
    pub(crate) const ROOT: Self = Self(0);
}

/// What every kind of file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// Permission bits with set-id and sticky bits.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    pub(crate) xattrs: XattrId,
}

impl Attributes {
    /// Those of a directory that no layer describes.
    pub(crate) const IMPLIED: Self =
        Self { mode: 0o755, uid: 0, gid: 0, mtime: Timestamp { sec: 0, nsec: 0 }, xattrs: XattrId::NONE };
}

/// A file of any kind.
#[derive(Debug)]
pub(crate) struct Inode {
    pub(crate) attributes: Attributes,
    /// Names; directories are counted when the image is laid out.
    pub(crate) nlink: u32,
    pub(crate) kind: Kind,
    pub(crate) place: Place,
}

/// Where on the image the inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Not decided.
    Unplaced,
    /// At this offset of the segment of small files that is being filled.
    InSegment(u32),
    /// At this byte of the image, written with this number of links.
    At { offset: u64, nlink: u32 },
}

#[derive(Debug)]
pub(crate) enum Kind {
    File(FileData),
    Directory(Box<Directory>),
    Symlink(Symlink),
    /// Device number in Linux's 32-bit encoding.
    CharDevice(u32),
    BlockDevice(u32),
    Fifo,
}

/// A symbolic link.
#[derive(Debug)]
pub(crate) struct Symlink {
    pub(crate) target: Box<[u8]>,
    /// The block that holds the target; `None` when it is short enough to follow the inode.
    pub(crate) block: Option<u32>,
}

/// Where a file's content is. Addresses and counts are in blocks of the image.
#[derive(Debug)]
pub(crate) struct FileData {
    pub(crate) size: u64,
    /// Blocks that hold content.
    pub(crate) blocks: u32,
    pub(crate) layout: FileLayout,
}

#[derive(Debug)]
pub(crate) enum FileLayout {
    /// All content in blocks from this address on.
    Plain(u32),
    /// Whole blocks from this address on; the rest follows the inode, which therefore has its place.
    Inline(u32),
    /// Content and holes in chunks.
    Chunked(Box<Chunks>),
}

/// Content with holes.
#[derive(Debug)]
pub(crate) struct Chunks {
    /// Logarithm of blocks per chunk.
    pub(crate) bits: u8,
    /// Runs of chunks in order; each ends where the next begins.
    pub(crate) runs: Vec<Run>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// First chunk of the file that belongs to the run.
    pub(crate) first_chunk: u32,
    /// Address of its first block; `None` for a hole.
    pub(crate) block: Option<u32>,
}

/// A directory's names.
#[derive(Debug)]
pub(crate) struct Directory {
    pub(crate) parent: InodeId,
    pub(crate) names: BTreeMap<Box<[u8]>, Name>,
    /// The layer in whose course everything that older layers put below was removed (or never was there).
    cleared_in: u32,
}

/// One name of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Name {
    pub(crate) inode: InodeId,
    /// The newest layer with an entry of this name.
    pub(crate) layer: u32,
}

/// All inodes, reachable from [`InodeId::ROOT`].
#[derive(Debug)]
pub(crate) struct Tree {
    inodes: Vec<Inode>,
    /// Ids to be used again.
    free: Vec<InodeId>,
    /// The layer being applied.
    layer: u32,
    /// Blocks of content that no name leads to any more.
    dead_blocks: u64,
    /// Grows whenever a name is removed: what was looked up before may have changed.
    removals: u64,
}

impl Tree {
    pub(crate) fn new() -> Self {
        let root = Inode {
            attributes: Attributes::IMPLIED,
            nlink: 1,
            kind: Kind::Directory(Box::new(Directory {
                parent: InodeId::ROOT,
                names: BTreeMap::new(),
                cleared_in: 0,
            })),
            place: Place::Unplaced,
        };
        Self { inodes: vec![root], free: Vec::new(), layer: 0, dead_blocks: 0, removals: 0 }
    }

    /// Starts with layer `layer`; layers must come in rising order.
    pub(crate) fn begin_layer(&mut self, layer: u32) {
        self.layer = layer;
    }

    pub(crate) fn layer(&self) -> u32 {
        self.layer
    }

    pub(crate) fn removals(&self) -> u64 {
        self.removals
    }

    pub(crate) fn dead_blocks(&self) -> u64 {
        self.dead_blocks
    }

    /// Inodes in use.
    pub(crate) fn len(&self) -> u64 {
        self.inodes.len().saturating_sub(self.free.len()) as u64
    }

    pub(crate) fn get(&self, id: InodeId) -> Option<&Inode> {
        self.inodes.get(id.0 as usize)
    }

    pub(crate) fn get_mut(&mut self, id: InodeId) -> Option<&mut Inode> {
        self.inodes.get_mut(id.0 as usize)
    }

    /// All inodes, also those not in use, which have no place.
    pub(crate) fn inodes(&self) -> impl Iterator<Item = &Inode> {
        self.inodes.iter()
    }

    pub(crate) fn directory(&self, id: InodeId) -> Option<&Directory> {
        match &self.get(id)?.kind {
            Kind::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    fn directory_mut(&mut self, id: InodeId) -> Option<&mut Directory> {
        match &mut self.get_mut(id)?.kind {
            Kind::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    pub(crate) fn lookup(&self, parent: InodeId, name: &[u8]) -> Option<Name> {
        self.directory(parent)?.names.get(name).copied()
    }

    /// Adds an inode without a name.
    pub(crate) fn add(&mut self, attributes: Attributes, kind: Kind) -> InodeId {
        let inode = Inode { attributes, nlink: 0, kind, place: Place::Unplaced };
        if let Some(id) = self.free.pop()
            && let Some(slot) = self.get_mut(id)
        {
            *slot = inode;
            return id;
        }
        // The limit on entries keeps the count far below 2^32.
        let id = InodeId(u32::try_from(self.inodes.len()).unwrap_or(u32::MAX));
        self.inodes.push(inode);
        id
    }

    /// An empty directory in the making; give it a name with [`Tree::link`].
    pub(crate) fn add_directory(&mut self, attributes: Attributes, parent: InodeId) -> InodeId {
        let cleared_in = self.layer;
        self.add(
            attributes,
            Kind::Directory(Box::new(Directory { parent, names: BTreeMap::new(), cleared_in })),
        )
    }

    /// Gives `inode` the name `name` in `parent` for the current layer. What had that name before is removed.
    pub(crate) fn link(&mut self, parent: InodeId, name: &[u8], inode: InodeId) {
        // Counted first: what is removed may hold the last other name of the inode.
        if let Some(inode) = self.get_mut(inode) {
            inode.nlink += 1;
        }
        self.unlink(parent, name);
        let layer = self.layer;
        if let Some(directory) = self.directory_mut(parent) {
            directory.names.insert(name.into(), Name { inode, layer });
        }
    }

    /// Notes that the current layer has an entry for a name that exists.
    pub(crate) fn touch(&mut self, parent: InodeId, name: &[u8]) {
        let layer = self.layer;
        if let Some(name) = self.directory_mut(parent).and_then(|directory| directory.names.get_mut(name)) {
            name.layer = layer;
        }
    }

    /// Removes a name and, when it is a directory's, all below.
    pub(crate) fn unlink(&mut self, parent: InodeId, name: &[u8]) {
        let removed = self.directory_mut(parent).and_then(|directory| directory.names.remove(name));
        if let Some(name) = removed {
            self.drop_name(name.inode);
        }
    }

    /// Takes a name away from an inode that has already left its directory.
    fn drop_name(&mut self, inode: InodeId) {
        self.removals += 1;
        let mut pending = vec![inode];
        while let Some(id) = pending.pop() {
            let Some(inode) = self.get_mut(id) else { continue };
            inode.nlink = inode.nlink.saturating_sub(1);
            if inode.nlink > 0 {
                continue;
            }
            inode.place = Place::Unplaced;
            match std::mem::replace(&mut inode.kind, Kind::Fifo) {
                Kind::Directory(directory) => pending.extend(directory.names.values().map(|name| name.inode)),
                Kind::File(data) => self.dead_blocks += u64::from(data.blocks),
                _ => {}
            }
            self.free.push(id);
        }
    }

    /// Whiteout of one name: removes what older layers put there and below, and keeps what the current layer did.
    pub(crate) fn white_out(&mut self, parent: InodeId, name: &[u8]) {
        let Some(found) = self.lookup(parent, name) else { return };
        self.clear(found.inode);
        if found.layer == self.layer {
            return;
        }
        match self.directory(found.inode).map(|directory| directory.names.is_empty()) {
            // The directory of older layers is gone; that of this layer is only implied by what it holds.
            Some(false) => {
                self.touch(parent, name);
                if let Some(inode) = self.get_mut(found.inode) {
                    inode.attributes = Attributes::IMPLIED;
                }
            }
            Some(true) | None => self.unlink(parent, name),
        }
    }

    /// Opaque whiteout: removes what older layers put below `top`. No directory is visited twice in one layer, so
    /// an image full of whiteouts costs no more than its size.
    pub(crate) fn clear(&mut self, top: InodeId) {
        let layer = self.layer;
        let mut parents_first = Vec::new();
        let mut pending = vec![top];
        while let Some(id) = pending.pop() {
            let Some(directory) = self.directory(id) else { continue };
            if directory.cleared_in < layer {
                parents_first.push(id);
                pending.extend(directory.names.values().map(|name| name.inode));
            }
        }
        for id in parents_first.into_iter().rev() {
            self.clear_one(id);
        }
    }

    /// The part of [`Tree::clear`] for one directory whose subdirectories are done.
    fn clear_one(&mut self, id: InodeId) {
        let layer = self.layer;
        let Some(directory) = self.directory_mut(id) else { return };
        directory.cleared_in = layer;
        let mut names = std::mem::take(&mut directory.names);
        let mut dropped = Vec::new();
        names.retain(|_, name| {
            if name.layer == layer {
                return true;
            }
            let keep = self.directory(name.inode).is_some_and(|directory| !directory.names.is_empty());
            if keep {
                name.layer = layer;
                if let Some(inode) = self.get_mut(name.inode) {
                    inode.attributes = Attributes::IMPLIED;
                }
            } else {
                dropped.push(name.inode);
            }
            keep
        });
        if let Some(directory) = self.directory_mut(id) {
            directory.names = names;
        }
        for inode in dropped {
            self.drop_name(inode);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(tree: &Tree, id: InodeId) -> Vec<String> {
        let names = tree.directory(id).unwrap().names.keys();
        names.map(|name| String::from_utf8_lossy(name).into_owned()).collect()
    }

    fn file(tree: &mut Tree, parent: InodeId, name: &str, blocks: u32) -> InodeId {
        let data = FileData { size: u64::from(blocks) * 4096, blocks, layout: FileLayout::Plain(1) };
        let id = tree.add(Attributes::IMPLIED, Kind::File(data));
        tree.link(parent, name.as_bytes(), id);
        id
    }

    fn directory(tree: &mut Tree, parent: InodeId, name: &str) -> InodeId {
        let id = tree.add_directory(Attributes { mode: 0o700, ..Attributes::IMPLIED }, parent);
        tree.link(parent, name.as_bytes(), id);
        id
    }

    #[test]
    fn removing_a_directory_counts_dead_blocks_and_reuses_inodes() {
        let mut tree = Tree::new();
        let dir = directory(&mut tree, InodeId::ROOT, "d");
        let shared = file(&mut tree, dir, "one", 3);
        file(&mut tree, dir, "two", 5);
        tree.link(InodeId::ROOT, b"kept", shared);
        tree.unlink(InodeId::ROOT, b"d");
        assert_eq!(tree.dead_blocks(), 5);
        assert_eq!(tree.get(shared).unwrap().nlink, 1);
        assert_eq!(tree.len(), 2);
        file(&mut tree, InodeId::ROOT, "new", 1);
        assert_eq!((tree.len(), tree.inodes.len()), (3, 4));
    }

    #[test]
    fn linking_over_the_directory_that_holds_the_target_keeps_it() {
        let mut tree = Tree::new();
        let dir = directory(&mut tree, InodeId::ROOT, "d");
        let inner = file(&mut tree, dir, "f", 1);
        tree.link(InodeId::ROOT, b"d", inner);
        assert_eq!(tree.get(inner).unwrap().nlink, 1);
        assert_eq!(tree.len(), 2);
    }

    #[test]
    fn whiteouts_spare_the_current_layer() {
        let mut tree = Tree::new();
        let dir = directory(&mut tree, InodeId::ROOT, "d");
        let sub = directory(&mut tree, dir, "sub");
        file(&mut tree, sub, "old", 1);
        file(&mut tree, dir, "old", 1);
        tree.begin_layer(1);
        file(&mut tree, sub, "new", 1);
        tree.white_out(InodeId::ROOT, b"d");
        assert_eq!(names(&tree, dir), ["sub"]);
        assert_eq!(names(&tree, sub), ["new"]);
        assert_eq!(tree.get(dir).unwrap().attributes.mode, 0o755);
        tree.begin_layer(2);
        tree.white_out(InodeId::ROOT, b"d");
        assert_eq!(names(&tree, InodeId::ROOT), [""; 0]);
        assert_eq!(tree.len(), 1);
    }

    #[test]
    fn deep_trees_do_not_recurse() {
        let mut tree = Tree::new();
        let mut at = InodeId::ROOT;
        for _ in 0..50_000 {
            at = directory(&mut tree, at, "d");
        }
        tree.begin_layer(1);
        tree.clear(InodeId::ROOT);
        assert_eq!(tree.len(), 1);
    }
}
