//! Drives an agent in a running machine through its whole RPC, and says of each case whether it held.
//!
//! `cargo run -p hyper-agent --example drive -- VSOCK_PATH LAYER_TAR [CASE]...`
//!
//! `VSOCK_PATH` is the machine's vsock socket: connections go out with a `CONNECT port` line, the doorbell comes in at
//! `VSOCK_PATH_1026`, which this program listens on; start it before the machine. The machine has a disk with serial `image`, which
//! becomes the unpacked layer, and one with serial `layer`, an ext4 file system. The layer holds busybox.

mod cases;
mod guest;

use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use guest::{Failure, Guest};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match drive().await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("drive: {error}"));
            ExitCode::from(125)
        }
    }
}

fn say(line: &str) {
    // Nowhere is left to report a broken standard output.
    let _ = writeln!(std::io::stdout(), "{line}");
}

async fn drive() -> Result<bool, Failure> {
    let mut arguments = std::env::args().skip(1);
    let (Some(path), Some(layer)) = (arguments.next(), arguments.next()) else {
        return Err("usage: drive VSOCK_PATH LAYER_TAR [CASE]...".into());
    };
    let wanted: Vec<String> = arguments.collect();
    let began = Instant::now();
    let guest = Guest::wait_for(&path).await?;
    say(&format!("doorbell after {:?}", began.elapsed()));
    guest.prepare(&layer).await?;
    say(&format!("prepared after {:?}", began.elapsed()));
    let mut failed = 0;
    for (name, case) in cases::ALL {
        if !wanted.is_empty() && !wanted.iter().any(|w| w == name) {
            continue;
        }
        let began = Instant::now();
        match case(guest.clone()).await {
            Ok(()) => say(&format!("ok    {name} {:?}", began.elapsed())),
            Err(error) => {
                failed += 1;
                say(&format!("FAIL  {name} {:?}: {error}", began.elapsed()));
            }
        }
    }
    guest.shutdown().await?;
    say(&format!("shut down; {failed} failed"));
    Ok(failed == 0)
}
