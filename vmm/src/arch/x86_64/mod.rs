//! x86_64: memory layout and everything that Linux wants to find in memory when it starts (64-bit boot protocol).

mod boot_data;
mod kernel;
mod layout;
mod mp_table;

pub(crate) use boot_data::{BootError, BootPlan, announce_devices, announce_processors, write_boot_data};
use kernel::LoadedKernel;
pub(crate) use kernel::{KernelError, load_initramfs, load_kernel};
pub(crate) use layout::{
    DEVICE_WINDOWS, FIRST_DEVICE_IRQ, SERIAL_IRQ, SERIAL_PORT, hot_memory_start, memory_ranges, ports,
};
