//! Directory blocks: in each, first the entries (12 bytes), then their names; sorted by name over the whole
//! directory, so that the kernel finds a name by bisection of blocks and then of entries.

use super::BLOCK;

/// Length of an entry: inode number, offset of its name, type.
const ENTRY_BYTES: usize = 12;

/// Types in entries.
pub(super) const REGULAR: u8 = 1;
pub(super) const DIRECTORY: u8 = 2;
pub(super) const CHAR_DEVICE: u8 = 3;
pub(super) const BLOCK_DEVICE: u8 = 4;
pub(super) const FIFO: u8 = 5;
pub(super) const SYMLINK: u8 = 7;

/// A name, the number of its inode, and its type.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) name: &'a [u8],
    pub(super) number: u64,
    pub(super) file_type: u8,
}

/// Length of a directory with `names`, which must be sorted and include `.` and `..`.
pub(super) fn size<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let (mut full, mut used) = (0, 0);
    for name in names {
        let need = ENTRY_BYTES + name.len();
        if used + need > BLOCK {
            full += BLOCK as u64;
            used = 0;
        }
        used += need;
    }
    full + used as u64
}

/// The blocks of a directory. All but the last are filled up to a whole block.
pub(super) struct Blocks<'e, 'a> {
    rest: &'e [Entry<'a>],
}

impl<'e, 'a> Blocks<'e, 'a> {
    pub(super) fn new(entries: &'e [Entry<'a>]) -> Self {
        Self { rest: entries }
    }
}

impl Iterator for Blocks<'_, '_> {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        if self.rest.is_empty() {
            return None;
        }
        let mut used = 0;
        let fits = self.rest.iter().take_while(|entry| {
            used += ENTRY_BYTES + entry.name.len();
            used <= BLOCK
        });
        let (now, later) = self.rest.split_at(fits.count());
        self.rest = later;
        let mut block = Vec::with_capacity(BLOCK);
        let mut name_at = now.len() * ENTRY_BYTES;
        for entry in now {
            block.extend_from_slice(&entry.number.to_le_bytes());
            block.extend_from_slice(&u16::try_from(name_at).unwrap_or(u16::MAX).to_le_bytes());
            block.extend_from_slice(&[entry.file_type, 0]);
            name_at += entry.name.len();
        }
        for entry in now {
            block.extend_from_slice(entry.name);
        }
        if !later.is_empty() {
            block.resize(BLOCK, 0);
        }
        Some(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(names: &[Vec<u8>]) -> Vec<usize> {
        let entries: Vec<_> =
            names.iter().map(|name| Entry { name, number: 0x24, file_type: REGULAR }).collect();
        let lens: Vec<_> = Blocks::new(&entries).map(|block| block.len()).collect();
        assert_eq!(size(names.iter().map(Vec::as_slice)), lens.iter().sum::<usize>() as u64);
        lens
    }

    #[test]
    fn blocks_are_filled_to_the_last_byte() {
        assert_eq!(check(&[b".".to_vec(), b"..".to_vec()]), [27]);
        // 16 entries of 256 bytes fill a block exactly.
        assert_eq!(check(&vec![vec![b'x'; 244]; 16]), [4096]);
        assert_eq!(check(&vec![vec![b'x'; 244]; 17]), [4096, 256]);
        assert_eq!(check(&vec![vec![b'x'; 255]; 31]), [4096, 4096, 267]);
    }

    #[test]
    fn entries_point_at_their_names() {
        let entries = [
            Entry { name: b".", number: 36, file_type: DIRECTORY },
            Entry { name: b"etc", number: 0x0102_0304_0506, file_type: DIRECTORY },
        ];
        let block = Blocks::new(&entries).next().unwrap();
        let expected =
            [[36, 0, 0, 0, 0, 0, 0, 0, 24, 0, 2, 0], [6, 5, 4, 3, 2, 1, 0, 0, 25, 0, 2, 0]].concat();
        assert_eq!(block, [expected.as_slice(), b".etc"].concat());
    }
}
