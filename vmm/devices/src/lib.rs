//! Device models. Nothing in this crate sees KVM: interrupts, files and event loops enter by constructors, so every
//! device is tested without a machine.
//!
//! Each device is a folder with the same files: `request` (parse), `handler` (serve a queue), `mod` (the [`device::VirtioDevice`]), and
//! `state` where there is something to save. A machine is restored by the constructors that boot it, and then told its state.
#![forbid(unsafe_code)]

pub mod balloon;
pub mod blk;
mod chain;
mod config;
pub mod console;
pub mod device;
pub mod fs;
pub mod legacy;
pub mod mem;
#[cfg(test)]
mod mock;
pub mod net;
mod note;
pub mod output;
pub mod rng;
mod serve;
pub mod state;
pub mod transport;
pub mod vsock;
