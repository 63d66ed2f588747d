//! What has no safe wrapper: TAP and bridge ioctls, attributes of mounts, and what a child does before it is another program.
// UNSAFETY: ioctl, syscall, dup2, pre_exec and tokio's registration of a descriptor are unsafe by signature; all are called with plain values only.
#![expect(
    unsafe_code,
    reason = "TUNSETIFF, TUNSETOFFLOAD, bridge ioctls, mount_setattr, dup2 and pre_exec have no safe wrapper in rustix or std"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Makes a bridge (linux/sockios.h; not in libc for Linux).
const SIOCBRADDBR: libc::Ioctl = 0x89a0;
/// Adds an interface to a bridge.
const SIOCBRADDIF: libc::Ioctl = 0x89a2;
/// Bytes of `struct ifreq` on 64-bit Linux: 16 of name, 24 of union.
const IFREQ_BYTES: usize = 40;

/// A `struct ifreq`: the name of an interface and one value.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(8))]
pub(crate) struct IfReq {
    bytes: [u8; IFREQ_BYTES],
}

impl IfReq {
    /// `name` must be 1 to 15 bytes long.
    pub(crate) fn new(name: &str) -> io::Result<Self> {
        let mut bytes = [0; IFREQ_BYTES];
        let valid = (1..libc::IFNAMSIZ).contains(&name.len()) && !name.contains(['\0', '/']);
        let Some(place) = bytes.get_mut(..name.len()).filter(|_| valid) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        place.copy_from_slice(name.as_bytes());
        Ok(Self { bytes })
    }

    /// Writes into the union, from its begin.
    pub(crate) fn with(mut self, value: &[u8]) -> Self {
        if let Some(place) = self.bytes.get_mut(libc::IFNAMSIZ..libc::IFNAMSIZ + value.len()) {
            place.copy_from_slice(value);
        }
        self
    }

    /// `N` bytes of the union, from `at`.
    pub(crate) fn value<const N: usize>(&self, at: usize) -> [u8; N] {
        let from = libc::IFNAMSIZ + at;
        self.bytes.get(from..from + N).and_then(|part| part.try_into().ok()).unwrap_or([0; N])
    }
}

/// An ioctl that takes a pointer to a `struct ifreq`, reads it and may write to it.
pub(crate) fn ioctl_ifreq(fd: BorrowedFd<'_>, request: IfIoctl, ifreq: &mut IfReq) -> io::Result<()> {
    let request = match request {
        IfIoctl::TunSetIff => libc::TUNSETIFF,
        IfIoctl::GetIndex => libc::SIOCGIFINDEX,
        IfIoctl::GetFlags => libc::SIOCGIFFLAGS,
        IfIoctl::SetFlags => libc::SIOCSIFFLAGS,
        IfIoctl::GetAddress => libc::SIOCGIFADDR,
        IfIoctl::SetAddress => libc::SIOCSIFADDR,
        IfIoctl::SetNetmask => libc::SIOCSIFNETMASK,
        IfIoctl::SetHardware => libc::SIOCSIFHWADDR,
        IfIoctl::SetMtu => libc::SIOCSIFMTU,
        IfIoctl::BridgeAdd => SIOCBRADDIF,
    };
    // SAFETY: `fd` is open; each of these requests reads and writes at most a `struct ifreq` at the pointer, and `ifreq` is one: as
    // long, as aligned, initialised, and exclusively borrowed for the call.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(ifreq)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Requests of [`ioctl_ifreq`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IfIoctl {
    /// Makes a TAP of the descriptor.
    TunSetIff,
    /// Interface index.
    GetIndex,
    /// Interface flags.
    GetFlags,
    /// Interface flags.
    SetFlags,
    /// IPv4 address.
    GetAddress,
    /// IPv4 address.
    SetAddress,
    /// IPv4 netmask.
    SetNetmask,
    /// Hardware address.
    SetHardware,
    /// Maximum transmission unit.
    SetMtu,
    /// Adds an interface to a bridge.
    BridgeAdd,
}

