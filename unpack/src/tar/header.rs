//! The 512 bytes in front of every entry: `pax(1)` of POSIX, "ustar Interchange Format", and GNU's variant of it.

use super::{BLOCK, EntryKind};
use crate::error::ArchiveError;

/// A header whose checksum is right.
pub(super) struct Header {
    block: [u8; BLOCK],
}

/// Offset and length of each field used here.
type Field = (usize, usize);
const NAME: Field = (0, 100);
const MODE: Field = (100, 8);
const UID: Field = (108, 8);
const GID: Field = (116, 8);
const SIZE: Field = (124, 12);
const MTIME: Field = (136, 12);
const CHECKSUM: Field = (148, 8);
const KIND: Field = (156, 1);
const LINK: Field = (157, 100);
const MAGIC: Field = (257, 6);
const DEV_MAJOR: Field = (329, 8);
const DEV_MINOR: Field = (337, 8);
const PREFIX: Field = (345, 155);
/// star's archives end their shorter prefix here and mark the header at its end.
const STAR_PREFIX: Field = (345, 131);
const STAR_MAGIC: Field = (508, 4);
const GNU_SPARSE_MAP: Field = (386, 96);
const GNU_SPARSE_MORE: Field = (482, 1);
const GNU_REAL_SIZE: Field = (483, 12);

impl Header {
    /// Checks the checksum, in both ways that were ever used: sums of unsigned and of signed bytes.
    pub(super) fn parse(block: [u8; BLOCK]) -> Result<Self, ArchiveError> {
        let header = Self { block };
        let stored = header.number(CHECKSUM, "checksum")?;
        let (from, to) = (CHECKSUM.0, CHECKSUM.0 + CHECKSUM.1);
        let (mut unsigned, mut signed) = (0, 0);
        for (at, byte) in header.block.iter().enumerate() {
            let byte = if (from..to).contains(&at) { b' ' } else { *byte };
            unsigned += i64::from(byte);
            signed += i64::from(byte.cast_signed());
        }
        if stored == unsigned || stored == signed { Ok(header) } else { Err(ArchiveError::Checksum) }
    }

    pub(super) fn kind(&self) -> u8 {
        self.field(KIND).first().copied().unwrap_or(0)
    }

    pub(super) fn entry_kind(&self) -> Result<EntryKind, ArchiveError> {
        match self.kind() {
            // Before POSIX a directory was told by the slash at the end of its name.
            0 if self.path().ends_with(b"/") => Ok(EntryKind::Directory),
            0 | b'0' | b'7' => Ok(EntryKind::File),
            b'S' if self.is_gnu() => Ok(EntryKind::File),
            b'1' => Ok(EntryKind::HardLink),
            b'2' => Ok(EntryKind::Symlink),
            b'3' => Ok(EntryKind::CharDevice),
            b'4' => Ok(EntryKind::BlockDevice),
            b'5' => Ok(EntryKind::Directory),
            b'6' => Ok(EntryKind::Fifo),
            other => Err(ArchiveError::EntryType(other)),
        }
    }

    pub(super) fn path(&self) -> Vec<u8> {
        let name = until_nul(self.field(NAME));
        let prefix = match self.field(MAGIC) {
            b"ustar\0" if self.field(STAR_MAGIC) == b"tar\0" => until_nul(self.field(STAR_PREFIX)),
            b"ustar\0" => until_nul(self.field(PREFIX)),
            _ => &[],
        };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    pub(super) fn link(&self) -> Vec<u8> {
        until_nul(self.field(LINK)).to_vec()
    }

    pub(super) fn mode(&self) -> Result<u16, ArchiveError> {
        let mode = self.number(MODE, "mode")? & 0o7777;
        u16::try_from(mode).map_err(|_| ArchiveError::Number("mode"))
    }

    pub(super) fn uid(&self) -> Result<i64, ArchiveError> {
        self.number(UID, "uid")
    }

    pub(super) fn gid(&self) -> Result<i64, ArchiveError> {
        self.number(GID, "gid")
    }

    pub(super) fn size(&self) -> Result<u64, ArchiveError> {
        self.unsigned(SIZE, "size")
    }

    pub(super) fn mtime(&self) -> Result<i64, ArchiveError> {
        self.number(MTIME, "mtime")
    }

    pub(super) fn dev_major(&self) -> Result<u64, ArchiveError> {
        self.unsigned(DEV_MAJOR, "devmajor")
    }

    pub(super) fn dev_minor(&self) -> Result<u64, ArchiveError> {
        self.unsigned(DEV_MINOR, "devminor")
    }

    /// Apparent size of a file in GNU's old sparse format.
    pub(super) fn gnu_real_size(&self) -> Result<u64, ArchiveError> {
        self.unsigned(GNU_REAL_SIZE, "realsize")
    }

    /// The first part of a map in GNU's old sparse format, and whether more blocks of it follow.
    pub(super) fn gnu_sparse_map(&self) -> (&[u8], bool) {
        (self.field(GNU_SPARSE_MAP), self.field(GNU_SPARSE_MORE) != [0])
    }

    fn is_gnu(&self) -> bool {
        self.field(MAGIC) == b"ustar "
    }

    fn field(&self, (at, len): Field) -> &[u8] {
        self.block.get(at..at + len).unwrap_or_default()
    }

    fn number(&self, field: Field, name: &'static str) -> Result<i64, ArchiveError> {
        number(self.field(field)).ok_or(ArchiveError::Number(name))
    }

    fn unsigned(&self, field: Field, name: &'static str) -> Result<u64, ArchiveError> {
        u64::try_from(self.number(field, name)?).map_err(|_| ArchiveError::Number(name))
    }
}

/// `bytes` up to their first NUL.
pub(super) fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A number as octal digits, or in two's complement when the first bit is set (GNU's "base 256").
pub(super) fn number(field: &[u8]) -> Option<i64> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => binary(field),
        _ => octal(field),
    }
}

fn octal(field: &[u8]) -> Option<i64> {
    let blank = |byte: &u8| *byte == b' ' || *byte == 0;
    let start = field.iter().position(|byte| !blank(byte)).unwrap_or(field.len());
    let digits = until_nul(field.get(start..)?).trim_ascii_end();
    digits.iter().try_fold(0_i64, |value, byte| match byte {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    })
}

fn binary(field: &[u8]) -> Option<i64> {
    let negative = field.first()? & 0x40 != 0;
    let start = if negative { -1 } else { 0 };
    field.iter().enumerate().try_fold(start, |value: i64, (at, byte)| {
        // The topmost bit marks the format; the sign is the one below it.
        let byte = match (at, negative) {
            (0, false) => byte & 0x7f,
            _ => *byte,
        };
        value.checked_mul(256)?.checked_add(i64::from(byte))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_numbers_with_all_the_usual_padding() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"644\0junk"), Some(0o644));
        assert_eq!(number(b"        "), Some(0));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(number(b"77777777777\0"), Some(0o77_777_777_777));
        assert_eq!(number(b"-000001\0"), None);
        assert_eq!(number(b"0000648\0"), None);
        assert_eq!(number(b"0x00064\0"), None);
        assert_eq!(number(b"7777777777777777777777777777"), None);
    }

    #[test]
    fn binary_numbers_of_both_signs() {
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]), Some(1 << 32));
        assert_eq!(number(&[0xff; 12]), Some(-1));
        assert_eq!(number(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]), Some(-256));
        assert_eq!(number(&[0x80, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), Some(0x7f_ffff_ffff_ffff));
        assert_eq!(number(&[0x80, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(number(&[0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), None);
    }
}
