//! The control socket of the real program, as far as it goes without KVM: whoever speaks to it wrongly is told so.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests, which fail by panic"
)]

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use hyper_vmm_spec::control::{MAX_PACKET_BYTES, Message, Request, SnapshotFds, exit_code};
use hyper_vmm_spec::probe::ProbeReport;
use hyper_vmm_spec::{FdSlot, VmSpec};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    recv, sendmsg, socketpair, sockopt,
};

fn vmm(stdin: impl Into<Stdio>) -> Child {
    Command::new(env!("CARGO_BIN_EXE_hyper-vmm"))
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for the end: exit code and log.
fn end(mut child: Child) -> (u8, String) {
    let mut log = String::new();
    child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    (child.wait().unwrap().code().unwrap().try_into().unwrap(), log)
}

struct Owner {
    socket: OwnedFd,
    vmm: Child,
}

impl Owner {
    fn start() -> Self {
        let (socket, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        Self { socket, vmm: vmm(theirs) }
    }

    fn send(&self, packet: &[u8], fds: &[File]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        if !borrowed.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)));
        }
        sendmsg(&self.socket, &[IoSlice::new(packet)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    }

    /// The error of the only reply, and how the process ended.
    fn refused(self) -> (String, u8, String) {
        let mut packet = vec![0; MAX_PACKET_BYTES];
        let (count, _) = recv(&self.socket, &mut packet, RecvFlags::empty()).unwrap();
        let message: Message = serde_json::from_slice(&packet[..count]).unwrap();
        let Message::Reply { result: Err(why) } = message else { panic!("{message:?}") };
        let (code, log) = end(self.vmm);
        assert!(!why.contains('\n') && log.lines().count() == 1, "one line each: {why:?} {log:?}");
        (why, code, log)
    }
}

fn file(bytes: &[u8]) -> File {
    let fd = rustix::fs::memfd_create("kernel", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(fd);
    file.write_all(bytes).unwrap();
    file
}

fn boot(kernel: u32) -> Vec<u8> {
    let spec = VmSpec::new(1, 64, FdSlot(kernel), "quiet").unwrap();
    serde_json::to_vec(&Request::Boot { spec }).unwrap()
}

#[test]
fn it_is_not_started_by_hand() {
    let stream = OwnedFd::from(UnixStream::pair().unwrap().0);
    for (code, log) in [end(vmm(Stdio::null())), end(vmm(stream))] {
        assert_eq!(code, exit_code::USAGE);
        assert!(log.contains("started by hyper"), "{log}");
    }
    let unknown = Command::new(env!("CARGO_BIN_EXE_hyper-vmm")).arg("--what").output().unwrap();
    assert_eq!(unknown.status.code(), Some(exit_code::USAGE.into()));
}

#[test]
fn an_owner_that_leaves_ends_it() {
    let owner = Owner::start();
    drop(owner.socket);
    assert_eq!(end(owner.vmm), (exit_code::ENDED, String::new()));
}

#[test]
fn what_is_no_boot_request_is_refused() {
    let spec_of_33 = String::from_utf8(boot(0)).unwrap().replace("\"vcpus\":1", "\"vcpus\":33");
    let state = serde_json::to_vec(&Request::State).unwrap();
    for (packet, word) in [
        (&b"{"[..], "bad request"),
        (b"{\"op\":\"fly\"}", "fly"),
        (&state, "must be a boot request"),
        (spec_of_33.as_bytes(), "33 vCPUs asked for: give 1 to 32"),
    ] {
        let owner = Owner::start();
        owner.send(packet, &[]);
        let (why, code, _) = owner.refused();
        assert!(why.contains(word), "{why}");
        assert_eq!(code, exit_code::USAGE);
    }
}

#[test]
fn a_packet_that_is_too_large_is_refused() {
    let owner = Owner::start();
    sockopt::set_socket_send_buffer_size(&owner.socket, 4 * MAX_PACKET_BYTES).unwrap();
    owner.send(&vec![b' '; MAX_PACKET_BYTES + 1], &[]);
    let (why, code, _) = owner.refused();
    assert!(why.contains("more than 65536 bytes"), "{why}");
    assert_eq!(code, exit_code::USAGE);
}

#[test]
fn a_descriptor_that_did_not_come_is_missed() {
    let owner = Owner::start();
    owner.send(&boot(1), &[file(b"only one")]);
    let (why, code, log) = owner.refused();
    assert!(why.contains("descriptor 1 for the kernel did not come"), "{why}");
    assert!(log.contains(&why), "{log}");
    assert_eq!(code, exit_code::BUILD);
}

#[test]
fn a_corrupt_kernel_is_called_corrupt() {
    let mut elf = vec![0; 4096];
    elf[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0");
    elf[56] = 1;
    elf[32..40].copy_from_slice(&8000_u64.to_le_bytes());
    for (bytes, word) in
        [(&b"#!/bin/sh"[..], "not an ELF file"), (&elf, "damaged: its headers are cut short")]
    {
        let owner = Owner::start();
        owner.send(&boot(0), &[file(bytes)]);
        let (why, code, _) = owner.refused();
        assert!(why.contains(word), "{why}");
        assert_eq!(code, exit_code::BUILD);
    }
}

/// The same file, open for reading only.
fn reopened(file: &File) -> File {
    use std::os::fd::AsRawFd;
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
}

#[test]
fn a_damaged_snapshot_is_called_damaged() {
    let restore = |state: File, memory: File| {
        let spec = VmSpec::new(1, 64, FdSlot(0), "quiet").unwrap();
        let snapshot = SnapshotFds { state: FdSlot(0), memory: FdSlot(1) };
        let owner = Owner::start();
        let request = serde_json::to_vec(&Request::Restore { spec, snapshot }).unwrap();
        owner.send(&request, &[state, memory]);
        let (why, code, _) = owner.refused();
        assert_eq!(code, exit_code::BUILD);
        why
    };
    let memory = |mib: u64| {
        let memory = file(b"");
        memory.set_len(mib << 20).unwrap();
        memory
    };
    let empty = [b"HYPRSNAP".as_slice(), &2_u32.to_le_bytes(), &[0; 12]].concat();
    let newer = [b"HYPRSNAP".as_slice(), &99_u32.to_le_bytes(), &[0; 12]].concat();
    for (state, word) in [
        (&b""[..], "cut short"),
        (b"HYPRSNAP", "cut short"),
        (&[0; 100], "is not one"),
        (&newer, "version 99"),
        (&empty, "damaged"),
    ] {
        let why = restore(file(state), reopened(&memory(64)));
        assert!(why.contains(word), "{why}");
    }
    let why = restore(file(&empty), reopened(&memory(63)));
    assert!(why.contains("66060288 bytes long, not 67108864"), "{why}");
    let why = restore(file(&empty), memory(64));
    assert!(why.contains("not open for reading only"), "{why}");
}

#[test]
fn the_probe_prints_one_line_of_json() {
    let output = Command::new(env!("CARGO_BIN_EXE_hyper-vmm")).arg("--probe").output().unwrap();
    assert!(output.status.success());
    let report: ProbeReport = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report.accessible, report.api_version.is_some());
    assert!(report.accessible || report.error.is_some());
    assert_eq!(output.stdout.iter().filter(|byte| **byte == b'\n').count(), 1);
}
