//! The flag `-info`: what containerd 2 wants to know of a runtime before it is used.

use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::Message;

use crate::{NAME, ShimError, VERSION};

/// Returns the encoded answer. The options on standard input do not change it.
pub(crate) fn run() -> Result<Vec<u8>, ShimError> {
    let version = RuntimeVersion { version: VERSION.to_owned(), ..Default::default() };
    let info =
        RuntimeInfo { name: NAME.to_owned(), version: MessageField::some(version), ..Default::default() };
    Ok(info.write_to_bytes()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_and_version_are_told() {
        let info = RuntimeInfo::parse_from_bytes(&run().unwrap()).unwrap();
        assert_eq!((info.name.as_str(), info.version.version.as_str()), (NAME, VERSION));
    }
}
