//! A reader for the outer archive of `docker save`: names, kinds and sizes of members, and nothing else.
//!
//! The archive is hostile. Nothing is created from its names; they are only compared. Understood are ustar, GNU
//! long names and the pax keys `path`, `linkpath` and `size`; sparse members, devices and pipes are refused.

use std::io::{self, Read};

use crate::error::{ImageError, Result, clean};

/// Bytes of a header and unit of padding.
const BLOCK: usize = 512;
/// Longest name of a member.
const MAX_NAME: usize = 512;
/// Largest pax header or GNU long name.
const MAX_EXTENSION: u64 = 64 << 10;
/// Most members, headers included.
const MAX_MEMBERS: u64 = 65_536;

/// Kind of a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A file; its content can be read.
    File,
    /// A directory.
    Directory,
    /// A symbolic link to this name, as written in the archive.
    Symlink(String),
}

/// A member of the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    /// Normalised: relative, no `.`, `..` or empty parts.
    pub(crate) name: String,
    pub(crate) kind: Kind,
    /// Bytes of content, as declared.
    pub(crate) size_bytes: u64,
}

/// Reads members one after the other; content is read from the archive itself ([`Archive`] is a reader of the
/// current member).
#[derive(Debug)]
pub(crate) struct Archive<R> {
    reader: R,
    /// Bytes left of the current member's content.
    left: u64,
    /// Padding after it.
    padding: u64,
    members: u64,
}

/// What extension headers say about the next member.
#[derive(Debug, Default)]
struct Extension {
    name: Option<String>,
    link: Option<String>,
    size_bytes: Option<u64>,
}

impl<R: Read> Archive<R> {
    pub(crate) fn new(reader: R) -> Self {
        Self { reader, left: 0, padding: 0, members: 0 }
    }

    /// The next member, skipping what is left of the current one; `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Member>> {
        let mut extension = Extension::default();
        loop {
            self.skip()?;
            let mut block = [0; BLOCK];
            if !self.read_block(&mut block)? || block.iter().all(|byte| *byte == 0) {
                return Ok(None);
            }
            self.members += 1;
            if self.members > MAX_MEMBERS {
                return Err(bad(format!("it has more than {MAX_MEMBERS} members")));
            }
            let header = Header(&block);
            header.check()?;
            let size_bytes = header.size()?;
            match header.kind() {
                b'x' => self.read_pax(size_bytes, &mut extension)?,
                b'g' => self.enter(size_bytes),
                b'L' => extension.name = Some(self.read_long_name(size_bytes)?),
                b'K' => extension.link = Some(self.read_long_name(size_bytes)?),
                kind => return self.member(&header, kind, extension, size_bytes).map(Some),
            }
        }
    }

    /// Forms a member from its header and what went before it.
    fn member(
        &mut self,
        header: &Header<'_>,
        kind: u8,
        extension: Extension,
        size_bytes: u64,
    ) -> Result<Member> {
        let raw = match extension.name {
            Some(name) => name,
            None => header.name()?,
        };
        let name =
            normalise(&raw).ok_or_else(|| bad(format!("member name \"{}\" is not allowed", clean(&raw))))?;
        let size_bytes = extension.size_bytes.unwrap_or(size_bytes);
        let kind = match kind {
            0 | b'0' | b'7' if raw.ends_with('/') => Kind::Directory,
            0 | b'0' | b'7' => Kind::File,
            b'5' => Kind::Directory,
            b'2' => Kind::Symlink(match extension.link {
                Some(link) => link,
                None => header.link()?,
            }),
            b'1' => return Err(bad(format!("member \"{}\" is a hard link", clean(&name)))),
            other => return Err(bad(format!("member \"{}\" is of kind {other:#04x}", clean(&name)))),
        };
        // Some writers give directories and links a size; no content follows those.
        let size_bytes = if kind == Kind::File { size_bytes } else { 0 };
        self.enter(size_bytes);
        Ok(Member { name, kind, size_bytes })
    }

    /// Notes that this many bytes of content come next.
    fn enter(&mut self, size_bytes: u64) {
        self.left = size_bytes;
        self.padding = (BLOCK as u64 - size_bytes % BLOCK as u64) % BLOCK as u64;
    }

    /// Skips the rest of the current member and its padding.
    fn skip(&mut self) -> Result<()> {
        let rest = self.left.saturating_add(self.padding);
        (self.left, self.padding) = (0, 0);
        let skipped = io::copy(&mut (&mut self.reader).take(rest), &mut io::sink())
            .map_err(|source| ImageError::ArchiveRead { source })?;
        if skipped < rest {
            return Err(bad("it ends in the middle of a member"));
        }
        Ok(())
    }

    /// Reads one block; `false` at the end of the input.
    fn read_block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool> {
        let mut filled = 0;
        while filled < BLOCK {
            match self.reader.read(block.get_mut(filled..).unwrap_or_default()) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(bad("it ends in the middle of a header")),
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(ImageError::ArchiveRead { source }),
            }
        }
        Ok(true)
    }

    /// Reads the content of an extension header.
    fn read_extension(&mut self, size_bytes: u64) -> Result<Vec<u8>> {
        if size_bytes > MAX_EXTENSION {
            return Err(bad(format!(
                "it has an extension header of {size_bytes} bytes, the limit is {MAX_EXTENSION}"
            )));
        }
        self.enter(size_bytes);
        let mut content = Vec::new();
        self.read_to_end(&mut content).map_err(|source| ImageError::ArchiveRead { source })?;
        Ok(content)
    }

    fn read_long_name(&mut self, size_bytes: u64) -> Result<String> {
        let content = self.read_extension(size_bytes)?;
        text(content.split(|byte| *byte == 0).next().unwrap_or_default())
    }

    /// Reads records of the form `<length> <key>=<value>\n`.
    fn read_pax(&mut self, size_bytes: u64, extension: &mut Extension) -> Result<()> {
        let content = self.read_extension(size_bytes)?;
        let malformed = || bad("it has a malformed pax header");
        let mut rest = content.as_slice();
        while !rest.is_empty() {
            let space = rest.iter().position(|byte| *byte == b' ').ok_or_else(malformed)?;
            let digits = rest.get(..space).and_then(|digits| std::str::from_utf8(digits).ok());
            let length: usize = digits.and_then(|digits| digits.parse().ok()).ok_or_else(malformed)?;
            let record = rest
                .get(space + 1..length)
                .and_then(|record| record.strip_suffix(b"\n"))
                .ok_or_else(malformed)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(malformed)?;
            let (key, value) =
                (record.get(..equals).unwrap_or_default(), record.get(equals + 1..).unwrap_or_default());
            match key {
                b"path" => extension.name = Some(text(value)?),
                b"linkpath" => extension.link = Some(text(value)?),
                b"size" => extension.size_bytes = Some(text(value)?.parse().map_err(|_| malformed())?),
                _ if key.starts_with(b"GNU.sparse") => return Err(bad("it has a sparse member")),
                _ => {}
            }
            rest = rest.get(length..).unwrap_or_default();
        }
        Ok(())
    }
}

