//! Where a guest's console output goes: a descriptor whose reader may be slow or gone, which must stall nobody.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Bytes per write. A pipe that polls as writable takes `PIPE_BUF` bytes (4096) at once.
const CHUNK_BYTES: usize = 4096;

/// A descriptor that is written to only when that does not wait; what does not fit is dropped and counted.
#[derive(Debug)]
pub struct Output {
    file: File,
    dropped: u64,
}

impl Output {
    /// Wraps a file, pipe, socket or terminal.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self { file: File::from(fd), dropped: 0 }
    }

    /// Writes `bytes`, or drops what the reader has no room for.
    pub fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(CHUNK_BYTES) {
            if !(self.has_room() && self.file.write_all(chunk).is_ok()) {
                self.dropped = self.dropped.saturating_add(chunk.len() as u64);
            }
        }
    }

    /// Bytes dropped so far.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    fn has_room(&self) -> bool {
        let mut fds = [PollFd::new(&self.file, PollFlags::OUT)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let polled = poll(&mut fds, Some(&at_once));
        let [fd] = &fds;
        polled.is_ok() && fd.revents().contains(PollFlags::OUT) && !fd.revents().contains(PollFlags::ERR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_full_pipe_drops_instead_of_waiting() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut output = Output::new(writer);
        output.write(&[b'a'; 1 << 20]);
        assert!(output.dropped() > 0);
        let kept = (1 << 20) - output.dropped();
        drop(output);
        let mut read = Vec::new();
        File::from(reader).read_to_end(&mut read).unwrap();
        assert_eq!(read.len() as u64, kept);
    }

    #[test]
    fn a_reader_that_is_gone_is_no_error() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let mut output = Output::new(writer);
        output.write(b"into the void");
        assert_eq!(output.dropped(), 13);
    }
}
