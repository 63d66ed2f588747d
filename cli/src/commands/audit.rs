//! `audit`.

use std::collections::VecDeque;

use hyper_sandbox::audit::{AuditRecord, Head};
use serde_json::{Value, json};

use crate::args::AuditArgs;
use crate::context;
use crate::error::CliError;
use crate::format::{Column, Format};
use crate::output;

const COLUMNS: [Column; 7] = [
    Column { heading: "RECORD", key: "Record" },
    Column { heading: "TIME", key: "Time" },
    Column { heading: "USER", key: "User" },
    Column { heading: "ACTION", key: "Action" },
    Column { heading: "SUBJECT", key: "Subject" },
    Column { heading: "DETAIL", key: "Detail" },
    Column { heading: "ERROR", key: "Error" },
];
/// Characters of a subject that are shown unless `--no-trunc`; those of an id.
const SUBJECT_SHOWN: usize = 12;
/// Digits of an id.
const ID_DIGITS: usize = 64;

/// `hyper audit`.
///
/// # Errors
/// A record that was changed, taken out or put in between; exit code 1.
pub(crate) fn audit(args: &AuditArgs) -> Result<i32, CliError> {
    let format = Format::parse(args.format.format.as_deref())?;
    let head = args.head.as_deref().map(parse_head).transpose()?;
    let most = match (args.verify, args.tail.as_str()) {
        (true, _) => 0,
        (false, "all") => usize::MAX,
        (false, text) => text
            .parse()
            .map_err(|_| CliError::failed(format!("invalid --tail {text:?}: give a number or all")))?,
    };
    let (mut first, mut shown) = (None, VecDeque::new());
    let end = context::audit().verify(head.as_ref(), &mut |record| {
        first.get_or_insert(record.seq);
        shown.push_back(row(record, args.no_trunc));
        if shown.len() > most {
            shown.pop_front();
        }
    });
    // What was read before a break is shown: each of it is right.
    if !args.verify {
        format.print(&COLUMNS, &Vec::from(shown))?;
    }
    let end = end.map_err(|error| CliError::from_chain(&error))?;
    if args.verify {
        let from =
            first.map_or_else(String::new, |first| format!("records {first} to {} are whole: ", end.seq));
        output::line(format!("{from}{}:{}", end.seq, end.hash));
    }
    Ok(0)
}

/// `NUMBER:HASH`.
fn parse_head(text: &str) -> Result<Head, CliError> {
    let parts = text.split_once(':').and_then(|(seq, hash)| Some((seq.parse().ok()?, hash)));
    let digits =
        |hash: &str| hash.len() == ID_DIGITS && hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    match parts {
        Some((seq, hash)) if digits(hash) => Ok(Head { seq, hash: hash.to_owned() }),
        _ => {
            Err(CliError::failed(format!("invalid --head {text:?}: give NUMBER:HASH as --verify prints it")))
        }
    }
}

fn row(record: &AuditRecord, no_trunc: bool) -> Value {
    let is_id = record.subject.len() == ID_DIGITS && record.subject.bytes().all(|b| b.is_ascii_hexdigit());
    let subject = match record.subject.get(..SUBJECT_SHOWN) {
        Some(start) if is_id && !no_trunc => start,
        _ => &record.subject,
    };
    json!({
        "Record": record.seq,
        "Time": record.at.to_string(),
        "User": record.login.unwrap_or(record.uid),
        "Uid": record.uid,
        "Pid": record.pid,
        "Action": record.action,
        "Subject": subject,
        "Detail": record.detail,
        "Error": record.error,
    })
}
