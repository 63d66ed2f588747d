//! The host's side of the protocol, as small as a test needs it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper_protocol::rpc::agent::layer::Compression;
use hyper_protocol::rpc::agent::{
    ConfigureRequest, CreateContainerRequest, CreateProcessRequest, Empty, ExitStatus, Layer, Mount,
    ProcessRef, Rootfs, StartProcessResponse, Stdio, UnpackImageRequest,
};
use hyper_protocol::rpc::agent_ttrpc::AgentClient;
use hyper_protocol::{DNS_PORT, DOORBELL_PORT, Doorbell, RPC_PORT, STREAM_PORT};
use protobuf::MessageField;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;
use ttrpc::context::{Context, with_duration};

pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Longest wait for anything: an emulated machine is slow.
const PATIENCE: Duration = Duration::from_secs(120);

/// A context with a deadline.
pub(crate) fn soon() -> Context {
    with_duration(PATIENCE)
}

/// Fails unless it holds.
pub(crate) fn check(holds: bool, what: impl FnOnce() -> String) -> Result<(), Failure> {
    if holds { Ok(()) } else { Err(what().into()) }
}

/// A connected agent.
#[derive(Clone)]
pub(crate) struct Guest {
    pub(crate) client: AgentClient,
    path: Arc<str>,
    next_stream: Arc<AtomicU64>,
    next_id: Arc<AtomicU64>,
}

/// What a process left.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) started: StartProcessResponse,
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// What to run.
pub(crate) struct Run {
    pub(crate) spec: Value,
    pub(crate) stdin: Option<Vec<u8>>,
    pub(crate) user: String,
    pub(crate) mounts: Vec<Mount>,
    pub(crate) writable: bool,
    pub(crate) init: bool,
}

impl Run {
    /// Docker's defaults around a command.
    pub(crate) fn new(args: &[&str]) -> Self {
        Self {
            spec: spec(args),
            stdin: None,
            user: String::new(),
            mounts: Vec::new(),
            writable: false,
            init: false,
        }
    }

    pub(crate) fn sh(script: &str) -> Self {
        Self::new(&["sh", "-c", script])
    }

    pub(crate) fn user(mut self, user: &str) -> Self {
        self.user = user.to_owned();
        self
    }

    pub(crate) fn set(mut self, pointer: &str, value: Value) -> Self {
        if let Some(place) = self.spec.pointer_mut(pointer) {
            *place = value;
        }
        self
    }
}

