//! The port on which the guest reports how far it is: one byte per step, a few instructions of the guest, no driver.

use std::fmt;

use hyper_vmm_spec::control::lifecycle;

use super::PortDevice;

/// A step that the guest reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LifecycleStep {
    /// First instruction of PID 1.
    UserSpace,
    /// The agent serves requests.
    AgentReady,
    /// An orderly end begins.
    PowerOff,
}

/// One port; see [`hyper_vmm_spec::control::LIFECYCLE_PORT`]. Reads as 0, unknown values are ignored.
pub struct LifecyclePort {
    on_step: Box<dyn FnMut(LifecycleStep) + Send>,
}

impl LifecyclePort {
    /// `on_step` is called for each reported step, repeated ones too.
    pub fn new(on_step: impl FnMut(LifecycleStep) + Send + 'static) -> Self {
        Self { on_step: Box::new(on_step) }
    }
}

impl fmt::Debug for LifecyclePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LifecyclePort").finish_non_exhaustive()
    }
}

impl PortDevice for LifecyclePort {
    fn read(&mut self, _offset: u16) -> u8 {
        0
    }

    fn write(&mut self, _offset: u16, value: u8) {
        match value {
            lifecycle::USER_SPACE => (self.on_step)(LifecycleStep::UserSpace),
            lifecycle::AGENT_READY => (self.on_step)(LifecycleStep::AgentReady),
            lifecycle::POWER_OFF => (self.on_step)(LifecycleStep::PowerOff),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn steps_are_told_and_noise_is_not() {
        let steps = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&steps);
        let mut port = LifecyclePort::new(move |step| seen.lock().unwrap().push(step));
        for value in [0, lifecycle::USER_SPACE, 0xff, lifecycle::AGENT_READY, lifecycle::POWER_OFF] {
            port.write(0, value);
        }
        use LifecycleStep::{AgentReady, PowerOff, UserSpace};
        assert_eq!(*steps.lock().unwrap(), [UserSpace, AgentReady, PowerOff]);
    }
}
