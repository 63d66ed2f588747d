//! Copies what the guest transmits to the output.

use std::sync::{Arc, Mutex, PoisonError};

use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

use crate::chain::{Chain, ChainError};
use crate::output::Output;
use crate::serve::ServeChain;

/// Bytes copied at once; the only memory that a request takes.
const CHUNK_BYTES: usize = 4096;
/// Most bytes taken from one request, so that it cannot occupy the loop: the kernel's own console sends single lines, programs
/// send at most 32 KiB.
const MAX_REQUEST_BYTES: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct ConsoleServer {
    output: Arc<Mutex<Output>>,
    chunk: Vec<u8>,
}

impl ConsoleServer {
    pub(super) fn new(output: Arc<Mutex<Output>>) -> Self {
        Self { output, chunk: vec![0; CHUNK_BYTES] }
    }
}

impl ServeChain for ConsoleServer {
    fn serve<'m>(
        &mut self,
        mem: &'m GuestMemoryMmap,
        chain: DescriptorChain<&'m GuestMemoryMmap>,
    ) -> Result<u32, ChainError> {
        let mut chain = Chain::parse(mem, chain)?;
        chain.readable.truncate(chain.readable.len().min(MAX_REQUEST_BYTES));
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let count = chain.readable.read(&mut self.chunk);
            match self.chunk.get(..count) {
                Some(bytes) if !bytes.is_empty() => output.write(bytes),
                _ => return Ok(0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::{Driver, memory};
    use std::io::Read;
    use virtio_queue::QueueT;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn what_the_guest_says_comes_out() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mem = memory();
        mem.write_slice(b"hello, ", GuestAddress(0x10_000)).unwrap();
        mem.write_slice(&[b'w'; 5000], GuestAddress(0x20_000)).unwrap();
        let mut driver = Driver::new(&mem, GuestAddress(0), 16);
        let mut queue = driver.queue();
        driver.offer(&[(0x10_000, 7, false), (0x20_000, 5000, false)]);
        let chain = queue.pop_descriptor_chain(&*mem).unwrap();
        let mut server = ConsoleServer::new(Arc::new(Mutex::new(Output::new(writer))));
        assert_eq!(server.serve(&mem, chain).unwrap(), 0);
        drop(server);
        let mut said = String::new();
        std::fs::File::from(reader).read_to_string(&mut said).unwrap();
        assert_eq!(said, format!("hello, {}", "w".repeat(5000)));
    }
}
