//! From flags and an image to the configuration of a container.

use std::path::{Path, PathBuf};

use hyper_image::{Image, ImageConfig as Defaults};
use hyper_sandbox::{
    ContainerConfig, EgressRule, ExtraHost, ImageConfig, MountConfig, NetworkMode, PortConfig, ProcessConfig,
    Protocol, ResourceConfig, RestartPolicy, SecurityConfig, Snapshot, UlimitConfig,
};

use crate::args::ContainerOptions;
use crate::error::CliError;
use crate::options::{env, quantity, signal};

const MIB: u64 = 1 << 20;

/// Refuses flags that no image could mend, so that a typing error does not cost a pull.
///
/// # Errors
/// The first flag that cannot be honoured, with exit code 125.
pub(crate) fn check(options: &ContainerOptions) -> Result<(), CliError> {
    // Flags end at the image, so a mistyped one that comes after others looks like one.
    let image = name(options);
    if image.starts_with('-') {
        return Err(CliError::usage(format!("unknown flag: {image}: see 'hyper run --help'")));
    }
    let any = Defaults { cmd: vec!["any".to_owned()], ..Default::default() };
    usage(wish(options, &any, String::new())?.check())
}

/// Everything but the disk, which is made later.
///
/// # Errors
/// The first flag that cannot be honoured, with exit code 125.
pub(crate) fn configure(options: &ContainerOptions, image: &Image) -> Result<ContainerConfig, CliError> {
    wish(options, &image.config, image.id.to_string())
}

fn wish(options: &ContainerOptions, config: &Defaults, id: String) -> Result<ContainerConfig, CliError> {
    let mut labels = config.labels.clone();
    labels.extend(env::merge_labels(&options.label_file, &options.label)?);
    let (network, egress) = network(options.network.as_deref().unwrap_or("bridge"))?;
    let stop_signal = options.stop_signal.as_deref().or(config.stop_signal.as_deref());
    Ok(ContainerConfig {
        name: options.name.clone().unwrap_or_default(),
        image: ImageConfig { reference: name(options), id, disk: PathBuf::new() },
        process: process(options, config)?,
        hostname: options.hostname.clone().unwrap_or_default(),
        resources: resources(options)?,
        network,
        egress,
        ports: ports(options, config)?,
        dns: each(&options.dns, |text| {
            text.parse()
                .map_err(|_| CliError::usage(format!("invalid name server {text:?}: give an IP address")))
        })?,
        dns_search: options.dns_search.clone(),
        extra_hosts: each(&options.add_host, |text| usage(text.parse::<ExtraHost>()))?,
        mounts: mounts(options, config)?,
        read_only_rootfs: options.read_only,
        security: security(options)?,
        sysctls: env::merge_labels(&[], &options.sysctl)?,
        labels,
        init: options.init,
        restart: restart(options)?,
        stop_signal: stop_signal.map(signal::parse).transpose()?.unwrap_or(15).unsigned_abs(),
        stop_timeout_s: options.stop_timeout.unwrap_or_else(|| ContainerConfig::default().stop_timeout_s),
        auto_remove: options.rm,
        rw_size_bytes: rw_size(&options.storage_opt)?,
        ..Default::default()
    })
}

/// Of a container that goes on from a snapshot: what was saved, but for the flags that can make a difference yet.
///
/// # Errors
/// A flag that asks for what the saved machine is not, with exit code 125.
pub(crate) fn going_on(options: &ContainerOptions, snapshot: &Snapshot) -> Result<ContainerConfig, CliError> {
    let mut config = snapshot.config();
    let saved = |what: String| CliError::usage(format!("snapshot {} was saved {what}", snapshot.name()));
    let process = &mut config.process;
    if options.tty && !process.terminal {
        return Err(saved("without a terminal: -t cannot be given".to_owned()));
    }
    if options.interactive && !process.open_stdin {
        return Err(saved("without standard input: -i cannot be given".to_owned()));
    }
    process.stdin_once |= options.interactive;
    let mem_mib = config.resources.mem_mib;
    if options.memory.is_some() && resources(options)?.mem_mib != mem_mib {
        return Err(saved(format!("with {mem_mib} MiB of memory: -m must be that, or left out")));
    }
    if let Some(text) = &options.network {
        let (mode, egress) = network(text)?;
        if mode != config.network {
            let had = if mode == NetworkMode::None { "with" } else { "without" };
            return Err(saved(format!("{had} a network: --network cannot change that")));
        }
        config.egress = egress;
    }
    config.ports = published(options)?;
    config.name = options.name.clone().unwrap_or_default();
    if let Some(hostname) = &options.hostname {
        config.hostname.clone_from(hostname);
    }
    config.labels.extend(env::merge_labels(&[], &options.label)?);
    config.auto_remove = options.rm;
    usage(config.check())?;
    Ok(config)
}

