//! Unpacks an image onto a disk, on a thread of its own.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Instant;

use hyper_protocol::rpc::agent::layer::Compression as Wire;
use hyper_protocol::rpc::agent::{Layer, UnpackImageRequest, UnpackImageResponse};
use hyper_unpack::{Compression, LayerInput, Limits, unpack};
use tokio_vsock::VsockStream;

use crate::disk;
use crate::error::{AgentError, Tried};
use crate::streams::Streams;

/// Most layers of an image.
const MAX_LAYERS: usize = hyper_unpack::limits::MAX_LAYERS as usize;

/// Unpacks the layers onto the disk.
///
/// # Errors
/// A disk or stream that is not there, or an image that is broken or too large.
pub(crate) async fn run(
    streams: &Streams,
    request: UnpackImageRequest,
) -> Result<UnpackImageResponse, AgentError> {
    disk::check_serial(&request.disk)?;
    if request.layers.len() > MAX_LAYERS {
        return Err(AgentError::limit("layers", MAX_LAYERS));
    }
    let mut layers = Vec::new();
    for layer in &request.layers {
        let stream = streams.claim(layer.stream).await?;
        layers.push(input(layer, stream)?);
    }
    let serial = request.disk;
    tokio::task::spawn_blocking(move || onto(&serial, layers))
        .await
        .map_err(|_| AgentError::state("the unpacking thread is gone"))?
}

fn input(layer: &Layer, stream: VsockStream) -> Result<LayerInput<File>, AgentError> {
    let compression = match layer.compression.enum_value() {
        Ok(Wire::NONE) => Compression::None,
        Ok(Wire::GZIP) => Compression::Gzip,
        Ok(Wire::ZSTD) => Compression::Zstd,
        Err(other) => return Err(AgentError::invalid(format!("compression {other} is not known"))),
    };
    let diff_id =
        layer.diff_id.as_slice().try_into().map_err(|_| {
            AgentError::invalid(format!("a diff id of {} bytes, not 32", layer.diff_id.len()))
        })?;
    let stream = OwnedFd::from(stream);
    rustix::io::ioctl_fionbio(&stream, false).tried(|| "make a stream blocking".to_owned())?;
    Ok(LayerInput { reader: File::from(stream), compression, diff_id })
}

fn onto(serial: &str, layers: Vec<LayerInput<File>>) -> Result<UnpackImageResponse, AgentError> {
    let found = disk::wait_for(&[serial], Instant::now().checked_add(disk::APPEAR_TIMEOUT))?;
    let Some(path) = found.first() else {
        return Err(AgentError::not_found(format!("no disk with serial {serial}")));
    };
    let tried = || format!("open disk {serial} ({})", path.display());
    // Exclusive: a disk that is mounted is not one to write an image to.
    let mut out =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(path).tried(tried)?;
    let limits = Limits { max_image_bytes: out.seek(SeekFrom::End(0)).tried(tried)?, ..Limits::default() };
    let layers = layers.into_iter().map(Ok::<_, std::convert::Infallible>);
    let summary = unpack(layers, &mut out, &limits, &mut |_| {}).map_err(|error| {
        let message = chain(&error);
        if error.is_image_fault() { AgentError::invalid(message) } else { AgentError::state(message) }
    })?;
    Ok(UnpackImageResponse {
        image_bytes: summary.image_bytes,
        inodes: summary.inodes,
        ..UnpackImageResponse::default()
    })
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !line.contains(&cause_text) {
            line.push_str(": ");
            line.push_str(&cause_text);
        }
        source = cause.source();
    }
    line
}
