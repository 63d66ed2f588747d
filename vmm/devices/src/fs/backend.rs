//! The connection to the process that serves the queues, with a deadline on every exchange.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::device::{ActivateError, ActiveQueue};

/// How long the other process may take for one exchange: it only maps memory and opens nothing.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);

/// The other process.
pub(super) struct Backend {
    frontend: Frontend,
    /// The same socket, to be shut down when the deadline passes and to be watched for its end.
    socket: UnixStream,
    /// Features of the other process, with those of the protocol itself.
    features: u64,
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backend").field("socket", &self.socket).field("features", &self.features).finish()
    }
}

/// Why the other process cannot be worked with.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag is empty or too long.
    #[error("tag {0:?}: give 1 to 36 bytes")]
    Tag(String),
    /// The socket cannot be used.
    #[error("cannot prepare the file server's socket")]
    Socket(#[source] io::Error),
    /// The other process refused, ended or did not answer in time.
    #[error("file server: {what}")]
    VhostUser {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        #[source]
        source: vhost::Error,
    },
    /// The other process lacks what is needed.
    #[error("file server offers no {0}")]
    Lacks(&'static str),
}

impl Backend {
    /// Takes the session over and negotiates the protocol. `queues` is how many queues the device has.
    pub(super) fn connect(socket: UnixStream, queues: u64) -> Result<Self, FsError> {
        let watched = socket.try_clone().map_err(FsError::Socket)?;
        let frontend = Frontend::from_stream(socket, queues);
        let mut backend = Self { frontend, socket: watched, features: 0 };
        let guard = backend.socket.try_clone().map_err(FsError::Socket)?;
        within(DEADLINE, guard, || backend.negotiate(queues)).map_err(FsError::Socket)??;
        Ok(backend)
    }

    fn negotiate(&mut self, queues: u64) -> Result<(), FsError> {
        let failed = |what| move |source| FsError::VhostUser { what, source };
        let frontend = &mut self.frontend;
        frontend.set_owner().map_err(failed("take the session"))?;
        self.features = frontend.get_features().map_err(failed("ask for features"))?;
        if self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(FsError::Lacks("protocol features"));
        }
        let offered = frontend.get_protocol_features().map_err(failed("ask for protocol features"))?;
        let wanted = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        if !offered.contains(wanted) {
            return Err(FsError::Lacks("multiple queues with acknowledged requests"));
        }
        frontend.set_protocol_features(wanted).map_err(failed("set protocol features"))?;
        // From here on every request is answered, so that its failure is seen here and not later.
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        if frontend.get_queue_num().map_err(failed("ask for queues"))? < queues {
            return Err(FsError::Lacks("second queue"));
        }
        Ok(())
    }

    /// Features for the driver to choose from: without those of the protocol and of migration.
    pub(super) fn device_features(&self) -> u64 {
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES | VhostUserVirtioFeatures::LOG_ALL;
        self.features & !protocol.bits()
    }

    /// The socket, whose hang-up is the other process's end.
    pub(super) fn watched(&self) -> io::Result<UnixStream> {
        self.socket.try_clone()
    }

    /// Hands memory and queues over. `call` is signalled when buffers were used.
    pub(super) fn start(
        &mut self,
        mem: &GuestMemoryMmap,
        features: u64,
        queues: &[ActiveQueue],
        call: &vmm_sys_util::eventfd::EventFd,
    ) -> Result<(), ActivateError> {
        let prepare = |source| ActivateError::Io { what: "the file server's socket", source };
        let guard = self.socket.try_clone().map_err(prepare)?;
        within(DEADLINE, guard, || self.hand_over(mem, features, queues, call)).map_err(prepare)?
    }

    fn hand_over(
        &mut self,
        mem: &GuestMemoryMmap,
        features: u64,
        queues: &[ActiveQueue],
        call: &vmm_sys_util::eventfd::EventFd,
    ) -> Result<(), ActivateError> {
        let failed = |what| move |source| ActivateError::VhostUser { what, source };
        let protocol = self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend.set_features(features | protocol).map_err(failed("set features"))?;
        let regions: Result<Vec<_>, _> =
            mem.iter().map(VhostUserMemoryRegionInfo::from_guest_region).collect();
        let regions = regions.map_err(failed("describe guest memory, which must be file-backed"))?;
        self.frontend.set_mem_table(&regions).map_err(failed("map guest memory"))?;
        for active in queues {
            let (index, queue) = (active.index, &active.queue);
            let data = vring(mem, queue).map_err(failed("find a queue in guest memory"))?;
            self.frontend.set_vring_num(index, queue.size()).map_err(failed("set a queue's size"))?;
            self.frontend.set_vring_addr(index, &data).map_err(failed("set a queue's addresses"))?;
            self.frontend.set_vring_base(index, queue.next_avail()).map_err(failed("set a queue's start"))?;
            self.frontend.set_vring_call(index, call).map_err(failed("set a queue's interrupt"))?;
            self.frontend.set_vring_kick(index, &active.kick).map_err(failed("set a queue's kick"))?;
        }
        for active in queues {
            self.frontend.set_vring_enable(active.index, true).map_err(failed("enable a queue"))?;
        }
        Ok(())
    }

    /// Has the other process let go of the queues; when this returns it no longer touches them. Should it not answer, its
    /// socket is shut down.
    pub(super) fn stop(&mut self, queues: &[usize]) -> Result<(), FsError> {
        let failed = |what| move |source| FsError::VhostUser { what, source };
        let guard = self.socket.try_clone().map_err(FsError::Socket)?;
        let stopped = within(DEADLINE, guard, || {
            for index in queues {
                self.frontend.set_vring_enable(*index, false).map_err(failed("disable a queue"))?;
                self.frontend.get_vring_base(*index).map_err(failed("stop a queue"))?;
            }
            Ok(())
        });
        stopped.map_err(FsError::Socket)?
    }
}

