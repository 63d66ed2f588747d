//! The first instructions, page tables for the windows and above, and faults that are expected.
//!
//! The machine begins as a Linux kernel does (64-bit boot protocol): long mode, the first GiB mapped one to one, the zero page in RSI.
// UNSAFETY: the processor is set up by hand, and assembly is where the program begins.
#![expect(unsafe_code, reason = "assembly, control registers and what the VMM left in memory")]

use core::arch::{asm, global_asm};
use core::panic::PanicInfo;

use crate::memory::{self, ARENA};
use crate::{say, sys};

/// Where the 64-bit pointers of the zero page begin that say where the command line is (`cmd_line_ptr`).
const CMDLINE_POINTER_AT: u64 = 0x228;
/// Longest command line.
const MAX_CMDLINE: usize = 2048;
const PAGE: u64 = 4096;
/// Gibibytes that are mapped one to one: memory, windows, and memory that may be added, which begins at 4 GiB.
const MAPPED_GIB: u64 = 6;
/// Page tables, from here on in the arena: one of level 4, one of level 3, [`MAPPED_GIB`] of level 2.
const TABLES: u64 = ARENA;
/// 32 gates of 16 bytes.
const GATES: u64 = ARENA + 16 * PAGE;
const CODE_SEGMENT: u64 = 0x10;

// Gates for an undefined instruction, a protection fault and a page fault go on where `sys` has said; without that the machine ends.
global_asm!(
    ".section .text.start, \"ax\"",
    ".globl start",
    "start:",
    "cli",
    "lea rsp, [rip + rude_stack_end]",
    "mov rax, cr0",
    "and eax, 0xfffffffb",
    "or eax, 2",
    "mov cr0, rax",
    "mov rax, cr4",
    "or eax, 0x600",
    "mov cr4, rax",
    "mov rdi, rsi",
    "call {begin}",
    "ud2",
    ".globl rude_fault_with_code",
    "rude_fault_with_code:",
    "add rsp, 8",
    ".globl rude_fault",
    "rude_fault:",
    "push rax",
    "mov rax, [rip + rude_go_on]",
    "test rax, rax",
    "jz 2f",
    "mov [rsp + 8], rax",
    "mov qword ptr [rip + rude_go_on], 0",
    "pop rax",
    "iretq",
    "2:",
    "mov rdi, [rsp + 8]",
    "call {unexpected}",
    "ud2",
    ".section .bss",
    ".balign 16",
    ".globl rude_go_on",
    "rude_go_on: .skip 16",
    "rude_stack: .skip 65536",
    "rude_stack_end:",
    ".text",
    begin = sym begin,
    unexpected = sym unexpected,
);

extern "C" fn unexpected(at: u64) -> ! {
    say!("rude guest: BAD: a fault at {at:#x}");
    sys::triple_fault()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("rude guest: BAD: {info}");
    sys::triple_fault()
}

extern "C" fn begin(zero_page: u64) -> ! {
    // SAFETY: the boot protocol has the boot parameters there, and the command line where they say, ended by a zero; both are mapped.
    let cmdline = unsafe { core::ptr::read_volatile((zero_page + CMDLINE_POINTER_AT) as *const u32) };
    // SAFETY: as above: 2048 bytes are mapped from there, and nobody writes to them.
    let bytes = unsafe { core::slice::from_raw_parts(u64::from(cmdline) as *const u8, MAX_CMDLINE) };
    map();
    set_gates();
    crate::run(bytes.split(|byte| *byte == 0).next().unwrap_or_default())
}

/// Maps what the VMM left out, in pages of 2 MiB.
fn map() {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    memory::write(TABLES, &((TABLES + PAGE) | PRESENT_WRITABLE).to_le_bytes());
    for gib in 0..MAPPED_GIB {
        let table = TABLES + (2 + gib) * PAGE;
        memory::write(TABLES + PAGE + gib * 8, &(table | PRESENT_WRITABLE).to_le_bytes());
        for entry in 0..512 {
            let page = gib << 30 | entry << 21 | LARGE | PRESENT_WRITABLE;
            memory::write(table + entry * 8, &page.to_le_bytes());
        }
    }
    // SAFETY: the tables map this program where it is.
    unsafe { asm!("mov cr3, {}", in(reg) TABLES, options(nostack)) };
}

fn set_gates() {
    let (plain, with_code): (u64, u64);
    // SAFETY: only takes addresses.
    unsafe { asm!("lea {}, [rip + rude_fault]", out(reg) plain, options(nomem, nostack)) };
    // SAFETY: only takes addresses.
    unsafe { asm!("lea {}, [rip + rude_fault_with_code]", out(reg) with_code, options(nomem, nostack)) };
    for (vector, handler) in [(6, plain), (13, with_code), (14, with_code)] {
        const PRESENT_INTERRUPT_GATE: u64 = 0x8e00;
        let low = handler & 0xffff
            | CODE_SEGMENT << 16
            | PRESENT_INTERRUPT_GATE << 32
            | (handler >> 16 & 0xffff) << 48;
        memory::write(GATES + vector * 16, &low.to_le_bytes());
        memory::write(GATES + vector * 16 + 8, &(handler >> 32).to_le_bytes());
    }
    let mut pointer = [0; 10];
    pointer[..2].copy_from_slice(&(32 * 16 - 1_u16).to_le_bytes());
    pointer[2..].copy_from_slice(&GATES.to_le_bytes());
    // SAFETY: the gates are there and lead to the code above.
    unsafe { asm!("lidt [{}]", in(reg) pointer.as_ptr(), options(nostack)) };
}
