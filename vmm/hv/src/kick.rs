//! Making a vCPU's `run` return from another thread, without a race.
//!
//! `immediate_exit` in the run page is set first, then the thread gets a signal. If the thread had not entered the guest
//! yet, KVM sees the flag; if it had, the signal brings it out. The flag is cleared by the vCPU's own thread.
#![expect(unsafe_code, reason = "the run page is shared with the kernel and must be mapped a second time")]
// UNSAFETY: `Kicker` owns a mapping of its own, so it may outlive the vCPU; it touches one byte of it, atomically.

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use libc::{c_int, c_void, siginfo_t};
use rustix::mm::{MapFlags, ProtFlags};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::HvError;

/// The signal that brings a vCPU thread out of the guest: the first real-time signal.
#[must_use]
pub fn kick_signal() -> c_int {
    SIGRTMIN()
}

/// Installs an empty handler for [`kick_signal`]: the signal must interrupt, not kill.
///
/// # Errors
/// [`HvError::Signal`].
pub fn install_kick_signal() -> Result<(), HvError> {
    extern "C" fn interrupt_only(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}
    register_signal_handler(kick_signal(), interrupt_only).map_err(HvError::Signal)
}

/// Sets the flag that makes a vCPU leave, or not enter, the guest. The caller then sends [`kick_signal`] to the thread.
#[derive(Debug)]
pub struct Kicker {
    page: NonNull<kvm_run>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone and is only accessed through an atomic.
unsafe impl Send for Kicker {}
// SAFETY: as above; `set` is an atomic store.
unsafe impl Sync for Kicker {}

impl Kicker {
    /// Maps the run page of `vcpu`, which is `len` bytes long.
    pub(crate) fn map(vcpu: impl AsFd, len: usize, index: u8) -> Result<Self, HvError> {
        let failed = |source: std::io::Error| HvError::RunPage { index, source };
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice; no Rust object lives there.
        let page = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, vcpu, 0) }
            .map_err(|e| failed(e.into()))?;
        let page = NonNull::new(page.cast()).ok_or_else(|| failed(std::io::ErrorKind::InvalidData.into()))?;
        Ok(Self { page, len })
    }

    /// Raises (`true`) or clears the flag.
    pub fn set(&self, leave: bool) {
        let run = self.page.as_ptr();
        // SAFETY: `run` points to a live mapping of at least one `kvm_run` (the kernel gave its size); a field's address only.
        let field = unsafe { &raw mut (*run).immediate_exit };
        // SAFETY: aligned (one byte), valid while `self` lives, and accessed by Rust only through this atomic.
        let flag = unsafe { AtomicU8::from_ptr(field) };
        flag.store(u8::from(leave), Ordering::SeqCst);
    }
}

impl Drop for Kicker {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `map`, which nothing else refers to.
        let unmapped = unsafe { rustix::mm::munmap(self.page.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "the run page was mapped by us");
    }
}
