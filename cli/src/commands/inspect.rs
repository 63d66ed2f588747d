//! `inspect`: containers, images and volumes in the shape of Docker's answers.

use hyper_image::Image;
use hyper_sandbox::{Container, MountConfig, NetworkMode, RestartPolicy, SandboxError, Status};
use serde_json::{Map, Value, json};

use super::lifecycle::protocol;
use super::volume;
use crate::args::InspectArgs;
use crate::context;
use crate::error::CliError;
use crate::format::Template;
use crate::output;

/// `hyper inspect`.
///
/// # Errors
/// Exit code 1 when something is not there; what was found is printed all the same.
pub(crate) fn inspect(args: &InspectArgs) -> Result<i32, CliError> {
    let kind = args.kind.as_deref();
    if !matches!(kind, None | Some("container" | "image" | "volume")) {
        return Err(CliError::failed("invalid --type: give container, image or volume"));
    }
    let (mut rows, mut code) = (Vec::new(), 0);
    for name in &args.names {
        match look_up(name, kind)? {
            Some(row) => rows.push(row),
            None => {
                output::error(format!("no such {}: {name}", kind.unwrap_or("object")));
                code = 1;
            }
        }
    }
    print(&rows, args.format.as_deref())?;
    Ok(code)
}

/// Prints rows as an indented JSON array, or one line of a template each.
///
/// # Errors
/// A template that does not parse or fails.
pub(crate) fn print(rows: &[Value], format: Option<&str>) -> Result<(), CliError> {
    match format {
        None | Some("" | "json") if format != Some("json") => {
            let text = serde_json::to_string_pretty(rows).unwrap_or_default();
            output::line(text);
        }
        None | Some("json" | "") => output::line(Value::from(rows.to_vec())),
        Some(text) => {
            let template = Template::parse(text)?;
            for row in rows {
                output::line(template.render(row)?);
            }
        }
    }
    Ok(())
}

