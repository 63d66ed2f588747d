//! What an attacker may know and have: more than a guest could find out, so that a way out is not missed for want of a name.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::FileType;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::sys::{address, call};

/// A file that every host has.
pub(crate) const HOST_FILE: &str = "/etc/passwd";
/// Longest file handle that Linux has, bytes.
const MAX_HANDLE_BYTES: u32 = 128;
/// As many as come with a boot request.
const MAX_FDS: usize = 64;

/// `struct file_handle` with room.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Handle {
    bytes: u32,
    kind: i32,
    handle: [u8; MAX_HANDLE_BYTES as usize],
}

/// What is known and held.
#[derive(Debug)]
pub(crate) struct World {
    /// Of [`HOST_FILE`], asked for before the jail closed.
    pub(crate) handle: Handle,
    /// /dev/kvm, as hyper-vmm has it.
    pub(crate) kvm: Option<File>,
    /// What came with the boot request.
    pub(crate) handed: Vec<OwnedFd>,
}

impl World {
    /// To be called while paths lead to the host.
    pub(crate) fn look() -> io::Result<Self> {
        let handle = Handle { bytes: MAX_HANDLE_BYTES, kind: 0, handle: [0; MAX_HANDLE_BYTES as usize] };
        let (path, mount) = (c"/etc/passwd", 0_i32);
        let here = libc::AT_FDCWD as usize;
        // The root of a lab machine has no handles; then there is none to try.
        let _no_handles = call(
            libc::SYS_name_to_handle_at,
            &[here, path.as_ptr() as usize, address(&handle), address(&mount), 0],
        );
        let kvm = File::options().read(true).write(true).open("/dev/kvm").ok();
        Ok(Self { handle, kvm, handed: Vec::new() })
    }

    /// Takes the boot request from standard input, as hyper-vmm does, for its descriptors.
    pub(crate) fn take_request(&mut self) -> io::Result<()> {
        let mut bytes = vec![0; 1 << 16];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let stdin = io::stdin();
        recvmsg(&stdin, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        for part in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = part {
                self.handed.extend(fds);
            }
        }
        Ok(())
    }

    /// Descriptors of regular files among what was handed over that can be written to: disks.
    pub(crate) fn writable_files(&self) -> Vec<BorrowedFd<'_>> {
        let writable = |fd: &&OwnedFd| {
            let flags = rustix::fs::fcntl_getfl(fd);
            flags.is_ok_and(|flags| !(flags & rustix::fs::OFlags::RWMODE).is_empty())
                && rustix::fs::fstat(fd)
                    .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
        };
        self.handed.iter().filter(writable).map(AsFd::as_fd).collect()
    }

    /// The longest of them, bytes.
    pub(crate) fn longest_file(&self) -> u64 {
        let length = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).map_or(0, |stat| stat.st_size.unsigned_abs());
        self.writable_files().into_iter().map(length).max().unwrap_or(0)
    }

    /// The descriptor of /dev/kvm.
    pub(crate) fn kvm(&self) -> usize {
        self.kvm.as_ref().map_or(usize::MAX, |file| file.as_raw_fd().unsigned_abs() as usize)
    }
}
