//! Reads an EROFS image the way the kernel does, and insists on everything that the kernel or a checker would: the
//! checksum, sorted names, bounds, and that each name is also found by the kernel's bisection.

use std::collections::BTreeMap;

use super::{Content, Listing, Node};

const BLOCK: usize = 4096;

fn le(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Reads every file of `image`.
pub(crate) fn read(image: &[u8]) -> Listing {
    let image = Image::open(image);
    let mut listing = Listing::new();
    let mut first_names = BTreeMap::new();
    let mut names = BTreeMap::<u64, u32>::new();
    let mut pending = vec![(Vec::new(), image.root, image.root)];
    let mut numbers = BTreeMap::new();
    while let Some((path, number, parent)) = pending.pop() {
        let inode = image.inode(number);
        if inode.kind == 0o040_000 {
            let children = image.directory(number, parent, &inode);
            let subdirectories = children.iter().filter(|(_, _, kind)| *kind == 2).count();
            assert_eq!(inode.node.nlink as usize, 2 + subdirectories, "links of {path:?}");
            for (name, child, kind) in children {
                let separator: &[u8] = if path.is_empty() { b"" } else { b"/" };
                assert_eq!(u32::from(kind), image.inode(child).entry_type());
                pending.push(([path.as_slice(), separator, &name].concat(), child, number));
            }
        }
        *names.entry(number).or_default() += 1;
        let first = first_names.entry(number).or_insert_with(|| path.clone());
        *first = first.clone().min(path.clone());
        numbers.insert(path.clone(), number);
        listing.insert(path, inode.node);
    }
    for (path, node) in &mut listing {
        let number = numbers[path];
        node.first_name = first_names[&number].clone();
        if node.content != Content::Directory {
            assert_eq!(node.nlink, names[&number], "links of {}", String::from_utf8_lossy(path));
        }
    }
    assert_eq!(names.len() as u64, image.inodes, "inodes in the superblock");
    listing
}

struct Image<'a> {
    bytes: &'a [u8],
    root: u64,
    meta: u64,
    inodes: u64,
}

struct Inode {
    node: Node,
    /// Type bits of the mode.
    kind: u32,
    data: Vec<u8>,
}

impl Inode {
    fn entry_type(&self) -> u32 {
        match self.kind {
            0o100_000 => 1,
            0o040_000 => 2,
            0o020_000 => 3,
            0o060_000 => 4,
            0o010_000 => 5,
            0o120_000 => 7,
            other => panic!("inode of type {other:o}"),
        }
    }
}

