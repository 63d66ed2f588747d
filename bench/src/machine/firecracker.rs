//! One start of Firecracker, without its API server and with its own kernel arguments, its guest's console off.
//!
//! It has no port that it hands on but the serial line's, so a first process of our own writes there before it becomes the agent.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use super::{MEM_MIB, Parts, Start};

pub(crate) const PROGRAM: &str = "firecracker";

/// What Firecracker gives a kernel by itself, and what spares it the same probing as with the others.
const CMDLINE: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce \
    quiet tsc=reliable no_timer_check random.trust_cpu=on rdinit=/mark";

/// A byte that Firecracker's own words do not have.
const MARK: u8 = 1;

/// Where the program's code lies in the guest: at the start of a page of its own.
const ADDRESS: u64 = 0x40_0000;
/// Length of an ELF file's header, bytes.
const EHDR: u16 = 64;
/// Length of one of its program headers, bytes.
const PHDR: u16 = 56;

/// Starts a machine, waits for its first process, ends it.
pub(crate) fn start(parts: &Parts) -> Result<Start> {
    let folder = tempfile::tempdir()?;
    let initramfs = folder.path().join("initramfs.cpio");
    let mut archive =
        std::fs::read(&parts.initramfs).with_context(|| format!("reading {}", parts.initramfs.display()))?;
    archive.extend(archive_of_mark());
    std::fs::write(&initramfs, archive).context("writing the initramfs")?;
    let config = folder.path().join("config.json");
    std::fs::write(&config, configuration(parts, &initramfs, folder.path()).to_string())
        .context("writing Firecracker's configuration")?;
    let mut command = Command::new(PROGRAM);
    command.args(["--no-api", "--level", "Error", "--config-file"]).arg(&config);
    super::marks::start(&mut command, (MARK, None))
}

fn configuration(parts: &Parts, initramfs: &Path, folder: &Path) -> serde_json::Value {
    json!({
        "boot-source": { "kernel_image_path": parts.kernel, "initrd_path": initramfs, "boot_args": CMDLINE },
        "drives": [],
        "machine-config": { "vcpu_count": 1, "mem_size_mib": MEM_MIB },
        "vsock": { "guest_cid": 3, "uds_path": folder.join("vsock") },
        "balloon": { "amount_mib": 0, "deflate_on_oom": false, "free_page_reporting": true },
        "entropy": {},
    })
}

/// A second archive for the end of an initramfs (the kernel unpacks one after the other), with the file `mark` in it.
fn archive_of_mark() -> Vec<u8> {
    let mut archive = Vec::new();
    let program = mark();
    for (name, mode, content) in [("mark", 0o100_755, program.as_slice()), ("TRAILER!!!", 0, &[])] {
        let fields = [1, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        archive.extend(b"070701");
        archive.extend(fields.map(|field| format!("{field:08x}")).concat().bytes());
        archive.extend(name.bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

/// An ELF program that writes [`MARK`] to the first serial port and becomes `/init`, with the arguments and the environment it was given.
fn mark() -> Vec<u8> {
    #[rustfmt::skip]
    let code: &[u8] = &[
        0xb8, 0xac, 0, 0, 0,                  // mov eax, SYS_iopl
        0xbf, 3, 0, 0, 0,                     // mov edi, 3
        0x0f, 0x05,                           // syscall
        0xba, 0xf8, 0x03, 0, 0,               // mov edx, 0x3f8
        0xb0, MARK,                           // mov al, MARK
        0xee,                                 // out dx, al
        0x48, 0x8d, 0x74, 0x24, 0x08,         // lea rsi, [rsp + 8]
        0x8b, 0x04, 0x24,                     // mov eax, [rsp]
        0x48, 0x8d, 0x54, 0xc4, 0x10,         // lea rdx, [rsp + 8 * rax + 16]
        0x48, 0x8d, 0x3d, 0x07, 0, 0, 0,      // lea rdi, [rip + 7]
        0xb8, 0x3b, 0, 0, 0,                  // mov eax, SYS_execve
        0x0f, 0x05,                           // syscall
        b'/', b'i', b'n', b'i', b't', 0,
    ];
    let at = ADDRESS + u64::from(EHDR + PHDR);
    let length = code.len() as u64 + u64::from(EHDR + PHDR);
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let halves = |elf: &mut Vec<u8>, values: &[u16]| elf.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    let words = |elf: &mut Vec<u8>, values: &[u32]| elf.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    let longs = |elf: &mut Vec<u8>, values: &[u64]| elf.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    // ET_EXEC for x86-64.
    halves(&mut elf, &[2, 62]);
    words(&mut elf, &[1]);
    longs(&mut elf, &[at, EHDR.into(), 0]);
    words(&mut elf, &[0]);
    halves(&mut elf, &[EHDR, PHDR, 1, 0, 0, 0]);
    // PT_LOAD, readable and executable: the whole file.
    words(&mut elf, &[1, 5]);
    longs(&mut elf, &[0, ADDRESS, ADDRESS, length, length, 0x1000]);
    elf.extend(code);
    elf
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `iopl` needs root and a port is written to, so the program is only looked at, not run.
    #[test]
    fn the_program_is_one_that_loads_where_it_says() {
        let elf = mark();
        let long = |at: usize| u64::from_le_bytes(elf.get(at..at + 8).unwrap().try_into().unwrap());
        let entry = usize::try_from(long(24) - ADDRESS).unwrap();
        assert_eq!((long(32), entry), (u64::from(EHDR), usize::from(EHDR + PHDR)));
        assert_eq!(long(96), elf.len() as u64);
        assert_eq!(elf.get(entry..entry + 5).unwrap(), [0xb8, 0xac, 0, 0, 0]);
        // The name that is given to execve follows the last instruction: 7 bytes after the one that takes its address.
        assert!(elf.ends_with(b"\x0f\x05/init\0"));
    }

    #[test]
    fn the_archive_is_whole_words() {
        let archive = archive_of_mark();
        assert_eq!(archive.len() % 4, 0);
        assert!(archive.starts_with(b"070701") && archive.windows(10).any(|name| name == b"TRAILER!!!"));
    }
}
