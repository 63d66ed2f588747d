//! Flags of the container verbs. `run` and `create` share [`ContainerOptions`].

use std::path::PathBuf;

use clap::{ArgAction, Args};

use super::PullPolicy;

/// What `run` and `create` share.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub(crate) struct ContainerOptions {
    /// Print help
    #[arg(long, action = ArgAction::Help)]
    pub(crate) help: Option<bool>,
    /// Keep standard input open even if not attached
    #[arg(long, short, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = ArgAction::Set)]
    pub(crate) interactive: bool,
    /// Allocate a terminal
    #[arg(long, short, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = ArgAction::Set)]
    pub(crate) tty: bool,
    /// Remove the container and its anonymous volumes when it exits
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = ArgAction::Set)]
    pub(crate) rm: bool,
    /// Name of the container
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Set an environment variable: KEY=VALUE, or KEY to pass on the caller's
    #[arg(long, short = 'e')]
    pub(crate) env: Vec<String>,
    /// Read environment variables from a file
    #[arg(long)]
    pub(crate) env_file: Vec<PathBuf>,
    /// Publish a port: [[HOST_IP:]HOST_PORT:]CONTAINER_PORT[/tcp|udp]
    #[arg(long, short)]
    pub(crate) publish: Vec<String>,
    /// Publish all exposed ports to random ports
    #[arg(long, short = 'P')]
    pub(crate) publish_all: bool,
    /// Bind a directory, file or named volume: [SOURCE:]TARGET[:ro]
    #[arg(long, short)]
    pub(crate) volume: Vec<String>,
    /// Attach a mount: type=bind|volume|tmpfs,source=…,target=…[,readonly]
    #[arg(long)]
    pub(crate) mount: Vec<String>,
    /// Mount a tmpfs: TARGET[:size=…,mode=…]
    #[arg(long)]
    pub(crate) tmpfs: Vec<String>,
    /// Working directory inside the container
    #[arg(long, short)]
    pub(crate) workdir: Option<String>,
    /// User: NAME|UID[:GROUP|GID]
    #[arg(long, short)]
    pub(crate) user: Option<String>,
    /// Additional groups
    #[arg(long)]
    pub(crate) group_add: Vec<String>,
    /// Replace the image's entrypoint; empty to drop it
    #[arg(long)]
    pub(crate) entrypoint: Option<String>,
    /// Memory of the container (and so of its machine), such as 512m
    #[arg(long, short)]
    pub(crate) memory: Option<String>,
    /// Processors, such as 1.5
    #[arg(long)]
    pub(crate) cpus: Option<String>,
    /// Most processes; -1 for no limit
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) pids_limit: Option<i64>,
    /// Size of /dev/shm
    #[arg(long)]
    pub(crate) shm_size: Option<String>,
    /// Storage: size=SIZE of the writable layer, 16m to 8t (default 10g); what is not written takes no space
    #[arg(long)]
    pub(crate) storage_opt: Vec<String>,
    /// Ulimit: NAME=SOFT[:HARD]
    #[arg(long)]
    pub(crate) ulimit: Vec<String>,
    /// Host name inside the container
    #[arg(long, short = 'h')]
    pub(crate) hostname: Option<String>,
    /// Network: none, or bridge[,egress=RULE]… (default): where it may connect to, ADDRESS[/LEN], NAME, any, host or none, then [:PORTS][/tcp|udp]
    #[arg(long, visible_alias = "net")]
    pub(crate) network: Option<String>,
    /// Name server
    #[arg(long)]
    pub(crate) dns: Vec<String>,
    /// Search domain of the name service
    #[arg(long)]
    pub(crate) dns_search: Vec<String>,
    /// Add a line to /etc/hosts: NAME:IP
    #[arg(long)]
    pub(crate) add_host: Vec<String>,
    /// Label: KEY[=VALUE]
    #[arg(long, short)]
    pub(crate) label: Vec<String>,
    /// Read labels from a file
    #[arg(long)]
    pub(crate) label_file: Vec<PathBuf>,
    /// Make the root file system read-only
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = ArgAction::Set)]
    pub(crate) read_only: bool,
    /// Add a capability
    #[arg(long)]
    pub(crate) cap_add: Vec<String>,
    /// Drop a capability
    #[arg(long)]
    pub(crate) cap_drop: Vec<String>,
    /// All capabilities, in the container's own machine only
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = ArgAction::Set)]
    pub(crate) privileged: bool,
    /// Security options: seccomp=unconfined, no-new-privileges
    #[arg(long)]
    pub(crate) security_opt: Vec<String>,
    /// Kernel parameters of the container: NAME=VALUE
    #[arg(long)]
    pub(crate) sysctl: Vec<String>,
    /// Run an init as PID 1 that reaps processes and forwards signals
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = ArgAction::Set)]
    pub(crate) init: bool,
    /// Restart policy: no, on-failure[:N], always, unless-stopped
    #[arg(long, default_value = "no")]
    pub(crate) restart: String,
    /// Signal that stops the container
    #[arg(long)]
    pub(crate) stop_signal: Option<String>,
    /// Seconds between the stop signal and the kill
    #[arg(long)]
    pub(crate) stop_timeout: Option<u32>,
    /// When to pull
    #[arg(long, value_enum, default_value = "missing")]
    pub(crate) pull: PullPolicy,
    /// Platform, such as linux/amd64
    #[arg(long)]
    pub(crate) platform: Option<String>,
    /// Only an image that one of these public keys has signed (cosign's signatures); a PEM file, may be given several times
    #[arg(long, value_name = "FILE", env = "HYPER_VERIFY_KEY", value_delimiter = ':')]
    pub(crate) verify_key: Vec<PathBuf>,
    /// Write the container's id to this file
    #[arg(long)]
    pub(crate) cidfile: Option<PathBuf>,
    /// Do not show the progress of a pull
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// Go on from a snapshot instead of starting an image: with --name, --rm, -d, -i, -t, -p, --hostname, --label, --network, -m, --cidfile
    #[arg(long, value_name = "SNAPSHOT", conflicts_with_all = [
        "env", "env_file", "publish_all", "volume", "mount", "tmpfs", "workdir", "user", "group_add", "entrypoint", "cpus", "pids_limit",
        "shm_size", "storage_opt", "ulimit", "dns", "dns_search", "add_host", "label_file", "read_only", "cap_add", "cap_drop",
        "privileged", "security_opt", "sysctl", "init", "restart", "stop_signal", "stop_timeout", "pull", "platform", "quiet",
        "image_and_args",
    ])]
    pub(crate) from_snapshot: Option<String>,
    /// IMAGE [COMMAND] [ARG…]
    #[arg(
        required_unless_present = "from_snapshot",
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "IMAGE [COMMAND] [ARG]..."
    )]
    pub(crate) image_and_args: Vec<String>,
}

