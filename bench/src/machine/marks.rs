//! Bytes that a guest writes to a port, as another VMM hands them on: to its standard output.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

use anyhow::{Context, Result, bail};

use super::Start;
use crate::program::{LIMIT, Watch, now_us};

/// Starts a VMM, waits for the guest's marks, ends it. `marks`: what means that the first process runs and, if that can be heard, that
/// the agent serves.
pub(super) fn start(command: &mut Command, marks: (u8, Option<u8>)) -> Result<Start> {
    let watch = Watch::start();
    let forked_us = now_us();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .with_context(|| format!("starting {}", command.get_program().display()))?;
    let result = read(&mut child, watch, forked_us, marks);
    child.kill().context("ending a VMM")?;
    child.wait().context("waiting for a VMM")?;
    result
}

fn read(
    child: &mut Child,
    watch: Watch,
    forked_us: u64,
    (user_space, agent_ready): (u8, Option<u8>),
) -> Result<Start> {
    let mut output = child.stdout.take().context("the VMM has no output")?;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut byte = [0];
        while let Ok(1) = output.read(&mut byte) {
            let [byte] = byte;
            if sender.send((byte, now_us())).is_err() {
                break;
            }
        }
    });
    let mut start = Start::default();
    loop {
        match receiver.recv_timeout(LIMIT) {
            Ok((byte, at)) if byte == user_space => {
                start.user_space_us = Some(at.saturating_sub(forked_us));
                if agent_ready.is_none() {
                    // Looked up for the last mark only: what follows would pay for it.
                    start.user_space_work_us = watch.work_us();
                    return Ok(start);
                }
            }
            Ok((byte, at)) if Some(byte) == agent_ready => {
                start.agent_ready_us = Some(at.saturating_sub(forked_us));
                start.agent_ready_work_us = watch.work_us();
                return Ok(start);
            }
            // Words of the VMM itself.
            Ok(_) => {}
            Err(error) => bail!("the guest did not come up ({error}); it got as far as {start:?}"),
        }
    }
}
