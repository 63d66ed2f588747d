//! Requests of the driver, their answers (virtio 1.2, 5.15.6.2) and the configuration space (5.15.4).

use crate::chain::{ChainError, Span};

/// What is plugged at once, bytes: a huge page, and what Linux takes at least.
pub(super) const BLOCK_BYTES: u64 = 2 << 20;

/// Bytes of an answer.
pub(super) const ANSWER_BYTES: usize = 10;

/// What the driver asks for. Addresses and counts are as it gave them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Plug { addr: u64, blocks: u16 },
    Unplug { addr: u64, blocks: u16 },
    UnplugAll,
    State { addr: u64, blocks: u16 },
    Unknown,
}

impl Request {
    /// Reads a request: type, padding, and for all but one kind an address and a number of blocks.
    pub(super) fn parse(span: &mut Span<'_>) -> Result<Self, ChainError> {
        let kind = u16::from_le_bytes(span.read_array()?);
        let _padding = span.read_array::<6>()?;
        if kind == 2 {
            return Ok(Self::UnplugAll);
        }
        let addr = u64::from_le_bytes(span.read_array()?);
        let blocks = u16::from_le_bytes(span.read_array()?);
        Ok(match kind {
            0 => Self::Plug { addr, blocks },
            1 => Self::Unplug { addr, blocks },
            3 => Self::State { addr, blocks },
            _ => Self::Unknown,
        })
    }
}

/// Whether the blocks of a range are plugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Plugged {
    All = 0,
    None = 1,
    Some = 2,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Ack,
    /// Done, and this is the state that was asked for.
    State(Plugged),
    /// Not now: the guest would have more than it is to have.
    Nack,
    /// Not now: the host cannot.
    Busy,
    /// Never: the request is wrong.
    Error,
}

impl Answer {
    /// As the driver reads it: type, padding, state.
    pub(super) fn bytes(self) -> [u8; ANSWER_BYTES] {
        let (kind, state) = match self {
            Self::Ack => (0_u8, 0),
            Self::State(state) => (0, state as u16),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        let [low, high] = state.to_le_bytes();
        [kind, 0, 0, 0, 0, 0, 0, 0, low, high]
    }
}

/// Where the memory may be and how much of it there is, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) addr: u64,
    pub(super) region: u64,
    pub(super) plugged: u64,
    pub(super) requested: u64,
}

/// The configuration space; all of the region is usable at any time.
pub(super) fn config_space(sizes: Sizes) -> [u8; 56] {
    let node_and_padding = 0;
    let fields = [
        BLOCK_BYTES,
        node_and_padding,
        sizes.addr,
        sizes.region,
        sizes.region,
        sizes.plugged,
        sizes.requested,
    ];
    let mut space = [0; 56];
    for (to, from) in space.iter_mut().zip(fields.iter().flat_map(|field| field.to_le_bytes())) {
        *to = from;
    }
    space
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::Chain;
    use crate::mock::{Driver, memory};
    use virtio_queue::QueueT;
    use vm_memory::{Bytes, GuestAddress};

    fn parse(bytes: &[u8]) -> Result<Request, ChainError> {
        let mem = memory();
        mem.write_slice(bytes, GuestAddress(0x10_0000)).unwrap();
        let mut driver = Driver::new(&mem, GuestAddress(0), 8);
        let mut queue = driver.queue();
        driver.offer(&[(0x10_0000, bytes.len() as u32, false)]);
        let mut chain = Chain::parse(&mem, queue.pop_descriptor_chain(&*mem).unwrap()).unwrap();
        Request::parse(&mut chain.readable)
    }

    #[test]
    fn fields_are_where_the_standard_puts_them() {
        let bytes = |kind: u8| [&[kind, 0, 9, 9, 9, 9, 9, 9][..], &[1, 2, 0, 0, 0, 0, 0, 0, 5, 1]].concat();
        let (addr, blocks) = (0x201, 0x105);
        assert_eq!(parse(&bytes(0)).unwrap(), Request::Plug { addr, blocks });
        assert_eq!(parse(&bytes(1)).unwrap(), Request::Unplug { addr, blocks });
        assert_eq!(parse(&bytes(3)).unwrap(), Request::State { addr, blocks });
        assert_eq!(parse(&bytes(4)).unwrap(), Request::Unknown);
        assert_eq!(parse(&bytes(2)[..8]).unwrap(), Request::UnplugAll);
        assert!(parse(&bytes(0)[..17]).is_err());
        assert!(parse(&[]).is_err());
        assert_eq!(Answer::State(Plugged::Some).bytes(), [0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
        assert_eq!(Answer::Error.bytes()[0], 3);
        let sizes = Sizes { addr: 1 << 32, region: 2 << 30, plugged: 3 << 20, requested: 4 << 20 };
        let space = config_space(sizes);
        let field = |at: usize| u64::from_le_bytes(space[at..at + 8].try_into().unwrap());
        assert_eq!(
            [0, 16, 24, 32, 40, 48].map(field),
            [2 << 20, 1 << 32, 2 << 30, 2 << 30, 3 << 20, 4 << 20]
        );
    }
}