/// Reads the current member's content.
impl<R: Read> Read for Archive<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 || buffer.is_empty() {
            return Ok(0);
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.reader.read(buffer.get_mut(..most).unwrap_or_default())?;
        if read == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ends in the middle of a member"));
        }
        self.left -= read as u64;
        Ok(read)
    }
}

/// A header block.
struct Header<'a>(&'a [u8; BLOCK]);

impl Header<'_> {
    fn field(&self, from: usize, len: usize) -> &[u8] {
        self.0.get(from..from + len).unwrap_or_default()
    }

    /// Compares the checksum: the sum of all bytes with the checksum's own taken as spaces.
    fn check(&self) -> Result<()> {
        let sum: u64 = self.0.iter().map(|byte| u64::from(*byte)).sum();
        let own: u64 = self.field(148, 8).iter().map(|byte| u64::from(*byte)).sum();
        if octal(self.field(148, 8)) == Some(sum - own + 8 * u64::from(b' ')) {
            return Ok(());
        }
        Err(bad("it is no tar file, or damaged: wrong checksum of a header"))
    }

    fn kind(&self) -> u8 {
        self.0.get(156).copied().unwrap_or_default()
    }

    /// Octal text, or big-endian binary if the first bit is set.
    fn size(&self) -> Result<u64> {
        let field = self.field(124, 12);
        let size = match field.split_first() {
            Some((0x80, rest)) => {
                let (high, low) = rest.split_at_checked(3).unwrap_or_default();
                let low = low.try_into().map(u64::from_be_bytes).ok();
                low.filter(|_| high.iter().all(|byte| *byte == 0))
            }
            _ => octal(field),
        };
        // Bounded so that sums with it cannot overflow; whether it is too large is decided by what it is.
        size.filter(|size| *size <= i64::MAX as u64).ok_or_else(|| bad("a member has a malformed size"))
    }

    fn name(&self) -> Result<String> {
        let name = text(until_zero(self.field(0, 100)))?;
        let prefix = until_zero(self.field(345, 155));
        if self.field(257, 6) == b"ustar\0" && !prefix.is_empty() {
            return Ok(format!("{}/{name}", text(prefix)?));
        }
        Ok(name)
    }

    fn link(&self) -> Result<String> {
        text(until_zero(self.field(157, 100)))
    }
}

/// A name without `.`, empty parts and trailing slashes; `None` if it is absolute, has `..`, or is too long. The
/// directory itself (`./`) is the empty name.
pub(crate) fn normalise(name: &str) -> Option<String> {
    if name.starts_with('/') || name.len() > MAX_NAME || name.chars().any(char::is_control) {
        return None;
    }
    let parts: Vec<&str> = name.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    (!parts.contains(&"..")).then(|| parts.join("/"))
}

/// A number in octal, surrounded by spaces or zero bytes; an empty field is zero.
fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(field).ok()?.trim_matches(['\0', ' ']);
    if text.is_empty() {
        return Some(0);
    }
    text.bytes().all(|byte| matches!(byte, b'0'..=b'7')).then(|| u64::from_str_radix(text, 8).ok())?
}

fn until_zero(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn text(bytes: &[u8]) -> Result<String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| bad("it has a name that is not UTF-8"))
}

fn bad(why: impl Into<String>) -> ImageError {
    ImageError::Archive { why: why.into() }
}
