//! The few calls of bpf(2) that steer connections of a network namespace to a listener (`BPF_PROG_TYPE_SK_LOOKUP`, Linux 5.9).
// UNSAFETY: bpf(2) has no safe wrapper; every pointer in its attributes is to a value that outlives the call.
#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper in rustix or std")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Commands of bpf(2).
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
/// Kinds of maps and programs.
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;
/// The program calls nothing that wants the GPL.
const LICENSE: &std::ffi::CStr = c"Apache-2.0";

/// The head of `union bpf_attr` for BPF_MAP_CREATE.
#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

/// The same for BPF_MAP_UPDATE_ELEM.
#[repr(C)]
struct MapUpdate {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The same for BPF_PROG_LOAD, to `expected_attach_type`.
#[repr(C)]
struct ProgLoad {
    kind: u32,
    insn_count: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    ifindex: u32,
    expected_attach_type: u32,
}

/// The same for BPF_LINK_CREATE.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// Plain data that begins a `union bpf_attr`; zeros follow, for the kernel.
///
/// # Safety
/// Addresses in `attr` are those of values of the kind and length that the command reads, and outlive the call.
unsafe fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is plain data of the size given, which the kernel reads; what it points to is as the caller promises.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    u32::try_from(fd.as_raw_fd()).unwrap_or(u32::MAX)
}

fn owned(answer: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(answer).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A map with one place, which holds this socket.
pub(crate) fn map_of_socket(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let create =
        MapCreate { kind: BPF_MAP_TYPE_SOCKMAP, key_size: 4, value_size: 8, max_entries: 1, flags: 0 };
    // SAFETY: no addresses in it.
    let map = owned(unsafe { bpf(BPF_MAP_CREATE, &create) }?)?;
    let (key, value) = (0_u32, u64::from(number(socket)));
    let update = MapUpdate {
        map_fd: number(std::os::fd::AsFd::as_fd(&map)),
        pad: 0,
        key: std::ptr::from_ref(&key).addr() as u64,
        value: std::ptr::from_ref(&value).addr() as u64,
        flags: 0,
    };
    // SAFETY: key and value are of the sizes that the map was made with.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &update) }?;
    Ok(map)
}

/// Loads a program of this kind: 8 bytes an instruction.
pub(crate) fn load_sk_lookup(program: &[u64]) -> io::Result<OwnedFd> {
    let load = ProgLoad {
        kind: BPF_PROG_TYPE_SK_LOOKUP,
        insn_count: u32::try_from(program.len()).unwrap_or(u32::MAX),
        insns: program.as_ptr().addr() as u64,
        license: LICENSE.as_ptr().addr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"hyper_loopback\0\0",
        ifindex: 0,
        expected_attach_type: BPF_SK_LOOKUP,
    };
    // SAFETY: `insns` has `insn_count` instructions, the licence ends with a NUL, and there is no log.
    owned(unsafe { bpf(BPF_PROG_LOAD, &load) }?)
}

/// Lets a program decide in a network namespace, until the answer is closed.
pub(crate) fn attach_to_netns(program: BorrowedFd<'_>, netns: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let link = LinkCreate {
        prog_fd: number(program),
        target_fd: number(netns),
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: no addresses in it.
    owned(unsafe { bpf(BPF_LINK_CREATE, &link) }?)
}
