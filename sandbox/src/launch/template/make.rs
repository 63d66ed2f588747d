//! Making a template: a machine of the shape, without anything of anybody's in it, is booted, paused and saved.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::inputs::MachineShape;
use super::mac_of;
use super::store::{self, Maker};
use crate::launch::guest::{Booted, Steps};
use crate::launch::plan::{DEFAULT_BOOT_MS, DiskPlan, GuestPlan, NetPlan};
use crate::launch::unpack::make_run_dir;
use crate::launch::{VmError, scaled_ms};
use crate::network::MTU;
use crate::store::{UNPACK_PREFIX, new_id};
use crate::{Home, SandboxError};

/// How long the writing of a machine's memory may take.
const SAVE_MS: u64 = 30_000;
/// How long other processes may take for templates that they make first.
const MAKER_MS: u64 = 90_000;

/// Size of the disks of a machine that is being saved: at least that of any disk, so that a clone whose driver has not yet heard of its
/// disk's size finds all of it. The file has no content.
const DISK_BYTES: u64 = 16 << 40;

/// A disk without content, open as the clones' disks will be.
fn blank_disk(read_only: bool) -> io::Result<File> {
    let disk = rustix::fs::memfd_create("blank", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&disk, DISK_BYTES)?;
    if read_only { File::open(format!("/proc/self/fd/{}", disk.as_raw_fd())) } else { Ok(disk.into()) }
}

/// Makes the template of a shape, unless it is there, another process makes one, or it has failed too often.
pub(crate) async fn make(home: &Home, shape: &MachineShape) -> Result<(), SandboxError> {
    if store::is_hopeless(home, &shape.inputs(home.parts())?) {
        return Ok(());
    }
    match Maker::try_new(home)? {
        Some(maker) => make_by(&maker, home, shape).await,
        None => Ok(()),
    }
}

/// As [`make`], but waits for the other process: the template is there afterwards.
pub(super) async fn make_or_wait(home: &Home, shape: &MachineShape) -> Result<(), SandboxError> {
    let maker = Maker::new(home, scaled_ms(MAKER_MS)).await?;
    make_by(&maker, home, shape).await
}

async fn make_by(maker: &Maker, home: &Home, shape: &MachineShape) -> Result<(), SandboxError> {
    let inputs = shape.inputs(home.parts())?;
    if store::has(home, &inputs) {
        return Ok(());
    }
    let draft = maker.draft(&inputs)?;
    let run_dir = home.dirs().run.join(format!("{UNPACK_PREFIX}{}", new_id().get(..16).unwrap_or("0")));
    let (_undo_dir, _lock) = make_run_dir(home, &run_dir)?;
    let mut nets = Vec::new();
    let mut wires = Vec::new();
    for index in 0..shape.nets {
        // An interface that is never switched on needs no TAP, only something that has no frames.
        let (tap, wire) =
            UnixStream::pair().map_err(|source| VmError::Descriptor { what: "a pair of sockets", source })?;
        nets.push(NetPlan { tap: OwnedFd::from(tap), mac: mac_of(index), mtu: MTU });
        wires.push(wire);
    }
    let mut disks = Vec::new();
    for (id, read_only) in &shape.disks {
        let file = blank_disk(*read_only)
            .map_err(|source| VmError::Descriptor { what: "a disk without content", source })?;
        disks.push(DiskPlan { id: id.clone(), file, read_only: *read_only });
    }
    let plan = GuestPlan {
        log_dir: run_dir.clone(),
        run_dir,
        vcpus: shape.vcpus,
        mem_mib: shape.mem_mib,
        growth: None,
        bays: 0,
        disks,
        nets,
        host_ports: Vec::new(),
        shares: Vec::new(),
        kernel_args: Vec::new(),
        in_pod: false,
        boot_ms: DEFAULT_BOOT_MS,
        cgroups: Vec::new(),
        template: None,
    };
    let mut steps = Steps::begin();
    let mut guest = Booted::new(plan, home.parts(), &mut steps).await?;
    let saved = async {
        let (state, memory) = draft.files()?;
        let deadline = Instant::now() + scaled_ms(SAVE_MS);
        guest.levers().save(&state, &memory, deadline, async { Ok(()) }).await
    };
    let saved = saved.await;
    guest.kill().await;
    drop(wires);
    saved?;
    maker.keep(draft, &inputs)?;
    tracing::debug!(name = inputs.name(), "template made");
    Ok(())
}
