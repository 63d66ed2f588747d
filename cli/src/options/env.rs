//! `-e`, `--env-file`, `--label` and `--label-file`.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::CliError;

/// Largest env or label file, bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The environment of a container: the image's, then files, then flags; a later value replaces an earlier one in its place.
///
/// A bare `KEY` takes the caller's value and is left out when the caller has none (in flags it then also removes the image's).
///
/// # Errors
/// A variable without a name, or a file that cannot be read.
pub(crate) fn merge_env(
    image: &[String],
    files: &[std::path::PathBuf],
    flags: &[String],
    caller: &dyn Fn(&str) -> Option<String>,
) -> Result<Vec<String>, CliError> {
    let mut merged: Vec<String> = image.to_vec();
    for file in files {
        for line in read_lines(file, "env file")? {
            apply(&mut merged, &line, caller)?;
        }
    }
    for flag in flags {
        apply(&mut merged, flag, caller)?;
    }
    Ok(merged)
}

fn apply(
    merged: &mut Vec<String>,
    entry: &str,
    caller: &dyn Fn(&str) -> Option<String>,
) -> Result<(), CliError> {
    let (key, value) = match entry.split_once('=') {
        Some((key, value)) => (key, Some(value.to_owned())),
        None => (entry, caller(entry)),
    };
    if key.is_empty() || key.contains(char::is_whitespace) {
        return Err(CliError::usage(format!(
            "invalid environment variable: {entry:?}: give KEY=VALUE or KEY"
        )));
    }
    let same = |e: &String| e.split_once('=').is_some_and(|(k, _)| k == key);
    match value {
        Some(value) => {
            let text = format!("{key}={value}");
            match merged.iter_mut().find(|e| same(e)) {
                Some(slot) => *slot = text,
                None => merged.push(text),
            }
        }
        None => merged.retain(|e| !same(e)),
    }
    Ok(())
}

/// Labels from files and flags; a bare key has an empty value.
///
/// # Errors
/// A label without a name, or a file that cannot be read.
pub(crate) fn merge_labels(
    files: &[std::path::PathBuf],
    flags: &[String],
) -> Result<BTreeMap<String, String>, CliError> {
    let mut labels = BTreeMap::new();
    let mut lines = Vec::new();
    for file in files {
        lines.extend(read_lines(file, "label file")?);
    }
    for entry in lines.iter().chain(flags) {
        let (key, value) = entry.split_once('=').unwrap_or((entry, ""));
        if key.is_empty() {
            return Err(CliError::usage(format!("invalid label: {entry:?}: give KEY or KEY=VALUE")));
        }
        labels.insert(key.to_owned(), value.to_owned());
    }
    Ok(labels)
}

fn read_lines(path: &Path, what: &str) -> Result<Vec<String>, CliError> {
    let fail = |e: std::io::Error| CliError::usage(format!("cannot read {what} {}: {e}", path.display()));
    let size = std::fs::metadata(path).map_err(fail)?.len();
    if size > MAX_FILE_BYTES {
        return Err(CliError::usage(format!(
            "{what} {} has {size} bytes: at most {MAX_FILE_BYTES}",
            path.display()
        )));
    }
    let text = std::fs::read_to_string(path).map_err(fail)?;
    let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim_start);
    Ok(lines.filter(|l| !l.is_empty() && !l.starts_with('#')).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(key: &str) -> Option<String> {
        (key == "MINE").then(|| "from caller".to_owned())
    }

    #[test]
    fn later_values_replace_in_place() {
        let image = ["PATH=/bin".to_owned(), "A=1".to_owned()];
        let flags = ["A=2".to_owned(), "B=x=y".to_owned(), "MINE".to_owned(), "ABSENT".to_owned()];
        let env = merge_env(&image, &[], &flags, &caller).unwrap();
        assert_eq!(env, ["PATH=/bin", "A=2", "B=x=y", "MINE=from caller"]);
    }

    #[test]
    fn env_file_has_comments_and_no_quoting() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("env");
        std::fs::write(&path, "# c\n\n  Q=\"a b\"\nMINE\nABSENT\n").unwrap();
        let env = merge_env(&[], &[path], &[], &caller).unwrap();
        assert_eq!(env, ["Q=\"a b\"", "MINE=from caller"]);
    }

    #[test]
    fn nameless_variable_is_refused() {
        let error = merge_env(&[], &[], &["=x".to_owned()], &caller).unwrap_err();
        assert_eq!(error.code, 125);
    }

    #[test]
    fn labels_may_lack_a_value() {
        let labels = merge_labels(&[], &["a=b=c".to_owned(), "d".to_owned()]).unwrap();
        assert_eq!(labels["a"], "b=c");
        assert_eq!(labels["d"], "");
    }
}