impl<'a> Image<'a> {
    fn open(bytes: &'a [u8]) -> Self {
        assert_eq!(bytes.len() % BLOCK, 0);
        let mut block = bytes[1024..BLOCK].to_vec();
        assert_eq!(le(&block[..4]), 0xe0f5_e1e2, "magic");
        let stored = le(&block[4..8]);
        block[4..8].fill(0);
        let crc = block.iter().fold(u32::MAX, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ (0x82f6_3b78 * (crc & 1)))
        });
        assert_eq!(stored, u64::from(crc), "checksum");
        assert_eq!((block[12], block[13]), (12, 0), "block size and extensions");
        assert_eq!(le(&block[36..40]), (bytes.len() / BLOCK) as u64, "blocks");
        assert_eq!(le(&block[80..84]) & !4, 0, "features that need a newer kernel");
        let meta = le(&block[40..44]) * BLOCK as u64;
        Self { bytes, root: le(&block[14..16]), meta, inodes: le(&block[16..24]) }
    }

    fn inode(&self, number: u64) -> Inode {
        let at = (self.meta + number * 32) as usize;
        let raw = &self.bytes[at..at + 64];
        let field = |from: usize, len: usize| le(&raw[from..from + len]);
        let format = field(0, 2);
        assert_eq!(format & 1, 1, "extended inode");
        let icount = field(2, 2) as usize;
        let xattr_bytes = if icount == 0 { 0 } else { 12 + 4 * (icount - 1) };
        let behind = at + 64 + xattr_bytes;
        let mode = field(4, 2) as u32;
        let kind = mode & 0o170_000;
        let size = field(8, 8) as usize;
        let location = field(16, 4);
        let is_device = kind == 0o020_000 || kind == 0o060_000 || kind == 0o010_000;
        let data = match format >> 1 {
            0 if is_device || size == 0 => Vec::new(),
            0 => self.bytes[location as usize * BLOCK..][..size].to_vec(),
            2 => self.inline(size, location, at, behind),
            4 => self.chunks(size, location, behind),
            other => panic!("layout {other}"),
        };
        let number = location as u32;
        let device = (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xfff00);
        let content = match kind {
            0o100_000 => Content::File(data.clone()),
            0o040_000 => Content::Directory,
            0o120_000 => Content::Symlink(data.clone()),
            0o020_000 => Content::CharDevice(device.0, device.1),
            0o060_000 => Content::BlockDevice(device.0, device.1),
            _ => Content::Fifo,
        };
        let node = Node {
            mode: (mode & 0o7777) as u16,
            uid: field(24, 4) as u32,
            gid: field(28, 4) as u32,
            mtime: (field(32, 8).cast_signed(), field(40, 4) as u32),
            xattrs: xattrs(&self.bytes[at + 64..behind]),
            first_name: Vec::new(),
            nlink: field(44, 4) as u32,
            content,
        };
        Inode { node, kind, data }
    }

    /// Whole blocks at their address, the rest behind the inode and in its block.
    fn inline(&self, size: usize, location: u64, at: usize, behind: usize) -> Vec<u8> {
        let tail = size % BLOCK;
        assert!(tail > 0, "nothing inline");
        assert_eq!(at / BLOCK, (behind + tail - 1) / BLOCK, "inline data crosses a block");
        let whole = size - tail;
        let start = if whole > 0 { location as usize * BLOCK } else { 0 };
        [&self.bytes[start..start + whole], &self.bytes[behind..behind + tail]].concat()
    }

    fn chunks(&self, size: usize, location: u64, behind: usize) -> Vec<u8> {
        assert_eq!(location & !0x1f, 0, "a map of plain addresses");
        let chunk = BLOCK << location;
        let mut data = Vec::new();
        for index in 0..size.div_ceil(chunk) {
            let at = behind.next_multiple_of(4) + index * 4;
            let address = le(&self.bytes[at..at + 4]);
            let len = chunk.min(size - data.len());
            if address == 0xffff_ffff {
                data.resize(data.len() + len, 0);
            } else {
                data.extend_from_slice(&self.bytes[address as usize * BLOCK..][..len]);
            }
        }
        data
    }

    /// Names, inode numbers and types, without `.` and `..`.
    fn directory(&self, number: u64, parent: u64, inode: &Inode) -> Vec<(Vec<u8>, u64, u8)> {
        let mut all = Vec::new();
        let mut first_of_blocks = Vec::new();
        for block in inode.data.chunks(BLOCK) {
            let names_at = le(&block[8..10]) as usize;
            assert_eq!(names_at % 12, 0);
            let count = names_at / 12;
            let offset = |index: usize| match index < count {
                true => le(&block[index * 12 + 8..index * 12 + 10]) as usize,
                false => block.len(),
            };
            first_of_blocks.push(all.len());
            for index in 0..count {
                let entry = &block[index * 12..index * 12 + 12];
                let name = block[offset(index)..offset(index + 1)].split(|byte| *byte == 0).next().unwrap();
                assert!(!name.is_empty() && name.len() <= 255 && !name.contains(&b'/'));
                all.push((name.to_vec(), le(&entry[..8]), entry[10]));
            }
        }
        assert!(all.is_sorted_by(|a, b| a.0 < b.0), "names are sorted and unique");
        let special = |name: &[u8], number| all.contains(&(name.to_vec(), number, 2));
        assert!(special(b".", number) && special(b"..", parent), "dot and dot-dot");
        all.retain(|(name, ..)| name != b"." && name != b"..");
        all
    }
}

fn xattrs(mut body: &[u8]) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut xattrs = BTreeMap::new();
    if body.is_empty() {
        return xattrs;
    }
    assert_eq!(body[4], 0, "no shared attributes");
    body = &body[12..];
    while !body.is_empty() {
        let (name_len, value_len) = (usize::from(body[0]), le(&body[2..4]) as usize);
        let prefix: &[u8] = match body[1] {
            1 => b"user.",
            2 => b"system.posix_acl_access",
            3 => b"system.posix_acl_default",
            4 => b"trusted.",
            6 => b"security.",
            other => panic!("attribute prefix {other}"),
        };
        let (name, value) = body[4..4 + name_len + value_len].split_at(name_len);
        xattrs.insert([prefix, name].concat(), value.to_vec());
        body = &body[(4 + name_len + value_len).next_multiple_of(4)..];
    }
    xattrs
}
