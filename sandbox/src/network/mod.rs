//! The host's side of a container's network: a bridge that all share, a TAP and an address for each.
//!
//! ```text
//! container eth0 -- hyper-vmm -- TAP hys<address> -- bridge hyper0 (first address) -- forwarding, masquerade -- world
//!                                                   |
//! published ports: proxy in the supervisor ---------+      names: service on a vsock port, see `dns`
//! ```
//!
//! Files: `place` (in which network namespace), `subnet`, `lease` (addresses), `link` (bridge, TAP), `firewall` (the way out),
//! `policy` and `names` (where it may lead), `own` (the host's addresses), `publish` (the way in), `dns`, `resolv`.

pub(crate) mod dns;
mod firewall;
mod lease;
mod link;
mod names;
mod own;
mod place;
mod policy;
pub(crate) mod publish;
pub(crate) mod resolv;
mod subnet;

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::task::JoinHandle;

use self::firewall::Firewall;
use self::policy::Seat;
use crate::SandboxError;
use crate::state::NetworkState;
use crate::store::{FileLock, make_private_dir};

pub(crate) use link::{MTU, bring_up, make_tap};
pub(crate) use names::Names;
pub(crate) use place::Place;
pub(crate) use policy::Policy;
pub(crate) use subnet::mac_text;

/// The bridge without `HYPER_BRIDGE`.
pub(crate) const DEFAULT_BRIDGE: &str = "hyper0";
/// Where locks and leases of all bridges of the host are, whoever's home it is. Those of a user's network are beside its keeper's socket.
const NET_DIR: &str = "/run/hyper-net";
const USERS_NET_DIR: &str = "net";
/// Most addresses that are passed over because their TAPs are still there.
const MOST_PASSED: usize = 256;

/// Why the network could not be set up. Every message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Somebody else listens there.
    #[error("bind for {address} failed: port is already allocated")]
    PortInUse {
        /// Address, port and protocol.
        address: String,
    },
    /// A listener could not be made for another reason.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Address, port and protocol.
        address: String,
        /// Why not.
        source: std::io::Error,
    },
    /// No TAP driver.
    #[error("this host has no /dev/net/tun: load the module (modprobe tun), or use --network none")]
    NoTun,
    /// No bridge driver.
    #[error("this host's kernel has no bridges: load the module (modprobe bridge), or use --network none")]
    NoBridge,
    /// Not allowed.
    #[error("no permission to {what} {name}: `hyper doctor` says what is missing; or use --network none")]
    Permission {
        /// What was tried.
        what: &'static str,
        /// On which interface.
        name: String,
    },
    /// An ioctl failed.
    #[error("cannot {what} {name}: {source}")]
    Interface {
        /// What was tried.
        what: &'static str,
        /// On which interface.
        name: String,
        /// Why not.
        source: std::io::Error,
    },
    /// Something else has the bridge's name.
    #[error("the interface {name} is no bridge: rename it, or set HYPER_BRIDGE to another name")]
    NotABridge {
        /// The name.
        name: String,
    },
    /// The bridge is of another network.
    #[error(
        "the bridge {name} has the address {found}, not {wanted}: delete it (ip link delete {name}) or set HYPER_SUBNET to its network"
    )]
    OtherSubnet {
        /// The bridge.
        name: String,
        /// Its address.
        found: Ipv4Addr,
        /// The address that it should have.
        wanted: Ipv4Addr,
    },
    /// `HYPER_SUBNET` is no network.
    #[error("HYPER_SUBNET is {0:?}: give an IPv4 network such as 10.120.0.0/16")]
    Subnet(String),
    /// All addresses are taken.
    #[error("all addresses of {subnet} are taken: stop a container or set HYPER_SUBNET to a larger network")]
    NoAddress {
        /// The network.
        subnet: String,
    },
    /// No nft.
    #[error("nft is missing on this host: install the package nftables, or use --network none")]
    NoNft,
    /// nft failed.
    #[error(
        "nft failed: {message}; the host's kernel needs nf_tables with NAT and for bridges, or use --network none"
    )]
    Nft {
        /// First line of its standard error.
        message: String,
    },
    /// The kernel refused a change to the namespace of a pod.
    #[error("cannot {what}: {source}")]
    Namespace {
        /// What was tried on what.
        what: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A port that only the host's root may listen on.
    #[error(
        "no permission to listen on {address}: publish it on a higher port, or have an administrator lower net.ipv4.ip_unprivileged_port_start"
    )]
    LowPort {
        /// Address, port and protocol.
        address: String,
    },
    /// Forwarding could not be turned on.
    #[error("cannot turn on forwarding in {path}: {source}")]
    Forwarding {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

impl NetworkError {
    /// The network namespace of a user cannot be entered.
    fn place(source: std::io::Error) -> Self {
        Self::Namespace { what: "enter this user's network namespace".to_owned(), source }
    }
}

/// Which bridge and network this host uses.
#[derive(Debug, Clone)]
pub(crate) struct NetworkSettings {
    bridge: String,
    subnet: subnet::Subnet,
    dir: PathBuf,
    /// Who knows the network namespace; the host's when nobody.
    keeper: Option<PathBuf>,
}

/// A container's place on the bridge. Address and TAP are free again when this is dropped and the VMM has ended.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) tap: Option<OwnedFd>,
    pub(crate) mac: [u8; 6],
    pub(crate) state: NetworkState,
    pub(crate) place: Place,
    names: Option<Names>,
    firewall: Option<JoinHandle<Result<(), NetworkError>>>,
    _own: Option<own::Watch>,
    _lease: lease::Lease,
}

