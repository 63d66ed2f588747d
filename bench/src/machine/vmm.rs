//! One start of hyper-vmm over its control socket, with the devices of a real sandbox that need no host set-up.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use hyper_vmm_spec::control::{Event, MAX_PACKET_BYTES, Message, Reply, Request, Timeline};
use hyper_vmm_spec::{BalloonSpec, DeviceSpec, FdSlot, HostPort, VmSpec, VsockSpec};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    recv, sendmsg, socketpair,
};

use super::{CMDLINE, MEM_MIB, Parts, Start};
use crate::program::{LIMIT, Watch, now_us};

/// Host port on which the agent announces itself.
const DOORBELL_PORT: u32 = 1026;

/// Starts a machine, waits for its agent, ends it.
pub(crate) fn start(parts: &Parts) -> Result<Start> {
    let folder = tempfile::tempdir().context("making a folder")?;
    let listener = UnixListener::bind(folder.path().join("vsock")).context("binding the vsock socket")?;
    let (_bell, doorbell) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let files = [
        File::open(&parts.kernel).with_context(|| format!("opening {}", parts.kernel.display()))?,
        File::open(&parts.initramfs).with_context(|| format!("opening {}", parts.initramfs.display()))?,
        File::options().write(true).open("/dev/null").context("opening /dev/null")?,
        File::from(OwnedFd::from(listener)),
        File::from(doorbell),
    ];
    let vsock = VsockSpec {
        guest_cid: 3,
        listener: FdSlot(3),
        host_ports: vec![HostPort { port: DOORBELL_PORT, fd: FdSlot(4) }],
    };
    let spec = VmSpec::new(1, MEM_MIB, FdSlot(0), format!("{CMDLINE} reboot=k"))?
        .with_initramfs(FdSlot(1))
        .with_serial(FdSlot(2))
        .with_device(DeviceSpec::Vsock(vsock))?
        .with_device(DeviceSpec::Balloon(BalloonSpec { free_page_reporting: true }))?
        .with_device(DeviceSpec::Rng)?;

    let (near, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&near, Timeout::Recv, Some(LIMIT))?;
    let watch = Watch::start();
    let forked_us = now_us();
    let mut child = Ended(
        Command::new(&parts.vmm)
            .stdin(Stdio::from(far))
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| format!("starting {}", parts.vmm.display()))?,
    );
    send(&near, &Request::Boot { spec }, &files)?;
    await_agent(&near)?;
    let agent_ready_work_us = watch.work_us();
    send(&near, &Request::State, &[])?;
    let timeline = timeline(&near)?;
    send(&near, &Request::Shutdown, &[])?;
    drop(near);
    child.0.wait().context("waiting for hyper-vmm")?;

    let main_us = timeline.main_us.saturating_sub(forked_us);
    let step = |us: u64| (us > 0).then_some(main_us + us);
    Ok(Start {
        main_us: Some(main_us),
        spec_us: step(timeline.spec_us),
        built_us: step(timeline.built_us),
        entered_us: step(timeline.entered_us),
        user_space_us: step(timeline.user_space_us),
        agent_ready_us: step(timeline.agent_ready_us),
        user_space_work_us: None,
        agent_ready_work_us,
        jail_us: Some(timeline.jail_us),
    })
}

/// A process that is gone when this is dropped.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It has ended by itself unless something failed on the way.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn send(socket: &OwnedFd, request: &Request, files: &[File]) -> Result<()> {
    let packet = serde_json::to_vec(request)?;
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        bail!("too many descriptors for one packet");
    }
    sendmsg(socket, &[IoSlice::new(&packet)], &mut ancillary, SendFlags::NOSIGNAL)
        .context("asking hyper-vmm")?;
    Ok(())
}

fn receive(socket: &OwnedFd) -> Result<Message> {
    let mut buffer = vec![0; MAX_PACKET_BYTES];
    let (_, length) =
        recv(socket, buffer.as_mut_slice(), RecvFlags::empty()).context("waiting for hyper-vmm")?;
    if length == 0 {
        bail!("hyper-vmm closed its control socket");
    }
    Ok(serde_json::from_slice(buffer.get(..length).unwrap_or_default())?)
}

fn await_agent(socket: &OwnedFd) -> Result<()> {
    loop {
        match receive(socket)? {
            Message::Event { event: Event::AgentReady } => return Ok(()),
            Message::Event { event: Event::MemoryReached { .. } } => {}
            Message::Event { event: Event::Exited { cause, .. } } => bail!("the machine ended: {cause:?}"),
            Message::Reply { result: Err(error) } => bail!("hyper-vmm refused: {error}"),
            Message::Reply { result: Ok(_) } => {}
        }
    }
}

fn timeline(socket: &OwnedFd) -> Result<Timeline> {
    loop {
        match receive(socket)? {
            Message::Reply { result: Ok(Reply::State { timeline, .. }) } => return Ok(timeline),
            Message::Reply { result: Err(error) } => bail!("hyper-vmm refused: {error}"),
            _ => {}
        }
    }
}
