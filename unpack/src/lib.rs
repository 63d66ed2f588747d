//! Layer tarballs in, one read-only EROFS image out.
//!
//! Runs in a throw-away guest: everything it reads comes from an untrusted image, everything it keeps is bounded by
//! [`Limits`]. It knows no paths, devices or processes of its own; layers are readers and the image goes to a
//! [`BlockSink`].
//!
//! ```text
//! layers ─▶ decompress ─▶ stream (sha256, bounds) ─▶ tar ─▶ apply ─▶ tree ──────────┐
//!                                                     └─ content of files ─▶ erofs ─┴─▶ output
//! ```
//! One pass, bottom layer first. Content goes straight to the image as it is read; the tree of names and inodes stays
//! in memory (about 200 bytes per file) and is written at the end. Content that an upper layer replaces stays in the
//! image as dead blocks, which [`Summary::dead_bytes`] counts. The same layers give the same image, byte for byte.

#![forbid(unsafe_code)]

mod apply;
mod decompress;
mod erofs;
mod error;
pub mod limits;
mod output;
mod resolve;
mod stream;
mod tar;
mod tree;
mod xattrs;

use std::error::Error;
use std::io::Read;

use sha2::{Digest as _, Sha256};

use apply::Applier;
pub use decompress::Compression;
use erofs::Image;
use error::Fault;
pub use error::{ArchiveError, Digest, EntryError, LimitExceeded, UnpackError};
use limits::Budget;
pub use limits::Limits;
pub use output::BlockSink;
use stream::LayerStream;
use tar::{Content, Piece, Tar};

/// One layer of an image.
#[derive(Debug)]
pub struct LayerInput<R> {
    /// The layer as it is stored; read to its end. To stop an unpack, let it fail.
    pub reader: R,
    /// How it is compressed.
    pub compression: Compression,
    /// SHA-256 of the uncompressed layer, from the image's configuration.
    pub diff_id: [u8; 32],
}

/// How far an unpack is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Index of the layer being read, bottom is 0.
    pub layer: u32,
    /// Bytes taken from that layer's reader.
    pub stored_bytes: u64,
    /// Bytes of its tar stream worked off.
    pub uncompressed_bytes: u64,
    /// Entries and implied directories of all layers so far.
    pub entries: u64,
}

/// A finished image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Length of the image, a multiple of 4096.
    pub image_bytes: u64,
    /// Files of all kinds in the image, each counted once however many names it has.
    pub inodes: u64,
    /// Layers read.
    pub layers: u32,
    /// Entries read, and directories that they implied.
    pub entries: u64,
    /// Bytes of all tar streams together.
    pub uncompressed_bytes: u64,
    /// Bytes of the image that hold content which upper layers replaced or removed.
    pub dead_bytes: u64,
    /// Extended attributes that the image cannot or must not hold.
    pub dropped_xattrs: u64,
    /// The volume's UUID, derived from the layers' digests.
    pub uuid: [u8; 16],
}

/// Bytes of a tar stream between two reports of progress.
const REPORT_BYTES: u64 = 1 << 20;

/// Unpacks `layers`, bottom first, into one EROFS image on `out`.
///
/// The image can be mounted only after this function has returned `Ok`: block 0 is cleared first and written last, each
/// time with a [`BlockSink::sync`] in between. `progress` is called about once per MiB and at the end of each layer.
///
/// # Errors
/// See [`UnpackError`]; [`UnpackError::is_image_fault`] tells whether trying again is of any use.
pub fn unpack<R, W, E>(
    layers: impl IntoIterator<Item = Result<LayerInput<R>, E>>,
    out: &mut W,
    limits: &Limits,
    progress: &mut dyn FnMut(Progress),
) -> Result<Summary, UnpackError>
where
    R: Read,
    W: BlockSink,
    E: Into<Box<dyn Error + Send + Sync>>,
{
    let mut unpacked = Unpacked {
        applier: Applier::new(limits),
        image: Image::begin(out, limits.max_image_bytes).map_err(|fault| fault.at(0, 0, b""))?,
        bytes: Budget::new("uncompressed bytes", limits.max_uncompressed_bytes),
        names: Sha256::new(),
    };
    let mut layer = 0;
    for input in layers {
        let input = input.map_err(|source| UnpackError::NextLayer { layer, source: source.into() })?;
        limits::check("layers", u64::from(layer) + 1, u64::from(limits.max_layers))
            .map_err(|source| UnpackError::Limit { layer, source })?;
        unpacked.layer(layer, input, limits, progress)?;
        layer += 1;
    }
    let Unpacked { applier: Applier { mut tree, xattrs, entries, .. }, image, bytes, names } = unpacked;
    let uuid = uuid(names);
    let finished = image.finish(&mut tree, &xattrs, uuid).map_err(|fault| fault.at(layer, 0, b"/"))?;
    Ok(Summary {
        image_bytes: finished.image_bytes,
        inodes: finished.inodes,
        layers: layer,
        entries: entries.used(),
        uncompressed_bytes: bytes.used(),
        dead_bytes: tree.dead_blocks() * erofs::BLOCK as u64,
        dropped_xattrs: xattrs.dropped(),
        uuid,
    })
}

