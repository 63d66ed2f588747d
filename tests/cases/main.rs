//! The product from outside. Each module is one group and gets a lab machine of its own; a hang costs one group.

mod bays;
mod bench;
mod cluster;
mod containerd;
mod containerd2;
mod containers;
mod crictl;
mod docker;
mod faults;
mod growth;
mod images;
mod jail;
mod kubernetes;
mod kubernetes_faults;
mod kubernetes_many;
mod limits;
mod logging;
mod many;
mod nerdctl;
mod network;
mod options;
mod pods;
mod run;
mod services;
mod template;
mod terminal;
