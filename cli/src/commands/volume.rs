//! `volume create|ls|inspect|rm`.

use std::collections::BTreeMap;

use hyper_sandbox::{SandboxError, Volume};
use serde_json::{Value, json};

use crate::args::VolumeVerb;
use crate::context;
use crate::error::CliError;
use crate::format::{Column, Format};
use crate::options::env;
use crate::output;

const COLUMNS: [Column; 2] =
    [Column { heading: "DRIVER", key: "Driver" }, Column { heading: "VOLUME NAME", key: "Name" }];

/// `hyper volume …`.
///
/// # Errors
/// What the verb could not do, exit code 1.
pub(crate) fn volume(verb: VolumeVerb) -> Result<i32, CliError> {
    let home = context::home()?;
    match verb {
        VolumeVerb::Create { name, labels } => {
            let labels: BTreeMap<String, String> = env::merge_labels(&[], &labels)?;
            output::line(home.create_volume(name.as_deref().unwrap_or(""), labels)?.name);
        }
        VolumeVerb::Ls { quiet, format } => {
            let volumes = home.volumes()?;
            if quiet {
                volumes.iter().for_each(|v| output::line(&v.name));
                return Ok(0);
            }
            let rows: Vec<Value> = volumes.iter().map(row).collect();
            Format::parse(format.format.as_deref())?.print(&COLUMNS, &rows)?;
        }
        VolumeVerb::Inspect { names, format } => {
            let mut rows = Vec::new();
            for name in &names {
                rows.push(row(&home.volume(name)?));
            }
            super::inspect::print(&rows, format.format.as_deref())?;
        }
        VolumeVerb::Rm { names, force } => {
            let mut code = 0;
            for name in &names {
                match home.remove_volume(name) {
                    Ok(()) => output::line(name),
                    Err(SandboxError::NoSuchVolume(_)) if force => output::line(name),
                    Err(error) => {
                        output::error(CliError::from(error));
                        code = 1;
                    }
                }
            }
            return Ok(code);
        }
    }
    Ok(0)
}

/// A volume as Docker's inspect shows it.
pub(crate) fn row(volume: &Volume) -> Value {
    json!({
        "Name": volume.name,
        "Driver": "local",
        "Scope": "local",
        "Mountpoint": volume.mountpoint,
        "CreatedAt": volume.created.to_string(),
        "Labels": volume.labels,
        "Options": {},
    })
}
