//! The uncompressed kernel inside a bzImage (Documentation/arch/x86/boot.rst, protocol 2.08 and later).
//!
//! A processor that is emulated in software takes seconds to run the kernel's own decompressor.

use std::io::{Read, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

const SETUP_SECTORS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// Every packer but gzip has the unpacked size appended by the kernel's build.
const SIZE_SUFFIX: usize = 4;

/// The ELF file packed into `image`.
pub(crate) fn unpack(image: &[u8]) -> Result<Vec<u8>> {
    let payload = payload(image).context("not a bzImage of boot protocol 2.08 or later")?;
    let bare = payload.get(..payload.len().saturating_sub(SIZE_SUFFIX)).unwrap_or_default();
    let elf = match payload {
        [0x1f, 0x8b, ..] => gunzip(payload)?,
        [0xfd, b'7', b'z', ..] => filter("xz", bare)?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => filter("zstd", bare)?,
        [0x02, 0x21, 0x4c, 0x18, ..] => filter("lz4", bare)?,
        _ => bail!("the kernel's payload is packed in an unknown way"),
    };
    if !elf.starts_with(b"\x7fELF") {
        bail!("the kernel's payload is not an ELF file");
    }
    Ok(elf)
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    if image.get(MAGIC..MAGIC + 4)? != b"HdrS" {
        return None;
    }
    let sectors = match *image.get(SETUP_SECTORS)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + word(image, PAYLOAD_OFFSET)?;
    image.get(start..start.checked_add(word(image, PAYLOAD_LENGTH)?)?)
}

fn word(image: &[u8], at: usize) -> Option<usize> {
    let bytes: [u8; 4] = image.get(at..at + 4)?.try_into().ok()?;
    usize::try_from(u32::from_le_bytes(bytes)).ok()
}

fn gunzip(packed: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    flate2::read::GzDecoder::new(packed).read_to_end(&mut out).context("unpacking gzip")?;
    Ok(out)
}

fn filter(program: &str, packed: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new(program)
        .args(["-d", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let mut stdin = child.stdin.take().context("no pipe")?;
    let packed = packed.to_vec();
    let feeder = std::thread::spawn(move || stdin.write_all(&packed));
    let output = child.wait_with_output().with_context(|| format!("waiting for {program}"))?;
    let fed = feeder.join().map_err(|_| anyhow::anyhow!("feeding {program}"))?;
    if !output.status.success() {
        bail!("{program} failed: {}", output.status);
    }
    fed.with_context(|| format!("feeding {program}"))?;
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(packed: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[SETUP_SECTORS] = 1;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&(packed.len() as u32).to_le_bytes());
        image.extend_from_slice(packed);
        image
    }

    #[test]
    fn gzip_payload_comes_out() {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(b"\x7fELF and more").unwrap();
        let packed = packer.finish().unwrap();
        assert_eq!(unpack(&image(&packed)).unwrap(), b"\x7fELF and more");
    }

    #[test]
    fn other_payloads_are_refused() {
        assert!(unpack(&image(b"nothing known")).is_err());
        assert!(unpack(b"short").is_err());
    }
}
