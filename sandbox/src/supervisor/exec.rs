//! More processes in the running container.

use std::sync::Arc;

use hyper_protocol::rpc::agent::{CreateProcessRequest, Stdio};
use protobuf::MessageField;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::boot::in_dockers_words;
use super::console::Console;
use super::run::{Run, Streams, check_started};
use super::serve::{attend, refuse, reply};
use super::shared::Shared;
use crate::config::ConfigError;
use crate::launch::{call, context, rpc_error, scaled_ms};
use crate::logs::LogSource;
use crate::state::Status;
use crate::store::ExecConfig;
use crate::stream::wire::{Refusal, Reply};
use crate::stream::{AttachOptions, FrameError, FrameReader};
use crate::{SandboxError, StartError, oci};

/// How long the last output may take to come when the process has ended. Something that it left behind may hold it open for ever.
const LAST_OUTPUT_MS: u64 = 2_000;
/// Exit code when the end of the process is not known: as of one that was killed.
const UNKNOWN_EXIT_CODE: u8 = 137;

/// Starts a process, answers, and (with `attach`) passes its streams on.
pub(super) async fn exec(
    shared: &Arc<Shared>,
    config: ExecConfig,
    attach: Option<AttachOptions>,
    from: FrameReader<OwnedReadHalf>,
    mut to: OwnedWriteHalf,
) -> Result<(), FrameError> {
    let console = Arc::new(Console::of(config.terminal, true));
    let attachment = attach.map(|options| console.attach(options));
    let process_id = match start(shared, &config, &console, attach).await {
        Ok(process_id) => process_id,
        Err(refusal) => return refuse(to, from, shared, refusal).await,
    };
    reply(&mut to, &Reply::Done).await?;
    match attachment {
        Some(attachment) => attend(shared, &process_id, &console, attachment, from, to).await,
        None => Ok(()),
    }
}

async fn start(
    shared: &Arc<Shared>,
    config: &ExecConfig,
    console: &Arc<Console>,
    attach: Option<AttachOptions>,
) -> Result<String, Refusal> {
    let _busy = shared.busy().await;
    let run = shared.running()?;
    if shared.status() == Status::Paused {
        let name = shared.container().name().to_owned();
        return Err(Refusal::new(format!("container {name} is paused, unpause the container before exec")));
    }
    if config.args.is_empty() {
        return Err(SandboxError::from(ConfigError::NoCommand).into());
    }
    let process_id = run.new_exec();
    let streams = create(&run, config, &process_id, attach).await?;
    console.open_stdin(streams.stdin).await;
    let mut pumps = JoinSet::new();
    for (stream, source) in [(streams.stdout, LogSource::Stdout), (streams.stderr, LogSource::Stderr)] {
        let Some(stream) = stream else { continue };
        let console = Arc::clone(console);
        pumps.spawn(async move { console.pump(stream, source, None).await });
    }
    let process = run.process(&process_id);
    let started = run.agent.rpc.start_process(call(), &process).await;
    let started = started.map_err(|error| Refusal::new(rpc_error("StartProcess")(error).to_string()))?;
    let program = config.args.first().map_or("", String::as_str);
    check_started(started.exit_code, &started.error, program)?;
    // The end is awaited even when the client goes: somebody must read the output.
    tokio::spawn(finish(Arc::clone(&run), process_id.clone(), Arc::clone(console), pumps));
    Ok(process_id)
}

async fn create(
    run: &Run,
    config: &ExecConfig,
    process_id: &str,
    attach: Option<AttachOptions>,
) -> Result<Streams, StartError> {
    let mut stdio = Stdio { terminal: config.terminal, ..Default::default() };
    let mut streams = Streams::default();
    let open = async || run.agent.open_stream().await.map_err(SandboxError::Vm);
    if config.open_stdin && attach.is_some_and(|options| options.stdin) {
        let (id, stream) = open().await?;
        (stdio.stdin, streams.stdin) = (id, Some(stream));
    }
    let wants = |out: bool, err: bool| {
        attach.is_some_and(|options| (out && options.stdout) || (err && options.stderr))
    };
    if wants(true, config.terminal) {
        let (id, stream) = open().await?;
        (stdio.stdout, streams.stdout) = (id, Some(stream));
    }
    if !config.terminal && wants(false, true) {
        let (id, stream) = open().await?;
        (stdio.stderr, streams.stderr) = (id, Some(stream));
    }
    if let Some(size) = attach.and_then(|options| options.size) {
        (stdio.rows, stdio.cols) = (u32::from(size.rows), u32::from(size.cols));
    }
    let user = if config.user.is_empty() { &run.config.process.user } else { &config.user };
    let request = CreateProcessRequest {
        container_id: run.container_id.clone(),
        process_id: process_id.to_owned(),
        oci_process: oci::exec_process(&run.config, config, &run.container_id).to_string().into_bytes(),
        user: user.clone(),
        additional_groups: run.config.process.additional_groups.clone(),
        stdio: MessageField::some(stdio),
        ..Default::default()
    };
    let created = run.agent.rpc.create_process(call(), &request).await;
    created.map_err(|error| in_dockers_words(rpc_error("CreateProcess")(error)))?;
    Ok(streams)
}

/// Waits for the end of a process, and tells its client.
async fn finish(run: Arc<Run>, process_id: String, console: Arc<Console>, mut pumps: JoinSet<()>) {
    let status = run.agent.rpc.wait_process(context(None), &run.process(&process_id)).await;
    let (exit_code, reason) = match status {
        Ok(status) => (u8::try_from(status.exit_code).unwrap_or(u8::MAX), ""),
        Err(error) => {
            tracing::debug!(process_id, %error, "its end is not known");
            (UNKNOWN_EXIT_CODE, "the container ended before the process did")
        }
    };
    let all = async { while pumps.join_next().await.is_some() {} };
    if timeout(scaled_ms(LAST_OUTPUT_MS), all).await.is_err() {
        tracing::debug!(process_id, "the last output did not come");
    }
    console.finish(exit_code, reason).await;
}
