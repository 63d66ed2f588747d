//! What a balloon remembers: how much it is to hold, and what the driver says that it holds.

use std::sync::atomic::Ordering;

use super::BalloonState;
use crate::state::{Reader, StateError, Writer};

pub(super) fn save(state: &BalloonState) -> Vec<u8> {
    let mut to = Writer::default();
    to.u32(state.target_pages.load(Ordering::SeqCst));
    to.u32(state.actual_pages.load(Ordering::SeqCst));
    to.done()
}

pub(super) fn restore(state: &BalloonState, bytes: &[u8]) -> Result<(), StateError> {
    let mut from = Reader::new(bytes);
    let (target, actual) = (from.u32()?, from.u32()?);
    from.end()?;
    state.target_pages.store(target, Ordering::SeqCst);
    state.actual_pages.store(actual, Ordering::SeqCst);
    Ok(())
}
