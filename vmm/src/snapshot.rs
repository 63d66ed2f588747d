//! The file that a machine's state is saved in.
//!
//! ```text
//!  "HYPRSNAP" | version, 4 bytes | length of the body, 4 bytes | FNV-1a of the body, 8 bytes | body
//!  body: vCPUs, most vCPUs, memory MiB, kinds of devices | machine | vCPUs … | ports … | windows …
//! ```
//!
//! Numbers are little-endian, everything of variable length has its length before it. Such a file is data from outside: its length is
//! bounded, the checksum is looked at before anything else, and each part checks its own. It is read by the program that wrote it only:
//! the version changes with anything in it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use hyper_vmm_devices::state::{Reader, StateError, Writer};
use hyper_vmm_hv::{HvError, MachineState, VcpuState};
use hyper_vmm_spec::{DeviceSpec, VmSpec};

const MAGIC: &[u8; 8] = b"HYPRSNAP";
/// Changed whenever the meaning of a byte changes, in here or in a device.
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 24;
/// Longest body: 32 vCPUs of 12 KiB each and 19 windows of a few hundred bytes fit eight times.
const MAX_BODY_BYTES: usize = 4 << 20;

/// Why a machine was not saved or restored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SnapshotError {
    #[error("cannot {what}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the saved machine's file is not one")]
    Magic,
    #[error("the saved machine is of version {0}, this program reads {VERSION}")]
    Version(u32),
    #[error("the saved machine's file is cut short")]
    Short,
    #[error("the saved machine's file is damaged")]
    Checksum,
    #[error("the saved machine has other {0}")]
    Shape(&'static str),
    #[error("a machine with {0} cannot be saved")]
    Unsaved(&'static str),
    #[error("the saved memory is {found} bytes long, not {wanted}")]
    MemoryLength { found: u64, wanted: u64 },
    #[error("writing the machine's memory takes longer than {0} ms")]
    Late(u32),
    #[error("the saved memory is not open for reading only")]
    MemoryMode,
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Kvm(#[from] HvError),
}

pub(crate) fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> SnapshotError {
    move |source| SnapshotError::Io { what, source }
}

/// What must be the same in the machine that is saved and the one that goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shape {
    vcpus: u8,
    max_vcpus: u8,
    mem_mib: u32,
    devices: Vec<u8>,
}

impl Shape {
    pub(crate) fn of(spec: &VmSpec) -> Self {
        let kind = |device: &DeviceSpec| match device {
            DeviceSpec::Disk(_) => b'd',
            DeviceSpec::Net(_) => b'n',
            DeviceSpec::Vsock(_) => b'v',
            DeviceSpec::Share(_) => b's',
            DeviceSpec::Balloon(balloon) if balloon.free_page_reporting => b'B',
            DeviceSpec::Balloon(_) => b'b',
            DeviceSpec::Bay => b'y',
            DeviceSpec::HotMemory(_) => b'h',
            DeviceSpec::Rng => b'r',
            DeviceSpec::Console { .. } => b'c',
        };
        let devices = spec.devices().iter().map(kind).collect();
        Self { vcpus: spec.vcpus(), max_vcpus: spec.max_vcpus(), mem_mib: spec.mem_mib(), devices }
    }

    pub(crate) fn vcpus(&self) -> usize {
        self.vcpus.into()
    }

    fn write(&self, to: &mut Writer) {
        to.u8(self.vcpus);
        to.u8(self.max_vcpus);
        to.u32(self.mem_mib);
        to.bytes(&self.devices);
    }

    fn check(&self, from: &mut Reader<'_>) -> Result<(), SnapshotError> {
        let same = |same, what| if same { Ok(()) } else { Err(SnapshotError::Shape(what)) };
        same((from.u8()?, from.u8()?) == (self.vcpus, self.max_vcpus), "vCPUs")?;
        same(from.u32()? == self.mem_mib, "memory")?;
        same(from.bytes()? == self.devices, "devices")
    }
}

/// A machine's state, but for its memory.
#[derive(Debug)]
pub(crate) struct Saved {
    pub(crate) machine: MachineState,
    /// In order of their numbers.
    pub(crate) vcpus: Vec<VcpuState>,
    /// Devices on I/O ports, in the order in which they are built.
    pub(crate) ports: Vec<Vec<u8>>,
    /// Devices behind windows, in slot order.
    pub(crate) windows: Vec<Vec<u8>>,
}

fn write_list(to: &mut Writer, list: &[Vec<u8>]) {
    to.u32(u32::try_from(list.len()).unwrap_or(u32::MAX));
    for part in list {
        to.bytes(part);
    }
}

/// Each part takes at least the bytes of its length, so the list cannot be longer than the file.
fn read_list(from: &mut Reader<'_>) -> Result<Vec<Vec<u8>>, StateError> {
    let count = from.u32()?;
    (0..count).map(|_| Ok(from.bytes()?.to_vec())).collect()
}

impl Saved {
    fn to_bytes(&self, shape: &Shape) -> Vec<u8> {
        let mut body = Writer::default();
        shape.write(&mut body);
        body.bytes(&self.machine.to_bytes());
        write_list(&mut body, &self.vcpus.iter().map(VcpuState::to_bytes).collect::<Vec<_>>());
        write_list(&mut body, &self.ports);
        write_list(&mut body, &self.windows);
        sealed(&body.done())
    }

    fn from_body(body: &[u8], shape: &Shape) -> Result<Self, SnapshotError> {
        let mut from = Reader::new(body);
        shape.check(&mut from)?;
        let machine = MachineState::from_bytes(from.bytes()?)?;
        let vcpus = read_list(&mut from)?;
        let vcpus = vcpus.iter().map(|bytes| VcpuState::from_bytes(bytes)).collect::<Result<Vec<_>, _>>()?;
        let saved = Self { machine, vcpus, ports: read_list(&mut from)?, windows: read_list(&mut from)? };
        from.end()?;
        let count = |found: usize, wanted: usize, what| {
            if found == wanted { Ok(()) } else { Err(SnapshotError::Shape(what)) }
        };
        count(saved.vcpus.len(), usize::from(shape.vcpus), "vCPUs")?;
        count(saved.windows.len(), shape.devices.len(), "devices")?;
        Ok(saved)
    }

    /// Writes the file, which is empty.
    pub(crate) fn write(&self, shape: &Shape, file: &File) -> Result<(), SnapshotError> {
        file.write_all_at(&self.to_bytes(shape), 0).map_err(io_error("write the machine's state"))
    }

    /// Reads a file that a machine of this shape was saved in.
    pub(crate) fn read(shape: &Shape, file: &File) -> Result<Self, SnapshotError> {
        let short = |source: io::Error| match source.kind() {
            io::ErrorKind::UnexpectedEof => SnapshotError::Short,
            _ => SnapshotError::Io { what: "read the machine's state", source },
        };
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0).map_err(short)?;
        let (length, sum) = parse_header(&header)?;
        let mut body = vec![0; length];
        file.read_exact_at(&mut body, HEADER_BYTES as u64).map_err(short)?;
        if checksum(&body) != sum {
            return Err(SnapshotError::Checksum);
        }
        Self::from_body(&body, shape)
    }
}

