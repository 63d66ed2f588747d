//! Unpacking an image in a throw-away machine: layers in over streams, one read-only disk out.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_protocol::rpc::agent::{ConfigureRequest, Layer, UnpackImageRequest, UnpackImageResponse, layer};
use protobuf::EnumOrUnknown;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

use super::agent::{context, rpc_error};
use super::plan::{DEFAULT_BOOT_MS, DiskPlan, GuestPlan};
use super::{Compression, Guest, LayerBlob, Steps, Stream, UnpackProgress, Unpacked, VmError, scaled_ms};
use crate::store::{FileLock, RemoveDir, UNPACK_PREFIX, make_private_dir, new_id};
use crate::{Home, SandboxError};

/// Memory of the machine, MiB.
const MEM_MIB: u32 = 512;
/// Serial of the disk that becomes the image.
const DISK: &str = "image";
/// The disk is so many times larger than the compressed layers, and this much more. It is sparse; the bound keeps a hostile image from
/// filling the host's disk without end.
const GROWTH: u64 = 64;
const SLACK_BYTES: u64 = 1 << 30;
/// Most bytes of a disk.
const MOST_BYTES: u64 = 256 << 30;
/// Bytes of an EROFS block.
const BLOCK_BYTES: u64 = 4096;
/// How long nothing may be sent, or the agent may work after the last byte.
const STALL_MS: u64 = 120_000;
/// Bytes that are read from a layer at once.
const CHUNK_BYTES: usize = 256 * 1024;

/// The image file, removed again unless it became one.
#[derive(Debug)]
struct OutFile(Option<PathBuf>);

impl Drop for OutFile {
    fn drop(&mut self) {
        if let Some(path) = &self.0
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "undo failed");
        }
    }
}

/// See [`Home::unpack`].
pub(crate) async fn unpack(
    home: &Home,
    layers: &[LayerBlob],
    out: &Path,
    progress: &(dyn Fn(UnpackProgress) + Send + Sync),
) -> Result<Unpacked, SandboxError> {
    let mut opened = Vec::new();
    for layer in layers {
        let open = || -> io::Result<(File, u64)> {
            let file = File::open(&layer.path)?;
            let bytes = file.metadata()?.len();
            Ok((file, bytes))
        };
        opened.push(open().map_err(|source| SandboxError::io("open layer", &layer.path, source))?);
    }
    let bound = disk_bound(opened.iter().map(|(_, bytes)| *bytes).sum());
    let mut options = OpenOptions::new();
    let disk = options.read(true).write(true).create_new(true).open(out);
    let disk = disk.map_err(|source| SandboxError::io("make", out, source))?;
    let mut undo = OutFile(Some(out.to_owned()));
    disk.set_len(bound).map_err(|source| SandboxError::io("size", out, source))?;

    let run_dir = home.dirs().run.join(format!("{UNPACK_PREFIX}{}", new_id().get(..16).unwrap_or("0")));
    let (_undo_dir, _lock) = make_run_dir(home, &run_dir)?;
    let guest_disk = disk.try_clone().map_err(|source| SandboxError::io("use", out, source))?;
    let plan = GuestPlan {
        log_dir: run_dir.clone(),
        run_dir,
        vcpus: vcpus(),
        mem_mib: MEM_MIB,
        growth: None,
        bays: 0,
        disks: vec![DiskPlan { id: DISK.to_owned(), file: guest_disk, read_only: false }],
        nets: Vec::new(),
        host_ports: Vec::new(),
        shares: Vec::new(),
        kernel_args: Vec::new(),
        in_pod: false,
        boot_ms: DEFAULT_BOOT_MS,
        cgroups: Vec::new(),
        template: None,
    };
    let mut steps = Steps::begin();
    let guest = Guest::start(plan, home.parts(), &mut steps).await?;
    let configure = ConfigureRequest { hostname: "unpack".to_owned(), ..Default::default() };
    guest.configure(configure).await?;
    let answer = run(&guest, layers, opened, progress).await;
    guest.shutdown().await;
    let answer = answer?;
    let image_bytes = answer.image_bytes;
    if image_bytes == 0 || image_bytes > bound || !image_bytes.is_multiple_of(BLOCK_BYTES) {
        return Err(VmError::Nonsense("UnpackImage").into());
    }
    disk.set_len(image_bytes).map_err(|source| SandboxError::io("shorten", out, source))?;
    disk.sync_all().map_err(|source| SandboxError::io("write", out, source))?;
    undo.0 = None;
    Ok(Unpacked { image_bytes, inodes: answer.inodes })
}

fn disk_bound(compressed_bytes: u64) -> u64 {
    compressed_bytes
        .saturating_mul(GROWTH)
        .saturating_add(SLACK_BYTES)
        .min(MOST_BYTES)
        .next_multiple_of(BLOCK_BYTES)
}

/// Decompression and the file system's checks run side by side if the host has two processors.
fn vcpus() -> u8 {
    std::thread::available_parallelism().map_or(1, |count| if count.get() > 1 { 2 } else { 1 })
}

/// The directory of sockets and logs; its lock tells the next command that we live.
pub(super) fn make_run_dir(home: &Home, run_dir: &Path) -> Result<(RemoveDir, FileLock), SandboxError> {
    let _home = home.lock()?;
    make_private_dir(run_dir)?;
    let undo = RemoveDir(Some(run_dir.to_owned()));
    let path = run_dir.join("lock");
    let lock = FileLock::take_short(&path)?;
    Ok((undo, lock))
}

