//! One start: what the host provides, the machine, the container in it.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use hyper_protocol::rpc::agent::{
    ConfigureRequest, CreateContainerRequest, InjectedFile, Interface, Mount, RenewContainerRequest, Rootfs,
    Route, ShareSource, SocketSource, Stdio, TmpfsSource, mount,
};
use hyper_protocol::{DNS_PORT, MAX_INJECTED_FILE_BYTES, MAX_OCI_SPEC_BYTES, SHARE_TAG};
use protobuf::MessageField;

use super::run::Streams;
use super::shared::Shared;
use crate::config::{ConfigError, ContainerConfig, MountConfig, NetworkMode};
use crate::launch::{
    self, DEFAULT_BOOT_MS, DiskPlan, Guest, GuestPlan, HostPortPlan, Inputs, MachineShape, MemorySizing,
    NetPlan, SharePlan, Steps, rpc_error,
};
use crate::network::dns::{NameService, Resolver};
use crate::network::publish::Listeners;
use crate::network::resolv::{HostResolver, upstreams};
use crate::network::{Link, MTU, NetworkSettings, Policy};
use crate::sockets::{HostSockets, Offer};
use crate::store::{SavedMachine, forget_saved, open_saved};
use crate::stream::TerminalSize;
use crate::{Container, Home, SandboxError, StartError, oci, storage};

/// Serials of the disks.
const IMAGE_DISK: &str = "image";
const RW_DISK: &str = "rw";
/// Interface of the container.
const INTERFACE: &str = "eth0";
/// Size of a terminal whose user's is not known.
const DEFAULT_SIZE: TerminalSize = TerminalSize { rows: 24, cols: 80 };

/// A machine with all that it uses; everything is given back when it is dropped.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) guest: Guest,
    pub(super) listeners: Listeners,
    pub(super) link: Option<Link>,
    pub(super) names: Option<NameService>,
    /// What it was made of.
    pub(super) inputs: Inputs,
    /// It goes on from this, with the container in it.
    pub(super) saved: Option<SavedMachine>,
    mounts: Vec<Mount>,
    host: HostResolver,
    _sockets: Sockets,
}

/// Sockets of the host that the container is given, if any.
#[derive(Debug, Default)]
struct Sockets {
    served: Option<HostSockets>,
    /// For the VMM.
    port: Option<HostPortPlan>,
    offers: Vec<Offer>,
}

impl Sockets {
    /// What the agent is told of a socket; `None` when the path leads to something else.
    fn offer(&mut self, path: &Path) -> std::io::Result<Option<SocketSource>> {
        if !fs::metadata(path)?.file_type().is_socket() {
            return Ok(None);
        }
        let served = match &mut self.served {
            Some(served) => served,
            none => {
                let (served, port) = HostSockets::serve()?;
                self.port = Some(port);
                none.insert(served)
            }
        };
        let offer = served.offer(path)?;
        let source = offer.as_ref().map(Offer::source);
        self.offers.extend(offer);
        Ok(source)
    }
}

/// Starts the machine of a container.
pub(super) async fn machine(
    shared: &Shared,
    container: &Container,
    steps: &mut Steps,
) -> Result<Machine, SandboxError> {
    let (home, id, config) = (&shared.home, shared.id.as_str(), container.config());
    let run_dir = home.run_dir(id);
    remove_sockets(&run_dir)?;
    let listeners = Listeners::open(&config.ports)?;
    let image = storage::open_image(&config.image.disk)?;
    let rw = storage::open_rw(home, id, config.rw_size_bytes, !config.auto_remove).await?;
    steps.done("storage");
    let mut sockets = Sockets::default();
    let (shares, mounts) = mounts(home, config, &mut sockets)?;
    let host = HostResolver::of_host();
    let mut connection = Connection::default();
    if config.network == NetworkMode::Bridge {
        connection = connect(home, container, &host).await?;
        steps.done("network");
    }
    let Connection { mut link, names, net, port } = connection;
    let saved = open_saved(&container.dir())?;
    let mut sizing = MemorySizing::load(&home.templates_dir(), home.parts());
    let (vcpus, vm_mem_mib) = match &saved {
        Some((saved, _)) => saved.inputs.shape().size(),
        None => {
            let vcpus = config.resources.vcpus();
            (vcpus, sizing.vm_mem_mib(config.resources.mem_mib, vcpus))
        }
    };
    let plan = GuestPlan {
        log_dir: container.dir(),
        run_dir,
        vcpus,
        mem_mib: vm_mem_mib,
        growth: None,
        bays: 0,
        disks: vec![
            DiskPlan { id: IMAGE_DISK.to_owned(), file: image, read_only: true },
            DiskPlan { id: RW_DISK.to_owned(), file: rw, read_only: false },
        ],
        nets: net.into_iter().collect(),
        host_ports: sockets.port.take().into_iter().chain(port).collect(),
        shares,
        kernel_args: config.kernel_args.clone(),
        in_pod: false,
        boot_ms: DEFAULT_BOOT_MS,
        cgroups: Vec::new(),
        template: None,
    };
    let inputs = MachineShape::planned(&plan).inputs(home.parts())?;
    let request = configure(config, id, link.as_ref());
    let (saved, started) = match saved {
        Some((saved, _)) if saved.inputs != inputs => {
            return Err(SandboxError::Stale(container.name().to_owned()));
        }
        Some((saved, files)) => {
            let started = go_on(home, container, plan, (&saved, files), request, steps).await?;
            (Some(saved), started)
        }
        None => (None, launch::start(home, plan, request, steps).await?),
    };
    let launch::Started { guest, configured, lacking } = started;
    if let Err(error) = sizing.learn(vm_mem_mib, vcpus, configured.mem_total_bytes) {
        tracing::debug!(%error, "nothing is learned");
    }
    // The next start will size its machine by what was learned.
    let next_mem_mib = sizing.vm_mem_mib(config.resources.mem_mib, vcpus);
    shared.set_lacking(lacking.map(|shape| shape.with_mem_mib(next_mem_mib)));
    steps.done("configured");
    if let Some(link) = &mut link {
        link.ready().await?;
        steps.done("firewall");
    }
    Ok(Machine { guest, listeners, link, names, inputs, saved, mounts, host, _sockets: sockets })
}

