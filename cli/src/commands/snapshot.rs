//! `snapshot create|ls|rm`.

use hyper_sandbox::{SandboxError, Snapshot, Timestamp};
use serde_json::{Value, json};

use crate::args::SnapshotVerb;
use crate::context;
use crate::error::CliError;
use crate::format::{Column, Format};
use crate::options::{quantity, time};
use crate::output;

const COLUMNS: [Column; 5] = [
    Column { heading: "NAME", key: "Name" },
    Column { heading: "CONTAINER", key: "Container" },
    Column { heading: "IMAGE", key: "Image" },
    Column { heading: "CREATED", key: "CreatedSince" },
    Column { heading: "SIZE", key: "Size" },
];

/// `hyper snapshot …`.
///
/// # Errors
/// What the verb could not do, exit code 1.
pub(crate) async fn snapshot(verb: SnapshotVerb) -> Result<i32, CliError> {
    let home = context::home()?;
    match verb {
        SnapshotVerb::Create { container, name } => {
            if let Some(name) = &name {
                home.check_new_snapshot(name)?;
            }
            let draft = home.find(&container)?.save().await?;
            output::line(draft.keep(name.as_deref().unwrap_or(""))?.name());
        }
        SnapshotVerb::Ls { quiet, format } => {
            let snapshots = home.snapshots()?;
            if quiet {
                snapshots.iter().for_each(|snapshot| output::line(snapshot.name()));
                return Ok(0);
            }
            let rows: Vec<Value> = snapshots.iter().map(row).collect();
            Format::parse(format.format.as_deref())?.print(&COLUMNS, &rows)?;
        }
        SnapshotVerb::Rm { names, force } => {
            let mut code = 0;
            for name in &names {
                match home.remove_snapshot(name) {
                    Ok(()) => output::line(name),
                    Err(SandboxError::NoSuchSnapshot(_)) if force => output::line(name),
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

fn row(snapshot: &Snapshot) -> Value {
    let image = &snapshot.saved_config().image;
    json!({
        "Name": snapshot.name(),
        "Container": snapshot.source(),
        "Image": image.reference,
        "ImageID": image.id,
        "CreatedAt": snapshot.created().to_string(),
        "CreatedSince": format!("{} ago", time::human(time::since(snapshot.created(), Timestamp::now()))),
        "Size": quantity::human(snapshot.bytes()),
        "Bytes": snapshot.bytes(),
    })
}
