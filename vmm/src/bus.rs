//! Where an access of the guest goes: I/O ports by range, device windows by address.

use std::sync::{Arc, Mutex, PoisonError};

use hyper_vmm_devices::legacy::PortDevice;
use hyper_vmm_devices::state::StateError;
use hyper_vmm_devices::transport::{MmioTransport, WINDOW_BYTES};

use crate::arch::DEVICE_WINDOWS;

/// A device behind its window, shared by vCPU threads.
pub(crate) type Window = Arc<Mutex<MmioTransport>>;

/// What an access to nothing reads.
const NOBODY: u8 = 0xff;

#[derive(Debug)]
struct PortRange {
    first: u16,
    count: u16,
    device: Mutex<Box<dyn PortDevice>>,
}

/// All devices of one machine, by address. Built once, then shared.
#[derive(Debug, Default)]
pub(crate) struct Bus {
    ports: Vec<PortRange>,
    windows: Vec<Window>,
}

impl Bus {
    /// Puts a device on `count` ports from `first`; ranges must not overlap.
    pub(crate) fn add_ports(&mut self, first: u16, count: u16, device: impl PortDevice + 'static) {
        self.ports.push(PortRange { first, count, device: Mutex::new(Box::new(device)) });
    }

    /// Puts a device in the next window.
    pub(crate) fn add_window(&mut self, window: Window) {
        self.windows.push(window);
    }

    /// State of all devices on ports, in the order in which they were added.
    pub(crate) fn save_ports(&self) -> Vec<Vec<u8>> {
        let save = |range: &PortRange| range.device.lock().unwrap_or_else(PoisonError::into_inner).save();
        self.ports.iter().map(save).collect()
    }

    /// Gives it back to the same devices.
    pub(crate) fn restore_ports(&mut self, states: &[Vec<u8>]) -> Result<(), StateError> {
        if states.len() != self.ports.len() {
            return Err(StateError::Length);
        }
        for (range, state) in self.ports.iter_mut().zip(states) {
            range.device.get_mut().unwrap_or_else(PoisonError::into_inner).restore(state)?;
        }
        Ok(())
    }

    fn port(&self, port: u16) -> Option<(&PortRange, u16)> {
        self.ports.iter().find_map(|range| {
            let offset = port.checked_sub(range.first)?;
            (offset < range.count).then_some((range, offset))
        })
    }

    /// An OUT. All devices have registers of one byte; wider accesses are ignored.
    pub(crate) fn port_write(&self, port: u16, data: &[u8]) {
        if let ([value], Some((range, offset))) = (data, self.port(port)) {
            range.device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, *value);
        }
    }

    /// An IN.
    pub(crate) fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(NOBODY);
        if let ([value], Some((range, offset))) = (data, self.port(port)) {
            *value = range.device.lock().unwrap_or_else(PoisonError::into_inner).read(offset);
        }
    }

    /// The window of `address` and the offset in it, if `len` bytes from there are inside.
    fn window(&self, address: u64, len: usize) -> Option<(&Window, u64)> {
        let from_first = address.checked_sub(DEVICE_WINDOWS)?;
        let window = self.windows.get(usize::try_from(from_first / WINDOW_BYTES).ok()?)?;
        let offset = from_first % WINDOW_BYTES;
        (offset + len as u64 <= WINDOW_BYTES).then_some((window, offset))
    }

    /// A store to an address without memory.
    pub(crate) fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((window, offset)) = self.window(address, data.len()) {
            window.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    /// A load from an address without memory.
    pub(crate) fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.window(address, data.len()) {
            Some((window, offset)) => {
                window.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data)
            }
            None => data.fill(NOBODY),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event_loop::EventThread;
    use hyper_vmm_devices::rng::{HostEntropy, Rng};
    use vmm_sys_util::eventfd::EventFd;

    #[derive(Debug)]
    struct Echo(u8);
    impl PortDevice for Echo {
        fn read(&mut self, offset: u16) -> u8 {
            self.0 + u8::try_from(offset).unwrap()
        }
        fn write(&mut self, _offset: u16, value: u8) {
            self.0 = value;
        }
    }

    #[test]
    fn ports_are_found_by_range_and_are_one_byte_wide() {
        let mut bus = Bus::default();
        bus.add_ports(0x60, 5, Echo(0));
        bus.add_ports(0xffff, 1, Echo(7));
        bus.port_write(0x64, &[10]);
        bus.port_write(0x64, &[99, 99]);
        bus.port_write(0x65, &[99]);
        let read = |port, len| {
            let mut data = vec![0; len];
            bus.port_read(port, &mut data);
            data
        };
        assert_eq!(
            (read(0x62, 1), read(0x62, 2), read(0x5f, 1), read(0x65, 4)),
            (vec![12], vec![0xff; 2], vec![0xff], vec![0xff; 4])
        );
        assert_eq!(read(0xffff, 1), [7]);
    }

    #[test]
    fn windows_are_found_by_address() {
        let events = EventThread::new().unwrap();
        let mem = crate::memory::create_private(32, &[(0, 32 << 20)]).unwrap();
        let transport = MmioTransport::new(
            Box::new(Rng::new(HostEntropy)),
            mem,
            EventFd::new(0).unwrap(),
            events.handle(),
        );
        let mut bus = Bus::default();
        bus.add_window(Arc::new(Mutex::new(transport.unwrap())));
        let read = |address, len| {
            let mut data = vec![0; len];
            bus.mmio_read(address, &mut data);
            data
        };
        assert_eq!(read(DEVICE_WINDOWS, 4), b"virt");
        assert_eq!(read(DEVICE_WINDOWS + WINDOW_BYTES, 4), [0xff; 4]);
        assert_eq!(read(DEVICE_WINDOWS - 4, 4), [0xff; 4]);
        assert_eq!(read(DEVICE_WINDOWS + WINDOW_BYTES - 2, 4), [0xff; 4], "across the end");
        bus.mmio_write(u64::MAX, &[1; 8]);
    }
}
