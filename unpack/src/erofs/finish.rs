//! The end of an image: all inodes that have no place yet, directories, and block 0.
//!
//! The tree is walked three times in one order: to give every inode its place, to write the inodes, and to write the
//! blocks of directories. Only then are all numbers known that the walk before needed.

use super::record::{self, Data, INODE_BYTES, INODE_SLOT, NLINK_AT, NO_BLOCK};
use super::{BLOCK, Image, directory};
use crate::error::{EntryError, Fault};
use crate::output::BlockSink;
use crate::tree::{Chunks, FileLayout, Inode, InodeId, Kind, Place, Symlink, Tree};
use crate::xattrs::XattrSets;

/// Where the root inode is: right behind the superblock.
const ROOT_AT: usize = record::SUPERBLOCK_OFFSET + record::SUPERBLOCK_BYTES;
/// Each entry of a map of chunks, which is also how it is aligned.
const MAP_ENTRY: usize = 4;
const BLOCK_U64: u64 = BLOCK as u64;

/// A finished image.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Finished {
    pub(crate) image_bytes: u64,
    pub(crate) inodes: u64,
}

/// A directory's content.
#[derive(Debug, Clone, Copy)]
struct Extent {
    size: u64,
    /// Bytes at its end that follow the inode.
    inline: usize,
    /// First of its blocks, counted from the first block of all directories.
    first_block: u32,
}

impl Extent {
    fn blocks(self) -> u64 {
        (self.size - self.inline as u64).div_ceil(BLOCK_U64)
    }
}

impl<W: BlockSink> Image<'_, W> {
    /// Writes what is missing. `uuid` names the volume.
    pub(crate) fn finish(
        mut self,
        tree: &mut Tree,
        xattrs: &XattrSets,
        uuid: [u8; 16],
    ) -> Result<Finished, Fault> {
        self.segment.flush(tree, &mut self.out)?;
        let plan = self.plan(tree, xattrs)?;
        let mut finisher = Finisher { image: &mut self, tree, xattrs, plan, has_chunks: false };
        let root = finisher.write_inodes()?;
        finisher.write_directories()?;
        let has_chunks = finisher.has_chunks;
        self.out.flush()?;
        for inode in tree.inodes() {
            if let Place::At { offset, nlink } = inode.place
                && nlink != inode.nlink
            {
                self.out.rewrite(&inode.nlink.to_le_bytes(), offset + NLINK_AT as u64)?;
            }
        }
        self.out.sync()?;
        let superblock = record::Superblock {
            root_number: (ROOT_AT as u64 / INODE_SLOT) as u16,
            inodes: tree.len(),
            blocks: self.out.block(),
            uuid,
            has_chunks,
        };
        self.out.rewrite(&record::block_zero(&superblock, &root), 0)?;
        self.out.sync()?;
        Ok(Finished { image_bytes: self.out.position(), inodes: tree.len() })
    }

    /// Gives every inode its place. Returns the directories' extents in the order of [`walk`].
    fn plan(&self, tree: &mut Tree, xattrs: &XattrSets) -> Result<Plan, Fault> {
        let mut plan = Plan { extents: Vec::new(), directory_blocks: 0, names_at: 0 };
        let mut cursor = self.out.position();
        let mut walk = Walk::new();
        while let Some(id) = walk.next(tree) {
            let Some(inode) = tree.get(id).filter(|inode| inode.place == Place::Unplaced) else { continue };
            let body = xattrs.body(inode.attributes.xattrs).len();
            let fixed = INODE_BYTES + body;
            let room = if id == InodeId::ROOT { BLOCK - ROOT_AT } else { BLOCK };
            let behind = match &inode.kind {
                Kind::Directory(_) => plan.add(tree, id, room.saturating_sub(fixed))?,
                Kind::Symlink(Symlink { target, block: None }) => target.len(),
                Kind::File(file) => match &file.layout {
                    FileLayout::Chunked(chunks) => map_entries(file.size, chunks) as usize * MAP_ENTRY,
                    FileLayout::Plain(_) | FileLayout::Inline(_) => 0,
                },
                _ => 0,
            };
            let offset = if id == InodeId::ROOT {
                if fixed > room {
                    return Err(EntryError::RootXattrs { max: room - INODE_BYTES }.into());
                }
                ROOT_AT as u64
            } else {
                let need = (fixed + behind) as u64;
                if cursor % BLOCK_U64 + need > BLOCK_U64 {
                    cursor = cursor.next_multiple_of(BLOCK_U64);
                }
                let offset = cursor;
                cursor = (cursor + need).next_multiple_of(INODE_SLOT);
                offset
            };
            if let Some(inode) = tree.get_mut(id) {
                inode.place = Place::At { offset, nlink: inode.nlink };
            }
        }
        plan.names_at = cursor.next_multiple_of(BLOCK_U64);
        Ok(plan)
    }
}

