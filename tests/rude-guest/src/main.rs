//! Boots in place of a guest's kernel, drives every device of the machine as no driver should, and says what came of it.
//!
//! ```text
//!  entry (long mode, one processor, no interrupts) --> look for devices on the command line --> for each device:
//!     for each attempt: misbehave --> what it came to --> reset --> a good request, which must still be served
//!  then ports and registers of the processor --> counts --> power off
//! ```
//! The first serial port carries a line for each attempt: `try DEVICE/NAME: answered | refused | needs reset`, with ` BAD: why` behind it
//! when that is not what the standard or the machine's own rules say. A line `? WORD` asks the owner for something, who says by the
//! balloon's target that it is done. The command line's first word says how the machine is to end.
//!
//! Sections in comments are those of virtio 1.3. Files: `attempts` (the list), `device` and `ring` (a driver that can be told to
//! err), `tally`, `owner`, and those that touch the machine: `entry`, `memory`, `sys`.
#![no_std]
#![no_main]
#![expect(
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a guest that is wrong about itself says so on the serial port and ends"
)]

mod attempts;
mod chains;
mod device;
mod entry;
mod memory;
mod owner;
mod requests;
mod ring;
mod sys;
mod tally;

use crate::device::Device;
use crate::owner::Owner;
use crate::tally::{Outcome, Tally};

/// Written to the lifecycle port: what follows is an orderly end.
const POWER_OFF: u8 = 0x4f;
const LIFECYCLE_PORT: u16 = 0x0520;
/// Command and status of the keyboard controller, and its command to pull the reset line.
const I8042_COMMAND: u16 = 0x64;
const PULSE_RESET: u8 = 0xfe;

/// What the machine's first instructions call.
pub(crate) fn run(cmdline: &[u8]) -> ! {
    say!("rude guest: {} devices", windows(cmdline).count());
    let mut tally = Tally::default();
    match cmdline.split(|byte| *byte == b' ').next() {
        Some(b"end=halt") => end("halt", sys::halt),
        Some(b"end=fault") => end("triple fault", sys::triple_fault),
        Some(b"end=spin") => end("spin on a window", spin),
        _ => all(cmdline, &mut tally),
    }
    tally.total();
    sys::out8(LIFECYCLE_PORT, POWER_OFF);
    sys::out8(I8042_COMMAND, PULSE_RESET);
    sys::halt()
}

fn end(how: &str, end: fn() -> !) -> ! {
    say!("rude guest: ends by {how}");
    end()
}

/// Touches a register for ever.
fn spin() -> ! {
    loop {
        sys::load(memory::HOLE, 4);
    }
}

fn all(cmdline: &[u8], tally: &mut Tally) {
    let mut owner = Owner::find(windows(cmdline));
    // Twice: what is made on the first use is no growth.
    for _ in 0..2 {
        for device in windows(cmdline).filter_map(Device::find) {
            tally.check("first", &device, |device| match requests::good(device) {
                Ok(()) => Outcome::Answered,
                Err(why) => Outcome::Bad(why),
            });
        }
    }
    owner.ask("before");
    for (slot, window) in windows(cmdline).enumerate() {
        match Device::find(window) {
            Some(device) => attempts::run(&device, slot, &mut owner, tally),
            None => attempts::bay::empty(window, &mut owner, tally),
        }
    }
    attempts::machine::run(tally);
    owner.ask("after");
}

/// Addresses of the windows that the command line names, as a Linux driver reads them: `virtio_mmio.device=4K@0xd0000000:5`.
fn windows(cmdline: &[u8]) -> impl Iterator<Item = u64> + '_ {
    cmdline.split(|byte| *byte == b' ').filter_map(|word| {
        let digits = word.strip_prefix(b"virtio_mmio.device=4K@0x")?;
        let digits = digits.split(|byte| *byte == b':').next()?;
        u64::from_str_radix(core::str::from_utf8(digits).ok()?, 16).ok()
    })
}
