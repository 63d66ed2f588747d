//! What Linux reads before it has a memory map: zero page, command line, page tables, segments, MP table.

use hyper_vmm_hv::Entry;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::layout::{
    BASE_MEMORY_END, CMDLINE, DESCRIPTOR_TABLE, DEVICE_WINDOWS, FIRST_DEVICE_IRQ, HIGH_MEMORY, MP_TABLE,
    PAGE_TABLE_LOW, PAGE_TABLE_MIDDLE, PAGE_TABLE_TOP, STACK_END, ZERO_PAGE,
};
use super::{LoadedKernel, mp_table};

/// x86 `COMMAND_LINE_SIZE`, with the final zero.
const MAX_FULL_CMDLINE_BYTES: usize = 2048;

/// Why the guest's memory could not be prepared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// Longer than Linux reads.
    #[error("kernel command line of {0} bytes with the device entries: at most {MAX_FULL_CMDLINE_BYTES}")]
    Cmdline(usize),
    /// More processors than the table has room for.
    #[error("the processor table has no room for {0} vCPUs")]
    MpTable(u8),
    /// Writing to guest memory failed.
    #[error("cannot write {what} to guest memory")]
    Write {
        /// What was to be written.
        what: &'static str,
        /// Why not.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// Writing the zero page failed.
    #[error("cannot write the boot parameters to guest memory")]
    ZeroPage(#[source] linux_loader::configurator::Error),
}

/// The command line with one entry per device slot: size, address and interrupt of its window.
pub(crate) fn announce_devices(cmdline: &str, devices: usize) -> String {
    let windows = (DEVICE_WINDOWS..).step_by(0x1000).zip(FIRST_DEVICE_IRQ..).take(devices);
    let entries = windows.map(|(address, irq)| format!("virtio_mmio.device=4K@{address:#x}:{irq}"));
    std::iter::once(cmdline.to_owned())
        .filter(|line| !line.is_empty())
        .chain(entries)
        .collect::<Vec<_>>()
        .join(" ")
}

/// The command line with how many processors are started at boot, when the table names more: those that are not made yet would be
/// waited for.
pub(crate) fn announce_processors(cmdline: &str, vcpus: u8, max_vcpus: u8) -> String {
    match cmdline {
        _ if vcpus == max_vcpus => cmdline.to_owned(),
        "" => format!("maxcpus={vcpus}"),
        _ => format!("{cmdline} maxcpus={vcpus}"),
    }
}

/// What is written for one boot.
#[derive(Debug)]
pub(crate) struct BootPlan<'a> {
    /// Processors that the table names.
    pub(crate) max_vcpus: u8,
    /// Where memory ends that is there at boot.
    pub(crate) memory_end: u64,
    pub(crate) cmdline: &'a str,
    pub(crate) kernel: &'a LoadedKernel,
    /// Start and length.
    pub(crate) initramfs: Option<(u64, u64)>,
}

/// Writes everything and says where the first processor starts.
pub(crate) fn write_boot_data(mem: &GuestMemoryMmap, plan: &BootPlan<'_>) -> Result<Entry, BootError> {
    let BootPlan { max_vcpus: vcpus, memory_end, cmdline, kernel, initramfs } = *plan;
    let line = [cmdline.as_bytes(), &[0]].concat();
    if line.len() > MAX_FULL_CMDLINE_BYTES {
        return Err(BootError::Cmdline(cmdline.len()));
    }
    let table = mp_table::build(vcpus).ok_or(BootError::MpTable(vcpus))?;
    write(mem, "the command line", CMDLINE, &line)?;
    write(mem, "the processor table", MP_TABLE, &table)?;
    write_page_tables(mem)?;
    write_segments(mem)?;
    let params = boot_parameters(&memory_map(mem, memory_end), line.len(), initramfs);
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, GuestAddress(ZERO_PAGE)), mem)
        .map_err(BootError::ZeroPage)?;
    Ok(Entry {
        instruction: kernel.entry,
        zero_page: ZERO_PAGE,
        stack: STACK_END,
        page_table: PAGE_TABLE_TOP,
        descriptor_table: DESCRIPTOR_TABLE,
    })
}

fn write(mem: &GuestMemoryMmap, what: &'static str, at: u64, bytes: &[u8]) -> Result<(), BootError> {
    mem.write_slice(bytes, GuestAddress(at)).map_err(|source| BootError::Write { what, source })
}

/// The first GiB, one to one, in 2 MiB pages: the kernel builds its own tables from there.
fn write_page_tables(mem: &GuestMemoryMmap) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let what = "page tables";
    write(mem, what, PAGE_TABLE_TOP, &(PAGE_TABLE_MIDDLE | PRESENT_WRITABLE).to_le_bytes())?;
    write(mem, what, PAGE_TABLE_MIDDLE, &(PAGE_TABLE_LOW | PRESENT_WRITABLE).to_le_bytes())?;
    let low: Vec<u8> =
        (0..512_u64).flat_map(|n| (n << 21 | LARGE | PRESENT_WRITABLE).to_le_bytes()).collect();
    write(mem, what, PAGE_TABLE_LOW, &low)
}

/// Null, unused, 64-bit code, flat data.
fn write_segments(mem: &GuestMemoryMmap) -> Result<(), BootError> {
    let table: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    write(mem, "segment descriptors", DESCRIPTOR_TABLE, &bytes)
}

