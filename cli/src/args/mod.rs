//! The command line as clap parses it: Docker's verbs, flags and short forms. Nothing here acts.

mod container;
mod image;

pub(crate) use container::{
    AttachArgs, ContainerOptions, CpArgs, CreateArgs, ExecArgs, InspectArgs, KillArgs, LogsArgs, NamesArgs,
    PortArgs, PsArgs, RenameArgs, RestartArgs, RmArgs, RunArgs, StartArgs, StatsArgs, StopArgs, TopArgs,
};
pub(crate) use image::{ImagesArgs, LoadArgs, PullArgs, PullPolicy, RmiArgs, TagArgs};

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Run any Docker image as if it were a local container, each in a virtual machine of its own.
#[derive(Debug, Parser)]
#[command(name = "hyper", version, about, disable_help_subcommand = false, max_term_width = 110)]
pub(crate) struct Cli {
    /// Say more on standard error: once for steps, twice for everything.
    #[arg(long = "debug", short = 'D', global = true, action = clap::ArgAction::Count)]
    pub(crate) debug: u8,
    /// What to do.
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Create and run a new container from an image
    Run(Box<RunArgs>),
    /// Create a new container
    Create(Box<CreateArgs>),
    /// Start one or more stopped containers
    Start(StartArgs),
    /// Stop one or more running containers
    Stop(StopArgs),
    /// Restart one or more containers
    Restart(RestartArgs),
    /// Kill one or more running containers
    Kill(KillArgs),
    /// Pause all processes within one or more containers
    Pause(NamesArgs),
    /// Unpause all processes within one or more containers
    Unpause(NamesArgs),
    /// Remove one or more containers
    Rm(RmArgs),
    /// List containers
    #[command(visible_alias = "list")]
    Ps(PsArgs),
    /// Fetch the logs of a container
    Logs(LogsArgs),
    /// Execute a command in a running container
    Exec(ExecArgs),
    /// Attach to a running container
    Attach(AttachArgs),
    /// Show everything known of containers or images
    Inspect(InspectArgs),
    /// Copy files between a container and the local file system
    Cp(CpArgs),
    /// Display a live stream of resource use
    Stats(StatsArgs),
    /// Display the running processes of a container
    Top(TopArgs),
    /// Make copies of a running container that go on where it is
    Fork(ForkArgs),
    /// Work with saved containers
    #[command(subcommand)]
    Snapshot(SnapshotVerb),
    /// Block until containers stop, then print their exit codes
    Wait(NamesArgs),
    /// Rename a container
    Rename(RenameArgs),
    /// List port mappings of a container
    Port(PortArgs),
    /// Download an image from a registry
    Pull(PullArgs),
    /// List images
    Images(ImagesArgs),
    /// Give an image another name
    Tag(TagArgs),
    /// Remove one or more images
    Rmi(RmiArgs),
    /// Load images from a tar archive or an OCI layout
    Load(LoadArgs),
    /// Work with volumes
    #[command(subcommand)]
    Volume(VolumeVerb),
    /// Show what was done, by whom; or check that nothing of that record was changed
    Audit(AuditArgs),
    /// Show the version
    Version(FormatArgs),
    /// Tell whether this host can run virtual machines, and what to do if not
    Doctor(DoctorArgs),
    /// Make hyper a runtime of other programs of this host
    Install(InstallArgs),
    /// Compare hyper with the other runtimes and VMMs of this host
    #[command(disable_help_flag = true)]
    Bench {
        /// Flags of the benchmark: `hyper bench --help` shows them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        flags: Vec<std::ffi::OsString>,
    },
    /// Supervise one container's virtual machine (started by `hyper start`)
    #[command(hide = true)]
    Supervise {
        /// Full id of the container.
        id: String,
    },
    /// Keep the namespaces of a user who is not root (started by the first command of that user)
    #[command(hide = true)]
    Keep {
        /// Make them, and stay in them.
        #[arg(long)]
        anchor: bool,
    },
}