/// `hyper run`.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub(crate) struct RunArgs {
    /// Run in the background and print the container's id
    #[arg(long, short, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = ArgAction::Set)]
    pub(crate) detach: bool,
    /// Keys that detach from the container
    #[arg(long)]
    pub(crate) detach_keys: Option<String>,
    /// Pass signals on to the process
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true, action = ArgAction::Set)]
    pub(crate) sig_proxy: bool,
    /// Attach to stdin, stdout or stderr only
    #[arg(long, short)]
    pub(crate) attach: Vec<String>,
    /// What is shared with `create`.
    #[command(flatten)]
    pub(crate) options: ContainerOptions,
}

/// `hyper create`.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub(crate) struct CreateArgs {
    /// What is shared with `run`.
    #[command(flatten)]
    pub(crate) options: ContainerOptions,
}

/// `hyper start`.
#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    /// Attach standard output and error, forward signals, and exit with the container's code
    #[arg(long, short)]
    pub(crate) attach: bool,
    /// Attach standard input
    #[arg(long, short)]
    pub(crate) interactive: bool,
    /// Keys that detach from the container
    #[arg(long)]
    pub(crate) detach_keys: Option<String>,
    /// Names or ids.
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}

/// `hyper stop`.
#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// Seconds to wait before killing; -1 to wait for ever
    #[arg(long, short = 't', visible_alias = "timeout", allow_negative_numbers = true)]
    pub(crate) time: Option<i64>,
    /// Signal to send
    #[arg(long, short)]
    pub(crate) signal: Option<String>,
    /// Names or ids.
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}

/// `hyper restart`.
#[derive(Debug, Args)]
pub(crate) struct RestartArgs {
    /// Seconds to wait before killing
    #[arg(long, short = 't', visible_alias = "timeout", allow_negative_numbers = true)]
    pub(crate) time: Option<i64>,
    /// Names or ids.
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}

/// `hyper kill`.
#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// Signal to send
    #[arg(long, short, default_value = "KILL")]
    pub(crate) signal: String,
    /// Names or ids.
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}

/// Verbs that take names alone.
#[derive(Debug, Args)]
pub(crate) struct NamesArgs {
    /// Names or ids.
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}

/// `hyper rm`.
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Kill it first if it runs
    #[arg(long, short)]
    pub(crate) force: bool,
    /// Remove its anonymous volumes, too
    #[arg(long, short)]
    pub(crate) volumes: bool,
    /// Names or ids.
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}

