//! `--format`: JSON, aligned tables and Go templates over the same rows.
//!
//! A row is a JSON object whose keys are Docker's names (`ID`, `Names`, `Status`, …); a template sees it as `.`.

mod table;
mod template;

use serde_json::Value;

use crate::error::CliError;
use crate::output;

pub(crate) use table::render as render_table;
pub(crate) use template::Template;

/// One column of the default table: heading and key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Column {
    /// Heading, capitals.
    pub(crate) heading: &'static str,
    /// Key in the row.
    pub(crate) key: &'static str,
}

/// What `--format` asked for.
#[derive(Debug)]
pub(crate) enum Format {
    /// The default table.
    Table,
    /// One JSON object a row.
    Json,
    /// A template a row.
    Template(Template),
    /// A template a row, in aligned columns with headings.
    TableTemplate(Template),
}

impl Format {
    /// Reads the flag.
    ///
    /// # Errors
    /// A template that does not parse.
    pub(crate) fn parse(flag: Option<&str>) -> Result<Self, CliError> {
        match flag {
            None | Some("" | "table") => Ok(Self::Table),
            Some("json") => Ok(Self::Json),
            Some(text) => match text.strip_prefix("table ") {
                Some(rest) => Ok(Self::TableTemplate(Template::parse(rest)?)),
                None => Ok(Self::Template(Template::parse(text)?)),
            },
        }
    }

    /// The text for some rows, newline at the end unless empty.
    ///
    /// # Errors
    /// A template that fails on a row.
    pub(crate) fn render(&self, columns: &[Column], rows: &[Value]) -> Result<String, CliError> {
        let mut text = String::new();
        match self {
            Self::Table => {
                let headings = columns.iter().map(|c| c.heading.to_owned()).collect();
                let cells = rows.iter().map(|r| columns.iter().map(|c| cell(r, c.key)).collect());
                text = render_table(headings, cells.collect());
            }
            Self::Json => {
                for row in rows {
                    text.push_str(&row.to_string());
                    text.push('\n');
                }
            }
            Self::Template(template) => {
                for row in rows {
                    text.push_str(&template.render(row)?);
                    text.push('\n');
                }
            }
            Self::TableTemplate(template) => {
                let split = |line: String| line.split('\t').map(str::to_owned).collect::<Vec<_>>();
                let headings = template.render(&headings_row(columns, rows))?;
                let cells: Result<Vec<_>, _> = rows.iter().map(|r| template.render(r).map(split)).collect();
                text = render_table(split(headings), cells?);
            }
        }
        Ok(text)
    }

    /// Renders and prints.
    ///
    /// # Errors
    /// As [`Format::render`].
    pub(crate) fn print(&self, columns: &[Column], rows: &[Value]) -> Result<(), CliError> {
        output::bytes_out(self.render(columns, rows)?.as_bytes());
        Ok(())
    }
}

fn headings_row(columns: &[Column], rows: &[Value]) -> Value {
    let mut row = serde_json::Map::new();
    if let Some(Value::Object(first)) = rows.first() {
        for key in first.keys() {
            row.insert(key.clone(), Value::String(key.to_uppercase()));
        }
    }
    for column in columns {
        row.insert(column.key.to_owned(), Value::String(column.heading.to_owned()));
    }
    Value::Object(row)
}

fn cell(row: &Value, key: &str) -> String {
    match row.get(key) {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const COLUMNS: [Column; 2] =
        [Column { heading: "CONTAINER ID", key: "ID" }, Column { heading: "NAMES", key: "Names" }];

    fn render(flag: Option<&str>) -> String {
        let rows = [
            json!({"ID": "abc", "Names": "web", "Extra": 3}),
            json!({"ID": "d", "Names": "a-longer-name", "Extra": 4}),
        ];
        Format::parse(flag).unwrap().render(&COLUMNS, &rows).unwrap()
    }

    #[test]
    fn every_form() {
        assert_eq!(render(None), "CONTAINER ID   NAMES\nabc            web\nd              a-longer-name\n");
        assert_eq!(render(Some("{{.Names}}")), "web\na-longer-name\n");
        assert_eq!(
            render(Some("table {{.Extra}}\t{{.ID}}")),
            "EXTRA   CONTAINER ID\n3       abc\n4       d\n"
        );
        assert!(render(Some("json")).starts_with("{\"Extra\":3,\"ID\":\"abc\""));
    }

    #[test]
    fn a_bad_template_is_one_line() {
        let error = Format::parse(Some("{{.Names")).unwrap_err();
        assert!(error.message.starts_with("template"), "{error}");
        assert!(!error.message.contains('\n'));
    }
}
