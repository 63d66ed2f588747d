//! gzip, zstd or nothing: a layer's bytes as they are stored, turned into its tar stream.
//!
//! Both formats allow a stream of several members (gzip, RFC 1952 section 2.2) or frames (zstd, RFC 8878 section
//! 3.1), some of which may be skippable; lazily pullable layers consist of thousands of them.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Chain, Cursor, Read};
use std::rc::Rc;

use flate2::bufread::GzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use crate::error::ArchiveError;

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Look at the first bytes.
    #[default]
    Detect,
    /// A plain tar stream.
    None,
    /// gzip, of one or more members.
    Gzip,
    /// zstd, of one or more frames.
    Zstd,
}

/// Bytes asked of the layer's reader at a time.
const INPUT_BUFFER: usize = 128 << 10;
/// Bytes needed to recognise every format of [`detect`].
const MAGIC_BYTES: usize = 6;

/// The layer's reader with the bytes that detection took put back in front.
type Source<R> = BufReader<Chain<Cursor<Vec<u8>>, Counted<R>>>;

/// Counts what passes, for progress.
struct Counted<R> {
    inner: R,
    count: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.count.set(self.count.get().saturating_add(n as u64));
        Ok(n)
    }
}

/// Reads a layer's tar stream.
pub(crate) struct Decoder<R> {
    state: State<R>,
    stored_bytes: Rc<Cell<u64>>,
}

enum State<R> {
    Plain(Source<R>),
    Gzip(Box<GzDecoder<Source<R>>>),
    /// Between two members of gzip, or after the last.
    GzipGap(Source<R>),
    Zstd {
        source: Source<R>,
        frame: Box<FrameDecoder>,
    },
    /// Between two frames of zstd, or after the last.
    ZstdGap {
        source: Source<R>,
        frame: Box<FrameDecoder>,
    },
    /// An error was returned; nothing follows.
    Failed,
}

impl<R: Read> Decoder<R> {
    pub(crate) fn new(reader: R, compression: Compression) -> Result<Self, ArchiveError> {
        let stored_bytes = Rc::new(Cell::new(0));
        let mut counted = Counted { inner: reader, count: Rc::clone(&stored_bytes) };
        let mut magic = Vec::with_capacity(MAGIC_BYTES);
        let mut start = counted.by_ref().take(MAGIC_BYTES as u64);
        start.read_to_end(&mut magic).map_err(ArchiveError::Read)?;
        let compression = match compression {
            Compression::Detect => detect(&magic)?,
            told => told,
        };
        let source = BufReader::with_capacity(INPUT_BUFFER, Cursor::new(magic).chain(counted));
        let state = match compression {
            Compression::Detect | Compression::None => State::Plain(source),
            Compression::Gzip => State::Gzip(Box::new(GzDecoder::new(source))),
            Compression::Zstd => State::ZstdGap { source, frame: Box::new(FrameDecoder::new()) },
        };
        Ok(Self { state, stored_bytes })
    }

    /// Bytes taken from the layer's reader so far.
    pub(crate) fn stored_bytes(&self) -> u64 {
        self.stored_bytes.get()
    }

