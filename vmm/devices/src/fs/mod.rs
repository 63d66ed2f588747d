//! virtio-fs (virtio 1.3, 5.11) whose queues another process serves over vhost-user: this side only introduces the two.

mod backend;
mod handler;
mod request;
#[cfg(test)]
mod tests;

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use self::backend::Backend;
pub use self::backend::FsError;
use self::handler::FsHandler;
use self::request::{MAX_TAG_BYTES, config_space};
use crate::device::{ActivateContext, ActivateError, Handler, VirtioDevice};
use crate::note::Notes;

/// Largest size of the high priority queue and of the one request queue.
const QUEUE_SIZES: [u16; 2] = [64, 1024];

/// The device.
#[derive(Debug)]
pub struct VhostUserFs {
    backend: Backend,
    config: Vec<u8>,
    /// Queues that the other process serves now.
    started: Vec<usize>,
    notes: Notes,
}

impl VhostUserFs {
    /// A file system with mount tag `tag`, 1 to 36 bytes, served by the process at the other end of `socket`; the protocol is
    /// negotiated here, within ten seconds.
    ///
    /// # Errors
    /// When the tag is not one, or the other process refuses, lacks something, has ended or does not answer.
    pub fn new(tag: &str, socket: UnixStream) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > MAX_TAG_BYTES {
            return Err(FsError::Tag(tag.to_owned()));
        }
        // An inherited flag would make exchanges fail instead of wait.
        socket.set_nonblocking(false).map_err(FsError::Socket)?;
        let backend = Backend::connect(socket, QUEUE_SIZES.len() as u64)?;
        if backend.device_features() & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err(FsError::Lacks("virtio 1"));
        }
        Ok(Self { backend, config: config_space(tag, 1), started: Vec::new(), notes: Notes::new("fs") })
    }
}

impl VirtioDevice for VhostUserFs {
    fn name(&self) -> &'static str {
        "fs"
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.backend.device_features()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::config::read(&self.config, offset, data);
    }

    fn activate(&mut self, context: ActivateContext) -> Result<Vec<Handler>, ActivateError> {
        let prepare = |source| ActivateError::Io { what: "the file server's interrupt", source };
        if let Some(missing) = (0..QUEUE_SIZES.len()).find(|n| !context.queues.iter().any(|q| q.index == *n))
        {
            return Err(ActivateError::MissingQueue(missing));
        }
        let call = context.interrupt.share_with_other_process().map_err(prepare)?;
        let watched = self.backend.watched().map_err(prepare)?;
        self.started = context.queues.iter().map(|queue| queue.index).collect();
        self.backend.start(&context.mem, context.features, &context.queues, &call)?;
        Ok(vec![Box::new(FsHandler::new(watched, Arc::clone(&context.interrupt)))])
    }

    fn reset(&mut self) {
        let started = std::mem::take(&mut self.started);
        if let Err(error) = self.backend.stop(&started) {
            self.notes.write(format_args!("cannot stop the file server's queues: {error}"));
        }
    }
}
