//! A door for the fuzzer: the file that a machine was saved in.

use hyper_vmm_spec::{BalloonSpec, DeviceSpec, FdSlot, SpecError, VmSpec};

use crate::snapshot::{Saved, Shape, sealed};

fn shape() -> Result<Shape, SpecError> {
    let balloon = DeviceSpec::Balloon(BalloonSpec { free_page_reporting: true });
    let spec = VmSpec::new(1, 64, FdSlot(0), "")?.with_device(DeviceSpec::Rng)?.with_device(balloon)?;
    Ok(Shape::of(&spec))
}

/// Reads a file of these bytes as it is, and once more with the length and checksum that its body has.
pub fn snapshot(bytes: &[u8]) {
    let Ok(shape) = shape() else { return };
    for bytes in [bytes.to_vec(), sealed(bytes)] {
        let file = rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC);
        let Ok(file) = file.map(std::fs::File::from) else { return };
        if std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).is_ok() {
            drop(Saved::read(&shape, &file));
        }
    }
}
