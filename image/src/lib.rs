//! Registry client, content store and unpacked images.
#![forbid(unsafe_code)]

mod config;
mod digest;
mod error;
mod fault;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod image;
mod load;
mod manifest;
mod platform;
pub mod progress;
mod pull;
mod reference;
mod registry;
mod signature;
mod store;
#[cfg(test)]
mod testing;

pub use config::{ExposedPort, Healthcheck, ImageConfig, MAX_CONFIG_BYTES, Protocol};
pub use digest::Digest;
pub use error::{ImageError, Result};
pub use image::{Compression, Image, Layer, LayerBlob};
pub use load::{LoadOptions, LoadedImage, load, load_path};
pub use manifest::{MAX_LAYER_BYTES, MAX_LAYERS, MAX_MANIFEST_BYTES};
pub use platform::Platform;
pub use pull::{PullOptions, Pulled, pull};
pub use reference::Reference;
pub use registry::Patience;
pub use registry::credentials::Auth;
pub use signature::{VerifyKey, verify};
pub use store::disk::{DiskBuild, DiskEntry};
pub use store::gc::{GcReport, PruneScope};
pub use store::images::{Removal, Removed, Used};
pub use store::{Hold, Store};