fn look_up(name: &str, kind: Option<&str>) -> Result<Option<Value>, CliError> {
    let home = context::home()?;
    if matches!(kind, None | Some("container")) {
        match home.find(name) {
            Ok(container) => return Ok(Some(container_json(&container))),
            Err(SandboxError::NoSuchContainer(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if matches!(kind, None | Some("image")) {
        match context::images()?.resolve(name) {
            Ok(image) => return Ok(Some(image_json(&image))),
            Err(hyper_image::ImageError::NoSuchImage { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if matches!(kind, None | Some("volume")) {
        match home.volume(name) {
            Ok(found) => return Ok(Some(volume::row(&found))),
            Err(SandboxError::NoSuchVolume(_) | SandboxError::Config(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

fn container_json(container: &Container) -> Value {
    let (config, state) = (container.config(), container.state());
    let args = config.process.args();
    json!({
        "Id": container.id(),
        "Created": container.created().to_string(),
        "Path": args.first(),
        "Args": args.get(1..).unwrap_or_default(),
        "State": state_json(container),
        "Image": config.image.id,
        "Name": format!("/{}", container.name()),
        "RestartCount": state.restart_count,
        "Driver": "erofs",
        "Platform": "linux",
        "LogPath": container.dir().join("log.json"),
        "HostnamePath": "",
        "HostConfig": host_config_json(container),
        "Mounts": config.mounts.iter().map(mount_json).collect::<Vec<_>>(),
        "Config": config_json(container),
        "NetworkSettings": network_json(container),
    })
}

fn state_json(container: &Container) -> Value {
    let state = container.state();
    json!({
        "Status": state.status.as_str(),
        "Running": matches!(state.status, Status::Running | Status::Paused),
        "Paused": state.status == Status::Paused,
        "Restarting": state.status == Status::Restarting,
        "OOMKilled": state.oom_killed,
        "Dead": state.status == Status::Dead,
        "Pid": state.pid,
        "ExitCode": state.exit_code,
        "Error": state.error,
        "StartedAt": state.started.to_string(),
        "FinishedAt": state.finished.to_string(),
    })
}

fn config_json(container: &Container) -> Value {
    let config = container.config();
    let process = &config.process;
    let hostname =
        if config.hostname.is_empty() { container.short_id().to_owned() } else { config.hostname.clone() };
    json!({
        "Hostname": hostname,
        "Domainname": config.domainname,
        "User": process.user,
        "Tty": process.terminal,
        "OpenStdin": process.open_stdin,
        "StdinOnce": process.stdin_once,
        "Env": process.env,
        "Cmd": process.cmd,
        "Entrypoint": process.entrypoint,
        "Image": config.image.reference,
        "WorkingDir": process.working_dir,
        "Labels": config.labels,
        "StopSignal": config.stop_signal.to_string(),
        "StopTimeout": config.stop_timeout_s,
        "Volumes": Value::Null,
    })
}

fn host_config_json(container: &Container) -> Value {
    let config = container.config();
    let resources = &config.resources;
    let (policy, retries) = match config.restart {
        RestartPolicy::No => ("no", 0),
        RestartPolicy::OnFailure { max_retries } => ("on-failure", max_retries),
        RestartPolicy::Always => ("always", 0),
        RestartPolicy::UnlessStopped => ("unless-stopped", 0),
    };
    json!({
        "Memory": u64::from(resources.mem_mib) << 20,
        "NanoCpus": u64::from(resources.cpus_milli) * 1_000_000,
        "PidsLimit": resources.pids_limit,
        "ShmSize": resources.shm_size_bytes,
        "Ulimits": resources.ulimits.iter().map(|u| json!({"Name": u.name, "Soft": u.soft, "Hard": u.hard})).collect::<Vec<_>>(),
        "NetworkMode": network_mode(config.network),
        "PortBindings": bindings(config.ports.iter().map(|p| {
            let ip = p.host_ip.map(|ip| ip.to_string()).unwrap_or_default();
            (format!("{}/{}", p.container_port, protocol(p.protocol)), ip, p.host_port)
        })),
        "RestartPolicy": {"Name": policy, "MaximumRetryCount": retries},
        "AutoRemove": config.auto_remove,
        "CapAdd": config.security.cap_add,
        "CapDrop": config.security.cap_drop,
        "Privileged": config.security.privileged,
        "ReadonlyRootfs": config.read_only_rootfs,
        "Dns": config.dns,
        "DnsSearch": config.dns_search,
        "ExtraHosts": config.extra_hosts.iter().map(|h| {
            let address = h.address.map_or_else(|| "host-gateway".to_owned(), |a| a.to_string());
            format!("{}:{address}", h.name)
        }).collect::<Vec<_>>(),
        "Init": config.init,
        "Sysctls": config.sysctls,
        "Runtime": "hyper",
    })
}

fn network_mode(mode: NetworkMode) -> &'static str {
    match mode {
        NetworkMode::Bridge => "bridge",
        NetworkMode::None => "none",
    }
}

/// Docker's map from `80/tcp` to a list of host addresses and ports.
fn bindings(ports: impl Iterator<Item = (String, String, u16)>) -> Value {
    let mut map = Map::new();
    for (key, ip, port) in ports {
        let entry = map.entry(key).or_insert_with(|| Value::Array(Vec::new()));
        if let Value::Array(list) = entry {
            list.push(json!({"HostIp": ip, "HostPort": port.to_string()}));
        }
    }
    Value::Object(map)
}

fn mount_json(mount: &MountConfig) -> Value {
    match mount {
        MountConfig::Bind { source, target, read_only, .. } => json!({
            "Type": "bind", "Source": source, "Destination": target, "RW": !read_only, "Mode": "", "Propagation": "rprivate",
        }),
        MountConfig::Volume { name, target, read_only, .. } => json!({
            "Type": "volume", "Name": name, "Destination": target, "RW": !read_only, "Mode": "", "Driver": "local",
        }),
        MountConfig::Tmpfs { target, .. } => json!({
            "Type": "tmpfs", "Source": "", "Destination": target, "RW": true, "Mode": "",
        }),
    }
}

fn network_json(container: &Container) -> Value {
    let state = container.state();
    let mode = network_mode(container.config().network);
    let ports = bindings(state.ports.iter().map(|p| {
        let key = format!("{}/{}", p.wish.container_port, protocol(p.wish.protocol));
        (key, p.bound_ip.to_string(), p.bound_port)
    }));
    let network = state.network.as_ref();
    let ip = network.map(|n| n.ip.to_string()).unwrap_or_default();
    let gateway = network.map(|n| n.gateway.to_string()).unwrap_or_default();
    let mac = network.map(|n| n.mac.clone()).unwrap_or_default();
    let prefix = network.map_or(0, |n| n.prefix_len);
    json!({
        "Egress": container.config().egress.as_ref().map(|rules| rules.iter().map(ToString::to_string).collect::<Vec<_>>()),
        "Bridge": network.map(|n| n.bridge.clone()).unwrap_or_default(),
        "IPAddress": ip,
        "IPPrefixLen": prefix,
        "Gateway": gateway,
        "MacAddress": mac,
        "Ports": ports,
        "Networks": {mode: {"IPAddress": ip, "IPPrefixLen": prefix, "Gateway": gateway, "MacAddress": mac}},
    })
}

fn image_json(image: &Image) -> Value {
    let config = &image.config;
    let names = |list: &[hyper_image::Reference]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
    let exposed: Map<String, Value> =
        config.exposed_ports.iter().map(|p| (p.to_string(), json!({}))).collect();
    let volumes: Map<String, Value> = config.volumes.iter().map(|v| (v.clone(), json!({}))).collect();
    json!({
        "Id": image.id.to_string(),
        "RepoTags": names(&image.references),
        "RepoDigests": names(&image.repo_digests),
        "Created": image.created,
        "Architecture": image.platform.architecture,
        "Os": image.platform.os,
        "Size": image.size_bytes,
        "Config": {
            "User": config.user,
            "ExposedPorts": exposed,
            "Env": config.env,
            "Entrypoint": config.entrypoint,
            "Cmd": config.cmd,
            "Volumes": volumes,
            "WorkingDir": config.working_dir,
            "Labels": config.labels,
            "StopSignal": config.stop_signal,
        },
        "RootFS": {"Type": "layers", "Layers": image.layers.iter().map(|l| l.diff_id.to_string()).collect::<Vec<_>>()},
    })
}