/// What connects a container with others.
#[derive(Debug, Default)]
struct Connection {
    link: Option<Link>,
    names: Option<NameService>,
    net: Option<NetPlan>,
    /// Of the name service, for the VMM.
    port: Option<HostPortPlan>,
}

async fn connect(
    home: &Home,
    container: &Container,
    host: &HostResolver,
) -> Result<Connection, SandboxError> {
    let config = container.config();
    let settings = NetworkSettings::from_env()?;
    let mut link = settings.connect(last_address(container), &Policy::of(config)).await?;
    let net = link.take_tap().map(|tap| NetPlan { tap, mac: link.mac, mtu: MTU });
    let (callers, port) = launch::Callers::of_port(DNS_PORT)
        .map_err(|source| SandboxError::io("make a socket for", container.dir(), source))?;
    let resolver = Resolver {
        home: home.clone(),
        gateway: settings.gateway(),
        upstreams: upstreams(config, host),
        names: link.take_names(),
    };
    let names = NameService::start(callers, resolver);
    Ok(Connection { link: Some(link), names: Some(names), net, port: Some(port) })
}

/// Has the machine of a container go on from what was saved, which is gone then.
async fn go_on(
    home: &Home,
    container: &Container,
    plan: GuestPlan,
    (saved, files): (&SavedMachine, launch::Template),
    request: ConfigureRequest,
    steps: &mut Steps,
) -> Result<launch::Started, SandboxError> {
    let request = found_as_saved(request, saved);
    // The guest is about to write to a disk that what was saved will not fit any more.
    forget_saved(&container.dir())?;
    let started = launch::go_on(home, plan, files, request, steps).await?;
    started.guest.agent.begin_streams(saved.next_stream);
    Ok(started)
}

/// Sockets of an earlier run of this supervisor.
fn remove_sockets(run_dir: &Path) -> Result<(), SandboxError> {
    let entries = fs::read_dir(run_dir).map_err(|source| SandboxError::io("read", run_dir, source))?;
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with("vsock") {
            fs::remove_file(entry.path())
                .map_err(|source| SandboxError::io("remove", entry.path(), source))?;
        }
    }
    Ok(())
}

/// The address of the last run is kept beside the state, which forgets it.
fn last_address(container: &Container) -> Option<IpAddr> {
    fs::read_to_string(container.dir().join("address")).ok()?.trim().parse().ok()
}

fn configure(config: &ContainerConfig, id: &str, link: Option<&Link>) -> ConfigureRequest {
    let mut request = ConfigureRequest { hostname: config.hostname_for(id).to_owned(), ..Default::default() };
    if let Some(link) = link {
        request.interfaces = vec![Interface {
            mac: link.state.mac.clone(),
            name: INTERFACE.to_owned(),
            addresses: vec![format!("{}/{}", link.state.ip, link.state.prefix_len)],
            mtu: u32::from(MTU),
            ..Default::default()
        }];
        request.routes = vec![Route {
            gateway: link.state.gateway.to_string(),
            interface: INTERFACE.to_owned(),
            ..Default::default()
        }];
        request.dns_proxy = true;
    }
    request
}

