//! What a register window saves: the driver's set-up, where its queues are, and what the device behind it has to say.
//!
//! A queue's position is the used ring's index. That is enough because every device here gives each chain back before it lets go of the
//! loop: between turns nothing is under way, so what is used is what was taken.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::MmioTransport;
use super::queue::QueueSetup;
use super::status::Status;
use crate::state::{Reader, StateError, Writer};

/// Where the index lies in a used ring (virtio 1.3, 2.7.8).
const USED_INDEX_AT: u64 = 2;

impl MmioTransport {
    /// Stops the device's threads; see [`crate::device::VirtioDevice::pause`].
    pub fn pause(&mut self) {
        self.device.pause();
    }

    /// Lets them go on.
    pub fn resume(&mut self) {
        self.device.resume();
    }

    /// The window's state. Call it on the event loop's thread, paused and while no processor runs, so that nothing is under way.
    ///
    /// # Errors
    /// [`StateError::Unsaved`] when the device cannot be saved, or not as it is now.
    pub fn save(&self) -> Result<Vec<u8>, StateError> {
        let device = self.device.save()?;
        if self.line.is_broken() {
            let why = "it waits for its driver to reset it".to_owned();
            return Err(StateError::Unsaved { device: self.name(), why });
        }
        let mut to = Writer::default();
        to.u32(self.device.device_type());
        to.u8(self.status.bits());
        to.u64(self.driver_features);
        for register in [self.device_features_page, self.driver_features_page, self.selected_queue] {
            to.u32(register);
        }
        self.line.save(&mut to);
        to.u8(u8::try_from(self.queues.len()).unwrap_or(u8::MAX));
        for queue in &self.queues {
            queue.save(&mut to);
            to.u16(self.position(queue));
        }
        to.bytes(&device);
        Ok(to.done())
    }

    /// How many chains of a queue were used.
    fn position(&self, queue: &QueueSetup) -> u16 {
        if !queue.ready || self.status != Status::Live {
            return 0;
        }
        // A ring outside guest memory cannot be live.
        let at = GuestAddress(queue.used().saturating_add(USED_INDEX_AT));
        self.mem.load(at, Ordering::Acquire).map_or(0, u16::from_le)
    }

    /// Puts a new window into a saved state; a device that was live is so again, through the same activation, and looks at its queues
    /// as soon as the event loop runs.
    ///
    /// # Errors
    /// [`StateError`] when the state is not one that this device can have been in.
    pub fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let bad = |what| StateError::Value { what };
        let mut from = Reader::new(state);
        if from.u32()? != self.device.device_type() {
            return Err(bad("a device"));
        }
        let status = Status::from_bits(from.u8()?).ok_or(bad("a device status"))?;
        self.driver_features = from.u64()?;
        self.device_features_page = from.u32()?;
        self.driver_features_page = from.u32()?;
        self.selected_queue = from.u32()?;
        self.line.restore(&mut from)?;
        if usize::from(from.u8()?) != self.queues.len() {
            return Err(bad("a number of queues"));
        }
        for queue in &mut self.queues {
            queue.restore(&mut from)?;
        }
        self.device.restore(from.bytes()?)?;
        from.end()?;
        if matches!(status, Status::FeaturesOk | Status::Live) && !self.features_are_good() {
            return Err(bad("features"));
        }
        self.status = status;
        if status == Status::Live {
            if !self.activate() {
                return Err(bad("queues"));
            }
            for (queue, kick) in self.queues.iter().zip(&self.kicks) {
                if queue.ready {
                    // A new counter has room.
                    let _ = kick.write(1);
                }
            }
        }
        self.line.raise_again();
        Ok(())
    }
}
