//! The keyboard controller, of which only the line to the processor's reset pin is wired.

use std::fmt;

use super::PortDevice;

/// Offset of the command and status register from port 0x60.
const COMMAND: u16 = 4;
/// Pulse output line 0, which is the reset line. Linux writes it for `reboot=k`, its default without ACPI.
const PULSE_RESET: u8 = 0xfe;

/// Ports 0x60 to 0x64. Status reads as "ready for a command, nothing to fetch".
pub struct I8042 {
    on_reset: Box<dyn FnMut() + Send>,
}

impl I8042 {
    /// Ports that it takes, from 0x60.
    pub const PORTS: u16 = 5;

    /// `on_reset` is called each time the guest pulls the reset line.
    pub fn new(on_reset: impl FnMut() + Send + 'static) -> Self {
        Self { on_reset: Box::new(on_reset) }
    }
}

impl fmt::Debug for I8042 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("I8042").finish_non_exhaustive()
    }
}

impl PortDevice for I8042 {
    fn read(&mut self, _offset: u16) -> u8 {
        0
    }

    fn write(&mut self, offset: u16, value: u8) {
        if offset == COMMAND && value == PULSE_RESET {
            (self.on_reset)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn only_the_reset_pulse_resets() {
        let resets = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&resets);
        let mut device = I8042::new(move || {
            seen.fetch_add(1, Ordering::SeqCst);
        });
        for offset in 0..I8042::PORTS {
            assert_eq!(device.read(offset), 0);
            for value in 0..=0xff {
                device.write(offset, value);
            }
        }
        assert_eq!(resets.load(Ordering::SeqCst), 1);
    }
}
