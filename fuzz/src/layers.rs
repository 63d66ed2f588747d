//! Layers of images: tar streams, compressed or not, on their way into one disk.

use std::io;

use hyper_unpack::{BlockSink, Compression, LayerInput, Limits, unpack};

/// Bounds that an input of a fuzzer can meet.
const MOST_BYTES: u64 = 4 << 20;

/// A disk in memory.
struct Disk(Vec<u8>);

impl BlockSink for Disk {
    fn write_all_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        let end = usize::try_from(offset).ok().and_then(|start| start.checked_add(data.len()));
        let end = end.filter(|end| *end as u64 <= 2 * MOST_BYTES);
        // The limit of the image is half of that: whoever writes beyond it does not keep to it.
        let Some(end) = end else { panic!("{} bytes at {offset} of a disk that is bounded", data.len()) };
        if self.0.len() < end {
            self.0.resize(end, 0);
        }
        if let Some(place) = self.0.get_mut(end - data.len()..end) {
            place.copy_from_slice(data);
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The first byte says how many layers there are and how they are compressed. Digests are not those of the streams: that is found out at a layer's end,
/// when all of it has been worked off.
pub(crate) fn layers(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    let compression = match kind % 3 {
        0 => Compression::None,
        1 => Compression::Gzip,
        _ => Compression::Zstd,
    };
    let limits = Limits {
        max_layers: 4,
        max_entries: 2000,
        max_uncompressed_bytes: MOST_BYTES,
        max_image_bytes: MOST_BYTES,
        max_metadata_bytes: 1 << 20,
        max_header_bytes: 64 << 10,
        max_sparse_segments: 2000,
        ..Limits::default()
    };
    let count = usize::from(kind / 3 % 3) + 1;
    let each = rest.len().div_ceil(count).max(1);
    let inputs = rest.chunks(each).map(|reader| {
        let diff_id = hyper_image::fuzz::sha256(reader);
        Ok::<_, io::Error>(LayerInput { reader, compression, diff_id })
    });
    let mut disk = Disk(Vec::new());
    if let Ok(summary) = unpack(inputs, &mut disk, &limits, &mut |_| {}) {
        assert!(summary.image_bytes <= MOST_BYTES, "an image of {} bytes", summary.image_bytes);
    }
}