/// The interface is as it was when it was saved, until it is given what is its own.
fn found_as_saved(mut request: ConfigureRequest, saved: &SavedMachine) -> ConfigureRequest {
    for (interface, found) in request.interfaces.iter_mut().zip(&saved.interface) {
        interface.found_mac.clone_from(&found.mac);
        interface.found_addresses = vec![found.address.clone()];
    }
    request
}

/// What the file server shares, and where the agent mounts it; memory mounts among them, in the user's order.
fn mounts(
    home: &Home,
    config: &ContainerConfig,
    sockets: &mut Sockets,
) -> Result<(Vec<SharePlan>, Vec<Mount>), SandboxError> {
    let (mut shares, mut mounts) = (Vec::new(), Vec::new());
    for wish in &config.mounts {
        let mut mount = Mount { destination: wish.target().to_owned(), ..Default::default() };
        let (source, read_only) = match wish {
            MountConfig::Tmpfs { size_bytes, mode, noexec, .. } => {
                let tmpfs = TmpfsSource {
                    size_bytes: *size_bytes,
                    mode: *mode,
                    noexec: *noexec,
                    ..Default::default()
                };
                mount.source = Some(mount::Source::Tmpfs(tmpfs));
                mounts.push(mount);
                continue;
            }
            MountConfig::Bind { source, read_only, create, .. } => {
                if !source.exists() {
                    if !create {
                        return Err(ConfigError::BindMissing(source.clone()).into());
                    }
                    fs::create_dir_all(source).map_err(|error| SandboxError::io("make", source, error))?;
                }
                if let Some(socket) =
                    sockets.offer(source).map_err(|error| SandboxError::io("share", source, error))?
                {
                    mount.source = Some(mount::Source::Socket(socket));
                    mount.read_only = *read_only;
                    mounts.push(mount);
                    continue;
                }
                (source.clone(), *read_only)
            }
            MountConfig::Volume { name, read_only, .. } => {
                mount.copy_up = !read_only;
                (home.create_volume(name, std::collections::BTreeMap::new())?.mountpoint, *read_only)
            }
        };
        let name = shares.len().to_string();
        let share = ShareSource { tag: SHARE_TAG.to_owned(), path: name.clone(), ..Default::default() };
        mount.source = Some(mount::Source::Share(share));
        mount.read_only = read_only;
        mounts.push(mount);
        shares.push(SharePlan { name, source, read_only, live: false });
    }
    Ok((shares, mounts))
}

/// Makes the container in the machine, ready to start, with its streams.
pub(super) async fn container(
    shared: &Shared,
    container: &Container,
    machine: &mut Machine,
) -> Result<Streams, StartError> {
    let (id, config) = (shared.id.as_str(), container.config());
    let wish = &config.process;
    let agent = &machine.guest.agent;
    let mut stdio = Stdio { terminal: wish.terminal, ..Default::default() };
    let mut streams = Streams::default();
    if wish.open_stdin {
        let (stream_id, stream) = agent.open_stream().await.map_err(SandboxError::Vm)?;
        stdio.stdin = stream_id;
        streams.stdin = Some(stream);
    }
    let (stream_id, stream) = agent.open_stream().await.map_err(SandboxError::Vm)?;
    stdio.stdout = stream_id;
    streams.stdout = Some(stream);
    if wish.terminal {
        let size = shared.console().size().unwrap_or(DEFAULT_SIZE);
        (stdio.rows, stdio.cols) = (u32::from(size.rows), u32::from(size.cols));
    } else {
        let (stream_id, stream) = agent.open_stream().await.map_err(SandboxError::Vm)?;
        stdio.stderr = stream_id;
        streams.stderr = Some(stream);
    }
    if let Some(saved) = &machine.saved {
        renew(config, id, machine, saved, stdio).await?;
        return Ok(streams);
    }
    let request = create_request(config, id, machine, stdio)?;
    let create = machine.guest.agent.rpc.create_container(launch::call(), &request);
    let created = machine.guest.until_end(create).await.map_err(SandboxError::Vm)?;
    created.map_err(|error| in_dockers_words(rpc_error("CreateContainer")(error)))?;
    Ok(streams)
}

/// Makes the container that is in the machine this one.
async fn renew(
    config: &ContainerConfig,
    id: &str,
    machine: &Machine,
    saved: &SavedMachine,
    stdio: Stdio,
) -> Result<(), SandboxError> {
    let request = RenewContainerRequest {
        container_id: saved.guest_id.clone(),
        hostname: config.hostname_for(id).to_owned(),
        files: files(config, id, machine)?,
        stdio: MessageField::some(stdio),
        ..Default::default()
    };
    let renew = machine.guest.agent.rpc.renew_container(launch::call(), &request);
    let renewed = machine.guest.until_end(renew).await?;
    renewed.map(drop).map_err(|error| SandboxError::Vm(rpc_error("RenewContainer")(error)))
}

