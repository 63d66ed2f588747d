//! The caller's terminal: raw mode with its undo, the window size, and the keys that detach.

mod detach;
mod raw;

pub(crate) use detach::{DetachKeys, Scan};
pub(crate) use raw::{RawMode, window_size};