    /// Reads some bytes of the tar stream; 0 only at its end.
    pub(crate) fn read(&mut self, buf: &mut [u8]) -> Result<usize, ArchiveError> {
        loop {
            let (state, result) = std::mem::replace(&mut self.state, State::Failed).step(buf);
            self.state = state;
            match result {
                Ok(Some(n)) => return Ok(n),
                Ok(None) => {}
                Err(ArchiveError::Read(e) | ArchiveError::Decompress(e))
                    if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// What one step of a state yields: bytes, the end as `Some(0)`, or `None` to step again.
type Step = Result<Option<usize>, ArchiveError>;

impl<R: Read> State<R> {
    fn step(self, buf: &mut [u8]) -> (Self, Step) {
        match self {
            Self::Plain(mut source) => {
                let result = source.read(buf).map(Some).map_err(ArchiveError::Read);
                (Self::Plain(source), result)
            }
            Self::Gzip(mut member) => match member.read(buf) {
                Ok(0) if !buf.is_empty() => (Self::GzipGap(member.into_inner()), Ok(None)),
                result => (Self::Gzip(member), result.map(Some).map_err(ArchiveError::Decompress)),
            },
            Self::GzipGap(source) => gzip_gap(source),
            Self::Zstd { mut source, mut frame } => match zstd_read(&mut source, &mut frame, buf) {
                Ok(0) if !buf.is_empty() => (Self::ZstdGap { source, frame }, Ok(None)),
                result => (Self::Zstd { source, frame }, result.map(Some).map_err(ArchiveError::Decompress)),
            },
            Self::ZstdGap { source, frame } => zstd_gap(source, frame),
            Self::Failed => {
                let error = io::Error::new(io::ErrorKind::InvalidData, "stream failed before");
                (Self::Failed, Err(ArchiveError::Decompress(error)))
            }
        }
    }
}

/// After a member: the end, another member, or padding with zeros as some tools add.
fn gzip_gap<R: Read>(mut source: Source<R>) -> (State<R>, Step) {
    let (zeros, next) = match source.fill_buf() {
        Ok([]) => return (State::GzipGap(source), Ok(Some(0))),
        Ok(bytes) => (bytes.iter().take_while(|byte| **byte == 0).count(), bytes.len()),
        Err(e) => return (State::GzipGap(source), Err(ArchiveError::Read(e))),
    };
    source.consume(zeros);
    if zeros == next {
        return (State::GzipGap(source), Ok(None));
    }
    (State::Gzip(Box::new(GzDecoder::new(source))), Ok(None))
}

/// After a frame, or before the first: the end, another frame, or a skippable one.
fn zstd_gap<R: Read>(mut source: Source<R>, mut frame: Box<FrameDecoder>) -> (State<R>, Step) {
    match source.fill_buf() {
        Ok([]) => return (State::ZstdGap { source, frame }, Ok(Some(0))),
        Ok(_) => {}
        Err(e) => return (State::ZstdGap { source, frame }, Err(ArchiveError::Read(e))),
    }
    match frame.reset(&mut source) {
        Ok(()) => (State::Zstd { source, frame }, Ok(None)),
        Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
            match skip(&mut source, u64::from(length)) {
                Ok(()) => (State::ZstdGap { source, frame }, Ok(None)),
                Err(e) => (State::Failed, Err(ArchiveError::Decompress(e))),
            }
        }
        Err(e) => (State::Failed, Err(ArchiveError::Decompress(io::Error::other(e)))),
    }
}

fn skip(source: &mut impl Read, len: u64) -> io::Result<()> {
    let skipped = io::copy(&mut source.take(len), &mut io::sink())?;
    if skipped < len { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

/// Reads some bytes of the current frame; 0 only at its end.
fn zstd_read(source: &mut impl Read, frame: &mut FrameDecoder, buf: &mut [u8]) -> io::Result<usize> {
    while frame.can_collect() < buf.len() && !frame.is_finished() {
        let wanted = buf.len().saturating_sub(frame.can_collect());
        frame
            .decode_blocks(&mut *source, BlockDecodingStrategy::UptoBytes(wanted))
            .map_err(io::Error::other)?;
    }
    frame.read(buf)
}

/// Recognises the formats that a layer has, and those that it is likely to have by mistake.
fn detect(magic: &[u8]) -> Result<Compression, ArchiveError> {
    match magic {
        [0x1f, 0x8b, ..] => Ok(Compression::Gzip),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(Compression::Zstd),
        [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Ok(Compression::Zstd),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => Err(ArchiveError::Compression("xz")),
        [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41] => Err(ArchiveError::Compression("bzip2")),
        _ => Ok(Compression::None),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// Gives one byte at a time, the worst that a reader may do.
    struct Trickle<'a>(&'a [u8]);

    impl Read for Trickle<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let n = 1.min(buf.len());
            self.0.read(&mut buf[..n])
        }
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(data: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest)
    }

    fn decode(stored: &[u8]) -> Result<Vec<u8>, ArchiveError> {
        let mut decoder = Decoder::new(Trickle(stored), Compression::Detect)?;
        let mut out = Vec::new();
        let mut buf = [0; 1000];
        loop {
            match decoder.read(&mut buf)? {
                0 => break,
                n => out.extend_from_slice(&buf[..n]),
            }
        }
        assert_eq!(decoder.stored_bytes(), stored.len() as u64);
        Ok(out)
    }

    fn sample() -> Vec<u8> {
        (0..50_000_u32).flat_map(|i| (i / 7).to_le_bytes()).collect()
    }

    #[test]
    fn each_format_comes_back() {
        let data = sample();
        assert_eq!(decode(&data).unwrap(), data);
        assert_eq!(decode(&gzip(&data)).unwrap(), data);
        assert_eq!(decode(&zstd(&data)).unwrap(), data);
        assert_eq!(decode(b"").unwrap(), b"");
    }

    #[test]
    fn members_and_frames_are_joined() {
        let data = sample();
        let members = [gzip(&data), gzip(b""), gzip(b"tail"), vec![0; 700]].concat();
        assert_eq!(decode(&members).unwrap(), [data.as_slice(), b"tail"].concat());
        let skippable = [0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
        let frames = [skippable.to_vec(), zstd(&data), skippable.to_vec(), zstd(b"tail"), skippable.to_vec()];
        assert_eq!(decode(&frames.concat()).unwrap(), [data.as_slice(), b"tail"].concat());
    }

    #[test]
    fn truncation_and_garbage_are_errors() {
        let whole = gzip(&sample());
        assert!(decode(&whole[..whole.len() - 3]).is_err());
        assert!(decode(&[whole, b"garbage".to_vec()].concat()).is_err());
        let whole = zstd(&sample());
        assert!(decode(&whole[..whole.len() - 3]).is_err());
        assert!(decode(&[whole, b"garbage".to_vec()].concat()).is_err());
        assert!(decode(&[0x50, 0x2a, 0x4d, 0x18, 9, 0, 0, 0, 1]).is_err());
    }

    #[test]
    fn other_compressors_are_named() {
        assert!(matches!(decode(b"\xfd7zXZ\0..."), Err(ArchiveError::Compression("xz"))));
        assert!(matches!(decode(b"BZh91AY&SY"), Err(ArchiveError::Compression("bzip2"))));
    }
}