impl NetworkSettings {
    /// From `HYPER_BRIDGE` and `HYPER_SUBNET`.
    pub(crate) fn from_env() -> Result<Self, NetworkError> {
        let var = |name: &str, default: &str| match std::env::var(name) {
            Ok(value) if !value.is_empty() => value,
            _ => default.to_owned(),
        };
        let bridge = var("HYPER_BRIDGE", DEFAULT_BRIDGE);
        let subnet = var("HYPER_SUBNET", subnet::DEFAULT_SUBNET).parse()?;
        let keeper = crate::rootless::keeper();
        let users = keeper.as_ref().and_then(|socket| socket.parent()).map(|run| run.join(USERS_NET_DIR));
        let dir = users.unwrap_or_else(|| PathBuf::from(NET_DIR)).join(&bridge);
        Ok(Self { dir, bridge, subnet, keeper })
    }

    /// The host's address, as containers see it.
    pub(crate) fn gateway(&self) -> IpAddr {
        self.subnet.gateway().into()
    }

    /// Puts a container on the bridge; `last` is the address that it had. The firewall is seen to meanwhile: see [`Link::ready`].
    pub(crate) async fn connect(&self, last: Option<IpAddr>, policy: &Policy) -> Result<Link, SandboxError> {
        make_private_dir(&self.dir)?;
        let place = match &self.keeper {
            None => Place::Host,
            Some(keeper) => Place::Users(Arc::new(crate::rootless::network(keeper.clone()).await?)),
        };
        {
            let _lock =
                FileLock::take_within(&self.dir.join("lock"), crate::launch::scaled_ms(10_000)).await?;
            let bridge = || link::ensure_bridge(&self.bridge, self.subnet);
            place.within(bridge).map_err(NetworkError::place)??;
        }
        let (lease, tap) = place.within(|| self.take_seat(last)).map_err(NetworkError::place)??;
        let (seat, mac) = (Seat(lease.ip), subnet::mac_of(lease.ip));
        let state = NetworkState {
            ip: lease.ip.into(),
            prefix_len: self.subnet.prefix_len(),
            gateway: self.gateway(),
            mac: mac_text(mac),
            tap: seat.tap(),
            bridge: self.bridge.clone(),
        };
        let walls = Firewall::new(&self.bridge, self.subnet, place.clone());
        // Followed before they are asked for, so that no change is missed.
        let own = match place {
            Place::Host => None,
            Place::Users(_) => Some(own::Watch::start(walls.clone()).map_err(NetworkError::place)?),
        };
        let names = Names::new(&walls, seat, policy);
        let policy = policy.clone();
        let firewall = tokio::spawn(async move { walls.seat(seat, &policy).await });
        Ok(Link {
            tap: Some(tap),
            mac,
            state,
            place,
            names,
            firewall: Some(firewall),
            _own: own,
            _lease: lease,
        })
    }

    /// An address, and the TAP that is named after it. The TAP of a machine that is just ending keeps its name a little longer than its
    /// address: then the next address is taken.
    fn take_seat(&self, last: Option<IpAddr>) -> Result<(lease::Lease, OwnedFd), SandboxError> {
        let last = last.and_then(|ip| match ip {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        });
        let mut passed = Vec::new();
        loop {
            let lease = lease::take(&self.dir.join("leases"), self.subnet, last)?;
            match link::open_tap(&Seat(lease.ip).tap(), &self.bridge) {
                Err(NetworkError::Interface { source, .. })
                    if source.raw_os_error() == Some(libc::EBUSY) && passed.len() < MOST_PASSED =>
                {
                    // Held, so that another one is found.
                    passed.push(lease);
                }
                tap => return Ok((lease, tap?)),
            }
        }
    }
}

impl Link {
    /// Gives the TAP away: the interface lives as long as the machine.
    pub(crate) fn take_tap(&mut self) -> Option<OwnedFd> {
        self.tap.take()
    }

    /// Gives what the container may ask for to its name service.
    pub(crate) fn take_names(&mut self) -> Option<Names> {
        self.names.take()
    }

    /// Waits until packets can leave the host, those that may and no others.
    pub(crate) async fn ready(&mut self) -> Result<(), SandboxError> {
        match self.firewall.take() {
            None => Ok(()),
            Some(task) => match task.await {
                Ok(done) => Ok(done?),
                Err(error) => Err(SandboxError::io("set up", "the firewall", std::io::Error::other(error))),
            },
        }
    }
}