/// What [`Image::plan`] decided beside the places of inodes.
#[derive(Debug)]
struct Plan {
    /// One for each directory.
    extents: Vec<Extent>,
    directory_blocks: u64,
    /// Offset of the first block of directories.
    names_at: u64,
}

impl Plan {
    /// Decides how directory `id` is stored; returns how much of it follows its inode, at most `room`.
    fn add(&mut self, tree: &Tree, id: InodeId, room: usize) -> Result<usize, Fault> {
        let size = directory::size(sorted_names(tree, id).into_iter());
        let tail = (size % BLOCK_U64) as usize;
        let inline = if tail <= room { tail } else { 0 };
        let first_block = u32::try_from(self.directory_blocks).unwrap_or(NO_BLOCK);
        let extent = Extent { size, inline, first_block };
        self.directory_blocks += extent.blocks();
        self.extents.push(extent);
        Ok(inline)
    }
}

/// Names of a directory in the order of the image.
fn sorted_names(tree: &Tree, id: InodeId) -> Vec<&[u8]> {
    let names = tree.directory(id).into_iter().flat_map(|directory| directory.names.keys());
    let mut sorted: Vec<&[u8]> =
        names.map(|name| &**name).chain([b".".as_slice(), b"..".as_slice()]).collect();
    sorted.sort_unstable();
    sorted
}

/// Visits every inode: a directory, then what it holds but directories, then those. A file with several names is
/// visited once for each.
struct Walk {
    /// Files of the directory visited last, the next one last.
    files: Vec<InodeId>,
    /// Directories still to visit, the next one last.
    directories: Vec<InodeId>,
}

impl Walk {
    fn new() -> Self {
        Self { files: Vec::new(), directories: vec![InodeId::ROOT] }
    }

    fn next(&mut self, tree: &Tree) -> Option<InodeId> {
        if let Some(file) = self.files.pop() {
            return Some(file);
        }
        let id = self.directories.pop()?;
        for name in tree.directory(id)?.names.values().rev() {
            match tree.directory(name.inode) {
                Some(_) => self.directories.push(name.inode),
                None => self.files.push(name.inode),
            }
        }
        Some(id)
    }
}

/// Writes what [`Image::plan`] laid out.
struct Finisher<'f, 'o, W> {
    image: &'f mut Image<'o, W>,
    tree: &'f Tree,
    xattrs: &'f XattrSets,
    plan: Plan,
    has_chunks: bool,
}

impl<W: BlockSink> Finisher<'_, '_, W> {
    /// Writes all inodes placed by the plan but the root's, which is returned.
    fn write_inodes(&mut self) -> Result<Vec<u8>, Fault> {
        let tree = self.tree;
        let mut extents = std::mem::take(&mut self.plan.extents).into_iter();
        let mut kept = Vec::with_capacity(extents.len());
        let mut root = Vec::new();
        let mut walk = Walk::new();
        while let Some(id) = walk.next(tree) {
            let Some(inode) = tree.get(id) else { continue };
            let Place::At { offset, .. } = inode.place else { continue };
            let extent = if tree.directory(id).is_some() { extents.next() } else { None };
            kept.extend(extent);
            if id == InodeId::ROOT {
                root = self.record(id, inode, extent);
                continue;
            }
            // What lies behind was written before: small files, and files with several names.
            if offset < self.image.out.position() {
                continue;
            }
            self.image.out.zeros_until(offset)?;
            let record = self.record(id, inode, extent);
            self.image.out.write(&record)?;
            if let Kind::File(file) = &inode.kind
                && let FileLayout::Chunked(chunks) = &file.layout
            {
                self.has_chunks = true;
                self.write_map(file.size, chunks)?;
            }
        }
        self.plan.extents = kept;
        self.image.out.zeros_until(self.plan.names_at)?;
        Ok(root)
    }

