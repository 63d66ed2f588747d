//! From the first instruction of PID 1 to serving, and the orderly end.
//!
//! ```text
//! USER_SPACE --> root and mounts --> listen --> doorbell --> AGENT_READY --> serve … Shutdown --> POWER_OFF --> reset
//! ```

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use hyper_protocol::rpc::agent_ttrpc::create_agent;
use hyper_protocol::{DOORBELL_PORT, Doorbell, RPC_PORT, STREAM_PORT};
use rustix::mount::{MountFlags, mount, mount_bind_recursive, mount_move, mount_remount};
use rustix::process::{Resource, Rlimit};
use tokio::io::AsyncWriteExt;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use crate::error::{AgentError, Tried};
use crate::sandbox::Sandbox;
use crate::service::AgentService;
use crate::streams::HOST_CID;
use crate::{log, net, sys};

/// The lifecycle device of the machine: an I/O port that takes one byte.
const LIFECYCLE_PORT: u16 = 0x0520;
/// First instruction of PID 1.
const USER_SPACE: u8 = 0x41;
/// The agent serves.
const AGENT_READY: u8 = 0x42;
/// What follows is an orderly end.
const POWER_OFF: u8 = 0x4f;

/// Open files that containers may ask for: the kernel's own ceiling (`fs.nr_open`).
const MAX_OPEN_FILES: u64 = 1 << 20;
/// How long the host may take to answer the doorbell.
const DOORBELL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the supervisor may take to close its connection after the answer to Shutdown.
const LAST_ANSWER_TIMEOUT: Duration = Duration::from_millis(250);

/// A mount of boot: source, place, kind, flags, options.
type BootMount = (&'static str, &'static str, MountFlags, Option<&'static std::ffi::CStr>);

const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC).union(MountFlags::NODEV);

/// In order; the kind is the source's name.
const MOUNTS: [BootMount; 5] = [
    ("proc", "/proc", PLAIN, None),
    ("sysfs", "/sys", PLAIN, None),
    ("devtmpfs", "/dev", MountFlags::NOSUID.union(MountFlags::NOEXEC), None),
    ("tmpfs", "/run", MountFlags::NOSUID.union(MountFlags::NODEV), Some(c"mode=0755")),
    ("cgroup2", "/sys/fs/cgroup", PLAIN, None),
];

/// Runs PID 1. Returns only when the sandbox could not be set up.
///
/// # Errors
/// What of it failed.
pub(crate) fn run() -> Result<(), AgentError> {
    // A machine without the lifecycle device, such as another VMM's, boots all the same.
    let told = sys::write_port(LIFECYCLE_PORT, USER_SPACE);
    set_up()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .tried(|| "make the runtime".to_owned())?;
    let sandbox = Arc::new(Sandbox::default());
    runtime.block_on(serve(&sandbox, told.is_ok()))?;
    end();
    Ok(())
}

fn set_up() -> Result<(), AgentError> {
    change_root()?;
    for (kind, place, flags, options) in MOUNTS {
        make_dir(place)?;
        mount(kind, place, kind, flags, options).tried(|| format!("mount {kind} at {place}"))?;
    }
    // Nobody writes there any more, least of all through /proc/PID/exe of a process that enters a container.
    mount_remount("/", MountFlags::RDONLY, c"").tried(|| "make the root read-only".to_owned())?;
    let files = Rlimit { current: Some(MAX_OPEN_FILES), maximum: Some(MAX_OPEN_FILES) };
    rustix::process::setrlimit(Resource::Nofile, files).tried(|| "raise the limit of files".to_owned())?;
    // What makes or ends a container waits for all processors to have passed a quiet point; a guest has few of them, which need not be
    // waited for until the next tick. A kernel that is built without the switch waits.
    let _ = std::fs::write("/sys/kernel/rcu_expedited", "1");
    net::configure::loopback()
}

/// Puts a mount of the initial root over itself. The initial root has no parent, and a container's change of root needs one.
fn change_root() -> Result<(), AgentError> {
    let tried = || "make the root movable".to_owned();
    make_dir("/run")?;
    mount_bind_recursive("/", "/run").tried(tried)?;
    rustix::process::chdir("/run").tried(tried)?;
    mount_move(".", "/").tried(tried)?;
    rustix::process::chroot(".").tried(tried)?;
    rustix::process::chdir("/").tried(tried)
}

