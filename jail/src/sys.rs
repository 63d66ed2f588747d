//! Calls that rustix does not offer safely.
// UNSAFETY: close_range, unshare, keyctl and sigaction have no safe wrapper; the handler of SIGSYS reads what the kernel gave it.
#![expect(unsafe_code, reason = "four system calls and a signal handler without a safe wrapper")]

use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::thread::UnshareFlags;

use crate::JailError;

/// The first descriptor that is not a standard one.
const FIRST_OTHER: libc::c_uint = 3;

/// Closes all descriptors but the three standard ones. To be called first thing in `main`: nothing of this program may be open yet.
///
/// # Errors
/// A kernel before Linux 5.9.
pub fn close_inherited() -> Result<(), JailError> {
    // SAFETY: plain numbers. Nothing in this process owns a descriptor yet, as the contract says, so no owner loses one.
    let done = unsafe { libc::syscall(libc::SYS_close_range, FIRST_OTHER, libc::c_uint::MAX, 0) };
    if done == 0 {
        Ok(())
    } else {
        Err(crate::step("close inherited descriptors")(io::Error::last_os_error()))
    }
}

/// Gives this process namespaces of its own. To be called while it has one thread.
///
/// # Errors
/// What the kernel answers.
pub fn namespaces(flags: UnshareFlags) -> io::Result<()> {
    debug_assert!(!flags.contains(UnshareFlags::FILES), "descriptors stay shared");
    // SAFETY: the descriptor table stays shared (no `FILES`), so no other thread's descriptors change meaning.
    unsafe { rustix::thread::unshare_unsafe(flags) }?;
    Ok(())
}

/// Leaves the keyring of the session that this process was started in. A kernel without keys has none to leave.
pub(crate) fn leave_session_keyring() -> io::Result<()> {
    const JOIN_SESSION_KEYRING: libc::c_long = 1;
    let anonymous = std::ptr::null::<libc::c_char>();
    // SAFETY: KEYCTL_JOIN_SESSION_KEYRING takes a name or no pointer, and here it gets none.
    let done = unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, anonymous) };
    match io::Error::last_os_error() {
        _ if done >= 0 => Ok(()),
        error if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        error => Err(error),
    }
}

/// What the process exits with when it made a call that it may not make.
static EXIT_CODE: AtomicU8 = AtomicU8::new(1);

/// From now on a system call that a filter forbids ends the process with `exit_code`, after one line on standard error that tells which.
///
/// # Errors
/// What the kernel answers.
pub fn exit_on_forbidden_calls(exit_code: u8) -> Result<(), JailError> {
    EXIT_CODE.store(exit_code, Ordering::Relaxed);
    // SAFETY: all zeroes is a valid `sigaction`: no flags, an empty mask, the default handler.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = forbidden as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: `action` is a whole `sigaction` whose handler has the signature that SA_SIGINFO asks for; no old one is asked for.
    let done = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) };
    if done == 0 {
        Ok(())
    } else {
        Err(crate::step("handle forbidden system calls")(io::Error::last_os_error()))
    }
}

/// The part of `siginfo_t` that a filter fills in, which libc does not describe.
#[repr(C)]
struct ForbiddenCall {
    _signal: [libc::c_int; 3],
    _address: *const libc::c_void,
    number: libc::c_int,
    _arch: libc::c_uint,
}

/// Writes "NAME: system call 41 is not allowed" and ends the process. Makes only calls that every table has, and takes no lock.
extern "C" fn forbidden(_: libc::c_int, info: *const libc::siginfo_t, _: *const libc::c_void) {
    // SAFETY: the kernel hands a handler with SA_SIGINFO a whole `siginfo_t`, which is larger than `ForbiddenCall`, as aligned, and for
    // SIGSYS has the call's number there.
    let number = unsafe { (*info.cast::<ForbiddenCall>()).number };
    let mut thread = [0_u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes, of which the last is zero.
    unsafe { libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr()) };
    let mut line = Line { bytes: [0; 96], len: 0 };
    line.push(b"jail: thread ");
    line.push(thread.split(|byte| *byte == 0).next().unwrap_or_default());
    line.push(b" made system call ");
    line.push_number(number.unsigned_abs());
    line.push(b", which it may not\n");
    // SAFETY: `len` bytes of the line are initialised. Nowhere is left to report that it cannot be written.
    unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len) };
    // SAFETY: ends the process without running anything of it.
    unsafe { libc::_exit(EXIT_CODE.load(Ordering::Relaxed).into()) };
}

/// A line made without allocating.
struct Line {
    bytes: [u8; 96],
    len: usize,
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = *byte;
                self.len += 1;
            }
        }
    }

    fn push_number(&mut self, number: u32) {
        let mut divisor = 1_000_000_000;
        while divisor > 1 && number / divisor == 0 {
            divisor /= 10;
        }
        while divisor > 0 {
            self.push(&[b'0' + u8::try_from(number / divisor % 10).unwrap_or(0)]);
            divisor /= 10;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_written_without_a_formatter_and_never_overflow() {
        for (number, text) in [(0, "0"), (41, "41"), (u32::MAX, "4294967295")] {
            let mut line = Line { bytes: [0; 96], len: 0 };
            line.push_number(number);
            assert_eq!(&line.bytes[..line.len], text.as_bytes());
        }
        let mut line = Line { bytes: [0; 96], len: 0 };
        line.push(&[b'x'; 200]);
        assert_eq!(line.len, 96);
    }

    #[test]
    fn the_number_lies_where_the_kernel_puts_it() {
        // include/uapi/asm-generic/siginfo.h, `_sigsys` after three integers and the padding that its pointer needs.
        assert_eq!(std::mem::offset_of!(ForbiddenCall, number), 24);
        assert!(size_of::<ForbiddenCall>() <= size_of::<libc::siginfo_t>());
    }
}