/// What grows from layer to layer.
struct Unpacked<'l, 'o, W> {
    applier: Applier<'l>,
    image: Image<'o, W>,
    /// Uncompressed bytes of all layers.
    bytes: Budget,
    /// Hash of the layers' digests.
    names: Sha256,
}

impl<W: BlockSink> Unpacked<'_, '_, W> {
    fn layer<R: Read>(
        &mut self,
        layer: u32,
        input: LayerInput<R>,
        limits: &Limits,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), UnpackError> {
        let stream = LayerStream::new(input.reader, input.compression, &mut self.bytes)
            .map_err(|fault| fault.at(layer, 0, b""))?;
        let mut metered =
            Metered { tar: Tar::new(stream, limits), layer, entries: 0, next_report: 0, progress };
        // Older than any layer is number 0, the root as it is before there are layers.
        self.applier.tree.begin_layer(layer + 1);
        let mut path = Vec::new();
        let result = loop {
            match metered.tar.next_entry() {
                Ok(Some(entry)) => {
                    metered.entries = self.applier.entries.used();
                    metered.report(REPORT_BYTES);
                    if let Err(fault) = self.applier.apply(&entry, &mut metered, &mut self.image) {
                        path = entry.path;
                        break Err(fault);
                    }
                }
                Ok(None) => break metered.tar.stream().finish(),
                Err(fault) => break Err(fault),
            }
        };
        let actual = result.map_err(|fault| fault.at(layer, metered.tar.stream().offset(), &path))?;
        metered.entries = self.applier.entries.used();
        metered.report(0);
        let expected = Digest(input.diff_id);
        if actual != expected {
            return Err(UnpackError::Digest { layer, expected, actual });
        }
        self.names.update(input.diff_id);
        Ok(())
    }
}

/// Reports progress while a tar stream is read.
struct Metered<'t, 'p, R> {
    tar: Tar<'t, R>,
    layer: u32,
    entries: u64,
    next_report: u64,
    progress: &'p mut dyn FnMut(Progress),
}

impl<R: Read> Metered<'_, '_, R> {
    /// Reports if that is due; the next one is due `after` bytes.
    fn report(&mut self, after: u64) {
        let stream = self.tar.stream();
        let uncompressed_bytes = stream.offset();
        if after > 0 && uncompressed_bytes < self.next_report {
            return;
        }
        self.next_report = uncompressed_bytes.saturating_add(after);
        let (layer, entries) = (self.layer, self.entries);
        let stored_bytes = stream.stored_bytes();
        (self.progress)(Progress { layer, stored_bytes, uncompressed_bytes, entries });
    }
}

impl<R: Read> Content for Metered<'_, '_, R> {
    fn next_piece(&mut self, buf: &mut [u8]) -> Result<Piece, Fault> {
        self.report(REPORT_BYTES);
        self.tar.next_piece(buf)
    }
}

/// A UUID (version 8, RFC 9562) that names the layers.
fn uuid(names: Sha256) -> [u8; 16] {
    let digest: [u8; 32] = names.finalize().into();
    let mut uuid = [0; 16];
    for (to, from) in uuid.iter_mut().zip(digest) {
        *to = from;
    }
    let [.., version, _, variant, _, _, _, _, _, _, _] = &mut uuid;
    *version = *version & 0x0f | 0x80;
    *variant = *variant & 0x3f | 0x80;
    uuid
}