/// The specification that the sandbox would send.
fn spec(args: &[&str]) -> Value {
    let caps = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE"
    ]);
    let mount = |destination: &str, kind: &str, options: Value| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    json!({
        "ociVersion": "1.2.0",
        "hostname": "box",
        "process": {
            "args": args,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 4096}],
            "noNewPrivileges": false,
            "oomScoreAdj": 0
        },
        "root": {"readonly": false},
        "annotations": {"hyper.seccomp": "default"},
        "mounts": [
            mount("/proc", "proc", json!(["nosuid", "noexec", "nodev"])),
            mount("/dev", "tmpfs", json!(["nosuid", "strictatime", "mode=755", "size=65536k"])),
            mount("/dev/pts", "devpts", json!(["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"])),
            mount("/sys", "sysfs", json!(["nosuid", "noexec", "nodev", "ro"])),
            mount("/sys/fs/cgroup", "cgroup", json!(["ro", "nosuid", "noexec", "nodev"])),
            mount("/dev/mqueue", "mqueue", json!(["nosuid", "noexec", "nodev"])),
            mount("/dev/shm", "tmpfs", json!(["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]))
        ],
        "linux": {
            "resources": {},
            "sysctl": {},
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware", "/proc/nothing"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}

impl Guest {
    /// Listens for the doorbell, then connects.
    pub(crate) async fn wait_for(path: &str) -> Result<Self, Failure> {
        let bell = UnixListener::bind(format!("{path}_{DOORBELL_PORT}"))?;
        tokio::spawn(answer_names(UnixListener::bind(format!("{path}_{DNS_PORT}"))?));
        let (mut stream, _) = timeout(PATIENCE, bell.accept()).await??;
        let mut line = Vec::new();
        timeout(PATIENCE, stream.read_to_end(&mut line)).await??;
        Doorbell::parse(&line)?;
        let socket = connect(path, RPC_PORT).await?;
        let client = ttrpc::r#async::Client::new(ttrpc::r#async::transport::Socket::new(socket));
        Ok(Self {
            client: AgentClient::new(client),
            path: path.into(),
            next_stream: Arc::new(AtomicU64::new(1)),
            next_id: Arc::new(AtomicU64::new(1)),
        })
    }

    /// Configures the sandbox and unpacks the image.
    pub(crate) async fn prepare(&self, layer: &str) -> Result<(), Failure> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let configured = self
            .client
            .configure(
                soon(),
                &ConfigureRequest {
                    hostname: "sandbox".to_owned(),
                    time_unix_ns: i64::try_from(now.as_nanos())?,
                    entropy: vec![7; 64],
                    dns_proxy: true,
                    ..ConfigureRequest::default()
                },
            )
            .await?;
        crate::say(&format!("configured: {configured:?}"));
        let tar = std::fs::read(layer)?;
        let (stream, mut socket) = self.stream().await?;
        let diff_id = Sha256::digest(&tar).to_vec();
        let feed = tokio::spawn(async move {
            socket.write_all(&tar).await?;
            socket.shutdown().await
        });
        let layer = Layer { stream, compression: Compression::NONE.into(), diff_id, ..Layer::default() };
        let request = UnpackImageRequest {
            disk: "image".to_owned(),
            layers: vec![layer],
            ..UnpackImageRequest::default()
        };
        let unpacked = self.client.unpack_image(soon(), &request).await?;
        feed.await??;
        crate::say(&format!("unpacked: {unpacked:?}"));
        Ok(())
    }

    /// Opens a stream.
    pub(crate) async fn stream(&self) -> Result<(u64, UnixStream), Failure> {
        let id = self.next_stream.fetch_add(1, Ordering::SeqCst);
        let mut socket = connect(&self.path, STREAM_PORT).await?;
        socket.write_all(&id.to_le_bytes()).await?;
        Ok((id, socket))
    }

    /// A container id that was not used.
    pub(crate) fn id(&self) -> String {
        format!("c{}", self.next_id.fetch_add(1, Ordering::SeqCst))
    }

    /// The request to make a container, with these streams.
    pub(crate) fn request(
        &self,
        id: &str,
        run: &Run,
        stdio: Stdio,
    ) -> Result<CreateContainerRequest, Failure> {
        Ok(CreateContainerRequest {
            container_id: id.to_owned(),
            oci_spec: serde_json::to_vec(&run.spec)?,
            rootfs: MessageField::some(Rootfs {
                image_disk: "image".to_owned(),
                writable_disk: if run.writable { "layer".to_owned() } else { String::new() },
                ..Rootfs::default()
            }),
            mounts: run.mounts.clone(),
            user: run.user.clone(),
            stdio: MessageField::some(stdio),
            init: run.init,
            ..CreateContainerRequest::default()
        })
    }

    /// Runs a container to its end and removes it.
    pub(crate) async fn run(&self, run: Run) -> Result<Output, Failure> {
        let id = self.id();
        let (stdin, input) = if run.stdin.is_some() { split(self.stream().await?) } else { (0, None) };
        let (stdout, out) = self.stream().await?;
        let (stderr, err) = self.stream().await?;
        let stdio = Stdio { stdin, stdout, stderr, ..Stdio::default() };
        self.client.create_container(soon(), &self.request(&id, &run, stdio)?).await?;
        let output = self.finish(&id, "", run.stdin.zip(input), [out, err]).await;
        self.client.delete_container(soon(), &container(&id)).await?;
        output
    }

    /// Adds a process to a container and runs it to its end.
    pub(crate) async fn exec(&self, id: &str, process: Value, user: &str) -> Result<Output, Failure> {
        let process_id = self.id();
        let (stdout, out) = self.stream().await?;
        let (stderr, err) = self.stream().await?;
        let request = CreateProcessRequest {
            container_id: id.to_owned(),
            process_id: process_id.clone(),
            oci_process: serde_json::to_vec(&process)?,
            user: user.to_owned(),
            stdio: MessageField::some(Stdio { stdout, stderr, ..Stdio::default() }),
            ..CreateProcessRequest::default()
        };
        self.client.create_process(soon(), &request).await?;
        self.finish(id, &process_id, None, [out, err]).await
    }

    async fn finish(
        &self,
        container_id: &str,
        process_id: &str,
        input: Option<(Vec<u8>, UnixStream)>,
        outputs: [UnixStream; 2],
    ) -> Result<Output, Failure> {
        let process = process(container_id, process_id);
        let started = self.client.start_process(soon(), &process).await?;
        if let Some((bytes, mut socket)) = input {
            tokio::spawn(async move {
                let _ = socket.write_all(&bytes).await;
                let _ = socket.shutdown().await;
                let _ = socket.read(&mut [0]).await;
            });
        }
        let [out, err] = outputs;
        let (stdout, stderr) = (tokio::spawn(all_of(out)), tokio::spawn(all_of(err)));
        let status = self.client.wait_process(soon(), &process).await?;
        let (stdout, stderr) = (stdout.await??, stderr.await??);
        Ok(Output { started, status, stdout, stderr })
    }

    /// Ends the machine.
    pub(crate) async fn shutdown(&self) -> Result<(), Failure> {
        self.client.shutdown(soon(), &Empty::default()).await?;
        Ok(())
    }
}

/// Names a container.
pub(crate) fn container(id: &str) -> hyper_protocol::rpc::agent::ContainerRef {
    hyper_protocol::rpc::agent::ContainerRef { container_id: id.to_owned(), ..Default::default() }
}

/// Names a process.
pub(crate) fn process(id: &str, process_id: &str) -> ProcessRef {
    ProcessRef { container_id: id.to_owned(), process_id: process_id.to_owned(), ..ProcessRef::default() }
}

fn split((id, socket): (u64, UnixStream)) -> (u64, Option<UnixStream>) {
    (id, Some(socket))
}

/// Everything up to the end of a stream.
pub(crate) async fn all_of(mut socket: UnixStream) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    timeout(PATIENCE, socket.read_to_end(&mut bytes)).await??;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

async fn connect(path: &str, port: u32) -> Result<UnixStream, Failure> {
    let mut socket = UnixStream::connect(path).await?;
    socket.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        answer.push(timeout(PATIENCE, socket.read_u8()).await??);
    }
    check(answer.starts_with(b"OK "), || format!("port {port}: {}", String::from_utf8_lossy(&answer)))?;
    Ok(socket)
}

/// A name service that knows one address, and nothing of names that begin with an `x`.
async fn answer_names(listener: UnixListener) {
    while let Ok((mut socket, _)) = listener.accept().await {
        tokio::spawn(async move {
            let length = usize::from(socket.read_u16().await?);
            let mut message = vec![0; length];
            socket.read_exact(&mut message).await?;
            // Closed without an answer.
            if message.get(13) == Some(&b'x') {
                return Ok(());
            }
            // The question only, as an answer with one address.
            let end = message.iter().skip(12).position(|b| *b == 0).unwrap_or_default() + 12 + 5;
            message.truncate(end);
            if let Some([_, _, flags, more, counts @ ..]) = message.first_chunk_mut::<12>() {
                (*flags, *more) = (0x81, 0x80);
                *counts = [0, 1, 0, 1, 0, 0, 0, 0];
            }
            message.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7]);
            socket.write_u16(u16::try_from(message.len()).unwrap_or_default()).await?;
            socket.write_all(&message).await
        });
    }
}
