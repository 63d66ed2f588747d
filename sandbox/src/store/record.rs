//! `containers/<id>/config.json`.

use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::config::ContainerConfig;

/// What is written of a container when it is made; afterwards only a rename or an update changes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) version: u32,
    pub(crate) id: String,
    pub(crate) created: Timestamp,
    pub(crate) config: ContainerConfig,
}

impl Record {
    /// Version of the file's format; a file of a later one is refused.
    pub(crate) const VERSION: u32 = 1;
}
