//! Is this KVM what it seems? A tiny guest loop in ring 0 is timed against the same loop here in ring 3.
//!
//! A KVM implemented in software runs guest code of ring 3 at full speed, but emulates ring 0 one instruction at a time, three
//! thousand times slower: a stock kernel then takes minutes to boot. Nothing in the interface tells; only the clock does.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::machine::{Hypervisor, lend_memory};
use crate::{HvError, entry};

/// Iterations of the loop, two instructions each, one run after the other. An emulated loop, at 0.6 to 6 µs per instruction, takes
/// tens of milliseconds in the short ones, ten times what it costs to enter a guest even in a nested machine; the long one is there
/// so that entering does not count at all.
const RUNS: [u32; 3] = [20_000, 20_000, 200_000];
/// Runs that must agree before the long ones are left out.
const AGREEING: usize = 2;
/// Emulated means: at least this many times slower than this process ...
const EMULATED_RATIO: u64 = 20;
/// ... and at least this much per instruction. Hardware needs under 1 ns, hardware KVM nested in an emulator about 10 ns.
const EMULATED_PS: u64 = 50_000;

/// Whether the processor or a program runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvmKind {
    /// Guest code of ring 0 runs on the processor.
    Hardware,
    /// Guest code of ring 0 is emulated instruction by instruction: kernels run too slowly to be of use.
    Emulated,
}

/// Time for one instruction of a loop, picoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingSpeed {
    /// In the guest's ring 0.
    pub guest_ring0_ps: u64,
    /// In this process.
    pub host_ring3_ps: u64,
}

impl RingSpeed {
    /// What the two figures mean.
    #[must_use]
    pub fn kind(&self) -> KvmKind {
        let slower = self.guest_ring0_ps / self.host_ring3_ps.max(1);
        if self.guest_ring0_ps >= EMULATED_PS && slower >= EMULATED_RATIO {
            KvmKind::Emulated
        } else {
            KvmKind::Hardware
        }
    }
}

/// What was found out about /dev/kvm.
#[derive(Debug)]
pub struct Probe {
    /// Interface version, when the node could be opened.
    pub api_version: Option<i32>,
    /// Needed features that are not there.
    pub missing: Vec<&'static str>,
    /// Measured speed, when a guest could be run.
    pub speed: Option<RingSpeed>,
    /// What stopped the probe.
    pub error: Option<HvError>,
}

/// Opens /dev/kvm, asks for its features and runs the loop. Takes some 50 ms when KVM is emulated.
#[must_use]
pub fn probe() -> Probe {
    let mut found = Probe { api_version: None, missing: Vec::new(), speed: None, error: None };
    let hypervisor = match Hypervisor::open_unchecked() {
        Ok(hypervisor) => hypervisor,
        Err(e) => {
            found.error = Some(e);
            return found;
        }
    };
    found.api_version = Some(hypervisor.api_version());
    found.missing = hypervisor.missing_capabilities();
    match measure(&hypervisor) {
        Ok(speed) => found.speed = Some(speed),
        Err(e) => found.error = Some(e),
    }
    found
}

/// The quickest run counts; short ones that are out of the question for hardware end the matter.
fn measure(hypervisor: &Hypervisor) -> Result<RingSpeed, HvError> {
    let mut best = RingSpeed { guest_ring0_ps: u64::MAX, host_ring3_ps: u64::MAX };
    for (run, iterations) in RUNS.into_iter().enumerate() {
        let per_instruction = |ns: u64| ns.saturating_mul(1000) / (2 * u64::from(iterations));
        best.guest_ring0_ps =
            best.guest_ring0_ps.min(per_instruction(guest_loop_ns(hypervisor, iterations)?));
        best.host_ring3_ps = best.host_ring3_ps.min(per_instruction(host_loop_ns(iterations)));
        let agreed = run + 1 >= AGREEING;
        if agreed && best.guest_ring0_ps >= 10 * EMULATED_PS && best.kind() == KvmKind::Emulated {
            break;
        }
    }
    Ok(best)
}

fn host_loop_ns(iterations: u32) -> u64 {
    let start = Instant::now();
    let mut left = iterations;
    while left != 0 {
        left = black_box(left - 1);
    }
    elapsed_ns(start)
}

fn elapsed_ns(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// One processor, one page: 32-bit protected mode without paging, count down, halt.
fn guest_loop_ns(hypervisor: &Hypervisor, iterations: u32) -> Result<u64, HvError> {
    const CODE_AT: u64 = 0x1000;
    let count = iterations.to_le_bytes();
    // mov ecx, iterations; again: dec ecx; jnz again; hlt
    let code = [0xb9, count[0], count[1], count[2], count[3], 0x49, 0x75, 0xfd, 0xf4];
    let mem: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2000)]).map_err(|_| HvError::MemoryAddress(0))?;
    let mem = Arc::new(mem);
    mem.write_slice(&code, GuestAddress(CODE_AT)).map_err(|_| HvError::MemoryAddress(CODE_AT))?;

    let vm = hypervisor.create_vm()?;
    lend_memory(&vm, &mem, u64::MAX)?;
    vm.set_identity_map_address(0xfffb_c000).map_err(HvError::refused("set the identity map"))?;
    vm.set_tss_address(0xfffb_d000).map_err(HvError::refused("set the task state segment"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(HvError::refused("create a vCPU"))?;
    let mut sregs = vcpu.get_sregs().map_err(HvError::refused("read control registers"))?;
    let data = entry::segment(0x18, false);
    sregs.cs = kvm_bindings::kvm_segment { l: 0, db: 1, ..entry::segment(0x10, true) };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs).map_err(HvError::refused("set control registers"))?;
    let regs = kvm_regs { rip: CODE_AT, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(HvError::refused("set registers"))?;

    let start = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => break,
            Ok(VcpuExit::Intr) => {}
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {}
            Ok(_) => {
                return Err(HvError::Refused {
                    what: "run the test loop",
                    source: kvm_ioctls::Error::new(libc::EIO),
                });
            }
            Err(e) => return Err(HvError::Refused { what: "run the test loop", source: e }),
        }
    }
    let taken = elapsed_ns(start);
    drop(vcpu);
    drop(vm);
    drop(mem);
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_apart() {
        let kind = |guest_ring0_ps, host_ring3_ps| RingSpeed { guest_ring0_ps, host_ring3_ps }.kind();
        assert_eq!(kind(170, 170), KvmKind::Hardware, "bare metal");
        assert_eq!(kind(600_000, 170), KvmKind::Emulated, "software KVM");
        assert_eq!(kind(20_000, 8_000), KvmKind::Hardware, "hardware KVM inside an emulator");
        assert_eq!(kind(60_000, 50_000), KvmKind::Hardware, "a slow machine is slow in both rings");
    }
}
