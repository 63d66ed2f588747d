//! Flags of the image verbs.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// When `run` and `create` pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PullPolicy {
    /// Always ask the registry.
    Always,
    /// Only when the image is not here.
    Missing,
    /// Never.
    Never,
}

/// `hyper pull`.
#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// Print the image's name only.
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// Platform, such as `linux/amd64`.
    #[arg(long)]
    pub(crate) platform: Option<String>,
    /// Only an image that one of these public keys has signed (cosign's signatures); a PEM file, may be given several times.
    #[arg(long, value_name = "FILE", env = "HYPER_VERIFY_KEY", value_delimiter = ':')]
    pub(crate) verify_key: Vec<PathBuf>,
    /// NAME[:TAG|@DIGEST]
    pub(crate) image: String,
}

/// `hyper images`.
#[derive(Debug, Args)]
pub(crate) struct ImagesArgs {
    /// Show ids only.
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// Show images without a name, too.
    #[arg(long, short)]
    pub(crate) all: bool,
    /// Show digests.
    #[arg(long)]
    pub(crate) digests: bool,
    /// Do not shorten ids.
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// `json`, `table`, `table TEMPLATE`, or a Go template
    #[arg(long)]
    pub(crate) format: Option<String>,
    /// Show only images of this repository.
    pub(crate) repository: Option<String>,
}

/// `hyper tag`.
#[derive(Debug, Args)]
pub(crate) struct TagArgs {
    /// Name or id of the image.
    pub(crate) source: String,
    /// Its other name, NAME[:TAG].
    pub(crate) target: String,
}

/// `hyper rmi`.
#[derive(Debug, Args)]
pub(crate) struct RmiArgs {
    /// Remove it though stopped containers use it.
    #[arg(long, short)]
    pub(crate) force: bool,
    /// Names or ids.
    #[arg(required = true)]
    pub(crate) images: Vec<String>,
}

/// `hyper load`.
#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// Read from this archive or OCI layout directory instead of standard input.
    #[arg(long, short)]
    pub(crate) input: Option<PathBuf>,
    /// Print nothing but names.
    #[arg(long, short)]
    pub(crate) quiet: bool,
}
