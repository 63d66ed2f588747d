//! Real archives, on request.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Instant;

use hyper_unpack::{Compression, LayerInput, Limits, unpack};
use sha2::{Digest, Sha256};

/// Unpacks the plain or compressed tar files named in `UNPACK_LAYERS` (colon between them, `digest=file` for a
/// compressed one) into `UNPACK_IMAGE` and says how long it took. For mounting the result and for measuring; nothing to
/// do without these variables.
#[test]
fn unpack_what_the_environment_names() {
    let (Ok(layers), Some(out)) = (std::env::var("UNPACK_LAYERS"), std::env::var_os("UNPACK_IMAGE")) else {
        return;
    };
    let layers: Vec<_> = layers.split(':').map(layer).collect();
    let mut image = File::create(out).unwrap();
    let started = Instant::now();
    let inputs = layers.into_iter().map(|(path, diff_id)| {
        Ok::<_, io::Error>(LayerInput {
            reader: File::open(path)?,
            compression: Compression::Detect,
            diff_id,
        })
    });
    let summary = unpack(inputs, &mut image, &Limits::default(), &mut |_| {}).unwrap();
    let seconds = started.elapsed().as_secs_f64();
    let rate = summary.uncompressed_bytes as f64 / 1e6 / seconds;
    writeln!(io::stdout(), "{summary:?}\n{seconds:.3} s, {rate:.0} MB/s of tar").unwrap();
}

fn layer(text: &str) -> (PathBuf, [u8; 32]) {
    let Some((digest, path)) = text.split_once('=') else {
        let mut hash = Sha256::new();
        io::copy(&mut File::open(text).unwrap(), &mut hash).unwrap();
        return (text.into(), hash.finalize().into());
    };
    let byte = |at: usize| u8::from_str_radix(&digest[2 * at..2 * at + 2], 16).unwrap();
    (path.into(), std::array::from_fn(byte))
}
