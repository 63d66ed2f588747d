//! What containerd is told of this runtime before there is a pod (`-info`).

use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};

use crate::{ShimError, VERSION};

/// Annotation with what of a root's mounts is left to the runtime: kinds, and steps (`STEP/*`) that are done before a kind is mounted.
/// Making a file system (`mkfs`) stays with containerd.
const ALLOW_MOUNTS: (&str, &str) = ("containerd.io/runtime-allow-mounts", "erofs,format/*,mkdir/*");

/// The answer, encoded.
pub(crate) fn run() -> Result<Vec<u8>, ShimError> {
    let version = RuntimeVersion { version: VERSION.to_owned(), ..Default::default() };
    let (name, value) = ALLOW_MOUNTS;
    let info = RuntimeInfo {
        name: "io.containerd.hyper.v2".to_owned(),
        version: MessageField::some(version),
        annotations: [(name.to_owned(), value.to_owned())].into(),
        ..Default::default()
    };
    Ok(info.write_to_bytes()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_of_disks_are_left_to_us() {
        let info = RuntimeInfo::parse_from_bytes(&run().unwrap()).unwrap();
        assert_eq!(info.annotations[ALLOW_MOUNTS.0], ALLOW_MOUNTS.1);
    }
}
