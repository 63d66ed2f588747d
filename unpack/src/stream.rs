//! One layer's tar stream: decompressed, bounded, and hashed from its first byte to its last.

use std::io::Read;

use sha2::{Digest as _, Sha256};

use crate::decompress::{Compression, Decoder};
use crate::error::{ArchiveError, Digest, Fault};
use crate::limits::Budget;

/// Bytes decompressed at a time for small reads; larger reads go straight to their destination.
const BUFFER: usize = 64 << 10;

/// Reads a layer's tar stream. Every byte that leaves it has been hashed and counted.
pub(crate) struct LayerStream<'b, R> {
    decoder: Decoder<R>,
    hash: Sha256,
    buf: Vec<u8>,
    pos: usize,
    len: usize,
    /// Bytes decompressed, of which `len - pos` still wait in `buf`.
    produced: u64,
    budget: &'b mut Budget,
}

impl<'b, R: Read> LayerStream<'b, R> {
    /// `budget` is shared by all layers of an image and counts uncompressed bytes.
    pub(crate) fn new(reader: R, compression: Compression, budget: &'b mut Budget) -> Result<Self, Fault> {
        let decoder = Decoder::new(reader, compression)?;
        Ok(Self { decoder, hash: Sha256::new(), buf: vec![0; BUFFER], pos: 0, len: 0, produced: 0, budget })
    }

    /// Bytes of the tar stream handed out so far.
    pub(crate) fn offset(&self) -> u64 {
        self.produced.saturating_sub(self.len.saturating_sub(self.pos) as u64)
    }

    /// Bytes taken from the layer's reader so far.
    pub(crate) fn stored_bytes(&self) -> u64 {
        self.decoder.stored_bytes()
    }

    /// Fills `out`; less than `out.len()` only when the stream ends.
    pub(crate) fn read_full(&mut self, out: &mut [u8]) -> Result<usize, Fault> {
        let wanted = out.len();
        let mut rest = out;
        while !rest.is_empty() {
            let waiting = self.buf.get(self.pos..self.len).unwrap_or_default();
            let n = if !waiting.is_empty() {
                let n = waiting.len().min(rest.len());
                let (to, from) = (rest.split_at_mut(n).0, waiting.split_at(n).0);
                to.copy_from_slice(from);
                self.pos += n;
                n
            } else if rest.len() >= BUFFER {
                let n = self.decoder.read(rest)?;
                self.account(rest.get(..n).unwrap_or_default())?;
                n
            } else {
                if self.refill()? == 0 {
                    break;
                }
                continue;
            };
            if n == 0 {
                break;
            }
            rest = rest.get_mut(n..).unwrap_or_default();
        }
        Ok(wanted - rest.len())
    }

    /// Passes over `count` bytes; fails when the stream ends before.
    pub(crate) fn skip(&mut self, count: u64) -> Result<(), Fault> {
        let mut left = count;
        while left > 0 {
            if self.pos == self.len && self.refill()? == 0 {
                return Err(ArchiveError::TruncatedContent.into());
            }
            let waiting = self.len - self.pos;
            let n = usize::try_from(left).map_or(waiting, |left| left.min(waiting));
            self.pos += n;
            left -= n as u64;
        }
        Ok(())
    }

    /// Reads whatever is left, so that the digest covers the whole stream, and returns the digest.
    pub(crate) fn finish(&mut self) -> Result<Digest, Fault> {
        while self.refill()? != 0 {}
        Ok(Digest(std::mem::take(&mut self.hash).finalize().into()))
    }

    /// Replaces the buffer, which must be used up, by the next bytes; 0 at the end.
    fn refill(&mut self) -> Result<usize, Fault> {
        let mut buf = std::mem::take(&mut self.buf);
        self.pos = 0;
        self.len = 0;
        let result = self.decoder.read(&mut buf);
        let result = match result {
            Ok(n) => self.account(buf.get(..n).unwrap_or_default()).map(|()| n),
            Err(e) => Err(e.into()),
        };
        self.buf = buf;
        self.len = result?;
        Ok(self.len)
    }

    fn account(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        self.budget.take(bytes.len() as u64)?;
        self.hash.update(bytes);
        self.produced += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream<'a>(data: &'a [u8], budget: &'a mut Budget) -> LayerStream<'a, &'a [u8]> {
        LayerStream::new(data, Compression::None, budget).unwrap()
    }

    #[test]
    fn small_large_and_skipped_reads_keep_their_order() {
        let data: Vec<u8> = (0..400_000_u32).map(|i| (i % 251) as u8).collect();
        let mut budget = Budget::new("bytes", 1 << 20);
        let mut stream = stream(&data, &mut budget);
        let mut small = [0; 512];
        assert_eq!(stream.read_full(&mut small).unwrap(), 512);
        assert_eq!(small, data[..512]);
        let mut large = vec![0; 200_000];
        assert_eq!(stream.read_full(&mut large).unwrap(), 200_000);
        assert_eq!(large, data[512..200_512]);
        stream.skip(100_000).unwrap();
        assert_eq!(stream.offset(), 300_512);
        let mut rest = vec![0; 200_000];
        assert_eq!(stream.read_full(&mut rest).unwrap(), 99_488);
        assert_eq!(rest[..99_488], data[300_512..]);
        assert_eq!(stream.finish().unwrap(), Digest(Sha256::digest(&data).into()));
    }

    #[test]
    fn the_digest_covers_what_nobody_read() {
        let data = vec![7; 300_000];
        let mut budget = Budget::new("bytes", 1 << 20);
        let mut stream = stream(&data, &mut budget);
        stream.skip(1).unwrap();
        assert_eq!(stream.finish().unwrap(), Digest(Sha256::digest(&data).into()));
        assert_eq!(budget.used(), 300_000);
    }

    #[test]
    fn a_bomb_is_stopped() {
        let data = vec![0; 300_000];
        let mut budget = Budget::new("bytes", 100_000);
        let mut stream = stream(&data, &mut budget);
        assert!(matches!(stream.finish(), Err(Fault::Limit(limit)) if limit.max == 100_000));
    }

    #[test]
    fn skipping_past_the_end_is_an_error() {
        let mut budget = Budget::new("bytes", 1 << 20);
        let mut stream = stream(b"short", &mut budget);
        assert!(matches!(stream.skip(6), Err(Fault::Archive(ArchiveError::TruncatedContent))));
    }
}