fn make_dir(path: &str) -> Result<(), AgentError> {
    match rustix::fs::mkdir(path, rustix::fs::Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno).tried(|| format!("make {path}")),
    }
}

async fn serve(sandbox: &Arc<Sandbox>, has_lifecycle: bool) -> Result<(), AgentError> {
    let rpc = listen(RPC_PORT)?;
    let streams = listen(STREAM_PORT)?;
    tokio::spawn(Arc::clone(&sandbox.streams).serve(streams));
    let closed = Arc::new(Notify::new());
    let mut server = server(rpc, sandbox, &closed);
    server.start().await.map_err(|e| AgentError::state(format!("serve: {e}")))?;
    tokio::spawn(async {
        // Without a host that listens there may still be one that knows the port.
        if let Err(error) = ring().await {
            log::error(error.to_string());
        }
    });
    if has_lifecycle {
        sys::write_port(LIFECYCLE_PORT, AGENT_READY).tried(|| "report readiness".to_owned())?;
    }
    sandbox.reaper.start()?;
    // After the doorbell, so that it costs no start anything: until the host has come with its first request, and in a machine that is
    // saved for others, once for all of them.
    sandbox.prepare()?;
    sandbox.end.notified().await;
    // The answer is under way; the supervisor closes its connection when it has it.
    let _ = timeout(LAST_ANSWER_TIMEOUT, closed.notified()).await;
    Ok(())
}

fn listen(port: u32) -> Result<VsockListener, AgentError> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).tried(|| format!("listen on vsock port {port}"))
}

fn server(listener: VsockListener, sandbox: &Arc<Sandbox>, closed: &Arc<Notify>) -> ttrpc::r#async::Server {
    let closed = Arc::clone(closed);
    // Only the host: a container must not reach the agent.
    let connections = listener.incoming().filter_map(move |connection| {
        let accepted = connection.and_then(|c| c.peer_addr().map(|peer| (c, peer))).map(|(stream, peer)| {
            (peer.cid() == HOST_CID).then(|| Connection { stream, closed: Arc::clone(&closed) })
        });
        std::future::ready(accepted.transpose())
    });
    let service: Arc<dyn hyper_protocol::rpc::agent_ttrpc::Agent + Send + Sync> =
        Arc::new(AgentService::new(Arc::clone(sandbox)));
    ttrpc::r#async::Server::new()
        .add_listener(ttrpc::r#async::transport::Listener::new(connections))
        .register_service(create_agent(service))
}

/// Tells the host that we serve.
async fn ring() -> Result<(), AgentError> {
    let bell = async {
        let mut host = VsockStream::connect(VsockAddr::new(HOST_CID, DOORBELL_PORT)).await?;
        host.write_all(Doorbell::line(env!("CARGO_PKG_VERSION")).as_bytes()).await?;
        host.shutdown(std::net::Shutdown::Write)
    };
    timeout(DOORBELL_TIMEOUT, bell)
        .await
        .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
        .tried(|| format!("ring at host port {DOORBELL_PORT}"))
}

/// Ends the machine in order.
fn end() {
    rustix::fs::sync();
    // Nobody left to tell; the reset says the rest.
    let _ = sys::write_port(LIFECYCLE_PORT, POWER_OFF);
    let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
}

mod connection {
    //! A connection that tells when it is closed.

    use std::pin::Pin;
    use std::sync::Arc;
    use std::task::{Context, Poll};

    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
    use tokio::sync::Notify;
    use tokio_vsock::VsockStream;

    /// A supervisor's connection.
    #[derive(Debug)]
    pub(super) struct Connection {
        pub(super) stream: VsockStream,
        pub(super) closed: Arc<Notify>,
    }

    impl AsyncRead for Connection {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<std::io::Result<()>> {
            let before = buffer.filled().len();
            let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
            if polled.is_ready() && buffer.filled().len() == before {
                self.closed.notify_one();
            }
            polled
        }
    }

    impl AsyncWrite for Connection {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<std::io::Result<usize>> {
            Pin::new(&mut self.stream).poll_write(cx, bytes)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
            Pin::new(&mut self.stream).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
            Pin::new(&mut self.stream).poll_shutdown(cx)
        }
    }
}

use connection::Connection;
