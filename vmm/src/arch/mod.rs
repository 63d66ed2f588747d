//! What depends on the processor architecture. x86_64 only, for now; everything outside this folder is neutral.

mod x86_64;

pub(crate) use x86_64::{
    BootError, BootPlan, DEVICE_WINDOWS, FIRST_DEVICE_IRQ, KernelError, SERIAL_IRQ, SERIAL_PORT,
    announce_devices, announce_processors, hot_memory_start, load_initramfs, load_kernel, memory_ranges,
    ports, write_boot_data,
};
