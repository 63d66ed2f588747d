//! Loading an uncompressed kernel (ELF vmlinux) and an initramfs, with errors that say what is wrong with the file.

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::elf::{EI_CLASS, ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3, Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use vm_memory::{ByteValued, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::layout::HIGH_MEMORY;
use crate::memory::copy_file;

/// Most program headers looked at; a vmlinux has five.
const MAX_SEGMENTS: u16 = 64;
const ELF_CLASS_64: u8 = 2;
const ELF_MACHINE_X86_64: u16 = 62;
const PAGE_BYTES: u64 = 4096;

/// A kernel in guest memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LoadedKernel {
    /// Its first instruction.
    pub(crate) entry: u64,
    /// First address after it.
    pub(crate) end: u64,
}

/// What is wrong with a kernel or initramfs.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    #[error("cannot read the {0} file")]
    Read(&'static str, #[source] std::io::Error),
    #[error("the kernel file is a compressed bzImage: give the uncompressed vmlinux that it was made from")]
    BzImage,
    #[error("the kernel file is not an ELF file: give an uncompressed vmlinux")]
    NotElf,
    #[error("the kernel file is not a 64-bit x86 kernel")]
    WrongMachine,
    #[error("the kernel file is damaged: {0}")]
    Damaged(&'static str),
    #[error("the kernel needs guest memory up to {} MiB, the machine has {} MiB", .needed.div_ceil(1 << 20), .available >> 20)]
    TooLittleMemory { needed: u64, available: u64 },
    #[error("the kernel's segment at {0:#x} is below 1 MiB")]
    TooLow(u64),
    #[error("cannot copy the {0} to guest memory")]
    Copy(&'static str, #[source] std::io::Error),
    #[error("the initramfs of {} KiB does not fit beside the kernel in {} MiB of memory: give more memory", .bytes >> 10, .available >> 20)]
    InitramfsTooLarge { bytes: u64, available: u64 },
}

/// End of the memory below the hole.
fn low_memory_end(mem: &GuestMemoryMmap) -> u64 {
    mem.iter().next().map_or(0, |region| region.start_addr().0 + region.len())
}

/// Checks the whole kernel file, then copies it to where it wants to be. Memory beyond what the file holds stays zero, as it is.
pub(crate) fn load_kernel(mem: &GuestMemoryMmap, file: &File) -> Result<LoadedKernel, KernelError> {
    let available = low_memory_end(mem);
    let (header, segments) = inspect(file)?;
    let end = segments.iter().map(|segment| segment.p_paddr + segment.p_memsz).max().unwrap_or(0);
    if end > available {
        return Err(KernelError::TooLittleMemory { needed: end, available });
    }
    for segment in &segments {
        copy_file(mem, segment.p_paddr, file, segment.p_offset, segment.p_filesz)
            .map_err(|e| KernelError::Copy("kernel", e))?;
    }
    Ok(LoadedKernel { entry: header.e_entry, end })
}

/// Reads the headers; the segments returned lie inside the file and above 1 MiB, and one holds the entry point.
fn inspect(file: &File) -> Result<(Elf64_Ehdr, Vec<Elf64_Phdr>), KernelError> {
    let file_bytes = file.metadata().map_err(|e| KernelError::Read("kernel", e))?.len();
    let header = read_header(file)?;
    if header.e_ident.get(EI_CLASS) != Some(&ELF_CLASS_64) || header.e_machine != ELF_MACHINE_X86_64 {
        return Err(KernelError::WrongMachine);
    }
    if header.e_phnum == 0 || header.e_phnum > MAX_SEGMENTS {
        return Err(KernelError::Damaged("it has no segments, or too many"));
    }
    let mut segments = Vec::new();
    for n in 0..u64::from(header.e_phnum) {
        let mut segment = Elf64_Phdr::default();
        let at = header.e_phoff.saturating_add(n * size_of::<Elf64_Phdr>() as u64);
        file.read_exact_at(segment.as_mut_slice(), at)
            .map_err(|_| KernelError::Damaged("its headers are cut short"))?;
        if segment.p_type == PT_LOAD {
            check_segment(&segment, file_bytes)?;
            segments.push(segment);
        }
    }
    let holds_entry = |s: &Elf64_Phdr| (s.p_paddr..s.p_paddr + s.p_memsz).contains(&header.e_entry);
    if !segments.iter().any(holds_entry) {
        return Err(KernelError::Damaged("its entry point is outside its segments"));
    }
    Ok((header, segments))
}

fn check_segment(segment: &Elf64_Phdr, file_bytes: u64) -> Result<(), KernelError> {
    let in_file = segment.p_offset.checked_add(segment.p_filesz);
    if in_file.is_none_or(|end| end > file_bytes) || segment.p_filesz > segment.p_memsz {
        return Err(KernelError::Damaged("it is cut short"));
    }
    if segment.p_paddr.checked_add(segment.p_memsz).is_none() {
        return Err(KernelError::Damaged("a segment has no end"));
    }
    if segment.p_paddr < HIGH_MEMORY {
        return Err(KernelError::TooLow(segment.p_paddr));
    }
    Ok(())
}

fn read_header(file: &File) -> Result<Elf64_Ehdr, KernelError> {
    /// Where the boot protocol puts "HdrS" in a bzImage.
    const BZIMAGE_MAGIC_AT: u64 = 0x202;
    let mut header = Elf64_Ehdr::default();
    let whole = file.read_exact_at(header.as_mut_slice(), 0);
    let magic = [ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3];
    if whole.is_ok() && header.e_ident.iter().zip(&magic).all(|(a, b)| u32::from(*a) == u32::from(*b)) {
        return Ok(header);
    }
    let mut hdrs = [0; 4];
    match file.read_exact_at(&mut hdrs, BZIMAGE_MAGIC_AT) {
        Ok(()) if &hdrs == b"HdrS" => Err(KernelError::BzImage),
        Err(e) if e.kind() != std::io::ErrorKind::UnexpectedEof => Err(KernelError::Read("kernel", e)),
        _ => Err(KernelError::NotElf),
    }
}

/// Copies the initramfs to the end of the memory below the hole; returns (start, length).
pub(crate) fn load_initramfs(
    mem: &GuestMemoryMmap,
    file: &File,
    kernel: &LoadedKernel,
) -> Result<(u64, u64), KernelError> {
    let bytes = file.metadata().map_err(|e| KernelError::Read("initramfs", e))?.len();
    let available = low_memory_end(mem);
    let start = available.checked_sub(bytes).map(|start| start / PAGE_BYTES * PAGE_BYTES);
    let start = start
        .filter(|start| *start >= kernel.end)
        .ok_or(KernelError::InitramfsTooLarge { bytes, available })?;
    copy_file(mem, start, file, 0, bytes).map_err(|e| KernelError::Copy("initramfs", e))?;
    Ok((start, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper_vmm_devices::device::GuestMem;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress};

    const MEM_BYTES: u64 = 32 << 20;

    fn memory() -> GuestMem {
        crate::memory::create_private(32, &[(0, MEM_BYTES)]).unwrap()
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(bytes).unwrap();
        file
    }

    /// A kernel of one segment: 0x3000 bytes in the file from 0x1000, 0x5000 in memory from 16 MiB.
    fn vmlinux(change: impl FnOnce(&mut Elf64_Ehdr, &mut Elf64_Phdr)) -> Vec<u8> {
        let mut header = Elf64_Ehdr::default();
        header.e_ident[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        header.e_machine = ELF_MACHINE_X86_64;
        header.e_phoff = size_of::<Elf64_Ehdr>() as u64;
        header.e_phentsize = size_of::<Elf64_Phdr>() as u16;
        header.e_phnum = 1;
        header.e_entry = 0x100_0010;
        let mut segment =
            Elf64_Phdr { p_type: PT_LOAD, p_offset: 0x1000, p_paddr: 0x100_0000, ..Default::default() };
        (segment.p_filesz, segment.p_memsz) = (0x3000, 0x5000);
        change(&mut header, &mut segment);
        let mut bytes = [header.as_slice(), segment.as_slice()].concat();
        bytes.resize(0x1000, 0);
        bytes.resize(0x4000, 0x90);
        bytes
    }

    fn load(bytes: &[u8]) -> Result<LoadedKernel, KernelError> {
        load_kernel(&memory(), &file(bytes))
    }

    #[test]
    fn a_kernel_goes_where_it_wants_to_be() {
        let mem = memory();
        let kernel = load_kernel(&mem, &file(&vmlinux(|_, _| {}))).unwrap();
        assert_eq!((kernel.entry, kernel.end), (0x100_0010, 0x100_5000));
        let byte = |at| mem.read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!([0xff_ffff, 0x100_0000, 0x100_2fff, 0x100_3000].map(byte), [0, 0x90, 0x90, 0]);
    }

    #[test]
    fn each_bad_kernel_is_called_by_its_name() {
        let says = |bytes: &[u8]| load(bytes).unwrap_err().to_string();
        assert!(says(&[]).contains("not an ELF file"));
        assert!(says(&[0x42; 5000]).contains("not an ELF file"));
        let mut bzimage = vec![0; 0x1000];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        assert!(says(&bzimage).contains("bzImage"));
        assert!(says(&vmlinux(|header, _| header.e_machine = 183)).contains("not a 64-bit x86"));
        assert!(says(&vmlinux(|header, _| header.e_ident[4] = 1)).contains("not a 64-bit x86"));
        assert!(says(&vmlinux(|_, _| {})[..0x3fff]).contains("cut short"));
        assert!(says(&vmlinux(|header, _| header.e_phoff = u64::MAX)).contains("cut short"));
        assert!(says(&vmlinux(|header, _| header.e_phnum = 0)).contains("no segments"));
        assert!(says(&vmlinux(|header, _| header.e_entry = 0x200_0000)).contains("entry point"));
        assert!(says(&vmlinux(|_, segment| segment.p_paddr = 0x1000)).contains("below 1 MiB"));
        assert!(says(&vmlinux(|_, segment| segment.p_paddr = u64::MAX - 5)).contains("no end"));
        assert!(says(&vmlinux(|_, segment| segment.p_offset = u64::MAX - 5)).contains("cut short"));
        assert!(says(&vmlinux(|_, segment| segment.p_memsz = 1)).contains("cut short"));
        let large = says(&vmlinux(|_, segment| segment.p_memsz = 64 << 20));
        assert_eq!(large, "the kernel needs guest memory up to 80 MiB, the machine has 32 MiB");
    }

    #[test]
    fn damage_anywhere_in_the_headers_is_no_panic() {
        let good = vmlinux(|_, _| {});
        for at in 0..120 {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = value;
                let _either_way = load(&bytes);
            }
        }
    }

    #[test]
    fn an_initramfs_goes_to_the_end_or_is_refused() {
        let mem = memory();
        let kernel = LoadedKernel { entry: 0x100_0000, end: 0x180_0000 };
        assert_eq!(load_initramfs(&mem, &file(&[7; 5000]), &kernel).unwrap(), (0x1ff_e000, 5000));
        assert_eq!(mem.read_obj::<u8>(GuestAddress(0x1ff_e000 + 4999)).unwrap(), 7);
        let large = load_initramfs(&mem, &file(&vec![7; 9 << 20]), &kernel).unwrap_err().to_string();
        assert!(large.contains("give more memory"), "{large}");
    }
}
