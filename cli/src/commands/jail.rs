//! `doctor --jail`: what is left to the processes that serve a container's machine.

use hyper_sandbox::Jailed;
use serde_json::{Value, json};

use crate::args::DoctorArgs;
use crate::context;
use crate::error::CliError;
use crate::format::{Column, Format};

const COLUMNS: [Column; 5] = [
    Column { heading: "PROCESS", key: "Process" },
    Column { heading: "PID", key: "PID" },
    Column { heading: "", key: "Verdict" },
    Column { heading: "LAYER", key: "Layer" },
    Column { heading: "FOUND", key: "Found" },
];

/// `hyper doctor --jail CONTAINER`: exit code 0 when all is as docs/threat-model.md promises, else 1.
///
/// # Errors
/// When it does not run, or the host's `/proc` cannot be read.
pub(crate) fn jail(container: &str, args: &DoctorArgs) -> Result<i32, CliError> {
    let format = if args.json { Format::Json } else { Format::parse(args.format.as_deref())? };
    let processes = context::home()?.find(container)?.jailed()?;
    let rows: Vec<Value> = processes.iter().flat_map(rows).collect();
    if !args.quiet {
        format.print(&COLUMNS, &rows)?;
    }
    let broken = processes.iter().flat_map(|process| &process.findings).any(|finding| !finding.holds);
    Ok(i32::from(broken))
}

fn rows(process: &Jailed) -> impl Iterator<Item = Value> {
    process.findings.iter().map(|finding| {
        json!({
            "Process": process.program,
            "PID": process.pid.to_string(),
            "Layer": finding.layer,
            "Verdict": if finding.holds { "ok" } else { "FAIL" },
            "Found": finding.found,
        })
    })
}