/// Where a queue lies, in addresses of this process, as the protocol wants them.
fn vring(mem: &GuestMemoryMmap, queue: &Queue) -> Result<VringConfigData, vhost::Error> {
    let host = |addr| {
        mem.get_host_address(GuestAddress(addr))
            .map(|address| address as u64)
            .map_err(|_| vhost::Error::InvalidGuestMemory)
    };
    Ok(VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        flags: 0,
        desc_table_addr: host(queue.desc_table())?,
        used_ring_addr: host(queue.used_ring())?,
        avail_ring_addr: host(queue.avail_ring())?,
        log_addr: None,
    })
}

/// Runs `exchange`; when it takes longer than `deadline`, shuts `socket` down, which ends the exchange with an error.
/// (The protocol crate retries reads that time out, so a socket timeout alone would not end them.)
fn within<T>(deadline: Duration, socket: UnixStream, exchange: impl FnOnce() -> T) -> io::Result<T> {
    let (done, waiting) = channel::<()>();
    let watch = std::thread::Builder::new().name("fs-deadline".to_owned()).spawn(move || {
        if waiting.recv_timeout(deadline) == Err(RecvTimeoutError::Timeout) {
            // Fails only when it is already shut down.
            let _ = socket.shutdown(Shutdown::Both);
        }
    })?;
    let result = exchange();
    drop(done);
    // The thread cannot panic.
    let _ = watch.join();
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_deadline_ends_a_read_that_would_wait_for_ever() {
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        let guard = ours.try_clone().unwrap();
        let read = within(Duration::from_millis(20), guard, || ours.read(&mut [0; 1])).unwrap();
        assert_eq!(read.unwrap(), 0);
    }

    #[test]
    fn in_time_the_socket_stays_open() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let guard = ours.try_clone().unwrap();
        assert_eq!(within(DEADLINE, guard, || 7).unwrap(), 7);
        theirs.set_nonblocking(true).unwrap();
        assert_eq!(theirs.read(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