async fn run(
    guest: &Guest,
    layers: &[LayerBlob],
    opened: Vec<(File, u64)>,
    progress: &(dyn Fn(UnpackProgress) + Send + Sync),
) -> Result<UnpackImageResponse, SandboxError> {
    let mut request = UnpackImageRequest { disk: DISK.to_owned(), ..Default::default() };
    let mut streams = Vec::new();
    for (layer, (file, bytes)) in layers.iter().zip(opened) {
        let (id, stream) = guest.agent.open_stream().await?;
        request.layers.push(message(layer, id));
        streams.push((layer.path.as_path(), file, bytes, stream));
    }
    let moved = std::sync::Mutex::new(Instant::now());
    let send = send_all(streams, progress, &moved);
    let answer = guest.agent.rpc.unpack_image(context(None), &request);
    let work = async {
        // The agent's refusal says more than the broken stream that it leaves behind.
        let (mut send, mut answer) = (std::pin::pin!(send), std::pin::pin!(answer));
        let mut sent = false;
        loop {
            tokio::select! {
                answer = &mut answer => return answer.map_err(|error| rpc_error("UnpackImage")(error).into()),
                done = &mut send, if !sent => match done {
                    Err(SendError::Host(error)) => return Err(error),
                    Ok(()) | Err(SendError::Guest) => sent = true,
                },
            }
        }
    };
    tokio::select! {
        done = guest.until_end(work) => done?,
        stalled = stall(&moved) => Err(stalled.into()),
    }
}

fn message(layer: &LayerBlob, stream: u64) -> Layer {
    let compression = match layer.compression {
        Compression::None => layer::Compression::NONE,
        Compression::Gzip => layer::Compression::GZIP,
        Compression::Zstd => layer::Compression::ZSTD,
    };
    Layer {
        stream,
        compression: EnumOrUnknown::new(compression),
        diff_id: layer.diff_id.to_vec(),
        ..Default::default()
    }
}

/// Ends when nothing has moved for too long.
async fn stall(moved: &std::sync::Mutex<Instant>) -> VmError {
    let limit: Duration = scaled_ms(STALL_MS);
    loop {
        let last = *moved.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let deadline = last + limit;
        if Instant::now() >= deadline {
            return VmError::Stalled { limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX) };
        }
        tokio::time::sleep_until(deadline).await;
    }
}

enum SendError {
    /// A layer cannot be read.
    Host(SandboxError),
    /// The guest closed a stream; its answer says why.
    Guest,
}

async fn send_all(
    streams: Vec<(&Path, File, u64, Stream)>,
    progress: &(dyn Fn(UnpackProgress) + Send + Sync),
    moved: &std::sync::Mutex<Instant>,
) -> Result<(), SendError> {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut open = Vec::new();
    for (layer, (path, file, total_bytes, mut stream)) in streams.into_iter().enumerate() {
        let mut file = tokio::fs::File::from_std(file);
        let mut sent_bytes = 0;
        loop {
            progress(UnpackProgress { layer, sent_bytes, total_bytes });
            let len = file
                .read(&mut buffer)
                .await
                .map_err(|source| SendError::Host(SandboxError::io("read layer", path, source)))?;
            if len == 0 {
                break;
            }
            stream.write_all(buffer.get(..len).unwrap_or_default()).await.map_err(|_| SendError::Guest)?;
            sent_bytes += u64::try_from(len).unwrap_or_default();
            *moved.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Instant::now();
        }
        stream.shutdown().await.map_err(|_| SendError::Guest)?;
        open.push(stream);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_bounded() {
        assert_eq!(disk_bound(0), SLACK_BYTES);
        assert_eq!(disk_bound(1), SLACK_BYTES + 4096);
        assert_eq!(disk_bound(u64::MAX), MOST_BYTES);
    }

    #[tokio::test]
    async fn nothing_is_left_when_the_parts_are_missing() {
        let (dir, home) = crate::store::tests::home();
        let out = dir.path().join("image");
        let error = unpack(&home, &[], &out, &|_| {}).await.unwrap_err();
        assert!(error.to_string().contains("the guest kernel"), "{error}");
        assert!(!out.exists());
        assert!(std::fs::read_dir(&home.dirs().run).unwrap().next().is_none());
        std::fs::write(&out, "precious").unwrap();
        assert!(unpack(&home, &[], &out, &|_| {}).await.is_err());
        assert_eq!(std::fs::read(&out).unwrap(), b"precious");
        let missing =
            LayerBlob { path: dir.path().join("layer"), compression: Compression::None, diff_id: [0; 32] };
        let error = unpack(&home, &[missing], &dir.path().join("other"), &|_| {}).await.unwrap_err();
        assert!(error.to_string().contains("open layer"), "{error}");
    }

    #[tokio::test]
    async fn layers_are_sent_in_order_to_their_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer");
        std::fs::write(&path, vec![7; CHUNK_BYTES + 5]).unwrap();
        let (near, mut far) = Stream::pair().unwrap();
        let streams = vec![(path.as_path(), File::open(&path).unwrap(), 5, near)];
        let seen = std::sync::Mutex::new(Vec::new());
        let note = |p: UnpackProgress| seen.lock().unwrap().push(p.sent_bytes);
        let moved = std::sync::Mutex::new(Instant::now());
        let mut bytes = Vec::new();
        let (sent, read) = tokio::join!(send_all(streams, &note, &moved), far.read_to_end(&mut bytes));
        assert!(sent.is_ok() && read.unwrap() == CHUNK_BYTES + 5);
        assert_eq!(seen.into_inner().unwrap().last(), Some(&(CHUNK_BYTES as u64 + 5)));
    }
}