/// The files that are put into the container.
fn files(config: &ContainerConfig, id: &str, machine: &Machine) -> Result<Vec<InjectedFile>, SandboxError> {
    let facts = oci::Facts {
        id,
        ip: machine.link.as_ref().map(|link| link.state.ip),
        gateway: machine.link.as_ref().map(|link| link.state.gateway),
        host: &machine.host,
    };
    let files = oci::injected_files(config, &facts);
    if files.iter().any(|file| file.content.len() > MAX_INJECTED_FILE_BYTES) {
        return Err(
            ConfigError::TooMany { what: "bytes of /etc/hosts", limit: MAX_INJECTED_FILE_BYTES }.into()
        );
    }
    Ok(files)
}

fn create_request(
    config: &ContainerConfig,
    id: &str,
    machine: &mut Machine,
    stdio: Stdio,
) -> Result<CreateContainerRequest, SandboxError> {
    let spec = oci::spec(config, id).to_string().into_bytes();
    if spec.len() > MAX_OCI_SPEC_BYTES {
        return Err(ConfigError::TooMany {
            what: "bytes of arguments and environment",
            limit: MAX_OCI_SPEC_BYTES,
        }
        .into());
    }
    let files = files(config, id, machine)?;
    Ok(CreateContainerRequest {
        container_id: id.to_owned(),
        oci_spec: spec,
        rootfs: MessageField::some(Rootfs {
            image_disk: IMAGE_DISK.to_owned(),
            writable_disk: RW_DISK.to_owned(),
            ..Default::default()
        }),
        mounts: std::mem::take(&mut machine.mounts),
        user: config.process.user.clone(),
        additional_groups: config.process.additional_groups.clone(),
        files,
        stdio: MessageField::some(stdio),
        init: config.init,
        ..Default::default()
    })
}

/// An agent's refusal, with the exit code that Docker's client finds in such words.
pub(super) fn in_dockers_words(error: launch::VmError) -> StartError {
    let message = error.to_string();
    let has = |words: &[&str]| words.iter().any(|word| message.contains(word));
    let exit_code = if has(&["executable file not found", "no such file or directory"]) {
        127
    } else if has(&["permission denied", "is a directory"]) {
        126
    } else {
        return StartError::Sandbox(SandboxError::Vm(error));
    };
    StartError::Command { exit_code, message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::{config, home};

    #[test]
    fn shares_and_mounts_agree() {
        let (dir, home) = home();
        let mut wish = config("c1");
        let source = dir.path().join("made");
        wish.mounts = vec![
            MountConfig::Tmpfs { target: "/t".into(), size_bytes: 5, mode: 0o700, noexec: true },
            MountConfig::Bind { source: source.clone(), target: "/b".into(), read_only: true, create: true },
            MountConfig::Volume {
                name: "data".into(),
                anonymous: false,
                target: "/v".into(),
                read_only: false,
            },
        ];
        let (shares, mounts) = mounts(&home, &wish, &mut Sockets::default()).unwrap();
        assert!(source.is_dir(), "made");
        assert_eq!(shares[0], SharePlan { name: "0".into(), source, read_only: true, live: false });
        assert_eq!(shares[1].source, home.volume("data").unwrap().mountpoint);
        let all: Vec<_> = mounts.iter().map(|m| (m.destination.as_str(), m.read_only, m.copy_up)).collect();
        assert_eq!(all, [("/t", false, false), ("/b", true, false), ("/v", false, true)]);
        let Some(mount::Source::Share(share)) = &mounts[2].source else { panic!("no share") };
        assert_eq!((share.tag.as_str(), share.path.as_str()), (SHARE_TAG, "1"));
        let missing = dir.path().join("missing");
        wish.mounts =
            vec![MountConfig::Bind { source: missing, target: "/b".into(), read_only: true, create: false }];
        assert!(matches!(
            super::mounts(&home, &wish, &mut Sockets::default()),
            Err(SandboxError::Config(ConfigError::BindMissing(_)))
        ));
    }

    #[test]
    fn refusals_get_dockers_codes() {
        let code = |message: &str| {
            in_dockers_words(launch::VmError::Agent { call: "CreateContainer", message: message.into() })
                .exit_code()
        };
        assert_eq!(code("exec: \"x\": executable file not found in $PATH"), 127);
        assert_eq!(code("chdir to cwd: permission denied"), 126);
        assert_eq!(code("unable to find user x: no matching entries in passwd file"), 125);
    }
}
