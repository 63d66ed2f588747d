//! Writes tar streams, good ones and others.

/// One entry. Start with a constructor and change what the case is about.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) kind: u8,
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) dev: (u32, u32),
    pub(crate) data: Vec<u8>,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Entry {
    pub(crate) fn new(kind: u8, path: &str) -> Self {
        let mode = if kind == b'5' { 0o755 } else { 0o644 };
        Self {
            kind,
            path: path.into(),
            link: Vec::new(),
            mode,
            uid: 0,
            gid: 0,
            mtime: (1_600_000_000, 0),
            dev: (0, 0),
            data: Vec::new(),
            xattrs: Vec::new(),
        }
    }

    pub(crate) fn file(path: &str, data: &[u8]) -> Self {
        Self { data: data.to_vec(), ..Self::new(b'0', path) }
    }

    pub(crate) fn dir(path: &str) -> Self {
        Self::new(b'5', path)
    }

    pub(crate) fn symlink(path: &str, target: &str) -> Self {
        Self { link: target.into(), ..Self::new(b'2', path) }
    }

    pub(crate) fn hard_link(path: &str, target: &str) -> Self {
        Self { link: target.into(), ..Self::new(b'1', path) }
    }

    /// The entry with the extended header that it needs, in pax format.
    pub(crate) fn pax(&self) -> Vec<u8> {
        let mut records = Vec::new();
        if self.path.len() > 100 {
            records.extend(record(b"path", &self.path));
        }
        if self.link.len() > 100 {
            records.extend(record(b"linkpath", &self.link));
        }
        for (key, id) in [(b"uid".as_slice(), self.uid), (b"gid", self.gid)] {
            if id >= 1 << 21 {
                records.extend(record(key, id.to_string().as_bytes()));
            }
        }
        if self.mtime.1 != 0 || self.mtime.0 < 0 {
            records.extend(record(b"mtime", time_text(self.mtime).as_bytes()));
        }
        for (name, value) in &self.xattrs {
            records.extend(record(&[b"SCHILY.xattr.", name.as_slice()].concat(), value));
        }
        let mut bytes = if records.is_empty() { Vec::new() } else { extended(b'x', &records) };
        bytes.extend(self.plain());
        bytes
    }

    /// The entry with GNU's long names, and base-256 numbers where octal ones do not fit.
    pub(crate) fn gnu(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (kind, name) in [(b'L', &self.path), (b'K', &self.link)] {
            if name.len() > 100 {
                bytes.extend(extended(kind, &[name.as_slice(), b"\0"].concat()));
            }
        }
        let mut header = self.header();
        header.set(257, b"ustar  \0");
        header.set(108, &binary(u64::from(self.uid), 8));
        header.set(116, &binary(u64::from(self.gid), 8));
        header.set(136, &binary(self.mtime.0 as u64, 12));
        bytes.extend(header.finish());
        bytes.extend(padded(&self.data));
        bytes
    }

    /// Header and content only, whatever does not fit cut off.
    pub(crate) fn plain(&self) -> Vec<u8> {
        [self.header().finish().to_vec(), padded(&self.data)].concat()
    }

    pub(crate) fn header(&self) -> Header {
        let mut header = Header([0; 512]);
        header.set(0, &self.path[..self.path.len().min(100)]);
        header.octal(100, 8, u64::from(self.mode));
        header.octal(108, 8, u64::from(self.uid) % (1 << 21));
        header.octal(116, 8, u64::from(self.gid) % (1 << 21));
        header.octal(124, 12, self.data.len() as u64);
        header.octal(136, 12, self.mtime.0.max(0) as u64);
        header.set(156, &[self.kind]);
        header.set(157, &self.link[..self.link.len().min(100)]);
        header.set(257, b"ustar\x0000");
        header.octal(329, 8, u64::from(self.dev.0));
        header.octal(337, 8, u64::from(self.dev.1));
        header
    }
}

/// A header to be tampered with.
pub(crate) struct Header(pub(crate) [u8; 512]);

impl Header {
    pub(crate) fn set(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn octal(&mut self, at: usize, len: usize, value: u64) {
        let text = format!("{value:0width$o}\0", width = len - 1);
        self.set(at, text.as_bytes());
    }

    /// The header with its checksum.
    pub(crate) fn finish(mut self) -> [u8; 512] {
        self.set(148, b"        ");
        let sum: u64 = self.0.iter().map(|byte| u64::from(*byte)).sum();
        self.set(148, format!("{sum:06o}\0 ").as_bytes());
        self.0
    }
}

/// A time as pax writes it: the fraction goes in the direction of the sign.
fn time_text((sec, nsec): (i64, u32)) -> String {
    match nsec {
        0 => sec.to_string(),
        _ if sec >= 0 => format!("{sec}.{nsec:09}"),
        _ => format!("-{}.{:09}", -(sec + 1), 1_000_000_000 - nsec),
    }
}

/// One record of a pax header.
pub(crate) fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let body = [b" ", key, b"=", value, b"\n"].concat();
    let mut len = body.len() + 1;
    while len.to_string().len() + body.len() != len {
        len += 1;
    }
    [len.to_string().as_bytes(), &body].concat()
}

/// A header of `kind` whose content is `payload`.
pub(crate) fn extended(kind: u8, payload: &[u8]) -> Vec<u8> {
    Entry { data: payload.to_vec(), ..Entry::new(kind, "././@Extended") }.plain()
}

/// A number in GNU's base 256.
pub(crate) fn binary(value: u64, len: usize) -> Vec<u8> {
    let negative = value.cast_signed() < 0;
    let mut bytes = vec![if negative { 0xff } else { 0 }; len];
    let digits = value.to_be_bytes();
    let from = len.saturating_sub(8);
    bytes[from..].copy_from_slice(&digits[8 - (len - from)..]);
    bytes[0] |= 0x80;
    bytes
}

pub(crate) fn padded(data: &[u8]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// A whole archive of parts, with its two zero blocks.
pub(crate) fn archive(parts: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = parts.concat();
    bytes.extend_from_slice(&[0; 1024]);
    bytes
}

/// A whole archive of entries in pax format.
pub(crate) fn tar(entries: &[Entry]) -> Vec<u8> {
    archive(&entries.iter().map(Entry::pax).collect::<Vec<_>>())
}