fn boot_parameters(
    map: &[boot_e820_entry],
    cmdline_bytes: usize,
    initramfs: Option<(u64, u64)>,
) -> boot_params {
    let low32 = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let mut params = boot_params::default();
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = u32::from_le_bytes(*b"HdrS");
    // A boot loader without a number of its own.
    params.hdr.type_of_loader = 0xff;
    params.hdr.kernel_alignment = 0x100_0000;
    params.hdr.cmd_line_ptr = low32(CMDLINE);
    params.hdr.cmdline_size = low32(cmdline_bytes as u64);
    if let Some((start, len)) = initramfs {
        params.hdr.ramdisk_image = low32(start);
        params.hdr.ramdisk_size = low32(len);
    }
    for (slot, entry) in params.e820_table.iter_mut().zip(map) {
        *slot = *entry;
    }
    params.e820_entries = u8::try_from(map.len()).unwrap_or(0);
    params
}

/// The e820 map: memory up to `end`, except the MP table and the PC's video and firmware area.
fn memory_map(mem: &GuestMemoryMmap, end: u64) -> Vec<boot_e820_entry> {
    const USABLE: u32 = 1;
    const RESERVED: u32 = 2;
    let entry = |addr, end: u64, kind| boot_e820_entry { addr, size: end - addr, r#type: kind };
    let mut map = vec![entry(0, MP_TABLE, USABLE), entry(MP_TABLE, BASE_MEMORY_END, RESERVED)];
    for region in mem.iter().filter(|region| region.start_addr().0 < end) {
        let start = region.start_addr().0;
        map.push(entry(start.max(HIGH_MEMORY), start + region.len(), USABLE));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(ranges: &[(u64, usize)]) -> GuestMemoryMmap {
        let ranges: Vec<_> = ranges.iter().map(|(at, len)| (GuestAddress(*at), *len)).collect();
        GuestMemoryMmap::from_ranges(&ranges).unwrap()
    }

    #[test]
    fn devices_are_announced_in_slot_order() {
        assert_eq!(announce_devices("quiet", 0), "quiet");
        assert_eq!(
            announce_devices("quiet", 2),
            "quiet virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6"
        );
        assert_eq!(announce_devices("", 1), "virtio_mmio.device=4K@0xd0000000:5");
        let longest =
            announce_devices(&"x".repeat(hyper_vmm_spec::MAX_CMDLINE_BYTES), hyper_vmm_spec::MAX_DEVICES);
        assert!(longest.len() < MAX_FULL_CMDLINE_BYTES, "{}", longest.len());
    }

    #[test]
    fn processors_to_come_are_not_waited_for() {
        assert_eq!(announce_processors("quiet", 2, 2), "quiet");
        assert_eq!(announce_processors("quiet", 2, 4), "quiet maxcpus=2");
        assert_eq!(announce_processors("", 1, 4), "maxcpus=1");
    }

    #[test]
    fn the_memory_map_leaves_out_tables_firmware_and_hole() {
        let mem = memory(&[(0, 0x800_0000), (1 << 32, 0x10_0000), (2 << 32, 0x10_0000)]);
        let map = memory_map(&mem, 2 << 32);
        let plain: Vec<_> = map.iter().map(|e| (e.addr, e.addr + e.size, e.r#type)).collect();
        let expected = [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0xa_0000, 2),
            (0x10_0000, 0x800_0000, 1),
            (1 << 32, (1 << 32) + 0x10_0000, 1),
        ];
        assert_eq!(plain, expected);
    }

    #[test]
    fn boot_data_is_where_the_entry_says() {
        let mem = memory(&[(0, 0x200_0000)]);
        let kernel = LoadedKernel { entry: 0x100_0000, end: 0x180_0000 };
        let plan = BootPlan {
            max_vcpus: 2,
            memory_end: u64::MAX,
            cmdline: "console=ttyS0",
            kernel: &kernel,
            initramfs: Some((0x1f0_0000, 0x1234)),
        };
        let entry = write_boot_data(&mem, &plan).unwrap();
        assert_eq!(entry.instruction, 0x100_0000);
        let params: boot_params = mem.read_obj(GuestAddress(entry.zero_page)).unwrap();
        let header = params.hdr;
        assert_eq!({ header.ramdisk_image }, 0x1f0_0000);
        assert_eq!({ header.ramdisk_size }, 0x1234);
        let mut line = [0; 14];
        mem.read_slice(&mut line, GuestAddress(u64::from(header.cmd_line_ptr))).unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
        let top: u64 = mem.read_obj(GuestAddress(entry.page_table)).unwrap();
        let middle: u64 = mem.read_obj(GuestAddress(top & !0xfff)).unwrap();
        let last: u64 = mem.read_obj(GuestAddress((middle & !0xfff) + 511 * 8)).unwrap();
        assert_eq!(last & !0xfff, 511 << 21);
    }

    #[test]
    fn a_line_that_linux_would_cut_is_refused() {
        let mem = memory(&[(0, 0x200_0000)]);
        let kernel = LoadedKernel { entry: 0x100_0000, end: 0x180_0000 };
        let long = "x".repeat(MAX_FULL_CMDLINE_BYTES);
        let plan =
            BootPlan { max_vcpus: 1, memory_end: u64::MAX, cmdline: &long, kernel: &kernel, initramfs: None };
        assert!(matches!(write_boot_data(&mem, &plan), Err(BootError::Cmdline(2048))));
    }
}