/// The image as the user named it.
pub(crate) fn name(options: &ContainerOptions) -> String {
    options.image_and_args.first().cloned().unwrap_or_default()
}

fn each<T>(texts: &[String], parse: impl Fn(&str) -> Result<T, CliError>) -> Result<Vec<T>, CliError> {
    texts.iter().map(|text| parse(text)).collect()
}

fn usage<T, E: std::error::Error + 'static>(parsed: Result<T, E>) -> Result<T, CliError> {
    parsed.map_err(|error| CliError::usage(crate::error::chain(&error)))
}

fn process(options: &ContainerOptions, config: &Defaults) -> Result<ProcessConfig, CliError> {
    let args = options.image_and_args.get(1..).unwrap_or_default();
    // As Docker: another entrypoint drops the image's command; arguments replace it.
    let (entrypoint, image_cmd) = match options.entrypoint.as_deref() {
        None => (config.entrypoint.clone(), config.cmd.clone()),
        Some("") => (Vec::new(), Vec::new()),
        Some(program) => (vec![program.to_owned()], Vec::new()),
    };
    let cmd = if args.is_empty() { image_cmd } else { args.to_vec() };
    if entrypoint.is_empty() && cmd.is_empty() {
        return Err(CliError::usage("no command specified: the image has none, give one after its name"));
    }
    let caller = |key: &str| std::env::var(key).ok();
    Ok(ProcessConfig {
        entrypoint,
        cmd,
        env: env::merge_env(&config.env, &options.env_file, &options.env, &caller)?,
        working_dir: options.workdir.clone().unwrap_or_else(|| config.working_dir.clone()),
        user: options.user.clone().unwrap_or_else(|| config.user.clone()),
        additional_groups: options.group_add.clone(),
        terminal: options.tty,
        open_stdin: options.interactive,
        stdin_once: false,
    })
}

fn resources(options: &ContainerOptions) -> Result<ResourceConfig, CliError> {
    let mut resources = ResourceConfig::default();
    if let Some(text) = &options.memory {
        let mib = quantity::bytes("--memory", text)?.div_ceil(MIB);
        resources.mem_mib = u32::try_from(mib)
            .map_err(|_| CliError::usage(format!("{text} of memory asked for: too much")))?;
    }
    if let Some(text) = &options.cpus {
        resources.cpus_milli = quantity::cpus_milli(text)?;
    }
    if let Some(text) = &options.shm_size {
        resources.shm_size_bytes = quantity::bytes("--shm-size", text)?;
    }
    if let Some(limit) = options.pids_limit {
        // Docker's -1 and 0 mean no limit.
        resources.pids_limit = u32::try_from(limit.max(0))
            .map_err(|_| CliError::usage(format!("invalid value {limit} for --pids-limit: too large")))?;
    }
    resources.ulimits = each(&options.ulimit, |text| usage(text.parse::<UlimitConfig>()))?;
    Ok(resources)
}

/// Size of the writable layer; 0 where none is given. As with Docker, of several the last counts.
fn rw_size(options: &[String]) -> Result<u64, CliError> {
    let mut bytes = 0;
    for option in options {
        let Some(("size", size)) = option.split_once('=') else {
            return Err(CliError::usage(format!(
                "invalid --storage-opt {option:?}: only size=SIZE is known"
            )));
        };
        bytes = quantity::bytes("--storage-opt size", size)?;
    }
    Ok(bytes)
}

