//! The template that a start found missing is made for the next one, when it no longer delays anybody.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::shared::{Life, Shared};
use crate::launch::{make_template, scaled_ms};

/// How long a container that goes on running has the host to itself.
const HEAD_START: Duration = Duration::from_secs(5);
/// How long a template may take: a boot, and the writing of some 40 MiB.
const MAKE_MS: u64 = 90_000;

/// Waits until the container has ended, or has run for a while; then makes the template that its start lacked, if any.
pub(super) async fn make_afterwards(shared: Arc<Shared>) {
    let mut phase = shared.phase();
    // The sender lives as long as we do.
    let _ = phase.wait_for(|phase| matches!(phase.life, Life::Running | Life::Over)).await;
    let _ = timeout(HEAD_START, phase.wait_for(|phase| phase.life == Life::Over)).await;
    let Some(shape) = shared.take_lacking() else { return };
    match timeout(scaled_ms(MAKE_MS), make_template(&shared.home, &shape)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "no template is made"),
        Err(_) => tracing::warn!("a template takes too long to be made"),
    }
}