/// `hyper ps`.
#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Show containers that do not run, too
    #[arg(long, short)]
    pub(crate) all: bool,
    /// Show ids only
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// Do not shorten
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Show the newest N containers, whatever their state
    #[arg(long, short = 'n')]
    pub(crate) last: Option<usize>,
    /// Show the newest container, whatever its state
    #[arg(long, short)]
    pub(crate) latest: bool,
    /// Filter: id=, name=, label=KEY[=VALUE], status=, exited=, ancestor=, volume=
    #[arg(long, short)]
    pub(crate) filter: Vec<String>,
    /// `json`, `table`, `table TEMPLATE`, or a Go template
    #[arg(long)]
    pub(crate) format: Option<String>,
}

/// `hyper logs`.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Follow the output
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Show lines since a time (RFC 3339, Unix seconds) or age (10m)
    #[arg(long)]
    pub(crate) since: Option<String>,
    /// Show lines until a time or age
    #[arg(long)]
    pub(crate) until: Option<String>,
    /// Show this many of the last lines
    #[arg(long, short = 'n', default_value = "all")]
    pub(crate) tail: String,
    /// Show when each line was written
    #[arg(long, short)]
    pub(crate) timestamps: bool,
    /// Name or id.
    pub(crate) container: String,
}

/// `hyper exec`.
#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// Run in the background
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// Keys that detach from the process
    #[arg(long)]
    pub(crate) detach_keys: Option<String>,
    /// Keep standard input open
    #[arg(long, short)]
    pub(crate) interactive: bool,
    /// Allocate a terminal
    #[arg(long, short)]
    pub(crate) tty: bool,
    /// Set an environment variable
    #[arg(long, short)]
    pub(crate) env: Vec<String>,
    /// Read environment variables from a file
    #[arg(long)]
    pub(crate) env_file: Vec<PathBuf>,
    /// User: NAME|UID[:GROUP|GID]
    #[arg(long, short)]
    pub(crate) user: Option<String>,
    /// Working directory
    #[arg(long, short)]
    pub(crate) workdir: Option<String>,
    /// All capabilities
    #[arg(long)]
    pub(crate) privileged: bool,
    /// CONTAINER COMMAND [ARG…]
    #[arg(required = true, num_args = 2.., trailing_var_arg = true, allow_hyphen_values = true, value_name = "CONTAINER COMMAND [ARG]...")]
    pub(crate) container_and_args: Vec<String>,
}

/// `hyper attach`.
#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// Do not attach standard input
    #[arg(long)]
    pub(crate) no_stdin: bool,
    /// Pass signals on to the process
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true, action = ArgAction::Set)]
    pub(crate) sig_proxy: bool,
    /// Keys that detach from the container
    #[arg(long)]
    pub(crate) detach_keys: Option<String>,
    /// Name or id.
    pub(crate) container: String,
}

/// `hyper inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// `json` or a Go template
    #[arg(long, short)]
    pub(crate) format: Option<String>,
    /// Look only for a `container`, `image` or `volume`
    #[arg(long = "type")]
    pub(crate) kind: Option<String>,
    /// Names or ids.
    #[arg(required = true)]
    pub(crate) names: Vec<String>,
}

/// `hyper cp`.
#[derive(Debug, Args)]
pub(crate) struct CpArgs {
    /// Keep owners
    #[arg(long, short)]
    pub(crate) archive: bool,
    /// Follow a symbolic link at the source
    #[arg(long, short = 'L')]
    pub(crate) follow_link: bool,
    /// Say nothing
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// CONTAINER:PATH, a local path, or - for a tar on standard input
    pub(crate) source: String,
    /// A local path, CONTAINER:PATH, or - for a tar on standard output
    pub(crate) destination: String,
}

/// `hyper stats`.
#[derive(Debug, Args)]
pub(crate) struct StatsArgs {
    /// Show containers that do not run, too
    #[arg(long, short)]
    pub(crate) all: bool,
    /// Show one sample and end
    #[arg(long)]
    pub(crate) no_stream: bool,
    /// Do not shorten
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// `json`, `table`, `table TEMPLATE`, or a Go template
    #[arg(long)]
    pub(crate) format: Option<String>,
    /// Names or ids; all running ones if left out.
    pub(crate) containers: Vec<String>,
}

/// `hyper top`.
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// Name or id.
    pub(crate) container: String,
    /// Accepted for ps's sake; only the default columns exist.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub(crate) ps_options: Vec<String>,
}

/// `hyper rename`.
#[derive(Debug, Args)]
pub(crate) struct RenameArgs {
    /// Name or id.
    pub(crate) container: String,
    /// The new name.
    pub(crate) new_name: String,
}

/// `hyper port`.
#[derive(Debug, Args)]
pub(crate) struct PortArgs {
    /// Name or id.
    pub(crate) container: String,
    /// PORT[/PROTOCOL]
    pub(crate) port: Option<String>,
}
