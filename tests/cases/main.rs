//! The product from outside. Each module is one group and gets a lab machine of its own; a hang costs one group.

mod containerd;
mod containers;
mod faults;
mod images;
mod limits;
mod logging;
mod many;
mod network;
mod options;
mod pods;
mod run;
mod services;
mod terminal;
