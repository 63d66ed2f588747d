//! Ports, registers of the processor, and what is no device's.

use crate::memory::{ADDED, HOLE};
use crate::tally::{Must, Outcome, Tally, answered, refused};
use crate::{LIFECYCLE_PORT, say, sys};

const SERIAL: u16 = 0x3f8;
const LINE_CONTROL: u16 = SERIAL + 3;
const MODEM_CONTROL: u16 = SERIAL + 4;
const I8042: core::ops::Range<u16> = 0x60..0x65;
/// Every how many-th port is looked at, and every one of the first [`DENSE`]: an exit to the VMM each.
const STEP: u16 = 7;
const DENSE: u16 = 0x800;
/// Registers of each range that are looked at.
const REGISTERS: u32 = 0x180;
/// How often the agent's readiness is told.
const READINESS: u32 = 1000;
const AGENT_READY: u8 = 0x42;

pub(super) const NAME: &str = "machine";

/// All of it.
pub(crate) fn run(tally: &mut Tally) {
    tally.note(NAME, "ports, read", Must::Answer, read_ports());
    tally.note(NAME, "ports, written", Must::Answer, write_ports());
    tally.note(NAME, "ports at other widths", Must::Refuse, wide_ports());
    tally.note(NAME, "strings to and from ports", Must::Answer, strings());
    tally.note(NAME, "serial port: every register, every value", Must::Answer, serial());
    tally.note(NAME, "keyboard controller: every command but one", Must::Answer, keyboard());
    tally.note(NAME, "ready, a thousand times", Must::Answer, ready());
    tally.note(NAME, "addresses where nothing is", Must::Refuse, nowhere());
    tally.note(NAME, "every leaf of CPUID", Must::Answer, leaves());
    tally.note(NAME, "registers of the processor that there are not", Must::Refuse, registers());
    tally.end_device(NAME, 0);
}

/// Not those of KVM's own interrupt controllers and timer, which are written below this machine's devices.
fn is_ours(port: u16) -> bool {
    !matches!(port, 0x20..=0x21 | 0x40..=0x43 | 0x61 | 0xa0..=0xa1 | 0x4d0..=0x4d1)
}

fn ports() -> impl Iterator<Item = u16> {
    (0..=u16::MAX).filter(|port| *port < DENSE || port % STEP == 0)
}

fn read_ports() -> Outcome {
    let mut somebody = 0;
    for port in ports() {
        somebody += u32::from(sys::in8(port) != 0xff);
    }
    answered(somebody < 64, "something is on ports where nothing should be")
}

fn write_ports() -> Outcome {
    for port in ports() {
        // The first two can end the machine, the third carries this very output.
        let spared = I8042.contains(&port) || port == LIFECYCLE_PORT || (SERIAL..SERIAL + 8).contains(&port);
        if is_ours(port) && !spared {
            sys::out8(port, 0xff);
            sys::out8(port, 0);
        }
    }
    Outcome::Answered
}

fn wide_ports() -> Outcome {
    for port in
        [0, 0x5f, 0x60, 0x64, SERIAL - 1, SERIAL, SERIAL + 5, SERIAL + 7, LIFECYCLE_PORT, 0xfffc, 0xffff]
    {
        sys::out16(port, 0xfefe);
        sys::out32(port, 0xfefe_fefe);
        let wide = sys::in16(port) == u16::MAX && sys::in32(port) == u32::MAX;
        if !wide && is_ours(port) {
            return Outcome::Bad("a register of one byte is there at another width");
        }
    }
    Outcome::Refused
}

fn strings() -> Outcome {
    let mut bytes = [0x0a_u8; 256];
    sys::in_string(SERIAL + 5, &mut bytes);
    sys::in_string(0x80, &mut bytes);
    sys::in_string(I8042.start, &mut bytes);
    sys::out_string(0x80, &bytes);
    sys::out_string(I8042.start, &[0xfe; 256]);
    Outcome::Answered
}

fn serial() -> Outcome {
    for register in 1..8 {
        for value in 0..=255_u8 {
            sys::out8(SERIAL + register, value);
            let _whatever = sys::in8(SERIAL + register);
            // Loopback, and the divisor: what is said now would go there.
            sys::out8(MODEM_CONTROL, 0);
            sys::out8(LINE_CONTROL, 3);
        }
    }
    // A full loop, with interrupts on.
    sys::out8(SERIAL + 1, 0x0f);
    sys::out8(MODEM_CONTROL, 0x10);
    for _ in 0..200 {
        sys::out8(SERIAL, b'x');
    }
    sys::out8(MODEM_CONTROL, 0);
    sys::out8(SERIAL + 1, 0);
    say!("");
    Outcome::Answered
}

fn keyboard() -> Outcome {
    for value in (0..=255_u8).filter(|value| *value != 0xfe) {
        for port in I8042 {
            sys::out8(port, value);
        }
    }
    // The one is for the command's port alone.
    for port in I8042.start..I8042.end - 1 {
        sys::out8(port, 0xfe);
    }
    Outcome::Answered
}

fn ready() -> Outcome {
    for _ in 0..READINESS {
        sys::out8(LIFECYCLE_PORT, AGENT_READY);
    }
    // Values that mean nothing; not the one that announces the end.
    for value in (0..=255_u8).filter(|value| *value != crate::POWER_OFF) {
        sys::out8(LIFECYCLE_PORT, value);
    }
    Outcome::Answered
}

fn nowhere() -> Outcome {
    let mut all = true;
    for address in [HOLE + (1 << 20), 0xd800_0001, 0xe000_0ffc, 0xfed0_0000, 0xffff_fff0, ADDED + (1 << 30)] {
        for width in [1, 2, 4, 8] {
            sys::store(address, width, u64::MAX);
            all &= sys::load(address, width) & 0xff == 0xff;
        }
    }
    refused(all, "something is where nothing should be")
}

fn leaves() -> Outcome {
    for base in [0, 0x4000_0000, 0x8000_0000, 0xc000_0000, 0xffff_ff00] {
        for leaf in base..=base + 0x40 {
            for subleaf in [0, 1, 63, u32::MAX] {
                sys::cpuid(leaf, subleaf);
            }
        }
    }
    // 0x40000000 and on are the hypervisor's.
    answered(sys::cpuid(0x4000_0000, 0) >= 0x4000_0000, "no hypervisor is told of")
}

/// Those that cannot be read are written, too.
fn registers() -> Outcome {
    let mut none = 0;
    for base in [0_u32, 0x4000_0000, 0x4b56_4d00, 0xc000_0000, 0xc001_0000, 0xdead_0000] {
        for number in base..base + REGISTERS {
            if sys::read_msr(number).is_none() {
                none += 1;
                sys::write_msr(number, 0);
                sys::write_msr(number, u64::MAX);
            }
        }
    }
    refused(none > 500, "there are registers where there are none")
}