/// A mode, and behind it, with commas between them, where the container may connect to.
fn network(text: &str) -> Result<(NetworkMode, Option<Vec<EgressRule>>), CliError> {
    let mut parts = text.split(',');
    let mode = parts.next().unwrap_or_default();
    let mode = network_mode(mode.strip_prefix("name=").unwrap_or(mode))?;
    let mut egress: Option<Vec<EgressRule>> = None;
    for part in parts {
        let Some(rule) = part.strip_prefix("egress=") else {
            return Err(CliError::usage(format!("invalid --network {text:?}: only egress=RULE can follow")));
        };
        let rules = egress.get_or_insert_default();
        // Of nothing but this there is nothing that is allowed.
        if rule != "none" {
            rules.push(usage(rule.parse())?);
        }
    }
    Ok((mode, egress))
}

fn network_mode(mode: &str) -> Result<NetworkMode, CliError> {
    match mode {
        "bridge" | "default" => Ok(NetworkMode::Bridge),
        "none" => Ok(NetworkMode::None),
        "host" => Err(CliError::usage(
            "--network host: a container is a machine of its own and cannot share the host's network: give bridge, with -p for ports, or none",
        )),
        other => Err(CliError::usage(format!("network {other} not found: give bridge or none"))),
    }
}

/// Ports that are given by number.
fn published(options: &ContainerOptions) -> Result<Vec<PortConfig>, CliError> {
    let parsed = each(&options.publish, |text| usage(PortConfig::parse(text)))?;
    Ok(parsed.into_iter().flatten().collect())
}

fn ports(options: &ContainerOptions, image: &Defaults) -> Result<Vec<PortConfig>, CliError> {
    let mut ports = published(options)?;
    if options.publish_all {
        for exposed in &image.exposed_ports {
            let protocol = match exposed.protocol {
                hyper_image::Protocol::Tcp => Protocol::Tcp,
                hyper_image::Protocol::Udp => Protocol::Udp,
                hyper_image::Protocol::Sctp => continue,
            };
            for container_port in exposed.first..=exposed.last {
                ports.push(PortConfig { host_ip: None, host_port: 0, container_port, protocol });
            }
        }
    }
    Ok(ports)
}

fn mounts(options: &ContainerOptions, image: &Defaults) -> Result<Vec<MountConfig>, CliError> {
    let cwd = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    let absolute = |path: &str| lexical(&cwd.join(path));
    let mut mounts = Vec::new();
    for text in &options.volume {
        mounts.push(usage(MountConfig::parse_volume(text, &absolute))?);
    }
    for text in &options.mount {
        mounts.push(usage(MountConfig::parse_mount(text, &absolute))?);
    }
    for text in &options.tmpfs {
        mounts.push(usage(MountConfig::parse_tmpfs(text))?);
    }
    for target in &image.volumes {
        let taken = mounts.iter().any(|m| m.target().trim_end_matches('/') == target.trim_end_matches('/'));
        if !taken {
            mounts.push(MountConfig::Volume {
                name: String::new(),
                anonymous: true,
                target: target.clone(),
                read_only: false,
            });
        }
    }
    Ok(mounts)
}

/// Without `.` and `..`, by text alone: what the user sees is what is shared.
fn lexical(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                clean.pop();
            }
            Component::CurDir => {}
            other => clean.push(other),
        }
    }
    clean
}

fn security(options: &ContainerOptions) -> Result<SecurityConfig, CliError> {
    let mut security = SecurityConfig {
        cap_add: options.cap_add.clone(),
        cap_drop: options.cap_drop.clone(),
        privileged: options.privileged,
        ..Default::default()
    };
    for option in &options.security_opt {
        match option.as_str() {
            "seccomp=unconfined" | "seccomp:unconfined" => security.seccomp_unconfined = true,
            "no-new-privileges" | "no-new-privileges=true" | "no-new-privileges:true" => {
                security.no_new_privileges = true;
            }
            "no-new-privileges=false" | "no-new-privileges:false" => security.no_new_privileges = false,
            // The guest has no AppArmor and no SELinux: the machine is the wall.
            "apparmor=unconfined" | "label=disable" | "label:disable" => {}
            other => {
                return Err(CliError::usage(format!(
                    "invalid --security-opt {other:?}: give seccomp=unconfined or no-new-privileges"
                )));
            }
        }
    }
    Ok(security)
}

fn restart(options: &ContainerOptions) -> Result<RestartPolicy, CliError> {
    let policy: RestartPolicy = usage(options.restart.parse())?;
    if options.rm && policy != RestartPolicy::No {
        return Err(CliError::usage("conflicting options: cannot specify both --restart and --rm"));
    }
    Ok(policy)
}