/// Length and checksum of the body.
fn parse_header(header: &[u8; HEADER_BYTES]) -> Result<(usize, u64), SnapshotError> {
    let Some((magic, rest)) = header.split_first_chunk::<8>() else { return Err(SnapshotError::Short) };
    if magic != MAGIC {
        return Err(SnapshotError::Magic);
    }
    let mut rest = Reader::new(rest);
    let version = rest.u32()?;
    if version != VERSION {
        return Err(SnapshotError::Version(version));
    }
    let length = usize::try_from(rest.u32()?).unwrap_or(usize::MAX);
    if length > MAX_BODY_BYTES {
        return Err(SnapshotError::Checksum);
    }
    Ok((length, rest.u64()?))
}

/// A file with this body behind a header that fits it.
pub(crate) fn sealed(body: &[u8]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(checksum(body).to_le_bytes());
    bytes.extend(body);
    bytes
}

/// FNV-1a over words of 8 bytes, the last one filled with zeroes: it is damage that is looked for, not malice.
fn checksum(bytes: &[u8]) -> u64 {
    const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    bytes.chunks(8).fold(BASIS, |hash, chunk| {
        let word = chunk.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        (hash ^ word).wrapping_mul(PRIME)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper_vmm_spec::{BalloonSpec, FdSlot};

    fn shape() -> Shape {
        let spec = VmSpec::new(1, 64, FdSlot(0), "").unwrap().with_device(DeviceSpec::Rng).unwrap();
        Shape::of(&spec.with_device(DeviceSpec::Bay).unwrap())
    }

    fn saved() -> Saved {
        Saved {
            machine: MachineState::default(),
            vcpus: vec![VcpuState::default()],
            ports: vec![b"port".to_vec(), Vec::new()],
            windows: vec![b"rng".to_vec(), b"bay".to_vec()],
        }
    }

    fn file(bytes: &[u8]) -> File {
        let file = File::from(rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    fn read(bytes: &[u8]) -> Result<Saved, SnapshotError> {
        Saved::read(&shape(), &file(bytes))
    }

    #[test]
    fn what_is_written_is_read() {
        let file = file(b"");
        saved().write(&shape(), &file).unwrap();
        let back = Saved::read(&shape(), &file).unwrap();
        assert_eq!((back.ports, back.windows), (saved().ports, saved().windows));
        assert_eq!(back.vcpus.len(), 1);
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_one_line_of_error() {
        let bytes = saved().to_bytes(&shape());
        for cut in 0..bytes.len() {
            assert!(matches!(read(&bytes[..cut]), Err(SnapshotError::Short)), "{cut}");
        }
        // Every bit of the header and its surroundings, one bit of each byte behind.
        let bits = (0..64 * 8).chain((64..bytes.len()).map(|byte| byte * 8 + byte % 8));
        for bit in bits {
            let mut odd = bytes.clone();
            odd[bit / 8] ^= 1 << (bit % 8);
            let error = read(&odd).unwrap_err().to_string();
            assert!(!error.contains('\n') && error.starts_with("the saved machine"), "{bit}: {error}");
        }
    }

    #[test]
    fn lengths_that_lie_are_refused_behind_a_good_checksum() {
        let good = saved().to_bytes(&shape());
        for at in HEADER_BYTES..good.len() - 4 {
            let mut odd = good.clone();
            odd[at..at + 4].fill(0xff);
            let sum = checksum(&odd[HEADER_BYTES..]).to_le_bytes();
            odd[16..24].copy_from_slice(&sum);
            // Register values are not judged here.
            let _refused_or_not = read(&odd);
        }
        let mut longer = good.clone();
        longer[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(read(&longer), Err(SnapshotError::Checksum)));
    }

    #[test]
    fn other_machines_are_told_apart() {
        let file = file(&saved().to_bytes(&shape()));
        let spec = || VmSpec::new(1, 64, FdSlot(0), "").unwrap().with_device(DeviceSpec::Rng).unwrap();
        let balloon = |free_page_reporting| DeviceSpec::Balloon(BalloonSpec { free_page_reporting });
        let others = [
            (VmSpec::new(2, 64, FdSlot(0), "").unwrap(), "vCPUs"),
            (spec().with_max_vcpus(2).unwrap(), "vCPUs"),
            (VmSpec::new(1, 65, FdSlot(0), "").unwrap(), "memory"),
            (spec(), "devices"),
            (spec().with_device(balloon(true)).unwrap(), "devices"),
        ];
        for (spec, what) in others {
            match Saved::read(&Shape::of(&spec), &file) {
                Err(SnapshotError::Shape(found)) => assert_eq!(found, what),
                other => panic!("{what}: {other:?}"),
            }
        }
        let kinds = [false, true].map(|on| Shape::of(&spec().with_device(balloon(on)).unwrap()));
        assert_ne!(kinds[0], kinds[1], "queues depend on it");
    }
}
