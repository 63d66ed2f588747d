//! Instructions: ports, windows, registers of the processor.
// UNSAFETY: instructions that Rust does not have; each is one line of assembly.
#![expect(unsafe_code, reason = "privileged instructions")]

use core::arch::asm;

pub(crate) fn out8(port: u16, value: u8) {
    // SAFETY: no port of this machine changes this program's memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value) };
}

pub(crate) fn out16(port: u16, value: u16) {
    // SAFETY: as above.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value) };
}

pub(crate) fn out32(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value) };
}

pub(crate) fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value) };
    value
}

pub(crate) fn in16(port: u16) -> u16 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value) };
    value
}

pub(crate) fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value) };
    value
}

/// A string of bytes to one port, in one instruction.
pub(crate) fn out_string(port: u16, bytes: &[u8]) {
    // SAFETY: reads `bytes`, and nothing else.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rcx") bytes.len() => _, inout("rsi") bytes.as_ptr() => _);
    }
}

/// A string of bytes from one port, in one instruction.
pub(crate) fn in_string(port: u16, bytes: &mut [u8]) {
    // SAFETY: writes `bytes`, and nothing else.
    unsafe {
        asm!("rep insb", in("dx") port, inout("rcx") bytes.len() => _, inout("rdi") bytes.as_mut_ptr() => _);
    }
}

/// A load of 1, 2, 4 or 8 bytes from an address where no memory is.
pub(crate) fn load(address: u64, width: u8) -> u64 {
    assert!(address >= crate::memory::HOLE, "{address:#x} is no window");
    let value: u64;
    // SAFETY (all): no memory is there, and what is read is only a number.
    match width {
        // SAFETY: see above.
        1 => unsafe { asm!("movzx {:e}, byte ptr [{}]", out(reg) value, in(reg) address) },
        // SAFETY: see above.
        2 => unsafe { asm!("movzx {:e}, word ptr [{}]", out(reg) value, in(reg) address) },
        // SAFETY: see above.
        4 => unsafe { asm!("mov {:e}, dword ptr [{}]", out(reg) value, in(reg) address) },
        // SAFETY: see above.
        _ => unsafe { asm!("mov {}, qword ptr [{}]", out(reg) value, in(reg) address) },
    }
    value
}

/// A store of 1, 2, 4 or 8 bytes to an address where no memory is.
pub(crate) fn store(address: u64, width: u8, value: u64) {
    assert!(address >= crate::memory::HOLE, "{address:#x} is no window");
    match width {
        // SAFETY: no memory is there.
        1 => unsafe { asm!("mov byte ptr [{}], {:l}", in(reg) address, in(reg_abcd) value) },
        // SAFETY: see above.
        2 => unsafe { asm!("mov word ptr [{}], {:x}", in(reg) address, in(reg) value) },
        // SAFETY: see above.
        4 => unsafe { asm!("mov dword ptr [{}], {:e}", in(reg) address, in(reg) value) },
        // SAFETY: see above.
        _ => unsafe { asm!("mov qword ptr [{}], {}", in(reg) address, in(reg) value) },
    }
}

/// Ticks of the processor's clock.
pub(crate) fn ticks() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: only reads a counter.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Lets another thread of the host have a go, as far as a hint does.
pub(crate) fn pause() {
    core::hint::spin_loop();
}

/// EAX of a leaf.
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> u32 {
    let eax;
    // SAFETY: only reads; RBX, which the compiler keeps for itself, is put back.
    unsafe {
        asm!("push rbx", "cpuid", "pop rbx", inout("eax") leaf => eax, inout("ecx") subleaf => _, out("edx") _);
    }
    eax
}

/// A model-specific register; none when the processor faults.
pub(crate) fn read_msr(number: u32) -> Option<u64> {
    let (low, high, whole): (u32, u32, u32);
    // SAFETY: a fault goes on at the label, with R8 unchanged.
    unsafe {
        asm!(
            "xor r8d, r8d",
            "lea rax, [rip + 2f]",
            "mov [rip + rude_go_on], rax",
            "rdmsr",
            "mov r8d, 1",
            "2:",
            "mov qword ptr [rip + rude_go_on], 0",
            out("r8") whole, in("ecx") number, out("eax") low, out("edx") high,
        );
    }
    (whole == 1).then(|| u64::from(high) << 32 | u64::from(low))
}

/// Sets a model-specific register; false when the processor faults. Not to be used on those that this program needs.
pub(crate) fn write_msr(number: u32, value: u64) -> bool {
    let [low, high] = [value & 0xffff_ffff, value >> 32];
    let whole: u32;
    // SAFETY: a fault goes on at the label, with R8 unchanged. The caller leaves the registers alone on which the running of code
    // depends.
    unsafe {
        asm!(
            "lea r8, [rip + 2f]",
            "mov [rip + rude_go_on], r8",
            "xor r8d, r8d",
            "wrmsr",
            "mov r8d, 1",
            "2:",
            "mov qword ptr [rip + rude_go_on], 0",
            out("r8") whole, in("ecx") number, in("rax") low, in("rdx") high,
        );
    }
    whole == 1
}

/// Stops for good: no interrupt is let in.
pub(crate) fn halt() -> ! {
    loop {
        // SAFETY: waits.
        unsafe { asm!("cli", "hlt") };
    }
}

/// A fault with no way to handle it, nor the fault that comes of that.
pub(crate) fn triple_fault() -> ! {
    let none = [0_u8; 10];
    // SAFETY: from here on every fault ends the machine, which is meant.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) none.as_ptr(), options(noreturn)) }
}
