//! Go templates, with the functions that Docker adds.

use std::collections::HashMap;
use std::fmt;

use gtmpl::{Context, FuncError, Value as Go};
use serde_json::Value;

use crate::error::CliError;

/// Longest template, bytes.
const MAX_TEMPLATE_BYTES: usize = 64 * 1024;

/// A parsed template.
pub(crate) struct Template {
    inner: gtmpl::Template,
    text: String,
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Template").field(&self.text).finish()
    }
}

impl Template {
    /// Parses a template; `\t` and `\n` written as two characters are understood, as Docker understands them.
    ///
    /// # Errors
    /// Bad syntax or an unknown function.
    pub(crate) fn parse(text: &str) -> Result<Self, CliError> {
        if text.len() > MAX_TEMPLATE_BYTES {
            return Err(CliError::usage(format!(
                "template of {} bytes: at most {MAX_TEMPLATE_BYTES}",
                text.len()
            )));
        }
        let text = text.replace("\\t", "\t").replace("\\n", "\n");
        let mut inner = gtmpl::Template::default();
        inner.add_funcs(&FUNCTIONS);
        inner
            .parse(&text)
            .map_err(|e| CliError::usage(format!("template {text:?}: {}", one_line(&e.to_string()))))?;
        Ok(Self { inner, text })
    }

    /// Renders one row.
    ///
    /// # Errors
    /// A field that is not there, a function that fails.
    pub(crate) fn render(&self, row: &Value) -> Result<String, CliError> {
        let context = Context::from(to_go(row));
        self.inner
            .render(&context)
            .map_err(|e| CliError::failed(format!("template {:?}: {}", self.text, one_line(&e.to_string()))))
    }
}

const FUNCTIONS: [(&str, gtmpl::Func); 7] = [
    ("json", json),
    ("join", join),
    ("lower", lower),
    ("upper", upper),
    ("title", title),
    ("split", split),
    ("println", println),
];

fn one_line(text: &str) -> String {
    text.replace('\n', " ")
}

fn to_go(value: &Value) -> Go {
    match value {
        Value::Null => Go::NoValue,
        Value::Bool(b) => Go::Bool(*b),
        Value::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64()) {
            (Some(n), _, _) => Go::from(n),
            (_, Some(n), _) => Go::from(n),
            (_, _, n) => Go::from(n.unwrap_or(0.0)),
        },
        Value::String(s) => Go::String(s.clone()),
        Value::Array(items) => Go::Array(items.iter().map(to_go).collect()),
        Value::Object(map) => {
            Go::Map(map.iter().map(|(k, v)| (k.clone(), to_go(v))).collect::<HashMap<_, _>>())
        }
    }
}

fn from_go(value: &Go) -> Value {
    match value {
        Go::Bool(b) => Value::Bool(*b),
        Go::String(s) => Value::String(s.clone()),
        Go::Array(items) => Value::Array(items.iter().map(from_go).collect()),
        Go::Map(map) | Go::Object(map) => {
            Value::Object(map.iter().map(|(k, v)| (k.clone(), from_go(v))).collect())
        }
        Go::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64()) {
            (Some(n), _, _) => Value::from(n),
            (_, Some(n), _) => Value::from(n),
            (_, _, n) => n.map_or(Value::Null, Value::from),
        },
        Go::Nil | Go::NoValue | Go::Function(_) => Value::Null,
    }
}

fn text_of(value: Option<&Go>) -> String {
    match value {
        None | Some(Go::NoValue | Go::Nil) => String::new(),
        Some(Go::String(s)) => s.clone(),
        Some(other) => other.to_string(),
    }
}

fn argument(args: &[Go], n: usize, name: &str) -> Result<String, FuncError> {
    match args.get(n) {
        Some(value) => Ok(text_of(Some(value))),
        None => Err(FuncError::Generic(format!("{name} needs {} arguments", n + 1))),
    }
}

fn json(args: &[Go]) -> Result<Go, FuncError> {
    Ok(Go::String(args.first().map_or(Value::Null, from_go).to_string()))
}

fn join(args: &[Go]) -> Result<Go, FuncError> {
    let separator = argument(args, 1, "join")?;
    match args.first() {
        Some(Go::Array(items)) => {
            let parts: Vec<String> = items.iter().map(|i| text_of(Some(i))).collect();
            Ok(Go::String(parts.join(&separator)))
        }
        other => Ok(Go::String(text_of(other))),
    }
}

fn lower(args: &[Go]) -> Result<Go, FuncError> {
    Ok(Go::String(argument(args, 0, "lower")?.to_lowercase()))
}

fn upper(args: &[Go]) -> Result<Go, FuncError> {
    Ok(Go::String(argument(args, 0, "upper")?.to_uppercase()))
}

fn title(args: &[Go]) -> Result<Go, FuncError> {
    let text = argument(args, 0, "title")?;
    let mut letters = text.chars();
    let first: String = letters.next().map(|c| c.to_uppercase().collect()).unwrap_or_default();
    Ok(Go::String(first + letters.as_str()))
}

fn split(args: &[Go]) -> Result<Go, FuncError> {
    let (text, separator) = (argument(args, 0, "split")?, argument(args, 1, "split")?);
    Ok(Go::Array(text.split(&separator).map(|p| Go::String(p.to_owned())).collect()))
}

fn println(args: &[Go]) -> Result<Go, FuncError> {
    let parts: Vec<String> = args.iter().map(|a| text_of(Some(a))).collect();
    Ok(Go::String(parts.join(" ") + "\n"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(text: &str) -> String {
        let row = json!({
            "Name": "/web", "State": {"Status": "running", "ExitCode": 0, "Big": 18_446_744_073_709_551_615u64},
            "Env": ["A=1", "B=2"], "Labels": {"com.x.y": "z"}, "On": true, "None": null
        });
        Template::parse(text).unwrap().render(&row).unwrap()
    }

    #[test]
    fn what_docker_users_write() {
        assert_eq!(render("{{.State.Status}}/{{.State.ExitCode}}"), "running/0");
        assert_eq!(render("{{json .Env}}"), r#"["A=1","B=2"]"#);
        assert_eq!(render("{{range .Env}}{{.}};{{end}}"), "A=1;B=2;");
        assert_eq!(render("{{if .On}}yes{{else}}no{{end}}"), "yes");
        assert_eq!(render(r#"{{index .Labels "com.x.y"}}"#), "z");
        assert_eq!(render(r#"{{join .Env ","}}"#), "A=1,B=2");
        assert_eq!(render("{{upper .Name}} {{len .Env}}"), "/WEB 2");
        assert_eq!(render("{{.State.Big}}"), "18446744073709551615");
        assert_eq!(render("{{json .None}}"), "null");
    }

    #[test]
    fn a_missing_field_is_an_error() {
        let template = Template::parse("{{.No.Such}}").unwrap();
        assert!(template.render(&json!({"ID": "x"})).is_err());
    }

    #[test]
    fn hostile_templates_fail_in_one_line() {
        for text in
            ["{{", "{{nosuch .}}", "{{end}}", "{{range}}", "{{if}}{{end}}", "{{.a.}}", "{{\"}}", "{{1.}}"]
        {
            if let Err(error) = Template::parse(text) {
                assert!(!error.message.contains('\n'), "{error}");
            }
        }
    }
}
