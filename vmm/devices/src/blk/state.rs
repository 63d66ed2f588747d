//! What a disk remembers: how large its driver thinks that it is. Its content is its file's.

use crate::state::{Reader, StateError, Writer};

/// Sectors of 512 bytes.
pub(super) fn save(sectors: u64) -> Vec<u8> {
    let mut to = Writer::default();
    to.u64(sectors);
    to.done()
}

pub(super) fn restore(state: &[u8]) -> Result<u64, StateError> {
    let mut from = Reader::new(state);
    let sectors = from.u64()?;
    from.end()?;
    Ok(sectors)
}
