//! Devices of the PC that live on I/O ports: serial port, keyboard controller (for reset only) and the lifecycle port.

mod i8042;
mod lifecycle;
mod serial;

pub use i8042::I8042;
pub use lifecycle::{LifecyclePort, LifecycleStep};
pub use serial::{LineLog, SerialPort};

use std::fmt;

use crate::state::{Reader, StateError};

/// A device on a range of I/O ports. Every register is one byte wide.
pub trait PortDevice: Send + fmt::Debug {
    /// An IN from port `offset` of the range.
    fn read(&mut self, offset: u16) -> u8;
    /// An OUT to port `offset` of the range.
    fn write(&mut self, offset: u16, value: u8);
    /// What is to be remembered when the machine is saved. Most have nothing.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }
    /// Takes what [`PortDevice::save`] gave.
    ///
    /// # Errors
    /// When that cannot be.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        Reader::new(state).end()
    }
}
