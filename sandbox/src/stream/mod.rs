//! The conversation between a client and a supervisor: frames on a Unix stream socket (`frame`), and its client half (`attach`), and what is asked (`wire`).

mod attach;
mod frame;
pub(crate) mod wire;

pub use attach::{AttachInput, AttachOptions, AttachOutput, Attached, Output, TerminalSize};
pub use frame::FrameError;
pub(crate) use frame::{Frame, FrameKind, FrameReader, MAX_DATA_BYTES, is_end, write_frame};
