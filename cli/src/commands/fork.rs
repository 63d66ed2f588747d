//! `fork`: copies of a running container, all from one save.

use hyper_sandbox::{Container, RemoveOptions};
use tokio::task::JoinSet;

use crate::args::ForkArgs;
use crate::context;
use crate::error::CliError;
use crate::output;

/// `hyper fork`.
///
/// # Errors
/// What stands in the way; there is none of the copies then.
pub(crate) async fn fork(args: &ForkArgs) -> Result<i32, CliError> {
    let (home, store) = (context::home()?, context::images()?);
    let source = home.find(&args.container)?;
    let draft = source.save().await?;
    let hold = store.hold().await?;
    let mut clones = Vec::new();
    let made = async {
        for _ in 0..args.number {
            let snapshot = draft.snapshot();
            clones.push(home.go_on(snapshot, snapshot.config()).await?);
        }
        Ok::<(), CliError>(())
    };
    let made = made.await;
    // The copies have all of it.
    drop((draft, hold));
    let started = match made {
        Ok(()) => start_all(&clones).await,
        Err(error) => Err(error),
    };
    if let Err(error) = started {
        for clone in &clones {
            // One that was to remove itself has; what matters is why there are none.
            let _ = clone.remove(RemoveOptions { force: true, volumes: true }).await;
        }
        return Err(error);
    }
    clones.iter().for_each(|clone| output::line(clone.id()));
    Ok(0)
}

/// Starts all at once; the first failure counts.
async fn start_all(clones: &[Container]) -> Result<(), CliError> {
    let mut starts = JoinSet::new();
    for clone in clones {
        let clone = clone.clone();
        starts.spawn(async move { clone.start(None).await.map(drop) });
    }
    let mut outcome = Ok(());
    while let Some(started) = starts.join_next().await {
        let started = started
            .map_err(CliError::failed)
            .and_then(|started| started.map_err(|error| CliError::from_chain(&error)));
        outcome = outcome.and(started);
    }
    outcome
}