/// Makes a bridge.
pub(crate) fn bridge_create(fd: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let name = IfReq::new(name)?;
    // SAFETY: `fd` is open; SIOCBRADDBR reads a NUL-terminated name of at most IFNAMSIZ bytes at the pointer, and an `IfReq` begins
    // with one.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCBRADDBR, name.bytes.as_ptr()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Length of the header before each frame of a TAP, bytes.
pub(crate) fn tap_set_header(fd: BorrowedFd<'_>, bytes: libc::c_int) -> io::Result<()> {
    // SAFETY: `fd` is open; TUNSETVNETHDRSZ reads an int at the pointer, and `bytes` is one that outlives the call.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, std::ptr::from_ref(&bytes)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Offloads that the reader of a TAP can take: checksums and TCP segmentation.
pub(crate) fn tap_set_offloads(fd: BorrowedFd<'_>) -> io::Result<()> {
    let offloads = libc::c_ulong::from(libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6);
    // SAFETY: `fd` is open; TUNSETOFFLOAD takes its argument by value.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, offloads) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Attributes of a mount (`struct mount_attr`, Linux 5.12).
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Sets attributes on the mount that `mount` refers to and on all mounts below it, and detaches them from their originals.
pub(crate) fn restrict_mounts(mount: BorrowedFd<'_>, attributes: u64) -> io::Result<()> {
    let attr = MountAttr { attr_set: attributes, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: the path is a C string and `attr` a `struct mount_attr` of the size given; both outlive the call, which writes to
    // neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes the kernel kill the child when the thread that spawns it ends. Spawn it from a thread that lives as long as the process.
pub(crate) fn die_with_parent(command: &mut tokio::process::Command) {
    let parent = getpid();
    let in_child = move || -> io::Result<()> {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // Between fork and prctl the parent may have ended. From a process namespace of its own the child cannot see that: it has no
        // parent there. It then ends with its socket.
        match getppid() {
            Some(other) if other.as_raw_nonzero() != parent.as_raw_nonzero() => {
                Err(io::Error::from_raw_os_error(libc::ESRCH))
            }
            _ => Ok(()),
        }
    };
    // SAFETY: the closure runs between fork and exec: it makes two system calls and touches only its captured integer; it neither
    // allocates nor takes a lock.
    unsafe {
        command.pre_exec(in_child);
    }
}

/// Makes the child enter control groups before it is another program; `entrances` are their open `cgroup.procs`.
pub(crate) fn enter_cgroups(command: &mut tokio::process::Command, entrances: Vec<OwnedFd>) {
    let in_child = move || -> io::Result<()> {
        // 0 is whoever writes it.
        entrances
            .iter()
            .try_for_each(|procs| rustix::io::write(procs, b"0").map(drop).map_err(io::Error::from))
    };
    // SAFETY: the closure runs between fork and exec: it makes system calls and touches only its captured descriptors; it allocates
    // nothing and takes no lock.
    unsafe {
        command.pre_exec(in_child);
    }
}

/// Waits for a socket that has no type of its own in tokio.
pub(crate) fn watch_readable(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by the value that is moved in and never replaced, so the number stays the same open socket for as long
    // as it is registered.
    unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }.map_err(Into::into)
}

/// Makes the child enter a network namespace before it is another program.
pub(crate) fn enter_network(command: &mut tokio::process::Command, namespace: Arc<OwnedFd>) {
    let in_child = move || -> io::Result<()> {
        Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
    };
    // SAFETY: the closure runs between fork and exec: it makes one system call and touches only its captured descriptor; it neither
    // allocates nor takes a lock.
    unsafe {
        command.pre_exec(in_child);
    }
}

/// Descriptors of a child after its three standard ones.
const FIRST_GIVEN: libc::c_int = 3;

/// Makes `given` the descriptors 3, 4 and 5 of the child.
pub(crate) fn give_descriptors(command: &mut tokio::process::Command, given: [OwnedFd; 3]) {
    let in_child = move || -> io::Result<()> {
        // Out of each other's way first.
        let [a, b, c] = [&given[0], &given[1], &given[2]].map(|fd| fcntl_dupfd_cloexec(fd, FIRST_GIVEN + 3));
        for (number, fd) in (FIRST_GIVEN..).zip([a?, b?, c?]) {
            // SAFETY: both are plain numbers: `fd` is open, and `number` is 3 to 5, which belongs to no owner in this process: it is the
            // child, whose own descriptors all lie above (the parent holds `given` and the far ends of three pipes, so that 3 to 5 were
            // taken when what the standard library needs for the start was opened) and which goes on to exec.
            if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec: it makes system calls and touches only its captured descriptors; it neither
    // allocates nor takes a lock.
    unsafe {
        command.pre_exec(in_child);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bounded() {
        for bad in ["", "sixteen-bytes-xx", "a/b", "a\0b"] {
            assert!(IfReq::new(bad).is_err(), "{bad}");
        }
        let ifreq = IfReq::new("fifteen-bytes-x").unwrap().with(&[1, 2, 3]);
        assert_eq!(ifreq.value::<3>(0), [1, 2, 3]);
        assert_eq!(ifreq.value::<1>(24), [0], "beyond the union");
        assert_eq!(size_of::<IfReq>(), size_of::<libc::ifreq>());
    }

    #[tokio::test]
    async fn child_learns_its_signal() {
        let mut command = tokio::process::Command::new("true");
        die_with_parent(&mut command);
        assert!(command.status().await.unwrap().success());
    }
}
