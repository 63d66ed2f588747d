//! A naive applier to compare with: layers as lists of entries, files in a flat map by path, no care for cost.

use std::collections::BTreeMap;

use super::archive::Entry;
use super::{Content, Listing, Node, Path};

/// A file of the model; hard links share `inode`.
#[derive(Debug, Clone)]
struct File {
    inode: usize,
    /// The layer that named it last.
    layer: usize,
}

#[derive(Debug, Default)]
pub(crate) struct Model {
    names: BTreeMap<Path, File>,
    inodes: Vec<Node>,
}

fn join(parent: &[u8], name: &[u8]) -> Path {
    if parent.is_empty() { name.to_vec() } else { [parent, b"/", name].concat() }
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

fn is_below(path: &[u8], top: &[u8]) -> bool {
    path != top && (top.is_empty() || path.strip_prefix(top).is_some_and(|rest| rest.starts_with(b"/")))
}

impl Model {
    pub(crate) fn new() -> Self {
        let mut model = Self::default();
        model.set(b"", 0, Self::implied());
        model
    }

    /// Whether an entry for `layer` (counted from 1) is one that has a result at all.
    pub(crate) fn accepts(&self, layer: usize, entry: &Entry) -> bool {
        let (parent, name) = split(&entry.path);
        let Some(real) = self.walk(parent) else { return false };
        if name.starts_with(b".wh.") {
            return true;
        }
        let prefixes = real.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| &real[..at]);
        let gives_way = |path: &[u8]| match self.names.get(path) {
            Some(file) => self.is_directory(path) || (real == parent && file.layer < layer),
            None => true,
        };
        if !prefixes.chain([real.as_slice()]).all(gives_way) {
            return false;
        }
        if entry.kind != b'1' {
            return true;
        }
        let path = join(&real, name);
        let (target_parent, target_name) = split(&entry.link);
        self.walk(target_parent).is_some_and(|target_parent| {
            let target = join(&target_parent, target_name);
            self.at(&target).is_some_and(|node| node.content != Content::Directory)
                && !is_below(&path, &target)
        })
    }

    fn implied() -> Node {
        Node {
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            xattrs: BTreeMap::new(),
            first_name: Vec::new(),
            nlink: 0,
            content: Content::Directory,
        }
    }

    fn node(entry: &Entry) -> Node {
        let content = match entry.kind {
            b'0' => Content::File(entry.data.clone()),
            b'2' => Content::Symlink(entry.link.clone()),
            b'3' => Content::CharDevice(entry.dev.0, entry.dev.1),
            b'4' => Content::BlockDevice(entry.dev.0, entry.dev.1),
            b'5' => Content::Directory,
            _ => Content::Fifo,
        };
        Node {
            mode: entry.mode as u16,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: entry.xattrs.iter().cloned().collect(),
            first_name: Vec::new(),
            nlink: 0,
            content,
        }
    }

    fn set(&mut self, path: &[u8], layer: usize, node: Node) {
        self.inodes.push(node);
        self.names.insert(path.to_vec(), File { inode: self.inodes.len() - 1, layer });
    }

    fn at(&self, path: &[u8]) -> Option<&Node> {
        self.names.get(path).map(|file| &self.inodes[file.inode])
    }

    fn is_directory(&self, path: &[u8]) -> bool {
        self.at(path).is_some_and(|node| node.content == Content::Directory)
    }

    fn remove(&mut self, path: &[u8]) {
        self.names.retain(|name, _| name != path && !is_below(name, path));
    }

    /// Applies an entry that is [accepted](Self::accepts) and has a clean relative name.
    pub(crate) fn apply(&mut self, layer: usize, entry: &Entry) {
        let (parent, name) = split(&entry.path);
        let parent = self.walk(parent).unwrap();
        if name == b".wh..wh..opq" {
            return self.clear(layer, &parent);
        }
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            return self.white_out(layer, &join(&parent, hidden));
        }
        self.make_directories(layer, &parent);
        let path = join(&parent, name);
        match entry.kind {
            b'1' => {
                let (target_parent, target_name) = split(&entry.link);
                let target = join(&self.walk(target_parent).unwrap(), target_name);
                let inode = self.names[&target].inode;
                if target != path {
                    self.remove(&path);
                }
                self.names.insert(path, File { inode, layer });
            }
            b'5' if self.is_directory(&path) => {
                let file = self.names.get_mut(&path).unwrap();
                file.layer = layer;
                self.inodes[file.inode] = Self::node(entry);
            }
            _ => {
                self.remove(&path);
                self.set(&path, layer, Self::node(entry));
            }
        }
    }

    /// Resolves links in every component, one at a time; `None` for more than 40 links.
    fn walk(&self, path: &[u8]) -> Option<Path> {
        let mut at = Vec::new();
        let mut links = 0;
        let mut left: Vec<Vec<u8>> = path.split(|byte| *byte == b'/').map(<[u8]>::to_vec).collect();
        while !left.is_empty() {
            let component = left.remove(0);
            match component.as_slice() {
                b"" | b"." => {}
                b".." => at = split(&at).0.to_vec(),
                name => {
                    let next = join(&at, name);
                    match self.at(&next).map(|node| &node.content) {
                        Some(Content::Symlink(target)) => {
                            links += 1;
                            if links > 40 {
                                return None;
                            }
                            if target.starts_with(b"/") {
                                at.clear();
                            }
                            let target = target.split(|byte| *byte == b'/').map(<[u8]>::to_vec);
                            left.splice(0..0, target);
                        }
                        _ => at = next,
                    }
                }
            }
        }
        Some(at)
    }

    fn make_directories(&mut self, layer: usize, path: &[u8]) {
        if path.is_empty() || self.is_directory(path) {
            return;
        }
        self.make_directories(layer, split(path).0);
        self.remove(path);
        self.set(path, layer, Self::implied());
    }

    /// Removes what is older than `layer` below `top`; directories that still hold something stay, as implied ones.
    fn clear(&mut self, layer: usize, top: &[u8]) {
        let below: Vec<_> = self.names.keys().filter(|path| is_below(path, top)).cloned().collect();
        for path in below.into_iter().rev() {
            self.expire(layer, &path);
        }
    }

    fn expire(&mut self, layer: usize, path: &[u8]) {
        let Some(file) = self.names.get_mut(path).filter(|file| file.layer < layer) else { return };
        let inode = file.inode;
        let path = path.to_vec();
        if self.names.keys().any(|name| is_below(name, &path)) {
            self.names.get_mut(&path).unwrap().layer = layer;
            self.inodes[inode] = Self::implied();
        } else {
            self.names.remove(&path);
        }
    }

    fn white_out(&mut self, layer: usize, path: &[u8]) {
        self.clear(layer, path);
        self.expire(layer, path);
    }

    pub(crate) fn listing(&self) -> Listing {
        let mut names = BTreeMap::<usize, Vec<&Path>>::new();
        for (path, file) in &self.names {
            names.entry(file.inode).or_default().push(path);
        }
        let node = |path: &Path, file: &File| {
            let mut node = self.inodes[file.inode].clone();
            node.first_name = names[&file.inode][0].clone();
            node.nlink = names[&file.inode].len() as u32;
            if node.content == Content::Directory {
                let is_child = |name: &Path| !name.is_empty() && split(name).0 == path.as_slice();
                let children = self.names.keys().filter(|name| is_child(name) && self.is_directory(name));
                node.nlink = 2 + children.count() as u32;
            }
            node
        };
        self.names.iter().map(|(path, file)| (path.clone(), node(path, file))).collect()
    }
}
