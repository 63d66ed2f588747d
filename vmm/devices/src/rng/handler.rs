//! Fills buffers, a chunk at a time.

use std::fmt;
use std::io;

use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

use crate::chain::{Chain, ChainError};
use crate::serve::{Counter, ServeChain};

/// Most bytes given for one request, however large its buffers: more would let a guest keep the host busy (Linux asks for at
/// most 64 bytes at a time).
pub const MAX_REQUEST_BYTES: usize = 64 * 1024;
/// Bytes fetched at once; the only memory that a request takes.
const CHUNK_BYTES: usize = 4096;

/// Where random bytes come from.
pub trait Entropy: Clone + Send + fmt::Debug + 'static {
    /// Fills `buf`.
    ///
    /// # Errors
    /// When the source fails; the request then gets what was filled before.
    fn fill(&mut self, buf: &mut [u8]) -> io::Result<()>;
}

/// The host's `getrandom`.
#[derive(Debug, Clone, Copy)]
pub struct HostEntropy;

impl Entropy for HostEntropy {
    fn fill(&mut self, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            let got = rustix::io::retry_on_intr(|| {
                rustix::rand::getrandom(&mut *buf, rustix::rand::GetRandomFlags::empty())
            })?;
            buf = buf.get_mut(got..).unwrap_or_default();
        }
        Ok(())
    }
}

#[derive(Debug)]
pub(super) struct RngServer<E> {
    entropy: E,
    bytes: Counter,
    chunk: Vec<u8>,
}

impl<E: Entropy> RngServer<E> {
    pub(super) fn new(entropy: E, bytes: Counter) -> Self {
        Self { entropy, bytes, chunk: vec![0; CHUNK_BYTES] }
    }
}

impl<E: Entropy> ServeChain for RngServer<E> {
    fn serve<'m>(
        &mut self,
        mem: &'m GuestMemoryMmap,
        chain: DescriptorChain<&'m GuestMemoryMmap>,
    ) -> Result<u32, ChainError> {
        let mut chain = Chain::parse(mem, chain)?;
        let mut left = chain.writable.len().min(MAX_REQUEST_BYTES);
        let mut given = 0;
        while left > 0 {
            let Some(chunk) = self.chunk.get_mut(..left.min(CHUNK_BYTES)) else { break };
            if self.entropy.fill(chunk).is_err() {
                break;
            }
            let written = chain.writable.write(chunk);
            if written == 0 {
                break;
            }
            given += written;
            left -= written;
        }
        self.bytes.add(given as u64);
        Ok(u32::try_from(given).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::{Driver, memory};
    use virtio_queue::QueueT;
    use vm_memory::{Bytes, GuestAddress};

    #[derive(Debug, Clone)]
    struct Sevens;
    impl Entropy for Sevens {
        fn fill(&mut self, buf: &mut [u8]) -> io::Result<()> {
            buf.fill(7);
            Ok(())
        }
    }

    fn serve(entropy: impl Entropy, buffers: &[(u64, u32, bool)]) -> (u32, Vec<u8>) {
        let mem = memory();
        let mut driver = Driver::new(&mem, GuestAddress(0), 16);
        let mut queue = driver.queue();
        driver.offer(buffers);
        let chain = queue.pop_descriptor_chain(&*mem).unwrap();
        let given = RngServer::new(entropy, Counter::default()).serve(&mem, chain).unwrap();
        let mut seen = vec![0; 0x20_000];
        mem.read_slice(&mut seen, GuestAddress(0x10_000)).unwrap();
        (given, seen)
    }

    #[test]
    fn buffers_are_filled() {
        let (given, seen) = serve(Sevens, &[(0x10_000, 5000, true), (0x18_000, 100, true)]);
        assert_eq!(given, 5100);
        assert!(seen[..5000].iter().chain(&seen[0x8000..0x8000 + 100]).all(|b| *b == 7));
        assert_eq!((seen[5000], seen[0x8000 + 100]), (0, 0));
    }

    #[test]
    fn a_request_is_capped() {
        let (given, seen) = serve(Sevens, &[(0x10_000, 0x1_8000, true)]);
        assert_eq!(given as usize, MAX_REQUEST_BYTES);
        assert_eq!((seen[MAX_REQUEST_BYTES - 1], seen[MAX_REQUEST_BYTES]), (7, 0));
    }

    #[test]
    fn nothing_is_written_to_what_is_not_writable() {
        assert_eq!(serve(Sevens, &[(0x10_000, 64, false)]).0, 0);
    }

    #[test]
    fn the_host_has_entropy() {
        let (given, seen) = serve(HostEntropy, &[(0x10_000, 64, true)]);
        assert_eq!(given, 64);
        assert_ne!(seen[..64], [0; 64]);
    }
}
