//! Guest memory that belongs to no part of this program, by address: for rings, buffers and tables. It is the devices' to write to as well.
// UNSAFETY: memory that devices write to is read and written by address; also the functions that the compiler calls to copy memory.
#![expect(unsafe_code, reason = "volatile access to memory that devices share, and memory functions")]

use core::arch::asm;

/// Where it begins: far above the program, which is loaded at 1 MiB.
pub(crate) const ARENA: u64 = 0x80_0000;
/// End of the machine's memory: it has 64 MiB.
pub(crate) const MEMORY_END: u64 = 64 << 20;
/// Where windows of devices may be, and no memory.
pub(crate) const HOLE: u64 = 0xd000_0000;
/// Where memory begins that may be added.
pub(crate) const ADDED: u64 = 1 << 32;

fn check(address: u64, len: usize) {
    let end = address.checked_add(len as u64);
    let inside = address >= ARENA && end.is_some_and(|end| end <= MEMORY_END);
    assert!(inside, "{len} bytes at {address:#x} are not free to use");
}

/// Copies `bytes` there.
pub(crate) fn write(address: u64, bytes: &[u8]) {
    check(address, bytes.len());
    for (at, byte) in (address..).zip(bytes) {
        // SAFETY: inside of the arena, as was just checked, which is mapped and which no reference points into.
        unsafe { core::ptr::write_volatile(at as *mut u8, *byte) };
    }
}

/// Fills with one byte.
pub(crate) fn fill(address: u64, len: u64, byte: u8) {
    check(address, usize::try_from(len).unwrap_or(usize::MAX));
    // SAFETY: inside of the arena, as was just checked, which is mapped and which no reference points into.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") address => _, in("al") byte, options(nostack));
    }
}

/// Copies `N` bytes from there.
pub(crate) fn read<const N: usize>(address: u64) -> [u8; N] {
    check(address, N);
    // SAFETY: inside of the arena, as was just checked, which is mapped; whatever bytes there are make an array.
    core::array::from_fn(|n| unsafe { core::ptr::read_volatile((address + n as u64) as *const u8) })
}

/// A word that devices read at any time: written at once.
pub(crate) fn store16(address: u64, value: u16) {
    check(address, 2);
    // SAFETY: inside of the arena, as was just checked; rings are aligned, and the processor takes any address.
    unsafe { asm!("mov word ptr [{}], {:x}", in(reg) address, in(reg) value, options(nostack)) };
}

/// A word that devices write at any time: read at once.
pub(crate) fn load16(address: u64) -> u16 {
    check(address, 2);
    let value: u16;
    // SAFETY: as for writing.
    unsafe { asm!("mov {:x}, word ptr [{}]", out(reg) value, in(reg) address, options(nostack)) };
    value
}

/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller gives `len` bytes on both sides that do not overlap.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack));
    }
    to
}

/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= len {
        // SAFETY: forwards, nothing is overwritten before it was read.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: the caller gives `len` bytes on both sides; backwards, from the last byte, nothing is overwritten before it was read.
    unsafe {
        asm!("lea rdi, [rdi + rcx - 1]", "lea rsi, [rsi + rcx - 1]", "std", "rep movsb", "cld",
            inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack));
    }
    to
}

/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller gives `len` bytes.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") byte.to_le_bytes()[0], options(nostack));
    }
    to
}

/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, len: usize) -> i32 {
    for n in 0..len {
        // SAFETY: the caller gives `len` bytes on both sides. Volatile, or this loop would become a call of itself.
        let left = unsafe { core::ptr::read_volatile(one.wrapping_add(n)) };
        // SAFETY: as above.
        let right = unsafe { core::ptr::read_volatile(other.wrapping_add(n)) };
        if left != right {
            return i32::from(left) - i32::from(right);
        }
    }
    0
}

/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, len: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(one, other, len) }
}
