//! The options of the runtime's handler as containerd gives them to a shim that it starts: on standard input of `start`.
//!
//! That is an `Any` up to containerd 2.2, and from 2.3 on a `containerd.runtime.bootstrap.v1.BootstrapParams`, which has one among its
//! extensions. With the Sandbox API nothing else has them. They are kept in the bundle, from where the pod's shim takes them.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use protobuf::CodedInputStream;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::stdio::dup2_stdin;

use crate::ShimError;
use crate::config::is_ours;

/// Where they are in the bundle; it goes with the bundle.
const FILE: &str = "hyper-options";
/// Largest options, bytes: those with a whole configuration in them.
const MAX_BYTES: u64 = 1 << 20;

/// Tag of `BootstrapParams.extensions`, of which each is a message with an `Any` in its first field.
const EXTENSIONS: u32 = 8 << 3 | 2;
const FIRST: u32 = 1 << 3 | 2;

/// The options in what containerd has written; `None` when there are none of this kind of runtime.
fn find(bytes: &[u8]) -> Result<Option<Any>, protobuf::Error> {
    let mut all = Vec::new();
    for extension in fields(bytes, EXTENSIONS)? {
        all.extend(fields(&extension, FIRST)?);
    }
    // Both have text in their first two fields, so that each can be taken for the other; the type tells.
    all.push(bytes.to_vec());
    Ok(all.iter().filter_map(|any| Any::parse_from_bytes(any).ok()).find(is_ours))
}

/// The values of a field with this tag.
fn fields(message: &[u8], tag: u32) -> Result<Vec<Vec<u8>>, protobuf::Error> {
    let mut input = CodedInputStream::from_bytes(message);
    let mut values = Vec::new();
    while let Some(found) = input.read_raw_tag_or_eof()? {
        if found == tag {
            values.push(input.read_bytes()?);
        } else {
            protobuf::rt::skip_field_for_tag(found, &mut input)?;
        }
    }
    Ok(values)
}

/// Keeps what is on standard input, which can be read once more then.
pub(crate) fn keep(bundle: &Path) -> Result<(), ShimError> {
    let mut bytes = Vec::new();
    let read = std::io::stdin().take(MAX_BYTES).read_to_end(&mut bytes);
    read.map_err(ShimError::io("read", "the runtime's options"))?;
    let again = || {
        let mut file = File::from(memfd_create("options", MemfdFlags::CLOEXEC)?);
        file.write_all(&bytes)?;
        file.seek(SeekFrom::Start(0))?;
        dup2_stdin(&file)?;
        Ok(())
    };
    again().map_err(ShimError::io("pass on", "the runtime's options"))?;
    // What is not understood is as good as nothing here: a containerd to come may write something else.
    match find(&bytes) {
        Ok(Some(options)) => write(bundle, &options),
        Ok(None) | Err(_) => Ok(()),
    }
}

fn write(bundle: &Path, options: &Any) -> Result<(), ShimError> {
    let path = bundle.join(FILE);
    let bytes = options.write_to_bytes()?;
    let write = || {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600).open(&path)?.write_all(&bytes)
    };
    write().map_err(ShimError::io("write", path.display().to_string()))
}

/// What was kept. What cannot be read or understood is as good as nothing: who is asked for a container is given them once more.
pub(crate) fn kept(bundle: &Path) -> Option<Any> {
    let mut bytes = Vec::new();
    let path = bundle.join(FILE);
    match File::open(&path).and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes)) {
        Ok(_) => Any::parse_from_bytes(&bytes).ok(),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the runtime's options are lost");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Any {
        Any {
            type_url: "types.containerd.io/runtimeoptions.v1.Options".into(),
            value: vec![1, 2],
            ..Any::default()
        }
    }

    /// A field that is text, bytes or a message of less than 128 bytes.
    fn field(tag: u32, bytes: &[u8]) -> Vec<u8> {
        [&[u8::try_from(tag).unwrap(), u8::try_from(bytes.len()).unwrap()], bytes].concat()
    }

    #[test]
    fn options_are_found_in_what_old_and_new_containerds_write() {
        let any = options().write_to_bytes().unwrap();
        assert_eq!(find(&any).unwrap(), Some(options()));
        let other = Any { type_url: "other".into(), ..Any::default() }.write_to_bytes().unwrap();
        assert_eq!(find(&other).unwrap(), None);
        let extensions = [&other, &any].map(|any| field(EXTENSIONS, &field(FIRST, any))).concat();
        let bootstrap =
            [field(FIRST, b"one"), field(2 << 3 | 2, b"k8s.io"), vec![3 << 3, 4], extensions].concat();
        assert_eq!(find(&bootstrap).unwrap(), Some(options()));
        assert_eq!(find(&[field(FIRST, b"one"), field(2 << 3 | 2, b"k8s.io")].concat()).unwrap(), None);
        assert_eq!(find(&[]).unwrap(), None);
        assert!(find(b"\xff").is_err());
    }

    #[test]
    fn options_are_kept_in_the_bundle() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(kept(bundle.path()), None);
        write(bundle.path(), &options()).unwrap();
        assert_eq!(kept(bundle.path()), Some(options()));
        std::fs::write(bundle.path().join(FILE), b"\xff").unwrap();
        assert_eq!(kept(bundle.path()), None);
    }
}