impl Verb {
    /// Whether it starts machines, or processes that do.
    pub(crate) fn starts_machines(&self) -> bool {
        matches!(
            self,
            Self::Run(_)
                | Self::Create(_)
                | Self::Start(_)
                | Self::Restart(_)
                | Self::Pull(_)
                | Self::Load(_)
        )
    }
}

/// Flags of `install`.
#[derive(Debug, Args)]
pub(crate) struct InstallArgs {
    /// For whom.
    pub(crate) what: InstallWhat,
    /// Take it out again.
    #[arg(long)]
    pub(crate) uninstall: bool,
    /// Configuration of containerd.
    #[arg(long, default_value = "/etc/containerd/config.toml")]
    pub(crate) config: PathBuf,
    /// Configuration of hyper as a runtime; one that is there is left alone.
    #[arg(long, default_value = "/etc/hyper/containerd.toml")]
    pub(crate) runtime_config: PathBuf,
    /// Where containerd finds the shim: a folder in its PATH.
    #[arg(long, default_value = "/usr/local/bin")]
    pub(crate) bin_dir: PathBuf,
}

/// Who can use hyper as a runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum InstallWhat {
    /// containerd, with ctr, nerdctl and Kubernetes
    Containerd,
}

/// Verbs of volumes.
#[derive(Debug, Subcommand)]
pub(crate) enum VolumeVerb {
    /// Create a volume
    Create {
        /// Name; a random one if left out.
        name: Option<String>,
        /// Label, `key=value`.
        #[arg(long = "label")]
        labels: Vec<String>,
    },
    /// List volumes
    Ls {
        /// Print names only.
        #[arg(long, short)]
        quiet: bool,
        /// Format of the output.
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Show everything known of volumes
    Inspect {
        /// Names.
        #[arg(required = true)]
        names: Vec<String>,
        /// Format of the output.
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Remove volumes
    Rm {
        /// Names.
        #[arg(required = true)]
        names: Vec<String>,
        /// Do not fail when a volume is not there.
        #[arg(long, short)]
        force: bool,
    },
}

/// `hyper fork`.
#[derive(Debug, Args)]
pub(crate) struct ForkArgs {
    /// How many copies, 1 to 64
    #[arg(long, short = 'n', default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) number: u8,
    /// Name or id.
    pub(crate) container: String,
}

/// Verbs of snapshots.
#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotVerb {
    /// Save a running container, which goes on: `run --from-snapshot` starts others from there
    Create {
        /// Name or id.
        container: String,
        /// Name of the snapshot; a random one if left out.
        name: Option<String>,
    },
    /// List snapshots
    Ls {
        /// Print names only.
        #[arg(long, short)]
        quiet: bool,
        /// Format of the output.
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Remove snapshots
    Rm {
        /// Names.
        #[arg(required = true)]
        names: Vec<String>,
        /// Do not fail when a snapshot is not there.
        #[arg(long, short)]
        force: bool,
    },
}

/// `--format`.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct FormatArgs {
    /// `json`, `table`, `table TEMPLATE`, or a Go template such as `{{.ID}}`
    #[arg(long, short = 'f')]
    pub(crate) format: Option<String>,
}

/// `hyper audit`.
#[derive(Debug, Args)]
pub(crate) struct AuditArgs {
    /// Print what the log ends with instead: the number of its last record and its hash.
    #[arg(long)]
    pub(crate) verify: bool,
    /// The log must have this record: `NUMBER:HASH`, as `--verify` printed it.
    #[arg(long, value_name = "NUMBER:HASH")]
    pub(crate) head: Option<String>,
    /// Show this many records, the last ones; `all`.
    #[arg(long, short = 'n', default_value = "all")]
    pub(crate) tail: String,
    /// Do not shorten ids.
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Format of the output.
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

/// `hyper doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
    /// Print nothing; the exit code tells.
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// What is left to the processes that serve this container's machine, and whether it is what is promised
    #[arg(long, value_name = "CONTAINER")]
    pub(crate) jail: Option<String>,
    /// With --jail: `json`, `table`, `table TEMPLATE`, or a Go template such as `{{.Layer}}`
    #[arg(long, short = 'f', requires = "jail")]
    pub(crate) format: Option<String>,
}
