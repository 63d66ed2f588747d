//! `ps`.

use hyper_sandbox::{Container, MountConfig, NetworkMode, Status, Timestamp};
use serde_json::{Value, json};

use super::lifecycle::protocol;
use crate::args::PsArgs;
use crate::context;
use crate::error::CliError;
use crate::format::{Column, Format};
use crate::options::time;
use crate::output;

const COLUMNS: [Column; 7] = [
    Column { heading: "CONTAINER ID", key: "ID" },
    Column { heading: "IMAGE", key: "Image" },
    Column { heading: "COMMAND", key: "Command" },
    Column { heading: "CREATED", key: "RunningFor" },
    Column { heading: "STATUS", key: "Status" },
    Column { heading: "PORTS", key: "Ports" },
    Column { heading: "NAMES", key: "Names" },
];

/// Characters of a command that are shown unless `--no-trunc`.
const COMMAND_SHOWN: usize = 20;

/// `hyper ps`.
///
/// # Errors
/// A bad filter or template, or state that cannot be read.
pub(crate) fn ps(args: &PsArgs) -> Result<i32, CliError> {
    let filters = args.filter.iter().map(|f| Filter::parse(f)).collect::<Result<Vec<_>, _>>()?;
    let last = if args.latest { Some(1) } else { args.last };
    let by_status = filters.iter().any(|f| matches!(f, Filter::Status(_) | Filter::Exited(_)));
    let all = args.all || last.is_some() || by_status;
    let mut containers = context::home()?.containers()?;
    containers.truncate(last.unwrap_or(usize::MAX));
    containers.retain(|c| (all || c.state().status.is_live()) && accepted(&filters, c));
    if args.quiet && args.format.is_none() {
        for container in &containers {
            output::line(if args.no_trunc { container.id() } else { container.short_id() });
        }
        return Ok(0);
    }
    let now = Timestamp::now();
    let rows: Vec<Value> = containers.iter().map(|c| row(c, args.no_trunc, now)).collect();
    Format::parse(args.format.as_deref())?.print(&COLUMNS, &rows)?;
    Ok(0)
}

fn row(container: &Container, no_trunc: bool, now: Timestamp) -> Value {
    let config = container.config();
    let command = format!("\"{}\"", shortened(&config.process.args().join(" "), no_trunc));
    let labels: Vec<String> = config.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    let network = match config.network {
        NetworkMode::Bridge => "bridge",
        NetworkMode::None => "none",
    };
    json!({
        "ID": if no_trunc { container.id() } else { container.short_id() },
        "Image": config.image.reference,
        "Command": command,
        "CreatedAt": container.created().to_string(),
        "RunningFor": format!("{} ago", time::human(time::since(container.created(), now))),
        "State": container.state().status.as_str(),
        "Status": status(container, now),
        "Ports": ports(container),
        "Names": container.name(),
        "Labels": labels.join(","),
        "Mounts": config.mounts.iter().map(mount_source).collect::<Vec<_>>().join(","),
        "Networks": network,
    })
}

fn shortened(text: &str, no_trunc: bool) -> String {
    if no_trunc || text.chars().count() <= COMMAND_SHOWN {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(COMMAND_SHOWN - 1).collect();
    short.push('…');
    short
}

fn mount_source(mount: &MountConfig) -> String {
    match mount {
        MountConfig::Bind { source, .. } => source.display().to_string(),
        MountConfig::Volume { name, .. } => name.clone(),
        MountConfig::Tmpfs { .. } => "tmpfs".to_owned(),
    }
}

/// Docker's sentence about a container's state.
fn status(container: &Container, now: Timestamp) -> String {
    let state = container.state();
    let ago = |then| time::human(time::since(then, now));
    match state.status {
        Status::Created => "Created".to_owned(),
        Status::Running => format!("Up {}", ago(state.started)),
        Status::Paused => format!("Up {} (Paused)", ago(state.started)),
        Status::Restarting => format!("Restarting ({}) {} ago", state.exit_code, ago(state.finished)),
        Status::Exited => format!("Exited ({}) {} ago", state.exit_code, ago(state.finished)),
        Status::Dead => "Removal In Progress".to_owned(),
    }
}

fn ports(container: &Container) -> String {
    let one = |p: &hyper_sandbox::ResolvedPort| {
        let bound = std::net::SocketAddr::new(p.bound_ip, p.bound_port);
        format!("{bound}->{}/{}", p.wish.container_port, protocol(p.wish.protocol))
    };
    container.state().ports.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// One `--filter`. Filters of one kind are alternatives, except labels, which must all hold.
#[derive(Debug, PartialEq, Eq)]
enum Filter {
    Id(String),
    Name(String),
    Label(String, Option<String>),
    Status(String),
    Exited(u8),
    Ancestor(String),
    Volume(String),
}

impl Filter {
    fn parse(text: &str) -> Result<Self, CliError> {
        let bad = || {
            CliError::failed(format!(
                "invalid filter {text:?}: give id=, name=, label=, status=, exited=, ancestor= or volume="
            ))
        };
        let (key, value) = text.split_once('=').ok_or_else(bad)?;
        let value = value.to_owned();
        Ok(match key {
            "id" => Self::Id(value),
            "name" => Self::Name(value),
            "label" => match value.split_once('=') {
                Some((key, value)) => Self::Label(key.to_owned(), Some(value.to_owned())),
                None => Self::Label(value, None),
            },
            "status" if Status::ALL.iter().any(|s| s.as_str() == value) => Self::Status(value),
            "exited" => Self::Exited(value.parse().map_err(|_| bad())?),
            "ancestor" => Self::Ancestor(value),
            "volume" => Self::Volume(value),
            _ => return Err(bad()),
        })
    }

    fn accepts(&self, container: &Container) -> bool {
        let (config, state) = (container.config(), container.state());
        match self {
            Self::Id(id) => container.id().starts_with(id.as_str()),
            Self::Name(name) => container.name().contains(name.trim_start_matches('/')),
            Self::Label(key, value) => {
                config.labels.get(key).is_some_and(|have| value.as_ref().is_none_or(|want| want == have))
            }
            Self::Status(status) => state.status.as_str() == status,
            Self::Exited(code) => state.status == Status::Exited && state.exit_code == *code,
            Self::Ancestor(image) => {
                let reference = &config.image.reference;
                reference == image
                    || config.image.id.trim_start_matches("sha256:").starts_with(image.as_str())
            }
            Self::Volume(volume) => {
                config.mounts.iter().any(|m| mount_source(m) == *volume || m.target() == volume)
            }
        }
    }
}

fn accepted(filters: &[Filter], container: &Container) -> bool {
    filters.iter().all(|filter| match filter {
        Filter::Label(..) => filter.accepts(container),
        _ => {
            let kind = std::mem::discriminant(filter);
            filters.iter().filter(|f| std::mem::discriminant(*f) == kind).any(|f| f.accepts(container))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_checked() {
        assert_eq!(Filter::parse("label=a=b").unwrap(), Filter::Label("a".into(), Some("b".into())));
        assert_eq!(Filter::parse("status=exited").unwrap(), Filter::Status("exited".into()));
        for text in ["", "id", "status=up", "exited=x", "colour=red"] {
            assert!(Filter::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn long_commands_are_shortened() {
        assert_eq!(shortened("sleep 10", false), "sleep 10");
        assert_eq!(shortened(&"x".repeat(30), false).chars().count(), COMMAND_SHOWN);
        assert_eq!(shortened(&"x".repeat(30), true).len(), 30);
    }
}
