//! Making an image ready for use: resolve, pull when asked or missing, unpack once.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper_image::progress::{Progress, Quiet, for_stderr};
use hyper_image::{
    DiskBuild, DiskEntry, Image, ImageError, Platform, PullOptions, Pulled, Reference, Store, VerifyKey,
};
use hyper_sandbox::{Compression, Home, LayerBlob, UnpackProgress};
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::PullPolicy;
use crate::error::CliError;
use crate::output;

/// Format of the disks that our unpacker writes; a change of the unpacker's output changes this.
const DISK_FORMAT: &str = "erofs-1";
/// How long one start waits for another to unpack the same image.
const UNPACK_PATIENCE: Duration = Duration::from_secs(1800);

/// How the flags want images to be got.
///
/// # Errors
/// A platform or a key that is none.
pub(crate) fn options(
    platform: Option<&str>,
    keys: &[PathBuf],
    quiet: bool,
) -> Result<PullOptions, CliError> {
    let mut options = PullOptions { progress: progress(quiet), ..Default::default() };
    if let Some(platform) = platform {
        options.platform = Platform::parse(platform)?;
    }
    options.keys = keys.iter().map(|path| VerifyKey::read(path)).collect::<Result<_, _>>()?;
    Ok(options)
}

/// Pulls an image.
///
/// # Errors
/// What the registry, the network or the store have against it, in one line.
pub(crate) async fn pull(
    store: &Store,
    reference: &Reference,
    options: &PullOptions,
) -> Result<Pulled, CliError> {
    let pulled = hyper_image::pull(store, reference, options).await;
    let digest = pulled.as_ref().map_or_else(|_| String::new(), |pulled| pulled.digest.to_string());
    Ok(crate::context::audit().note("image pull", &reference.full(), &digest, pulled)?)
}

/// Where the progress of a pull goes.
fn progress(quiet: bool) -> Arc<dyn Progress> {
    if quiet { Arc::new(Quiet) } else { for_stderr() }
}

/// The image that `run` or `create` names, by policy from the store or the registry. With keys, one of them has signed it wherever it came from.
///
/// # Errors
/// Docker's words when it cannot be found; exit code 125.
pub(crate) async fn image(
    store: &Store,
    name: &str,
    policy: PullPolicy,
    options: &PullOptions,
    quiet: bool,
) -> Result<Image, CliError> {
    let found = match policy {
        PullPolicy::Always => None,
        PullPolicy::Missing | PullPolicy::Never => match store.resolve(name) {
            Ok(image) => Some(image),
            Err(ImageError::NoSuchImage { .. }) if policy == PullPolicy::Missing => None,
            Err(error) => return Err(error.into()),
        },
    };
    if let Some(image) = found {
        hyper_image::verify(store, &image, options).await?;
        return Ok(image);
    }
    let reference = Reference::parse(name)?;
    if policy == PullPolicy::Missing && !quiet {
        output::note(format!("Unable to find image '{reference}' locally"));
    }
    Ok(pull(store, &reference, options).await?.image)
}

/// The read-only disk of an image, unpacked in a throw-away machine when it is not there yet.
///
/// # Errors
/// When a layer is not what its image says, or the machine fails.
pub(crate) async fn disk(
    home: &Home,
    store: &Store,
    image: &Image,
    quiet: bool,
) -> Result<PathBuf, CliError> {
    match store.disk(image, DISK_FORMAT, UNPACK_PATIENCE).await? {
        DiskEntry::Ready(path) => Ok(path),
        DiskEntry::Build(build) => unpack(home, build, quiet).await,
    }
}

async fn unpack(home: &Home, build: DiskBuild, quiet: bool) -> Result<PathBuf, CliError> {
    let layers = build.layers().iter().map(layer).collect::<Result<Vec<_>, _>>()?;
    let bar = unpack_bar(quiet);
    let report = |p: UnpackProgress| {
        bar.set_length(p.total_bytes);
        bar.set_position(p.sent_bytes);
        bar.set_message(format!("{}/{}", p.layer + 1, layers.len()));
    };
    let unpacked = home.unpack(&layers, build.path(), &report).await;
    bar.finish_and_clear();
    unpacked?;
    Ok(build.commit().await?)
}

/// A bar on standard error when that is a terminal, else nothing.
fn unpack_bar(quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let template = "Unpacking layer {msg} [{bar:50}]  {decimal_bytes}/{decimal_total_bytes}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    // indicatif draws on standard error, and on nothing that is not a terminal.
    ProgressBar::new(0).with_style(style.progress_chars("=> "))
}

fn layer(blob: &hyper_image::LayerBlob) -> Result<LayerBlob, CliError> {
    let compression = match blob.compression {
        hyper_image::Compression::None => Compression::None,
        hyper_image::Compression::Gzip => Compression::Gzip,
        hyper_image::Compression::Zstd => Compression::Zstd,
    };
    let diff_id = digest_bytes(blob.diff_id.hex())
        .ok_or_else(|| CliError::failed(format!("layer {} has a malformed diff id", blob.digest.short())))?;
    Ok(LayerBlob { path: blob.path.clone(), compression, diff_id })
}

fn digest_bytes(hex: &str) -> Option<[u8; 32]> {
    let pairs =
        hex.as_bytes().chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
    pairs.collect::<Option<Vec<u8>>>()?.try_into().ok()
}
