//! What every verb works on: the containers and the images of this user, opened when first needed.

use hyper_image::{Digest, ImageError, Store, Used};
use hyper_sandbox::audit::AuditLog;
use hyper_sandbox::{Container, Dirs, Home, Parts, SandboxError};

use crate::error::CliError;

impl From<SandboxError> for CliError {
    fn from(error: SandboxError) -> Self {
        Self::from_chain(&error)
    }
}

impl From<ImageError> for CliError {
    fn from(error: ImageError) -> Self {
        Self::failed(error.one_line())
    }
}

/// Containers, volumes and machines of this user.
///
/// # Errors
/// When the state cannot be opened.
pub(crate) fn home() -> Result<Home, CliError> {
    Ok(Home::open(Dirs::from_env(), Parts::locate()?)?)
}

/// Images of this user.
///
/// # Errors
/// When the store cannot be opened.
pub(crate) fn images() -> Result<Store, CliError> {
    Ok(Store::open(&Dirs::from_env().data.join("images"))?)
}

/// The log of what was done by this user.
pub(crate) fn audit() -> AuditLog {
    AuditLog::of(&Dirs::from_env())
}

/// Images that containers and snapshots use: the store must keep them.
///
/// # Errors
/// When containers or snapshots cannot be read.
pub(crate) fn used_images(home: &Home) -> Result<Used, CliError> {
    let mut used = Used::default();
    for container in home.containers()? {
        let config = container.config();
        used.disks.insert(config.image.disk.clone());
        if let Ok(id) = Digest::parse(&config.image.id) {
            used.images.insert(id, format!("container {}", container.name()));
        }
    }
    for snapshot in home.snapshots()? {
        let image = &snapshot.saved_config().image;
        used.disks.insert(image.disk.clone());
        if let Ok(id) = Digest::parse(&image.id) {
            used.images.entry(id).or_insert_with(|| format!("snapshot {}", snapshot.name()));
        }
    }
    Ok(used)
}

/// Does one thing to each named container: prints the name as it was given, or an error line, and goes on.
///
/// # Errors
/// Exit code 1 when any of them failed.
pub(crate) async fn for_each<F>(names: &[String], mut act: F) -> Result<i32, CliError>
where
    F: AsyncFnMut(Container) -> Result<(), CliError>,
{
    let home = home()?;
    let mut code = 0;
    for name in names {
        let done = match home.find(name) {
            Ok(container) => act(container).await,
            Err(error) => Err(error.into()),
        };
        match done {
            Ok(()) => crate::output::line(name),
            Err(error) => {
                crate::output::error(&error);
                code = error.code;
            }
        }
    }
    Ok(code)
}