    /// An inode with its attributes and what follows them, except a map of chunks.
    fn record(&mut self, id: InodeId, inode: &Inode, extent: Option<Extent>) -> Vec<u8> {
        self.image.inodes += 1;
        let body = self.xattrs.body(inode.attributes.xattrs);
        let plain = |size, location| Data { layout: record::FLAT_PLAIN, size, location };
        let mut nlink = inode.nlink;
        let mut behind = Vec::new();
        let (file_type, data) = match &inode.kind {
            Kind::Directory(directory) => {
                let subdirectories =
                    directory.names.values().filter(|name| self.tree.directory(name.inode).is_some());
                nlink = u32::try_from(2 + subdirectories.count()).unwrap_or(u32::MAX);
                let extent = extent.unwrap_or(Extent { size: 0, inline: 0, first_block: 0 });
                let location = (self.plan.names_at / BLOCK_U64) as u32 + extent.first_block;
                let location = if extent.blocks() == 0 { NO_BLOCK } else { location };
                let layout = if extent.inline > 0 { record::FLAT_INLINE } else { record::FLAT_PLAIN };
                if extent.inline > 0 {
                    let entries = entries(self.tree, id);
                    behind = directory::Blocks::new(&entries).last().unwrap_or_default();
                }
                (record::DIRECTORY, Data { layout, size: extent.size, location })
            }
            Kind::Symlink(Symlink { target, block: Some(block) }) => {
                (record::SYMLINK, plain(target.len() as u64, *block))
            }
            Kind::Symlink(Symlink { target, block: None }) => {
                behind = target.to_vec();
                let size = target.len() as u64;
                (record::SYMLINK, Data { layout: record::FLAT_INLINE, size, location: NO_BLOCK })
            }
            Kind::File(file) => match &file.layout {
                FileLayout::Plain(block) | FileLayout::Inline(block) => {
                    let block = if file.blocks == 0 { NO_BLOCK } else { *block };
                    (record::REGULAR, plain(file.size, block))
                }
                FileLayout::Chunked(chunks) => {
                    let location = u32::from(chunks.bits);
                    (record::REGULAR, Data { layout: record::CHUNK_BASED, size: file.size, location })
                }
            },
            Kind::CharDevice(number) => (record::CHAR_DEVICE, plain(0, *number)),
            Kind::BlockDevice(number) => (record::BLOCK_DEVICE, plain(0, *number)),
            Kind::Fifo => (record::FIFO, plain(0, 0)),
        };
        let mut bytes = record::inode(inode, file_type, nlink, data, body, self.image.inodes);
        bytes.extend_from_slice(body);
        bytes.extend_from_slice(&behind);
        bytes
    }
}

impl<W: BlockSink> Finisher<'_, '_, W> {
    /// Writes the blocks of all directories, but for what follows their inodes.
    fn write_directories(&mut self) -> Result<(), Fault> {
        let mut walk = Walk::new();
        let mut extents = std::mem::take(&mut self.plan.extents).into_iter();
        while let Some(id) = walk.next(self.tree) {
            if self.tree.directory(id).is_none() {
                continue;
            }
            let Some(extent) = extents.next() else { continue };
            if extent.blocks() == 0 {
                continue;
            }
            let entries = entries(self.tree, id);
            for block in directory::Blocks::new(&entries).take(extent.blocks() as usize) {
                self.image.out.write(&block)?;
                self.image.out.align()?;
            }
        }
        Ok(())
    }

    /// The address of each chunk of a file of `size` bytes.
    fn write_map(&mut self, size: u64, chunks: &Chunks) -> Result<(), Fault> {
        let ends = chunks.runs.iter().skip(1).map(|run| u64::from(run.first_chunk));
        let ends = ends.chain([map_entries(size, chunks)]);
        for (run, end) in chunks.runs.iter().zip(ends) {
            let chunks_in_run = end.saturating_sub(u64::from(run.first_chunk));
            let mut address = run.block;
            for _ in 0..chunks_in_run {
                self.image.out.write(&address.unwrap_or(NO_BLOCK).to_le_bytes())?;
                address = address.map(|address| address.wrapping_add(1 << chunks.bits));
            }
        }
        Ok(())
    }
}

/// Chunks of a file of `size` bytes.
fn map_entries(size: u64, chunks: &Chunks) -> u64 {
    size.div_ceil(BLOCK_U64 << chunks.bits)
}

fn entry_type(kind: &Kind) -> u8 {
    match kind {
        Kind::File(_) => directory::REGULAR,
        Kind::Directory(_) => directory::DIRECTORY,
        Kind::Symlink(_) => directory::SYMLINK,
        Kind::CharDevice(_) => directory::CHAR_DEVICE,
        Kind::BlockDevice(_) => directory::BLOCK_DEVICE,
        Kind::Fifo => directory::FIFO,
    }
}

/// The entries of a directory, sorted.
fn entries(tree: &Tree, id: InodeId) -> Vec<directory::Entry<'_>> {
    let Some(directory) = tree.directory(id) else { return Vec::new() };
    let entry = |name, inode| directory::Entry {
        name,
        number: number(tree, inode),
        file_type: tree.get(inode).map_or(0, |inode| entry_type(&inode.kind)),
    };
    let names = directory.names.iter().map(|(name, found)| entry(&**name, found.inode));
    let mut entries: Vec<_> = names.chain([entry(b".", id), entry(b"..", directory.parent)]).collect();
    entries.sort_unstable_by_key(|entry| entry.name);
    entries
}

fn number(tree: &Tree, id: InodeId) -> u64 {
    match tree.get(id).map(|inode| inode.place) {
        Some(Place::At { offset, .. }) => offset / INODE_SLOT,
        _ => 0,
    }
}
