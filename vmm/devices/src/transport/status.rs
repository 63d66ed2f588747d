//! The status register as a state machine (virtio 1.3, 2.1 and 3.1.1).
//!
//! ```text
//!  Reset --ACKNOWLEDGE--> Acknowledged --DRIVER--> Driver --FEATURES_OK--> FeaturesOk --DRIVER_OK--> Live
//!    ^                                       (refused: stays)        (refused: NeedsReset)
//!    \--- 0 from anywhere                    FAILED from anywhere --> Failed
//! ```

/// Bits of the register.
pub(super) mod bit {
    pub(crate) const ACKNOWLEDGE: u8 = 1;
    pub(crate) const DRIVER: u8 = 2;
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const FEATURES_OK: u8 = 8;
    pub(crate) const NEEDS_RESET: u8 = 0x40;
    pub(crate) const FAILED: u8 = 0x80;
}

const ACKNOWLEDGED: u8 = bit::ACKNOWLEDGE;
const DRIVER: u8 = ACKNOWLEDGED | bit::DRIVER;
const FEATURES_OK: u8 = DRIVER | bit::FEATURES_OK;
const LIVE: u8 = FEATURES_OK | bit::DRIVER_OK;

/// How far the driver has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    /// Nothing is set.
    Reset,
    /// The guest has seen the device.
    Acknowledged,
    /// It has a driver for it, which may negotiate features.
    Driver,
    /// Features are settled; queues may be set up.
    FeaturesOk,
    /// The device runs; nothing but a reset changes its set-up.
    Live,
    /// The device could not be started, or broke: only a reset helps.
    NeedsReset,
    /// The driver gave up.
    Failed,
}

/// What a write to the register asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing changes: a repeated or a forbidden write.
    Stay,
    /// Go there.
    Go(Status),
    /// Go to `FeaturesOk` if the features are good.
    SettleFeatures,
    /// Go to `Live` if the device starts.
    Activate,
    /// Undo everything.
    Reset,
}

const ALL: [Status; 7] = [
    Status::Reset,
    Status::Acknowledged,
    Status::Driver,
    Status::FeaturesOk,
    Status::Live,
    Status::NeedsReset,
    Status::Failed,
];

/// All that a driver may do, one row per step.
const TABLE: [(Status, u8, Step); 4] = [
    (Status::Reset, ACKNOWLEDGED, Step::Go(Status::Acknowledged)),
    (Status::Acknowledged, DRIVER, Step::Go(Status::Driver)),
    (Status::Driver, FEATURES_OK, Step::SettleFeatures),
    (Status::FeaturesOk, LIVE, Step::Activate),
];

impl Status {
    /// The register as the driver reads it.
    pub(super) fn bits(self) -> u8 {
        match self {
            Self::Reset => 0,
            Self::Acknowledged => ACKNOWLEDGED,
            Self::Driver => DRIVER,
            Self::FeaturesOk => FEATURES_OK,
            Self::Live => LIVE,
            Self::NeedsReset => LIVE | bit::NEEDS_RESET,
            Self::Failed => bit::FAILED,
        }
    }

    /// The status whose register reads as `bits`.
    pub(super) fn from_bits(bits: u8) -> Option<Self> {
        ALL.into_iter().find(|status| status.bits() == bits)
    }

    /// What the write of `value` means here. Only the low byte of the register exists.
    pub(super) fn step(self, value: u32) -> Step {
        let Ok(value) = u8::try_from(value) else { return Step::Stay };
        if value == 0 {
            return Step::Reset;
        }
        if value & bit::FAILED != 0 {
            return Step::Go(Status::Failed);
        }
        // Drivers add bits to what they read, which may hold a bit that is the device's own.
        let value = value & !bit::NEEDS_RESET;
        TABLE.iter().find(|(from, wrote, _)| *from == self && *wrote == value).map_or(Step::Stay, |row| row.2)
    }

    /// Whether queue registers take writes.
    pub(super) fn queues_open(self) -> bool {
        self == Self::FeaturesOk
    }

    /// Whether feature registers take writes.
    pub(super) fn features_open(self) -> bool {
        self == Self::Driver
    }

    /// Whether the configuration space takes writes.
    pub(super) fn config_open(self) -> bool {
        matches!(self, Self::Driver | Self::FeaturesOk | Self::Live)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_write_in_every_state() {
        for from in ALL {
            for value in 0..=0xff_u32 {
                let expected = match (from, value & !0x40) {
                    _ if value == 0 => Step::Reset,
                    (_, v) if v & 0x80 != 0 => Step::Go(Status::Failed),
                    (Status::Reset, 1) => Step::Go(Status::Acknowledged),
                    (Status::Acknowledged, 3) => Step::Go(Status::Driver),
                    (Status::Driver, 11) => Step::SettleFeatures,
                    (Status::FeaturesOk, 15) => Step::Activate,
                    _ => Step::Stay,
                };
                assert_eq!(from.step(value), expected, "{from:?} {value:#x}");
            }
            assert_eq!(from.step(0x100), Step::Stay, "high bits are no reset");
        }
    }
}
