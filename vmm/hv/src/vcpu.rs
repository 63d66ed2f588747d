//! One virtual processor: run it, learn why it came back.
#![expect(unsafe_code, reason = "the reason for an internal error is in a union of the run page")]
// UNSAFETY: one union field is read, right after the exit reason that selects it.

use std::sync::Arc;

use kvm_bindings::KVM_EXIT_INTERNAL_ERROR;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::GuestMemoryMmap;

use crate::{Entry, HvError, Kicker};

/// A virtual processor. Run it on one thread.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    index: u8,
    run_size: usize,
    /// Keeps lent memory mapped while the processor can run.
    _mem: Arc<GuestMemoryMmap>,
}

/// Why the guest stopped running.
#[derive(Debug)]
pub enum Exit<'a> {
    /// An OUT to a port. More than one element of a string instruction comes as one slice.
    PortWrite(u16, &'a [u8]),
    /// An IN from a port; fill the slice.
    PortRead(u16, &'a mut [u8]),
    /// A store to an address without memory, 1 to 8 bytes.
    MmioWrite(u64, &'a [u8]),
    /// A load from an address without memory, 1 to 8 bytes; fill the slice.
    MmioRead(u64, &'a mut [u8]),
    /// A signal or the kick flag.
    Kicked,
    /// Nothing to do, run again.
    Again,
    /// The processor cannot go on.
    Fault(Fault),
}

/// Why a processor cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// An exception while delivering a double fault: the processor shut down.
    #[error("triple fault")]
    TripleFault,
    /// The guest reset or shut down through a KVM interface that this machine does not have.
    #[error("system event {0}")]
    SystemEvent(u32),
    /// The hardware refused the guest's state.
    #[error("the processor refused to enter the guest, reason {0:#x}")]
    FailedEntry(u64),
    /// KVM gave up, most often on an instruction that it cannot emulate.
    #[error("KVM internal error {0}{hint}", hint = if *.0 == 1 { " (an instruction that it cannot emulate)" } else { "" })]
    Internal(u32),
    /// Guest memory could not be read or written on the host.
    #[error("host memory fault at guest address {0:#x}")]
    Memory(u64),
    /// `KVM_RUN` itself failed.
    #[error("KVM_RUN failed: {0}")]
    Run(kvm_ioctls::Error),
    /// An exit that this machine never asked for.
    #[error("unexpected exit {0}")]
    Unexpected(String),
}

impl Vcpu {
    pub(crate) fn new(fd: VcpuFd, index: u8, run_size: usize, mem: Arc<GuestMemoryMmap>) -> Self {
        Self { fd, index, run_size, _mem: mem }
    }

    pub(crate) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Number of the processor, from 0.
    #[must_use]
    pub fn index(&self) -> u8 {
        self.index
    }

    /// Puts the processor at the kernel's 64-bit entry point.
    ///
    /// # Errors
    /// [`HvError::Refused`].
    pub fn set_entry(&self, entry: &Entry) -> Result<(), HvError> {
        crate::entry::set_boot_state(&self.fd, entry)
    }

    /// A handle by which another thread makes [`Vcpu::run`] return.
    ///
    /// # Errors
    /// [`HvError::RunPage`].
    pub fn kicker(&self) -> Result<Kicker, HvError> {
        use std::os::fd::{AsRawFd, BorrowedFd};
        // SAFETY: the descriptor belongs to `self.fd`, which outlives this borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) };
        Kicker::map(fd, self.run_size, self.index)
    }

    /// Tells the guest that it was stopped for a while, so that its watchdogs do not bark.
    pub fn was_stopped(&self) {
        // Fails when the guest has not set up kvm-clock, and then there is nobody to tell.
        let _not_listening = self.fd.kvmclock_ctrl();
    }

    /// Runs the guest until something is to be done for it. After [`Exit::Fault`], [`Vcpu::explain`] may know more.
    pub fn run(&mut self) -> Exit<'_> {
        let fault = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => return Exit::PortWrite(port, data),
            Ok(VcpuExit::IoIn(port, data)) => return Exit::PortRead(port, data),
            Ok(VcpuExit::MmioWrite(address, data)) => return Exit::MmioWrite(address, data),
            Ok(VcpuExit::MmioRead(address, data)) => return Exit::MmioRead(address, data),
            Ok(VcpuExit::Intr) => return Exit::Kicked,
            Ok(VcpuExit::IrqWindowOpen | VcpuExit::SetTpr | VcpuExit::Hlt) => return Exit::Again,
            Ok(VcpuExit::Shutdown) => Fault::TripleFault,
            Ok(VcpuExit::SystemEvent(event, _)) => Fault::SystemEvent(event),
            Ok(VcpuExit::FailEntry(reason, _)) => Fault::FailedEntry(reason),
            Ok(VcpuExit::MemoryFault { gpa, .. }) => Fault::Memory(gpa),
            Ok(VcpuExit::InternalError) => Fault::Internal(0),
            Ok(other) => Fault::Unexpected(format!("{other:?}")),
            Err(e) if e.errno() == libc::EINTR => return Exit::Kicked,
            Err(e) if e.errno() == libc::EAGAIN => return Exit::Again,
            Err(e) => Fault::Run(e),
        };
        Exit::Fault(fault)
    }

    /// Adds to `fault` what KVM left in the run page about it.
    #[must_use]
    pub fn explain(&mut self, fault: Fault) -> Fault {
        let run = self.fd.get_kvm_run();
        if fault != Fault::Internal(0) || run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
            return fault;
        }
        // SAFETY: the exit reason says that this member of the union was written.
        Fault::Internal(unsafe { run.__bindgen_anon_1.internal.suberror })
    }
}
