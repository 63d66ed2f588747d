//! The action `delete`: a shim has died, or never came up. All that it held went with it, but for its directory.

use containerd_shim::Flags;
use containerd_shim_protos::api::DeleteResponse;
use hyper_sandbox::Timestamp;
use protobuf::Message;

use crate::bundle::Bundle;
use crate::serve::run_dir;
use crate::{ShimError, encode, socket_of};

/// Exit code of a container whose shim has died: as of one that was killed.
const KILLED: u32 = 137;

/// Returns the encoded answer.
pub(crate) fn run(flags: &Flags) -> Result<Vec<u8>, ShimError> {
    let bundle = match flags.bundle.as_str() {
        "" => std::env::current_dir().map_err(ShimError::io("find", "the bundle"))?,
        bundle => bundle.into(),
    };
    let config = Bundle::read(&bundle).unwrap_or_default();
    let group = config.sandbox_id().unwrap_or(&flags.id);
    let socket = socket_of(flags, group);
    let path = socket.strip_prefix("unix://").unwrap_or(&socket);
    // The shim of a pod that lives on has other containers to care for.
    if std::os::unix::net::UnixStream::connect(path).is_err() {
        hyper_sandbox::pod::clean(&run_dir(&socket));
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(ShimError::io("remove", path)(error));
            }
            _ => {}
        }
    }
    let answer = DeleteResponse {
        exit_status: KILLED,
        exited_at: encode::time(Timestamp::now()),
        ..Default::default()
    };
    Ok(answer.write_to_bytes()?)
}
