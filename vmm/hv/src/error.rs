//! What can go wrong with KVM, in words that say how to mend it.

use kvm_ioctls::Error as Errno;

/// Why KVM cannot be used, or which request it refused.
#[derive(Debug, thiserror::Error)]
pub enum HvError {
    /// No device node.
    #[error(
        "/dev/kvm does not exist: load the module (modprobe kvm_intel or kvm_amd), or switch on virtualisation \
         in the firmware, or nested virtualisation on the host that runs this one"
    )]
    Missing,
    /// The device node may not be opened.
    #[error(
        "no permission to open /dev/kvm: add the user to its group (usermod -aG kvm USER) and log in again"
    )]
    Permission,
    /// The node is there, the driver is not.
    #[error("/dev/kvm has no driver behind it: load the module (modprobe kvm_intel or kvm_amd)")]
    NoDriver,
    /// Opening failed in some other way.
    #[error("cannot open /dev/kvm")]
    Open(#[source] Errno),
    /// Not the interface that every Linux since 2.6.22 has.
    #[error("/dev/kvm speaks API version {0}, version 12 is needed: use the kvm module of a Linux kernel")]
    ApiVersion(i32),
    /// Features without which no machine is built.
    #[error("this KVM lacks {}: use a host kernel of 4.14 or newer with the full kvm module", .0.join(", "))]
    Capabilities(Vec<&'static str>),
    /// More processors than this KVM can do.
    #[error("this KVM runs at most {most} vCPUs per machine, {asked} were asked for")]
    Vcpus {
        /// Asked for.
        asked: usize,
        /// What KVM allows.
        most: usize,
    },
    /// An ioctl was refused.
    #[error("KVM refused to {what}")]
    Refused {
        /// What was asked, as a verb phrase.
        what: &'static str,
        /// Its answer.
        #[source]
        source: Errno,
    },
    /// A list for KVM came out too long.
    #[error("a list of {0} for KVM is too long")]
    ListLength(&'static str),
    /// Guest memory could not be lent to KVM.
    #[error("guest memory at {0:#x} has no host address")]
    MemoryAddress(u64),
    /// Saved state that cannot be, or that this program does not know how to save; of what.
    #[error("the state of {0} is not one that this program saves")]
    State(&'static str),
    /// A model-specific register does not take its saved value.
    #[error("KVM refused the value {value:#x} of model-specific register {index:#x}")]
    Msr {
        /// Which.
        index: u32,
        /// The value.
        value: u64,
    },
    /// A machine was saved on another host, or under another kernel.
    #[error("the machine was saved under a KVM or a processor that offers something else")]
    OtherHost,
    /// Memory could not be given back to the host.
    #[error("cannot give guest memory back")]
    Discard(#[source] std::io::Error),
    /// Memory could not be kept out of core dumps.
    #[error("cannot keep guest memory out of core dumps")]
    Dumps(#[source] std::io::Error),
    /// The signal that stops vCPUs could not be set up.
    #[error("cannot install the signal handler for vCPU threads")]
    Signal(#[source] Errno),
    /// A vCPU's shared page could not be mapped once more.
    #[error("cannot map the run page of vCPU {index}")]
    RunPage {
        /// Which vCPU.
        index: u8,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

impl HvError {
    /// Shape for `map_err` on ioctls.
    pub(crate) fn refused(what: &'static str) -> impl FnOnce(Errno) -> Self {
        move |source| Self::Refused { what, source }
    }
}
