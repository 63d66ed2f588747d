//! Registers and the configuration space at widths and places that they do not have (virtio 1.3, 4.2.2.2), and around the windows.

use crate::device::{Device, Kind, WINDOW_BYTES, reg, status};
use crate::memory::HOLE;
use crate::requests;
use crate::sys;
use crate::tally::{Must, Outcome, Tally, refused};

const WIDTHS: [u8; 4] = [1, 2, 4, 8];
/// Bytes of the longest configuration space of a device here, and some more.
const LONGEST: u64 = 72;

pub(super) fn run(device: &Device, tally: &mut Tally) {
    tally.attempt(device, "registers read at other widths and places", Must::Refuse, odd_reads);
    tally.attempt(device, "registers written at other widths and places", Must::Refuse, odd_writes);
    tally.attempt(device, "registers that are for reading written", Must::Refuse, read_only);
    tally.attempt(device, "registers that there are not", Must::Refuse, unknown);
    tally.attempt(device, "configuration read at every width and place", Must::Answer, config_reads);
    tally.attempt(device, "configuration written before there is a driver", Must::Refuse, early_config);
    tally.attempt(device, "configuration written at every width and place", Must::Live, config_writes);
    tally.attempt(device, "interrupts acknowledged that were not raised", Must::Refuse, acknowledge);
    tally.attempt(device, "across the end of the window", Must::Refuse, across);
}

fn odd_reads(device: &Device) -> Outcome {
    device.reset();
    for at in 0..reg::CONFIG - 8 {
        for width in WIDTHS {
            let odd = width != 4 || at % 4 != 0;
            if odd && at % 7 < 3 && sys::load(device.base + at, width) != 0 {
                return Outcome::Bad("a register is there at another width");
            }
        }
    }
    Outcome::Refused
}

fn odd_writes(device: &Device) -> Outcome {
    device.reset();
    device.set_status(status::ACKNOWLEDGE);
    for width in WIDTHS {
        for off in 0..4 {
            if width != 4 || off != 0 {
                for register in
                    [reg::STATUS, reg::QUEUE_SEL, reg::QUEUE_READY, reg::DRIVER_FEATURES, reg::QUEUE_NOTIFY]
                {
                    sys::store(device.base + register + off, width, 0);
                    sys::store(device.base + register + off, width, u64::MAX);
                }
            }
        }
    }
    refused(device.status() == status::ACKNOWLEDGE, "a register takes another width")
}

fn read_only(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    let registers = [0x000, 0x004, 0x008, 0x00c, 0x010, 0x034, 0x060, 0x0b0, 0x0b4, 0x0b8, 0x0bc, 0x0fc];
    let before = registers.map(|register| device.read(register));
    for register in registers {
        device.write(register, u32::MAX);
        device.write(register, 0);
    }
    if registers.map(|register| device.read(register)) != before {
        return Outcome::Bad("a register for reading is written");
    }
    refused(requests::good_on(&mut live).is_ok(), "it no longer serves")
}

fn unknown(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    for register in
        [0x018, 0x01c, 0x028, 0x02c, 0x03c, 0x040, 0x048, 0x04c, 0x054, 0x068, 0x074, 0x0c0, 0x0f8]
    {
        device.write(register, u32::MAX);
        if device.read(register) != 0 {
            return Outcome::Bad("a register that there is not holds something");
        }
    }
    refused(requests::good_on(&mut live).is_ok(), "it no longer serves")
}

/// What is read in one piece is what is read byte by byte, and nothing behind the end.
fn config_reads(device: &Device) -> Outcome {
    device.reset();
    let byte = |at: u64| sys::load(device.base + reg::CONFIG + at, 1);
    let mut space = [0_u64; LONGEST as usize + 8];
    for (at, value) in (0..).zip(&mut space) {
        *value = byte(at);
    }
    for at in 0..LONGEST {
        for width in WIDTHS {
            let bytes = (0..u64::from(width)).map(|n| space[(at + n) as usize] << (8 * n));
            if sys::load(device.base + reg::CONFIG + at, width) != bytes.sum::<u64>() {
                return Outcome::Bad("the same bytes read differently");
            }
        }
    }
    for at in (LONGEST..WINDOW_BYTES - reg::CONFIG - 8).step_by(61) {
        for width in WIDTHS {
            if sys::load(device.base + reg::CONFIG + at, width) != 0 {
                return Outcome::Bad("something is behind the configuration");
            }
        }
    }
    Outcome::Answered
}

fn early_config(device: &Device) -> Outcome {
    device.reset();
    let read = |at| sys::load(device.base + reg::CONFIG + at, 4);
    let before: [u64; 16] = core::array::from_fn(|n| read(4 * n as u64));
    for at in (0..LONGEST).step_by(4) {
        sys::store(device.base + reg::CONFIG + at, 4, 0x5555_5555);
    }
    refused(before == core::array::from_fn(|n| read(4 * n as u64)), "it is written without a driver")
}

fn config_writes(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    for at in (0..LONGEST).chain(WINDOW_BYTES - reg::CONFIG - 8..WINDOW_BYTES - reg::CONFIG) {
        for width in WIDTHS.into_iter().filter(|width| at + u64::from(*width) <= WINDOW_BYTES - reg::CONFIG) {
            sys::store(device.base + reg::CONFIG + at, width, u64::MAX);
            sys::store(device.base + reg::CONFIG + at, width, 0);
        }
    }
    match requests::good_on(&mut live) {
        Ok(()) => Outcome::Refused,
        Err(why) => Outcome::Bad(why),
    }
}

fn acknowledge(device: &Device) -> Outcome {
    let Some(mut live) = device.live() else { return Outcome::Bad("it does not start") };
    device.write(reg::INTERRUPT_ACK, u32::MAX);
    device.write(reg::INTERRUPT_ACK, 0);
    if let Err(why) = requests::good_on(&mut live) {
        return Outcome::Bad(why);
    }
    // 4.2.2: bit 0 is set when a buffer was used, and stays until it is acknowledged. The process that serves a share cannot set it, so
    // that it is always there.
    let shared = device.kind == Kind::Fs;
    let mut raised = false;
    for _ in 0..1000 {
        raised |= device.read(reg::INTERRUPT_STATUS) & 1 != 0;
    }
    device.write(reg::INTERRUPT_ACK, !1);
    let stays = device.read(reg::INTERRUPT_STATUS) & 1 != 0;
    device.write(reg::INTERRUPT_ACK, u32::MAX);
    let cleared = shared || device.read(reg::INTERRUPT_STATUS) & 1 == 0;
    refused(raised && stays && cleared, "the interrupt status is not what was raised")
}

/// Half in this window, half in the next; and where no window is.
fn across(device: &Device) -> Outcome {
    device.reset();
    device.set_status(status::ACKNOWLEDGE);
    let end = device.base + WINDOW_BYTES;
    for off in 1..8 {
        for width in WIDTHS.into_iter().filter(|width| u64::from(*width) > off) {
            sys::store(end - off, width, u64::MAX);
            sys::load(end - off, width);
        }
    }
    for gap in [HOLE + 32 * WINDOW_BYTES, HOLE + (16 << 20), 0xe000_0000, 0xfffb_b000, 0xffff_fff8] {
        for width in WIDTHS {
            sys::store(gap, width, u64::MAX);
            sys::load(gap, width);
        }
    }
    refused(device.status() == status::ACKNOWLEDGE, "what was written elsewhere arrives here")
}
